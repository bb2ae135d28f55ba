// For avx2.h: products of few tokens, with inputs in the lanes.
#pragma once
#if defined(__x86_64__)
#include "avx2_base.h"

namespace eacmoe {
namespace avx2 {

// Codes of up to 4 bits, in integers, exact within a group. Zero points are subtracted once per row, through `terms`.
//
// Row r of both halves is computed together. `all`: the inputs of every segment, known to the compiler; 0: read from
// the segments.
template <int bits, Form form, int64_t M, int64_t all>
WITH_AVX2 static void few_bytes(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows,
                                float* out) {
  constexpr int64_t parts = form == WORDS ? 2 : 1;  // bytes of an input
  const ByteUnpacker<bits> unpack;
  const int64_t groups = p.groups(), padded = s.chunks * CHUNK, count = s.count, lower = s.padded();
  float* scales = (float*)scratch(SCALES, size_t(2 * (copy_bytes(p) + (groups + M * count + 16) * 4)));
  float* own = scales + groups + 8;  // [2, M, count] scale of the weight times that of the token
  uint8_t* copies = (uint8_t*)(own + 2 * M * count + 8);
  const int8_t* x[M];
  const float *x_scale[M], *x_term[M];
  for (int64_t m = 0; m < M; m++) {
    x[m] = (const int8_t*)tokens[m] + bytes_at(s, form);
    x_scale[m] = (const float*)(tokens[m] + scales_at(s, form));
    x_term[m] = (const float*)(tokens[m] + terms_at(s, form));
  }
  const __m256i ones = _mm256_set1_epi16(1), places = _mm256_set1_epi16(256);
  const bool vectors = s.per_group == 1 && groups >= 8;
  for (int64_t r = 0; r < rows.valid[0]; r++) {
    const int64_t row[2] = {rows.first[0] + r, rows.first[r < rows.valid[1] ? 1 : 0] + r};
    const uint8_t* codes[2] = {row_codes(p, row[0], copies), row_codes(p, row[1], copies + copy_bytes(p))};
    __m256 total[2][M];
#pragma GCC unroll 2
    for (int64_t j = 0; j < 2; j++) {
      const uint16_t* scale = p.scale + row[j] * groups;
      const uint8_t* zero = p.zero + row[j] * groups;
      for (int64_t m = 0; m < M; m++) total[j][m] = _mm256_setzero_ps();
      if (vectors) {
        for (int64_t g = 0, term = 0; g < groups; g += 8, term += 8) {
          if (g + 8 > groups) g = groups - 8;
          const __m256 step = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scale + g)));
          const __m256 offset = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(zero + g))));
          for (int64_t m = 0; m < M; m++) {
            _mm256_storeu_ps(own + (j * M + m) * count + g, _mm256_mul_ps(step, _mm256_loadu_ps(x_scale[m] + g)));
            total[j][m] = _mm256_fnmadd_ps(_mm256_mul_ps(step, offset), _mm256_load_ps(x_term[m] + term), total[j][m]);
          }
        }
      } else {
        const int64_t whole = groups / 8 * 8, last = 8 - groups + whole;
        read_halves(scale, groups, scales);
        for (int64_t m = 0; m < M; m++) {
          float sum = 0;
          for (int64_t g = 0; g < groups; g++) sum -= scales[g] * zero[g] * x_term[m][g < whole ? g : g + last];
          total[j][m] = _mm256_setr_ps(sum, 0, 0, 0, 0, 0, 0, 0);
          for (int64_t i = 0; i < count; i++) own[(j * M + m) * count + i] = scales[i / s.per_group] * x_scale[m][i];
        }
      }
    }
    for (int64_t i = 0, at = 0; i < count; i++, at += padded) {
      const int64_t n = all ? all : s.size(i);
      for (int64_t byte = 0; byte < n / 8 * bits; byte += 64) {
        _mm_prefetch((const char*)codes[0] + AHEAD + byte, _MM_HINT_T0);
        _mm_prefetch((const char*)codes[1] + AHEAD + byte, _MM_HINT_T0);
      }
      __m256i sum[2][M][parts];
#pragma GCC unroll 4
      for (int64_t k = 0; k < n; k += CHUNK) {
        __m256i even[2], odd[2];
        unpack(codes[0] + k / 8 * bits, even[0], odd[0]);
        unpack(codes[1] + k / 8 * bits, even[1], odd[1]);
        for (int64_t m = 0; m < M; m++) {
#pragma GCC unroll 2
          for (int64_t b = 0; b < parts; b++) {
            const __m256i* place = (const __m256i*)(x[m] + b * lower + at + k);
            const __m256i x_even = _mm256_load_si256(place), x_odd = _mm256_load_si256(place + 1);
#pragma GCC unroll 2
            for (int64_t j = 0; j < 2; j++) {
              const __m256i first = _mm256_maddubs_epi16(even[j], x_even);
              if (k == 0)
                sum[j][m][b] = first;
              else
                add16(sum[j][m][b], first);
              add16(sum[j][m][b], _mm256_maddubs_epi16(odd[j], x_odd));
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++) {
        codes[j] += n / 8 * bits;
        for (int64_t m = 0; m < M; m++) {
          __m256i whole = _mm256_madd_epi16(sum[j][m][0], form == WORDS ? places : ones);
          if (form == WORDS) whole = _mm256_add_epi32(whole, _mm256_madd_epi16(sum[j][m][parts - 1], ones));
          const __m256 weight = _mm256_broadcast_ss(own + (j * M + m) * count + i);
          total[j][m] = _mm256_fmadd_ps(weight, _mm256_cvtepi32_ps(whole), total[j][m]);
        }
      }
    }
    for (int64_t m = 0; m < M; m++) {
      out[m * 2 * TILE + r] = add_lanes(total[0][m]);
      if (r < rows.valid[1]) out[(m * 2 + 1) * TILE + r] = add_lanes(total[1][m]);
    }
  }
}

// FLOATS, and WORDS with wider codes. Zero points are subtracted from the codes, or (up to 7 bits, integers) through
// the sums of the inputs. `input` is the form in which tokens were prepared: `form`, or BYTES.
template <int bits, Form form, int64_t M, int64_t all>
WITH_AVX2 static void few_rows(const Packed& p, const Segments& s, Form input, const uint8_t* const* tokens,
                               const Rows& rows, float* out) {
  constexpr bool subtract = form == FLOATS || bits == 8;
  const Unpacker<bits> unpack;
  const int64_t groups = p.groups(), padded = s.chunks * CHUNK, count = s.count, per_group = s.per_group;
  float* scales = (float*)scratch(SCALES, size_t(2 * (copy_bytes(p) + groups * 4)));
  uint8_t* copies = (uint8_t*)(scales + 2 * groups);
  const uint8_t* x[M];
  const float *x_scale[M], *x_sum[M];
  for (int64_t m = 0; m < M; m++) {
    x[m] = tokens[m] + words_at(s, input);
    x_scale[m] = (const float*)(tokens[m] + scales_at(s, input));
    x_sum[m] = (const float*)(tokens[m] + sums_at(s, input));
  }
  for (int64_t r = 0; r < rows.valid[0]; r++) {
    const int64_t halves = r < rows.valid[1] ? 2 : 1;
    const uint8_t *codes[2], *zero[2];
    __m256 total[2][M];
    for (int64_t j = 0; j < 2; j++) {
      const int64_t row = rows.first[j < halves ? j : 0] + r;
      codes[j] = row_codes(p, row, copies + j * copy_bytes(p));
      zero[j] = p.zero + row * groups;
      read_halves(p.scale + row * groups, groups, scales + j * groups);
      for (int64_t m = 0; m < M; m++) total[j][m] = _mm256_setzero_ps();
    }
    int64_t at = 0;
    for (int64_t i = 0, g = 0, part = 0; i < count; i++, at += padded) {
      const int64_t n = all ? all : s.size(i);
      int32_t own_sum[M];
      for (int64_t m = 0; m < M; m++) own_sum[m] = subtract ? 0 : int32_t(x_sum[m][i]);
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++) {
        const __m256i z = _mm256_set1_epi16(zero[j][g]);
        const uint8_t* from = codes[j];
        codes[j] += n / 8 * bits;
        __m256i sum[M];
        __m256 sums[M];
        for (int64_t m = 0; m < M; m++) {
          sum[m] = _mm256_setr_epi32(-int32_t(zero[j][g]) * own_sum[m], 0, 0, 0, 0, 0, 0, 0);
          sums[m] = _mm256_setzero_ps();
        }
        for (int64_t byte = 0; byte < n / 8 * bits; byte += 64)
          _mm_prefetch((const char*)from + AHEAD + byte, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int64_t k = 0; k < n; k += 16, from += 2 * bits) {
          __m256i steps = unpack(from);
          if (subtract) steps = _mm256_sub_epi16(steps, z);
          if constexpr (form == FLOATS) {
            const __m256 low = low_floats(steps), high = high_floats(steps);
            for (int64_t m = 0; m < M; m++) {
              const float* place = (const float*)x[m] + at + k;
              sums[m] = _mm256_fmadd_ps(low, _mm256_load_ps(place), sums[m]);
              sums[m] = _mm256_fmadd_ps(high, _mm256_load_ps(place + 8), sums[m]);
            }
          } else {
            for (int64_t m = 0; m < M; m++) {
              const __m256i* place = (const __m256i*)((const int16_t*)x[m] + at + k);
              add32(sum[m], _mm256_madd_epi16(steps, _mm256_load_si256(place)));
            }
          }
        }
        const float own = scales[j * groups + g];
        for (int64_t m = 0; m < M; m++) {
          const __m256 value = form == FLOATS ? sums[m] : _mm256_cvtepi32_ps(sum[m]);
          const __m256 weight = _mm256_set1_ps(form == FLOATS ? own : own * x_scale[m][i]);
          total[j][m] = _mm256_fmadd_ps(weight, value, total[j][m]);
        }
      }
      if (++part == per_group) part = 0, g++;
    }
    for (int64_t j = 0; j < halves; j++)
      for (int64_t m = 0; m < M; m++) out[(m * 2 + j) * TILE + r] = add_lanes(total[j][m]);
  }
}

template <int bits, Form form, int64_t M>
static void few(const Packed& p, const Segments& s, Form input, const uint8_t* const* tokens, const Rows& rows,
                float* out) {
  if constexpr (form != FLOATS && bits <= 4) {
    if (s.group == 128) return few_bytes<bits, form, M, 128>(p, s, tokens, rows, out);
    return few_bytes<bits, form, M, 0>(p, s, tokens, rows, out);
  }
  if (s.group == 128) return few_rows<bits, form, M, 128>(p, s, input, tokens, rows, out);
  return few_rows<bits, form, M, 0>(p, s, input, tokens, rows, out);
}

}  // namespace avx2
}  // namespace eacmoe
#endif

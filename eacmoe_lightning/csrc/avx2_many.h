// For avx2.h: products of many tokens, with outputs in the lanes.
#pragma once
#if defined(__x86_64__)
#include "avx2_base.h"

namespace eacmoe {
namespace avx2 {

// Transposes 8 x 8 doublewords.
WITH_AVX2 static inline void transpose(__m256i v[8]) {
  __m256i w[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    w[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm256_unpacklo_epi64(w[i + j], w[i + 2 + j]);
      v[i + 2 * j + 1] = _mm256_unpackhi_epi64(w[i + j], w[i + 2 + j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    w[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    w[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) v[i] = w[i];
}

// Fills the tile of one half and segment: for each step of 1 (FLOATS), 2 (WORDS) or 4 (BYTES) inputs, [16 outputs]
// doublewords.
template <int bits, Form form>
WITH_AVX2 static inline void fill_tile(const Unpacker<bits>& unpack, const uint8_t* const* codes, int64_t n,
                                       const uint8_t* zero, __m256i* tile) {
  constexpr int64_t wide = form == BYTES ? 32 : 16, steps = form == FLOATS ? 16 : 8;  // inputs at once, their steps
  for (int64_t k = 0; k < n; k += wide, tile += 2 * steps) {
    for (int h = 0; h < 2; h++) {
      __m256i v[8], upper[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; r++) {
        const uint8_t* from = codes[8 * h + r] + k / 8 * bits;
        const __m256i first = unpack(from);
        if constexpr (form == BYTES) {
          v[r] = _mm256_packus_epi16(first, k + 16 < n ? unpack(from + 2 * bits) : _mm256_setzero_si256());
        } else {
          const __m256i own = _mm256_sub_epi16(first, _mm256_set1_epi16(zero[8 * h + r]));
          v[r] = own;
          if constexpr (form == FLOATS)
            v[r] = _mm256_castps_si256(low_floats(own)), upper[r] = _mm256_castps_si256(high_floats(own));
        }
      }
      transpose(v);
      for (int t = 0; t < 8; t++) tile[2 * t + h] = v[t];
      if constexpr (form == FLOATS) {
        transpose(upper);
        for (int t = 0; t < 8; t++) tile[16 + 2 * t + h] = upper[t];
      }
    }
  }
}

// Multiplies M tokens with the tile of one half and segment, of `steps` steps.
template <Form form, int64_t M>
WITH_AVX2 static inline void pass(const __m256i* tile, int64_t steps, const uint8_t* const* x, const float* x_scale,
                                  const float* x_sum, const float* scale, const float* zero, float* out) {
  __m256i sum[M][2], part[M][2];
  __m256 sums[M][2];
#pragma GCC unroll 4
  for (int64_t m = 0; m < M; m++)
    for (int h = 0; h < 2; h++)
      sum[m][h] = part[m][h] = _mm256_setzero_si256(), sums[m][h] = _mm256_setzero_ps();
  for (int64_t t = 0; t < steps;) {
    const int64_t until = form == BYTES && t + 8 < steps ? t + 8 : steps;  // as many as 16-bit sums can hold
    for (; t < until; t++, tile += 2) {
      __m256i w[2] = {tile[0], tile[1]};
      asm("" : "+x"(w[0]), "+x"(w[1]));  // keeps them in registers
#pragma GCC unroll 4
      for (int64_t m = 0; m < M; m++) {
        int32_t inputs;
        std::memcpy(&inputs, x[m] + 4 * t, 4);
        const __m256i a = _mm256_set1_epi32(inputs);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          if constexpr (form == FLOATS)
            fma(sums[m][h], _mm256_castsi256_ps(w[h]), _mm256_castsi256_ps(a));
          else if constexpr (form == WORDS)
            add32(sum[m][h], _mm256_madd_epi16(w[h], a));
          else
            add16(part[m][h], _mm256_maddubs_epi16(w[h], a));
        }
      }
    }
    if constexpr (form == BYTES) {
#pragma GCC unroll 4
      for (int64_t m = 0; m < M; m++) {
        for (int h = 0; h < 2; h++) {
          sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(part[m][h], _mm256_set1_epi16(1)));
          part[m][h] = _mm256_setzero_si256();
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t m = 0; m < M; m++) {
    for (int h = 0; h < 2; h++) {
      __m256 value = form == FLOATS ? sums[m][h] : _mm256_cvtepi32_ps(sum[m][h]);
      __m256 weight = _mm256_loadu_ps(scale + 8 * h);
      if (form == BYTES) value = _mm256_fnmadd_ps(_mm256_loadu_ps(zero + 8 * h), _mm256_set1_ps(x_sum[m]), value);
      if (form != FLOATS) weight = _mm256_mul_ps(weight, _mm256_set1_ps(x_scale[m]));
      float* place = out + m * 2 * TILE + 8 * h;
      _mm256_storeu_ps(place, _mm256_fmadd_ps(weight, value, _mm256_loadu_ps(place)));
    }
  }
}

// `input` is the form in which tokens were prepared, `form` that in which they are multiplied: the same, or BYTES and
// WORDS.
template <int bits, Form input, Form form>
WITH_AVX2 static void many(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                           const Rows& rows, float* out) {
  constexpr int64_t size = form == FLOATS ? 4 : form == WORDS ? 2 : 1;
  const Unpacker<bits> unpack;
  const int64_t groups = p.groups(), row_bytes = p.row_bytes(), bytes = s.chunks * CHUNK * size;
  const int64_t x_at = input == BYTES && form == WORDS ? words_at(s, input) : 0;
  uint8_t* copies = scratch(SCALES, size_t(2 * TILE * copy_bytes(p)));
  alignas(64) __m256i tile[2][MAX_SEGMENT / 4 * size * 2];
  float scale[2][TILE], zero[2][TILE];
  uint8_t zeros[2][TILE];
  const uint8_t* codes[2][TILE];
  for (int h = 0; h < 2; h++)
    for (int64_t r = 0; r < TILE; r++)
      codes[h][r] = r < rows.valid[h] ? row_codes(p, rows.first[h] + r, copies + (h * TILE + r) * copy_bytes(p))
                                      : codes[0][0];
  std::memset(out, 0, size_t(M) * 2 * TILE * 4);
  for (int64_t i = 0; i < s.count; i++) {
    const int64_t n = s.size(i), g = i / s.per_group, begin = s.start(i) / 8 * bits;
    const int64_t steps = form == FLOATS ? n : form == WORDS ? n / 2 : (n + 31) / 32 * 8;
    for (int h = 0; h < 2; h++) {
      const uint8_t* from[TILE];
      for (int64_t r = 0; r < TILE; r++) {
        const int64_t at = (rows.first[h] + (r < rows.valid[h] ? r : 0)) * groups + g;
        const bool there = rows.valid[h] > 0;
        scale[h][r] = there ? half(p.scale + at) : 0, zeros[h][r] = there ? p.zero[at] : 0;
        zero[h][r] = zeros[h][r];
        from[r] = codes[h][r] + begin;
        _mm_prefetch((const char*)from[r] + TILE * row_bytes, _MM_HINT_T1);  // the same position in the next tile
      }
      fill_tile<bits, form>(unpack, from, n, zeros[h], tile[h]);
    }
    for (int64_t m = 0; m < M; m += BLOCK) {
      const int64_t count = M - m < BLOCK ? M - m : BLOCK;
      const uint8_t* x[BLOCK];
      float x_scale[BLOCK], x_sum[BLOCK];
      for (int64_t b = 0; b < count; b++) {
        const uint8_t* token = tokens[m + b];
        x[b] = token + x_at + i * bytes;
        x_scale[b] = input == FLOATS ? 1 : ((const float*)(token + scales_at(s, input)))[i];
        x_sum[b] = form == BYTES ? ((const float*)(token + sums_at(s, input)))[i] : 0;
        for (int64_t line = 0; m + BLOCK + b < M && line < bytes; line += 64)
          _mm_prefetch((const char*)tokens[m + BLOCK + b] + x_at + i * bytes + line, _MM_HINT_T0);
      }
      for (int h = 0; h < 2; h++) {
        float* place = out + m * 2 * TILE + h * TILE;
        switch (count) {
          case 1: pass<form, 1>(tile[h], steps, x, x_scale, x_sum, scale[h], zero[h], place); break;
          case 2: pass<form, 2>(tile[h], steps, x, x_scale, x_sum, scale[h], zero[h], place); break;
          case 3: pass<form, 3>(tile[h], steps, x, x_scale, x_sum, scale[h], zero[h], place); break;
          default: pass<form, 4>(tile[h], steps, x, x_scale, x_sum, scale[h], zero[h], place);
        }
      }
    }
  }
}

}  // namespace avx2
}  // namespace eacmoe
#endif

// For avx512.h: products of few tokens, with inputs in the lanes.
#pragma once
#if defined(__x86_64__)
#include "avx512_base.h"

namespace eacmoe {
namespace avx512 {

// `wide`: chunks loaded together; 0 if segments are not made of whole chunks. Row r of both halves is computed
// together, so that the arithmetic of one hides the latency of the other.
template <int bits, int bytes, int64_t M, int wide>
WITH_AVX512 static void few_rows(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows,
                                 float* out) {
  const Unpacker<bits> unpack;
  const int64_t groups = p.groups(), count = s.count, per_group = s.per_group, chunks = s.chunks;
  const int64_t padded = (count + 15) / 16 * 16;
  // [half][M][segment]: scale times token's scale; and zero point times the sum of upper bytes, a sixteenth for each lane
  float* weight = (float*)scratch(SCALES, size_t(4 * M * padded) * 4);
  float* upper_zero = weight + 2 * M * padded;
  const uint8_t* x[M];
  for (int64_t m = 0; m < M; m++) x[m] = tokens[m];
  for (int64_t r = 0; r < rows.valid[0]; r++) {
    const int64_t halves = r < rows.valid[1] ? 2 : 1;
    const uint8_t* codes[2];
    __m512 total[2][M];
    for (int64_t j = 0; j < 2; j++) {
      const int64_t row = rows.first[j < halves ? j : 0] + r;
      codes[j] = p.codes + row * p.row_bytes();
      for (int64_t m = 0; m < M; m++) total[j][m] = _mm512_setzero_ps();
      for (int64_t i = 0; i < count; i += 16) {  // 16 segments at once, the zero points' share with them
        const __mmask16 there = up_to_16(count - i);
        const uint16_t* own_scale = p.scale + row * groups + i;
        const uint8_t* own_zero = p.zero + row * groups + i;
        uint16_t scales[16];
        uint8_t zeros[16];
        if (per_group > 1) {
          for (int64_t k = 0; k < 16 && i + k < count; k++) {
            scales[k] = p.scale[row * groups + (i + k) / per_group];
            zeros[k] = p.zero[row * groups + (i + k) / per_group];
          }
          own_scale = scales, own_zero = zeros;
        }
        const __m512 a = load_halves(own_scale, there), z = load_bytes(own_zero, there), az = _mm512_mul_ps(a, z);
        for (int64_t m = 0; m < M; m++) {
          const float* x_scale = (const float*)(x[m] + scales_at<bytes>(s)) + i;
          const float* term = (const float*)(x[m] + terms_at<bytes>(s)) + i;
          _mm512_storeu_ps(weight + (j * M + m) * padded + i, _mm512_mul_ps(a, _mm512_maskz_loadu_ps(there, x_scale)));
          total[j][m] = _mm512_fnmadd_ps(az, _mm512_maskz_loadu_ps(there, term), total[j][m]);
          if (bytes == 3) {
            const __m512 sum = _mm512_maskz_loadu_ps(there, (const float*)(x[m] + sums_at<bytes>(s)) + i);
            const __m512 share = _mm512_mul_ps(_mm512_mul_ps(z, sum), _mm512_set1_ps(1.0f / 16));
            _mm512_storeu_ps(upper_zero + (j * M + m) * padded + i, share);
          }
        }
      }
    }
    int64_t at = 0;
    for (int64_t i = 0; i < count; i++) {
      __m512i sum[2][M][bytes];
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++)
        for (int64_t m = 0; m < M; m++)
          for (int b = 0; b < bytes; b++) sum[j][m][b] = _mm512_setzero_si512();
      const auto add = [&](int64_t j, __m512i code) __attribute__((always_inline)) WITH_AVX512 {
        for (int64_t m = 0; m < M; m++)
          for (int b = 0; b < bytes; b++)
            sum[j][m][b] = _mm512_dpbusd_epi32(sum[j][m][b], code, _mm512_loadu_si512(x[m] + at + b * CHUNK));
      };
      if constexpr (wide > 0) {
        for (int64_t c = 0; c < chunks; c += wide) {
          __m512i loaded[2];
#pragma GCC unroll 2
          for (int64_t j = 0; j < 2; j++) {
            loaded[j] = unpack.load(codes[j], wide * CHUNK);
            _mm_prefetch((const char*)codes[j] + AHEAD, _MM_HINT_T0);
            codes[j] += wide * CHUNK / 8 * bits;
          }
#pragma GCC unroll 2
          for (int w = 0; w < wide; w++, at += bytes * CHUNK) {
#pragma GCC unroll 2
            for (int64_t j = 0; j < 2; j++) add(j, unpack(loaded[j], w));
          }
        }
      } else {
        for (int64_t c = 0, rest = s.size(i); c < chunks; c++, rest -= CHUNK, at += bytes * CHUNK) {
          if (rest <= 0) continue;
          const int64_t n = rest < CHUNK ? rest : CHUNK;
          for (int64_t j = 0; j < 2; j++, codes[j - 1] += n / 8 * bits) add(j, unpack(unpack.load(codes[j], n), 0));
        }
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++)
        for (int64_t m = 0; m < M; m++) {
          const int64_t place = (j * M + m) * padded + i;
          __m512 value = whole<bytes>(sum[j][m]);
          if (bytes == 3) value = with_upper(value, sum[j][m][0], _mm512_set1_ps(upper_zero[place]));
          total[j][m] = _mm512_fmadd_ps(_mm512_set1_ps(weight[place]), value, total[j][m]);
        }
    }
    for (int64_t j = 0; j < halves; j++)
      for (int64_t m = 0; m < M; m++) out[(m * 2 + j) * TILE + r] = _mm512_reduce_add_ps(total[j][m]);
  }
}

template <int bits, int bytes, int64_t M>
static void few(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows, float* out) {
  if (s.group % s.length || s.length % CHUNK) return few_rows<bits, bytes, M, 0>(p, s, tokens, rows, out);
  if (bits <= 4 && s.chunks % 2 == 0) return few_rows<bits, bytes, M, bits <= 4 ? 2 : 1>(p, s, tokens, rows, out);
  return few_rows<bits, bytes, M, 1>(p, s, tokens, rows, out);
}

}  // namespace avx512
}  // namespace eacmoe
#endif

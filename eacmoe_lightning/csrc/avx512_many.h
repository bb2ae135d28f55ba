// For avx512.h: products of many tokens, with outputs in the lanes.
#pragma once
#if defined(__x86_64__)
#include "avx512_base.h"

namespace eacmoe {
namespace avx512 {

// Transposes 16 x 16 doublewords.
WITH_AVX512 static inline void transpose(__m512i v[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + 2 + j]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; i++) {
    w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
  }
}

// Fills the tile of one segment: for each chunk and step t < 16, [half][16 outputs] doublewords with the codes of inputs
// 4t to 4t + 3.
template <int bits>
WITH_AVX512 static inline void fill_tile(const Packed& p, const Segments& s, int64_t i, const Rows& rows,
                                         const Unpacker<bits>& unpack, __m512i* tile) {
  const int64_t stride = p.row_bytes();
  int64_t rest = s.size(i);
  for (int64_t c = 0; c < s.chunks; c++, rest -= CHUNK) {
    const int64_t n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
    for (int h = 0; h < 2; h++) {
      const uint8_t* codes = p.codes + rows.first[h] * stride + (s.start(i) + c * CHUNK) / 8 * bits;
      const int64_t valid = n ? rows.valid[h] : 0;
      __m512i v[16];
      if (valid == TILE) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < TILE; r++, codes += stride) {
          v[r] = unpack(unpack.load(codes, n), 0);
          _mm_prefetch((const char*)codes + TILE * stride, _MM_HINT_T0);  // the same position in the next tile
        }
      } else {
        for (int64_t r = 0; r < TILE; r++, codes += stride)
          v[r] = r < valid ? unpack(unpack.load(codes, n), 0) : _mm512_setzero_si512();
      }
      transpose(v);
#pragma GCC unroll 16
      for (int t = 0; t < 16; t++) tile[(c * 16 + t) * 2 + h] = v[t];
    }
  }
}

// Scales and zero points of a tile, [group][scale, zero][half][16 outputs].
WITH_AVX512 static void tile_scales(const Packed& p, const Rows& rows, __m512* out) {
  const int64_t groups = p.groups();
  for (int64_t g = 0; g < groups; g += 16) {
    const __mmask16 there = up_to_16(groups - g);
    for (int h = 0; h < 2; h++) {
      for (int which = 0; which < 2; which++) {
        __m512i v[16];
        for (int64_t r = 0; r < TILE; r++) {
          const int64_t at = (rows.first[h] + r) * groups + g;
          __m512 value = _mm512_setzero_ps();
          if (r < rows.valid[h])
            value = which ? load_bytes(p.zero + at, there) : load_halves(p.scale + at, there);
          v[r] = _mm512_castps_si512(value);
        }
        transpose(v);
        for (int64_t j = 0; j < 16 && g + j < groups; j++) out[(g + j) * 4 + which * 2 + h] = _mm512_castsi512_ps(v[j]);
      }
    }
  }
}

// sum += w . a, in place: with intrinsics gcc 12 copies every sum of `pass` to another register and back.
WITH_AVX512 static inline void dot(__m512i& sum, __m512i w, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(a));
}

// Adds a segment's share to a token's outputs, [half][16 outputs], from the sums of its products.
template <int bytes>
WITH_AVX512 static inline void add_segment(const Segments& s, int64_t i, const uint8_t* token,
                                           const __m512i sum[2][bytes], const __m512* scale, const __m512* zero,
                                           float* out) {
  const __m512 x_sum = _mm512_set1_ps(((const float*)(token + sums_at<bytes>(s)))[i]);
  const __m512 below = bytes == 3 ? _mm512_set1_ps(((const float*)(token + lower_sums_at<bytes>(s)))[i]) : x_sum;
  const __m512 x_scale = _mm512_set1_ps(((const float*)(token + scales_at<bytes>(s)))[i]);
  for (int h = 0; h < 2; h++) {
    float* place = out + h * TILE;
    const __m512 before = _mm512_loadu_ps(place);
    _mm512_storeu_ps(place, with_segment<bytes>(before, sum[h], scale[h], zero[h], x_scale, x_sum, below));
  }
}

template <int bytes, int64_t M>
WITH_AVX512 static inline void pass(const Segments& s, int64_t i, const __m512i* tile, const uint8_t* const* tokens,
                                    const __m512* scale, const __m512* zero, float* out) {
  __m512i sum[M][2][bytes];
  const uint8_t* x[M];
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; m++) {
    x[m] = tokens[m] + i * s.chunks * CHUNK * bytes;
    for (int h = 0; h < 2; h++)
      for (int b = 0; b < bytes; b++) sum[m][h][b] = _mm512_setzero_si512();
  }
  for (int64_t c = 0; c < s.chunks; c++) {
    for (int64_t t = 0; t < 16; t++, tile += 2) {
      const __m512i w0 = tile[0], w1 = tile[1];
#pragma GCC unroll 16
      for (int64_t m = 0; m < M; m++) {
#pragma GCC unroll 3
        for (int b = 0; b < bytes; b++) {
          int32_t four;
          std::memcpy(&four, x[m] + (c * bytes + b) * CHUNK + t * 4, 4);
          const __m512i a = _mm512_set1_epi32(four);
          dot(sum[m][0][b], w0, a);
          dot(sum[m][1][b], w1, a);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; m++) add_segment<bytes>(s, i, tokens[m], sum[m], scale, zero, out + m * 2 * TILE);
}

template <int bytes, int64_t M>
WITH_AVX512 static inline void pass_up_to(int64_t count, const Segments& s, int64_t i, const __m512i* tile,
                                          const uint8_t* const* tokens, const __m512* scale, const __m512* zero,
                                          float* out) {
  if constexpr (M > 0) {
    if (count == M)
      pass<bytes, M>(s, i, tile, tokens, scale, zero, out);
    else
      pass_up_to<bytes, M - 1>(count, s, i, tile, tokens, scale, zero, out);
  }
}

template <int bits, int bytes>
WITH_AVX512 static void many(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                             const Rows& rows, float* out) {
  constexpr int64_t block = SUMS_OF_TILE / bytes;
  const Unpacker<bits> unpack;
  alignas(64) __m512i tile[MAX_SEGMENT / 4 * 2];
  __m512* scales = (__m512*)scratch(SCALES, size_t(p.groups()) * 4 * sizeof(__m512));
  tile_scales(p, rows, scales);
  std::memset(out, 0, size_t(M) * 2 * TILE * 4);
  for (int64_t i = 0; i < s.count; i++) {
    fill_tile<bits>(p, s, i, rows, unpack, tile);
    const __m512* scale = scales + i / s.per_group * 4;
    // Equal blocks: 34 tokens in 5 passes are 7 + 7 + 7 + 7 + 6, not 8 + 8 + 8 + 8 + 2.
    const int64_t passes = (M + block - 1) / block, size = s.chunks * CHUNK * bytes;
    for (int64_t b = 0, m = 0; b < passes; b++) {
      const int64_t count = (M - m + passes - b - 1) / (passes - b);
      for (int64_t next = m + count; next < M && next < m + 2 * count; next++)
        for (int64_t line = 0; line < size; line += 64)
          _mm_prefetch((const char*)tokens[next] + i * size + line, _MM_HINT_T0);
      pass_up_to<bytes, block>(count, s, i, tile, tokens + m, scale, scale + 2, out + m * 2 * TILE);
      m += count;
    }
  }
}

}  // namespace avx512
}  // namespace eacmoe
#endif

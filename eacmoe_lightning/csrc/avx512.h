// 16-bit and 8-bit activations on CPUs with AVX512, VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// Activations are signed bytes, with one scale for each token and segment: one byte (the int8 option), or two for
// bfloat16 and float16, 256 times an upper byte plus a lower one. The rounding error of the latter (1 in 65279 of the
// segment's largest) is far below the rounding of the result. Codes of any width are unsigned bytes; VNNI multiplies
// both and sums in 32 bits, exactly (256 * 255 * 32639 < 2^31). Zero points are taken off afterwards, through the sum
// of a segment's activations.
//
// Two instructions turn 64 codes of any width into 64 bytes: spread `bits` bytes into each quadword, shift every byte
// of it into place; a third masks its neighbours' bits.
//
// Few tokens: a row's codes are multiplied with the tokens lane by lane (lanes hold inputs). Many tokens: the codes of
// 2 x 16 rows are transposed into a tile (lanes hold outputs), and every token is multiplied with the tile.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "packed.h"

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,f16c")))

namespace eacmoe {
namespace avx512 {

constexpr int64_t FEW = 4;    // with up to this many tokens, codes are not transposed
constexpr int64_t SUMS_OF_TILE = 12;  // token bytes whose sums over a tile stay in registers
constexpr int64_t AHEAD = 4096; // distance of the prefetch in bytes; both halves are read sequentially
constexpr int64_t SPAN = 192; // tokens for which the tiles of all inputs are filled once

// --- codes to bytes -------------------------------------------------------------------------------------------------

// `wide` chunks are loaded at once: 2 if 128 codes fit a register.
template <int bits>
struct Unpacker {
  __m512i spread[2], shift, mask;

  struct Tables {
    alignas(64) uint8_t spread[2][64] = {}, shift[64] = {};
    constexpr Tables() {
      for (int i = 0; i < 64; i++) {
        for (int w = 0; w < 2; w++) spread[w][i] = uint8_t(i % 8 < bits ? (w * 8 + i / 8) * bits + i % 8 : 0);
        shift[i] = uint8_t(i % 8 * bits);
      }
    }
  };

  WITH_AVX512 Unpacker() {
    static constexpr Tables tables;
    for (int w = 0; w < 2; w++) spread[w] = _mm512_load_si512(tables.spread[w]);
    shift = _mm512_load_si512(tables.shift), mask = _mm512_set1_epi8(char((1 << bits) - 1));
  }

  // The bytes of n codes, n at most 64 (128 for up to 4 bits).
  WITH_AVX512 static inline __m512i load(const uint8_t* codes, int64_t n) {
    const int64_t bytes = n / 8 * bits;
    if (bits <= 4 && n <= CHUNK) {  // a short load crosses fewer cache lines
      const __m256i half = _mm256_maskz_loadu_epi8(bytes >= 32 ? ~__mmask32(0) : (__mmask32(1) << bytes) - 1, codes);
      return _mm512_zextsi256_si512(half);
    }
    return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~__mmask64(0) : (__mmask64(1) << bytes) - 1, codes);
  }

  // The codes of loaded chunk `w` as bytes.
  WITH_AVX512 inline __m512i operator()(__m512i loaded, int w) const {
    const __m512i own = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread[w], loaded));
    return bits == 8 ? own : _mm512_and_si512(own, mask);
  }
};

// The lowest n lanes.
static inline __mmask16 up_to_16(int64_t n) { return n < 16 ? __mmask16((1u << n) - 1) : __mmask16(0xffff); }

// --- prepared tokens ------------------------------------------------------------------------------------------------
// Chunks of 64 inputs: the upper bytes, then (of 16-bit activations) the lower ones. After them, per segment, the scale,
// the sum, and their product. One token takes a whole number of cache lines.

static inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <int bytes>
static int64_t scales_at(const Segments& s) {
  return s.padded() * bytes;
}
template <int bytes>
static int64_t sums_at(const Segments& s) {
  return scales_at<bytes>(s) + lines(s.count * 4);
}
template <int bytes>
static int64_t terms_at(const Segments& s) {
  return sums_at<bytes>(s) + lines(s.count * 4);
}
template <int bytes>
static int64_t token_bytes(const Segments& s) {
  return terms_at<bytes>(s) + lines(s.count * 4);
}

template <int bytes>
WITH_AVX512 static void prepare(const float* x, const Segments& s, uint8_t* prepared) {
  constexpr float top = bytes == 1 ? 127 : 127 * 256 + 127;
  float *scales = (float*)(prepared + scales_at<bytes>(s)), *sums = (float*)(prepared + sums_at<bytes>(s));
  float* terms = (float*)(prepared + terms_at<bytes>(s));
  for (int64_t i = 0; i < s.count; i++) {
    const float* in = x + s.start(i);
    const int64_t n = s.size(i);
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(up_to_16(n - k), in + k)));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? top / largest : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < s.chunks * CHUNK; k += 16) {
      const __m512 value = k < n ? _mm512_maskz_loadu_ps(up_to_16(n - k), in + k) : _mm512_setzero_ps();
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      __m128i* place = (__m128i*)(prepared + k / CHUNK * CHUNK * bytes + k % CHUNK);
      sum = _mm512_add_epi32(sum, whole);
      if (bytes == 1) {
        _mm_storeu_si128(place, _mm512_cvtepi32_epi8(whole));
      } else {  // the lower byte is signed too: the upper one is rounded, not cut
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128(place, _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128(place + CHUNK / 16, _mm512_cvtepi32_epi8(whole));
      }
    }
    prepared += s.chunks * CHUNK * bytes;
    scales[i] = largest / top;
    sums[i] = float(_mm512_reduce_add_epi32(sum));
    terms[i] = scales[i] * sums[i];
  }
}

// --- scales -------------------------------------------------------------------------------------------------------

WITH_AVX512 static inline __m512 load_halves(const uint16_t* h, __mmask16 there) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, h));
}

WITH_AVX512 static inline __m512 load_bytes(const uint8_t* z, __mmask16 there) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, z)));
}

// --- few tokens: inputs in the lanes --------------------------------------------------------------------------------

// Sums of the upper and lower bytes' products.
template <int bytes>
WITH_AVX512 static inline __m512 whole(const __m512i sum[bytes]) {
  if (bytes == 1) return _mm512_cvtepi32_ps(sum[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[0], 8), sum[bytes - 1]));
}

// `wide`: chunks loaded together; 0 if segments are not made of whole chunks. Row r of both halves is computed
// together, so that the arithmetic of one hides the latency of the other.
template <int bits, int bytes, int64_t M, int wide>
WITH_AVX512 static void few_rows(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows,
                                 float* out) {
  const Unpacker<bits> unpack;
  const int64_t groups = p.groups(), count = s.count, per_group = s.per_group, chunks = s.chunks;
  const int64_t padded = (count + 15) / 16 * 16;
  float* weight = (float*)scratch(SCALES, size_t(2 * M * padded) * 4);  // [half][M][segment], scale times token's scale
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
        const __m512 a = load_halves(own_scale, there), az = _mm512_mul_ps(a, load_bytes(own_zero, there));
        for (int64_t m = 0; m < M; m++) {
          const float* x_scale = (const float*)(x[m] + scales_at<bytes>(s)) + i;
          const float* term = (const float*)(x[m] + terms_at<bytes>(s)) + i;
          _mm512_storeu_ps(weight + (j * M + m) * padded + i, _mm512_mul_ps(a, _mm512_maskz_loadu_ps(there, x_scale)));
          total[j][m] = _mm512_fnmadd_ps(az, _mm512_maskz_loadu_ps(there, term), total[j][m]);
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
        for (int64_t m = 0; m < M; m++)
          total[j][m] = _mm512_fmadd_ps(_mm512_set1_ps(weight[(j * M + m) * padded + i]), whole<bytes>(sum[j][m]),
                                        total[j][m]);
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

// --- many tokens: outputs in the lanes ------------------------------------------------------------------------------

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
#pragma GCC unroll 2
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
  for (int64_t m = 0; m < M; m++) {
    const __m512 x_sum = _mm512_set1_ps(((const float*)(tokens[m] + sums_at<bytes>(s)))[i]);
    const __m512 x_scale = _mm512_set1_ps(((const float*)(tokens[m] + scales_at<bytes>(s)))[i]);
    for (int h = 0; h < 2; h++) {
      const __m512 value = _mm512_fnmadd_ps(zero[h], x_sum, whole<bytes>(sum[m][h]));
      float* place = out + m * 2 * TILE + h * TILE;
      _mm512_storeu_ps(place, _mm512_fmadd_ps(_mm512_mul_ps(scale[h], x_scale), value, _mm512_loadu_ps(place)));
    }
  }
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
  for (int64_t m0 = 0; m0 < M; m0 += SPAN) {
    const int64_t end = M - m0 < SPAN ? M : m0 + SPAN;
    for (int64_t i = 0; i < s.count; i++) {
      fill_tile<bits>(p, s, i, rows, unpack, tile);
      const __m512* scale = scales + i / s.per_group * 4;
      // Equal blocks: 34 tokens in 5 passes are 7 + 7 + 7 + 7 + 6, not 8 + 8 + 8 + 8 + 2.
      const int64_t passes = (end - m0 + block - 1) / block, size = s.chunks * CHUNK * bytes;
      for (int64_t b = 0, m = m0; b < passes; b++) {
        const int64_t count = (end - m + passes - b - 1) / (passes - b);
        for (int64_t next = m + count; next < end && next < m + 2 * count; next++)
          for (int64_t line = 0; line < size; line += 64)
            _mm_prefetch((const char*)tokens[next] + i * size + line, _MM_HINT_T0);
        pass_up_to<bytes, block>(count, s, i, tile, tokens + m, scale, scale + 2, out + m * 2 * TILE);
        m += count;
      }
    }
  }
}

template <int bits, int bytes>
static void multiply_bits(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                          const Rows& rows, float* out) {
  static_assert(FEW == 4);
  switch (M) {
    case 1: return few<bits, bytes, 1>(p, s, tokens, rows, out);
    case 2: return few<bits, bytes, 2>(p, s, tokens, rows, out);
    case 3: return few<bits, bytes, 3>(p, s, tokens, rows, out);
    case 4: return few<bits, bytes, 4>(p, s, tokens, rows, out);
    default: return many<bits, bytes>(p, s, tokens, M, rows, out);
  }
}

template <int bytes>
static void multiply(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                     const Rows& rows, float* out) {
  switch (p.bits) {
    case 2: return multiply_bits<2, bytes>(p, s, tokens, M, rows, out);
    case 3: return multiply_bits<3, bytes>(p, s, tokens, M, rows, out);
    case 4: return multiply_bits<4, bytes>(p, s, tokens, M, rows, out);
    case 5: return multiply_bits<5, bytes>(p, s, tokens, M, rows, out);
    case 6: return multiply_bits<6, bytes>(p, s, tokens, M, rows, out);
    case 7: return multiply_bits<7, bytes>(p, s, tokens, M, rows, out);
    case 8: return multiply_bits<8, bytes>(p, s, tokens, M, rows, out);
  }
}

static const Engine words = {token_bytes<2>, prepare<2>, multiply<2>};
static const Engine bytes = {token_bytes<1>, prepare<1>, multiply<1>};

}  // namespace avx512
}  // namespace eacmoe
#endif

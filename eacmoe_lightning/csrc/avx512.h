// bfloat16 and int8 activations on CPUs with AVX512 BF16, VNNI and VBMI (Zen 4, Sapphire Rapids and later).
//
// Three instructions turn 64 codes of any width into 64 bytes: spread `bits` bytes into each quadword, shift every byte
// of it into place, mask. bfloat16 holds every code exactly, so products are exact; sums are in float32. Zero points
// are subtracted afterwards, through the sum of a segment's activations.
//
// Few tokens: a row's codes are multiplied with the tokens lane by lane (lanes hold inputs). Many tokens: the codes of
// 2 x 16 rows are transposed into a tile (lanes hold outputs), and every token is multiplied with the tile.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "packed.h"

#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,f16c")))

namespace eacmoe {
namespace avx512 {

constexpr int64_t FEW = 4;    // with up to this many tokens, codes are not transposed
constexpr int64_t BLOCK = 12; // tokens whose sums over a tile stay in registers
constexpr int64_t AHEAD = 4096; // distance of the prefetch in bytes; both halves are read sequentially
constexpr int64_t SPAN = 192; // tokens for which the tiles of all inputs are filled once

// --- codes to bytes, bytes to bfloat16 ----------------------------------------------------------------------------

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

  // The codes of loaded chunk `w` as bytes; above its code, each byte holds bits of its neighbours.
  WITH_AVX512 inline __m512i unmasked(__m512i loaded, int w) const {
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread[w], loaded));
  }
  WITH_AVX512 inline __m512i operator()(__m512i loaded, int w) const {
    return _mm512_and_si512(unmasked(loaded, w), mask);
  }
};

WITH_AVX512 static inline __m512i as_float(__m512i code) { return _mm512_castps_si512(_mm512_cvtepi32_ps(code)); }

// Converts codes in bytes to bfloat16: up to 5 bits with a table over the lowest 5 bits of a byte; 6 and 7 bits as
// 128 + code, by writing the code into the mantissa of 128; 8 bits through float32.
template <int bits>
struct ToBf16 {
  __m512i table;
  static constexpr int offset = bits == 6 || bits == 7 ? 128 : 0;  // of the values; the zero point gets it too

  WITH_AVX512 ToBf16() {
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), high = _mm512_add_epi32(low, _mm512_set1_epi32(16));
    table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_and_si512(high, mask)),
                                         _mm512_cvtepi32_ps(_mm512_and_si512(low, mask)));
  }

  // Splits the bytes (k0, k1, k2, k3) of each doubleword into (k0, k2) and (k1, k3).
  WITH_AVX512 inline void operator()(__m512i bytes, __m512i* even, __m512i* odd) const {
    if constexpr (bits <= 5) {
      *even = _mm512_permutexvar_epi16(bytes, table);
      *odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 8), table);
    } else if constexpr (bits <= 7) {
      const __m512i code = _mm512_set1_epi16((1 << bits) - 1), base = _mm512_set1_epi16(0x4300);
      *even = _mm512_or_si512(_mm512_and_si512(bytes, code), base);
      *odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(bytes, 8), code), base);
    } else {
      const __m512i low = _mm512_set1_epi32(255), high = _mm512_set1_epi32(int(0xffff0000));
      const __m512i k0 = as_float(_mm512_and_si512(bytes, low));
      const __m512i k1 = as_float(_mm512_and_si512(_mm512_srli_epi32(bytes, 8), low));
      const __m512i k2 = as_float(_mm512_and_si512(_mm512_srli_epi32(bytes, 16), low));
      const __m512i k3 = as_float(_mm512_srli_epi32(bytes, 24));
      *even = _mm512_or_si512(_mm512_srli_epi32(k0, 16), _mm512_and_si512(k2, high));
      *odd = _mm512_or_si512(_mm512_srli_epi32(k1, 16), _mm512_and_si512(k3, high));
    }
  }
};

// The lowest n lanes.
static inline __mmask16 up_to_16(int64_t n) { return n < 16 ? __mmask16((1u << n) - 1) : __mmask16(0xffff); }

// --- prepared tokens ----------------------------------------------------------------------------------------------
// bfloat16: chunks of 64 inputs as (k0, k2) pairs, then (k1, k3) pairs; int8: chunks in order. After them, per segment,
// the sum of the activations; for int8 also their scale. One token takes a whole number of cache lines.

template <bool int8>
static int64_t sums_at(const Segments& s) {
  return s.padded() * (int8 ? 1 : 2);
}

static inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <bool int8>
static int64_t scales_at(const Segments& s) {
  return sums_at<int8>(s) + lines(s.count * 4);
}

template <bool int8>
static int64_t token_bytes(const Segments& s) {
  return scales_at<int8>(s) + (int8 ? lines(s.count * 4) : 0);
}

WITH_AVX512 static void prepare_bf16(const float* x, const Segments& s, uint8_t* prepared) {
  float* sums = (float*)(prepared + sums_at<false>(s));
  const __m512i first = _mm512_set_epi32(0x003e003c, 0x003a0038, 0x00360034, 0x00320030, 0x002e002c, 0x002a0028,
                                         0x00260024, 0x00220020, 0x001e001c, 0x001a0018, 0x00160014, 0x00120010,
                                         0x000e000c, 0x000a0008, 0x00060004, 0x00020000);  // 0, 2, 4 ... 62
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(1)), ones = _mm512_set1_epi16(0x3f80);
  for (int64_t i = 0; i < s.count; i++) {
    const float* in = x + s.start(i);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0, rest = s.size(i); c < s.chunks; c++, rest -= CHUNK, in += CHUNK, prepared += 2 * CHUNK) {
      __m512 four[4];
      for (int64_t q = 0; q < 4; q++) {
        const int64_t n = rest - 16 * q;
        four[q] = n > 0 ? _mm512_maskz_loadu_ps(up_to_16(n), in + 16 * q) : _mm512_setzero_ps();
      }
      const __m512i low = (__m512i)_mm512_cvtne2ps_pbh(four[1], four[0]);
      const __m512i high = (__m512i)_mm512_cvtne2ps_pbh(four[3], four[2]);
      _mm512_storeu_si512(prepared, _mm512_permutex2var_epi16(low, first, high));
      _mm512_storeu_si512(prepared + CHUNK, _mm512_permutex2var_epi16(low, second, high));
      sum = _mm512_dpbf16_ps(sum, (__m512bh)low, (__m512bh)ones);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)high, (__m512bh)ones);
    }
    sums[i] = _mm512_reduce_add_ps(sum);
  }
}

static void prepare_int8(const float* x, const Segments& s, uint8_t* prepared) {
  int8_t* out = (int8_t*)prepared;
  float *sums = (float*)(prepared + sums_at<true>(s)), *scales = (float*)(prepared + scales_at<true>(s));
  for (int64_t i = 0; i < s.count; i++, out += s.chunks * CHUNK) {
    const float* in = x + s.start(i);
    const int64_t n = s.size(i);
    float largest = 0;
    for (int64_t k = 0; k < n; k++) largest = __builtin_fabsf(in[k]) > largest ? __builtin_fabsf(in[k]) : largest;
    const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    int32_t sum = 0;
    std::memset(out, 0, size_t(s.chunks * CHUNK));
    for (int64_t k = 0; k < n; k++) {
      const int32_t value = int32_t(__builtin_rintf(in[k] * inverse));
      out[k] = int8_t(value);
      sum += value;
    }
    sums[i] = float(sum);
    scales[i] = scale;
  }
}

// --- scales -------------------------------------------------------------------------------------------------------

WITH_AVX512 static inline __m512 load_halves(const uint16_t* h, __mmask16 there) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, h));
}

WITH_AVX512 static inline __m512 load_bytes(const uint8_t* z, __mmask16 there) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, z)));
}

// Every `stride`-th of up to 16 * stride numbers.
WITH_AVX512 static inline __m512 strided(const float* x, int64_t stride, __mmask16 there) {
  if (stride == 1) return _mm512_maskz_loadu_ps(there, x);
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride)));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, at, x, 4);
}

// --- few tokens: inputs in the lanes --------------------------------------------------------------------------------

// Multiplies the codes of up to 64 inputs with M tokens.
template <int bits, bool int8, int64_t M>
WITH_AVX512 static inline void dot(__m512i bytes, const ToBf16<bits>& to_bf16, const uint8_t* const* x, int64_t at,
                                   __m512 acc[M], __m512i sum[M]) {
  if constexpr (int8) {
    for (int64_t m = 0; m < M; m++) sum[m] = _mm512_dpbusd_epi32(sum[m], bytes, _mm512_loadu_si512(x[m] + at));
  } else {
    __m512i even, odd;
    to_bf16(bytes, &even, &odd);
    for (int64_t m = 0; m < M; m++) {
      acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)even, (__m512bh)_mm512_loadu_si512(x[m] + 2 * at));
      acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)odd, (__m512bh)_mm512_loadu_si512(x[m] + 2 * at + CHUNK));
    }
  }
}

// `wide`: chunks loaded together; 0 if segments are not made of whole chunks. Row r of both halves is computed
// together, so that the arithmetic of one hides the latency of the other.
template <int bits, bool int8, int64_t M, int wide>
WITH_AVX512 static void few_rows(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows,
                                 float* out) {
  const Unpacker<bits> unpack;
  const ToBf16<bits> to_bf16;
  const int64_t groups = p.groups(), count = s.count, per_group = s.per_group, chunks = s.chunks;
  const __m512 offset = _mm512_set1_ps(int8 ? 0 : to_bf16.offset);
  float* scale[2];  // scales of a row's groups, then scale * zero
  scale[0] = (float*)scratch(SCALES, size_t(groups + 16) * 16), scale[1] = scale[0] + 2 * (groups + 16);
  const uint8_t* x[M];
  const float *x_sum[M], *x_scale[M];
  for (int64_t m = 0; m < M; m++) {
    x[m] = tokens[m];
    x_sum[m] = (const float*)(tokens[m] + sums_at<int8>(s));
    x_scale[m] = int8 ? (const float*)(tokens[m] + scales_at<int8>(s)) : nullptr;
  }
  for (int64_t r = 0; r < rows.valid[0]; r++) {
    const int64_t halves = r < rows.valid[1] ? 2 : 1;
    const uint8_t* codes[2];
    __m512 total[2][M];
    for (int64_t j = 0; j < 2; j++) {
      const int64_t row = rows.first[j < halves ? j : 0] + r;
      codes[j] = p.codes + row * p.row_bytes();
      for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 there = up_to_16(groups - g);
        const __m512 a = load_halves(p.scale + row * groups + g, there);
        const __m512 z = _mm512_add_ps(load_bytes(p.zero + row * groups + g, there), offset);
        _mm512_storeu_ps(scale[j] + g, a);
        _mm512_storeu_ps(scale[j] + groups + 16 + g, _mm512_mul_ps(a, z));
      }
      for (int64_t m = 0; m < M; m++) total[j][m] = _mm512_setzero_ps();
    }
    int64_t at = 0;
    for (int64_t i = 0, g = 0, part = 0; i < count; i++) {
      __m512 acc[2][M];
      __m512i sum[2][M];
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++)
        for (int64_t m = 0; m < M; m++) acc[j][m] = _mm512_setzero_ps(), sum[j][m] = _mm512_setzero_si512();
      if constexpr (wide > 0) {
        for (int64_t c = 0; c < chunks; c += wide, at += wide * CHUNK) {
#pragma GCC unroll 2
          for (int64_t j = 0; j < 2; j++) {
            const __m512i loaded = unpack.load(codes[j], wide * CHUNK);
            _mm_prefetch((const char*)codes[j] + AHEAD, _MM_HINT_T0);
            codes[j] += wide * CHUNK / 8 * bits;
#pragma GCC unroll 2
            for (int w = 0; w < wide; w++)
              dot<bits, int8, M>(int8 ? unpack(loaded, w) : unpack.unmasked(loaded, w), to_bf16, x, at + w * CHUNK,
                                 acc[j], sum[j]);
          }
        }
      } else {
        for (int64_t c = 0, rest = s.size(i); c < chunks; c++, rest -= CHUNK, at += CHUNK) {
          if (rest <= 0) continue;
          const int64_t n = rest < CHUNK ? rest : CHUNK;
          for (int64_t j = 0; j < 2; j++, codes[j - 1] += n / 8 * bits)
            dot<bits, int8, M>(unpack(unpack.load(codes[j], n), 0), to_bf16, x, at, acc[j], sum[j]);
        }
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < 2; j++) {
        for (int64_t m = 0; m < M; m++) {
          const __m512 value = int8 ? _mm512_cvtepi32_ps(sum[j][m]) : acc[j][m];
          const __m512 a = _mm512_set1_ps(int8 ? scale[j][g] * x_scale[m][i] : scale[j][g]);
          total[j][m] = _mm512_fmadd_ps(a, value, total[j][m]);
        }
      }
      if (++part == per_group) part = 0, g++;
    }
    for (int64_t j = 0; j < halves; j++) {
      for (int64_t m = 0; m < M; m++) {
        for (int64_t part = 0; part < per_group; part++) {
          for (int64_t g = 0; g < groups; g += 16) {  // the zero points' share, 16 groups at once
            const __mmask16 there = up_to_16(groups - g);
            __m512 sums = strided(x_sum[m] + g * per_group + part, per_group, there);
            if (int8) sums = _mm512_mul_ps(sums, strided(x_scale[m] + g * per_group + part, per_group, there));
            const __m512 z = _mm512_maskz_loadu_ps(there, scale[j] + groups + 16 + g);
            total[j][m] = _mm512_fnmadd_ps(z, sums, total[j][m]);
          }
        }
        out[(m * 2 + j) * TILE + r] = _mm512_reduce_add_ps(total[j][m]);
      }
    }
  }
}

template <int bits, bool int8, int64_t M>
static void few(const Packed& p, const Segments& s, const uint8_t* const* tokens, const Rows& rows, float* out) {
  if (s.group % s.length || s.length % CHUNK) return few_rows<bits, int8, M, 0>(p, s, tokens, rows, out);
  if (bits <= 4 && s.chunks % 2 == 0) return few_rows<bits, int8, M, bits <= 4 ? 2 : 1>(p, s, tokens, rows, out);
  return few_rows<bits, int8, M, 1>(p, s, tokens, rows, out);
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

// Fills the tile of one segment. For each chunk and step t < 16, [half][16 outputs] doublewords: for int8 the codes of
// inputs 4t to 4t + 3; for bfloat16 first those of (4t, 4t + 2), then those of (4t + 1, 4t + 3).
template <int bits, bool int8>
WITH_AVX512 static inline void fill_tile(const Packed& p, const Segments& s, int64_t i, const Rows& rows,
                                         const Unpacker<bits>& unpack, const ToBf16<bits>& to_bf16, __m512i* tile) {
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
      for (int t = 0; t < 16; t++) {
        if constexpr (int8) {
          tile[(c * 16 + t) * 2 + h] = v[t];
        } else {
          to_bf16(v[t], &tile[(c * 16 + t) * 4 + h], &tile[(c * 16 + t) * 4 + 2 + h]);
        }
      }
    }
  }
}

// Scales and zero points of a tile, [group][scale, zero][half][16 outputs].
template <bool int8>
WITH_AVX512 static void tile_scales(const Packed& p, const Rows& rows, float offset, __m512* out) {
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
            value = which ? _mm512_add_ps(load_bytes(p.zero + at, there), _mm512_set1_ps(offset))
                          : load_halves(p.scale + at, there);
          v[r] = _mm512_castps_si512(value);
        }
        transpose(v);
        for (int64_t j = 0; j < 16 && g + j < groups; j++) out[(g + j) * 4 + which * 2 + h] = _mm512_castsi512_ps(v[j]);
      }
    }
  }
}

// acc += w . a, in place: with intrinsics gcc 12 copies every accumulator of `pass` to another register and back.
WITH_AVX512 static inline void dot_bf16(__m512& acc, __m512i w, __m512i a) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
}
WITH_AVX512 static inline void dot_int8(__m512i& acc, __m512i w, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a));
}

template <bool int8, int64_t M>
WITH_AVX512 static inline void pass(const Segments& s, int64_t i, const __m512i* tile, const uint8_t* const* tokens,
                               const __m512* scale, const __m512* zero, float* out) {
  __m512 acc[M][2];
  __m512i sum[M][2];
  const uint8_t* x[M];
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; m++) {
    x[m] = tokens[m] + i * s.chunks * CHUNK * (int8 ? 1 : 2);
    for (int h = 0; h < 2; h++) acc[m][h] = _mm512_setzero_ps(), sum[m][h] = _mm512_setzero_si512();
  }
  for (int64_t c = 0; c < s.chunks; c++) {
    for (int64_t t = 0; t < 16; t++, tile += int8 ? 2 : 4) {
      if constexpr (int8) {
        const __m512i w0 = tile[0], w1 = tile[1];
#pragma GCC unroll 16
        for (int64_t m = 0; m < M; m++) {
          int32_t four;
          std::memcpy(&four, x[m] + c * CHUNK + t * 4, 4);
          const __m512i a = _mm512_set1_epi32(four);
          dot_int8(sum[m][0], w0, a);
          dot_int8(sum[m][1], w1, a);
        }
      } else {
        for (int half = 0; half < 2; half++) {
          const __m512i w0 = tile[2 * half], w1 = tile[2 * half + 1];
#pragma GCC unroll 16
          for (int64_t m = 0; m < M; m++) {
            int32_t two;
            std::memcpy(&two, x[m] + c * 2 * CHUNK + half * CHUNK + t * 4, 4);
            const __m512i a = _mm512_set1_epi32(two);
            dot_bf16(acc[m][0], w0, a);
            dot_bf16(acc[m][1], w1, a);
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t m = 0; m < M; m++) {
    const __m512 x_sum = _mm512_set1_ps(((const float*)(tokens[m] + sums_at<int8>(s)))[i]);
    for (int h = 0; h < 2; h++) {
      __m512 value = int8 ? _mm512_cvtepi32_ps(sum[m][h]) : acc[m][h], weight = scale[h];
      value = _mm512_fnmadd_ps(zero[h], x_sum, value);
      if constexpr (int8)
        weight = _mm512_mul_ps(weight, _mm512_set1_ps(((const float*)(tokens[m] + scales_at<true>(s)))[i]));
      float* place = out + m * 2 * TILE + h * TILE;
      _mm512_storeu_ps(place, _mm512_fmadd_ps(weight, value, _mm512_loadu_ps(place)));
    }
  }
}

template <bool int8, int64_t M>
WITH_AVX512 static inline void pass_up_to(int64_t count, const Segments& s, int64_t i, const __m512i* tile,
                                     const uint8_t* const* tokens, const __m512* scale, const __m512* zero,
                                     float* out) {
  if constexpr (M > 0) {
    if (count == M)
      pass<int8, M>(s, i, tile, tokens, scale, zero, out);
    else
      pass_up_to<int8, M - 1>(count, s, i, tile, tokens, scale, zero, out);
  }
}

template <int bits, bool int8>
WITH_AVX512 static void many(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                             const Rows& rows, float* out) {
  const Unpacker<bits> unpack;
  const ToBf16<bits> to_bf16;
  alignas(64) __m512i tile[MAX_SEGMENT / 4 * (int8 ? 2 : 4)];
  __m512* scales = (__m512*)scratch(SCALES, size_t(p.groups()) * 4 * sizeof(__m512));
  tile_scales<int8>(p, rows, int8 ? 0 : to_bf16.offset, scales);
  std::memset(out, 0, size_t(M) * 2 * TILE * 4);
  for (int64_t m0 = 0; m0 < M; m0 += SPAN) {
    const int64_t end = M - m0 < SPAN ? M : m0 + SPAN;
    for (int64_t i = 0; i < s.count; i++) {
      fill_tile<bits, int8>(p, s, i, rows, unpack, to_bf16, tile);
      const __m512* scale = scales + i / s.per_group * 4;
      // Equal blocks: 34 tokens in 5 passes are 7 + 7 + 7 + 7 + 6, not 8 + 8 + 8 + 8 + 2.
      const int64_t passes = (end - m0 + BLOCK - 1) / BLOCK;
      for (int64_t b = 0, m = m0; b < passes; b++) {
        const int64_t count = (end - m + passes - b - 1) / (passes - b), bytes = s.chunks * CHUNK * (int8 ? 1 : 2);
        for (int64_t next = m + count; next < end && next < m + 2 * count; next++)
          for (int64_t line = 0; line < bytes; line += 64)
            _mm_prefetch((const char*)tokens[next] + i * bytes + line, _MM_HINT_T0);
        pass_up_to<int8, BLOCK>(count, s, i, tile, tokens + m, scale, scale + 2, out + m * 2 * TILE);
        m += count;
      }
    }
  }
}

template <int bits, bool int8>
static void multiply_bits(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                          const Rows& rows, float* out) {
  static_assert(FEW == 4);
  switch (M) {
    case 1: return few<bits, int8, 1>(p, s, tokens, rows, out);
    case 2: return few<bits, int8, 2>(p, s, tokens, rows, out);
    case 3: return few<bits, int8, 3>(p, s, tokens, rows, out);
    case 4: return few<bits, int8, 4>(p, s, tokens, rows, out);
    default: return many<bits, int8>(p, s, tokens, M, rows, out);
  }
}

template <bool int8>
static void multiply(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                     const Rows& rows, float* out) {
  switch (p.bits) {
    case 2: return multiply_bits<2, int8>(p, s, tokens, M, rows, out);
    case 3: return multiply_bits<3, int8>(p, s, tokens, M, rows, out);
    case 4: return multiply_bits<4, int8>(p, s, tokens, M, rows, out);
    case 5: return multiply_bits<5, int8>(p, s, tokens, M, rows, out);
    case 6: return multiply_bits<6, int8>(p, s, tokens, M, rows, out);
    case 7: return multiply_bits<7, int8>(p, s, tokens, M, rows, out);
    case 8: return multiply_bits<8, int8>(p, s, tokens, M, rows, out);
  }
}

static const Engine bf16 = {token_bytes<false>, prepare_bf16, multiply<false>};
static const Engine int8 = {token_bytes<true>, prepare_int8, multiply<true>};

}  // namespace avx512
}  // namespace eacmoe
#endif

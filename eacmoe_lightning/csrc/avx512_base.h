// For avx512.h: codes on their way into registers, prepared tokens, and scales.
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
// Chunks of 64 inputs: their upper bytes, then (of 16- and 24-bit activations) the lower ones. After them, per segment,
// the scale, a sum, and the scale times a sum: both of the inputs, or (24 bits) of the upper bytes and of what lies below
// them, and then that sum itself. One token takes a whole number of cache lines.

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
static int64_t lower_sums_at(const Segments& s) {
  return terms_at<bytes>(s) + lines(s.count * 4);
}
template <int bytes>
static int64_t token_bytes(const Segments& s) {
  return lower_sums_at<bytes>(s) + (bytes == 3 ? lines(s.count * 4) : 0);
}

template <int bytes>
WITH_AVX512 static void prepare(const float* x, const Segments& s, uint8_t* prepared) {
  // of 24 bits a little less than fits, for products that are rounded up
  constexpr float top = bytes == 1 ? 127 : bytes == 2 ? 127 * 256 + 127 : (127 * 256 + 127) * 256;
  float *scales = (float*)(prepared + scales_at<bytes>(s)), *sums = (float*)(prepared + sums_at<bytes>(s));
  float *terms = (float*)(prepared + terms_at<bytes>(s)), *lower = (float*)(prepared + lower_sums_at<bytes>(s));
  for (int64_t i = 0; i < s.count; i++) {
    const float* in = x + s.start(i);
    const int64_t n = s.size(i);
    __m512i most = _mm512_setzero_si512();  // bits of the largest without signs; those of a NaN are above infinity's
    for (int64_t k = 0; k < n; k += 16) {
      const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(up_to_16(n - k), in + k));
      most = _mm512_max_epi32(most, _mm512_castps_si512(value));
    }
    const float largest = as_float(_mm512_reduce_max_epi32(most));
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? top / largest : 0);
    __m512i sum = _mm512_setzero_si512(), upper_sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < s.chunks * CHUNK; k += 16) {
      const __m512 value = k < n ? _mm512_maskz_loadu_ps(up_to_16(n - k), in + k) : _mm512_setzero_ps();
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      __m128i* place = (__m128i*)(prepared + k / CHUNK * CHUNK * bytes + k % CHUNK);
      sum = _mm512_add_epi32(sum, whole);
      if (bytes == 1) {
        _mm_storeu_si128(place, _mm512_cvtepi32_epi8(whole));
      } else {  // the lower bytes are signed too: what is above them is rounded, not cut
        const __m512i half = _mm512_set1_epi32(128);
        const __m512i above = _mm512_srai_epi32(_mm512_add_epi32(whole, half), 8);
        if (bytes == 3) {
          const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(above, half), 8);
          upper_sum = _mm512_add_epi32(upper_sum, upper);
          _mm_storeu_si128(place, _mm512_cvtepi32_epi8(upper));
        }
        _mm_storeu_si128(place + (bytes - 2) * (CHUNK / 16), _mm512_cvtepi32_epi8(above));
        _mm_storeu_si128(place + (bytes - 1) * (CHUNK / 16), _mm512_cvtepi32_epi8(whole));
      }
    }
    prepared += s.chunks * CHUNK * bytes;
    scales[i] = largest / top;
    if (bytes == 3) {
      const int32_t upper = _mm512_reduce_add_epi32(upper_sum);
      sums[i] = float(upper);
      lower[i] = float(_mm512_reduce_add_epi32(sum) - upper * 65536);
      terms[i] = scales[i] * lower[i];
    } else {
      sums[i] = float(_mm512_reduce_add_epi32(sum));
      terms[i] = scales[i] * sums[i];
    }
  }
}

// --- sums ---------------------------------------------------------------------------------------------------------

// The sum of the products of all bytes, of three of the lower two.
template <int bytes>
WITH_AVX512 static inline __m512 whole(const __m512i sum[bytes]) {
  if (bytes == 1) return _mm512_cvtepi32_ps(sum[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[bytes - 2], 8), sum[bytes - 1]));
}

// The sum of products from those of the lower two of three bytes and those of the upper ones, which are exact in float32
// and are freed of the zero points' share first, so that nothing large cancels.
WITH_AVX512 static inline __m512 with_upper(__m512 lower, __m512i upper, __m512 zero_share) {
  return _mm512_fmadd_ps(_mm512_set1_ps(65536), _mm512_sub_ps(_mm512_cvtepi32_ps(upper), zero_share), lower);
}

// `before` and a segment's share of outputs, from the sums of its products.
template <int bytes>
WITH_AVX512 static inline __m512 with_segment(__m512 before, const __m512i sum[bytes], __m512 scale, __m512 zero,
                                              __m512 x_scale, __m512 x_sum, __m512 below) {
  __m512 value = _mm512_fnmadd_ps(zero, below, whole<bytes>(sum));
  if (bytes == 3) value = with_upper(value, sum[0], _mm512_mul_ps(zero, x_sum));
  return _mm512_fmadd_ps(_mm512_mul_ps(scale, x_scale), value, before);
}

// --- scales -------------------------------------------------------------------------------------------------------

WITH_AVX512 static inline __m512 load_halves(const uint16_t* h, __mmask16 there) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, h));
}

WITH_AVX512 static inline __m512 load_bytes(const uint8_t* z, __mmask16 there) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, z)));
}

}  // namespace avx512
}  // namespace eacmoe
#endif

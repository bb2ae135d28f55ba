// For avx2.h: prepared tokens, and codes on their way into registers.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "packed.h"

#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace eacmoe {
namespace avx2 {

enum Form { FLOATS, WORDS, BYTES };

constexpr int64_t FEW = 3;     // with up to this many tokens, codes are not transposed
constexpr int64_t BLOCK = 4;   // tokens whose sums over half a tile stay in registers
constexpr int64_t FRONT = 4, SLACK = 32;  // bytes before and after a row that loads may read without using them
constexpr int64_t AHEAD = 2048;  // distance of the prefetch in bytes

// --- prepared tokens ------------------------------------------------------------------------------------------------
// FLOATS: inputs, segments padded with zeros. WORDS: the same as int16; then, per segment, the scale and the sum; then
// the bytes for few tokens (the upper ones, then the lower; of 64 inputs the even, then the odd); then, per group,
// sum * scale (`terms_at`). BYTES: int8 in the order of `order`, then the parts of WORDS without the lower bytes.

static inline int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t words_at(const Segments& s, Form form) { return form == BYTES ? s.padded() : 0; }
static inline int64_t scales_at(const Segments& s, Form form) { return words_at(s, form) + s.padded() * 2; }
static inline int64_t sums_at(const Segments& s, Form form) { return scales_at(s, form) + lines(s.count * 4); }

static inline int64_t bytes_at(const Segments& s, Form form) { return sums_at(s, form) + lines(s.count * 4); }
static inline int64_t terms_at(const Segments& s, Form form) {
  return bytes_at(s, form) + s.padded() * (form == BYTES ? 1 : 2);
}

template <Form form>
static int64_t token_bytes(const Segments& s) {
  if (form == FLOATS) return float_bytes(s);
  return terms_at(s, form) + lines((s.cols / s.group + 8) * 4);
}

// The position of byte i of 32, because two vectors of 16-bit codes are packed to bytes lane by lane.
static inline int64_t order(int64_t i) { return (i & ~31) | (i & 7) | (i & 8) << 1 | (i & 16) >> 1; }

// Packs four vectors of eight doublewords to bytes.
WITH_AVX2 static inline __m256i narrow(const __m256i v[4]) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Computes the last two parts of a token, the bytes and the terms, from the parts before.
template <Form form>
WITH_AVX2 static void split(const Segments& s, uint8_t* prepared) {
  const int16_t* words = (const int16_t*)(prepared + words_at(s, form));
  const float *scales = (const float*)(prepared + scales_at(s, form)), *sums = (const float*)(prepared + sums_at(s, form));
  int8_t *upper = (int8_t*)(prepared + bytes_at(s, form)), *lower = upper + s.padded();
  for (int64_t at = 0; at < s.padded(); at += CHUNK) {
    for (int odd = 0; odd < 2; odd++) {
      __m256i high[4], low[4];  // the bytes of 32 words as doublewords
      for (int i = 0; i < 4; i++) {
        const __m256i two = _mm256_load_si256((const __m256i*)(words + at) + i);
        const __m256i word = _mm256_srai_epi32(odd ? two : _mm256_slli_epi32(two, 16), 16);
        high[i] = form == BYTES ? word : _mm256_srai_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(128)), 8);
        low[i] = _mm256_sub_epi32(word, _mm256_slli_epi32(high[i], 8));
      }
      _mm256_store_si256((__m256i*)(upper + at) + odd, narrow(high));
      if (form == WORDS) _mm256_store_si256((__m256i*)(lower + at) + odd, narrow(low));
    }
  }
  // Eight groups are read at once; the last eight of a row overlap those before, whose terms are zero there.
  float* terms = (float*)(prepared + terms_at(s, form));
  const int64_t groups = s.count / s.per_group, whole = groups / 8 * 8;
  if (whole < groups) std::memset(terms + whole, 0, 8 * sizeof(float));
  for (int64_t g = 0; g < groups; g++) {
    float term = 0;
    for (int64_t i = g * s.per_group; i < (g + 1) * s.per_group; i++) term += scales[i] * sums[i];
    terms[g < whole ? g : whole + 8 - groups + g] = term;
  }
}

template <Form form>
WITH_AVX2 static void prepare(const float* x, const Segments& s, uint8_t* prepared) {
  constexpr float most = form == BYTES ? 127 : 127 * 256;
  const int64_t padded = s.chunks * CHUNK;
  int16_t* out = (int16_t*)(prepared + words_at(s, form));
  float *scales = (float*)(prepared + scales_at(s, form)), *sums = (float*)(prepared + sums_at(s, form));
  for (int64_t i = 0; i < s.count; i++, out += padded) {
    const float* in = x + s.start(i);
    const int64_t n = s.size(i);  // a multiple of 8
    __m256i largest = _mm256_setzero_si256();  // bits without signs; those of a NaN are above infinity's
    for (int64_t k = 0; k < n; k += 8) {
      const __m256 value = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(in + k));
      largest = _mm256_max_epi32(largest, _mm256_castps_si256(value));
    }
    int32_t most_of[8], top_bits = 0;
    _mm256_storeu_si256((__m256i*)most_of, largest);
    for (int32_t each : most_of) top_bits = each > top_bits ? each : top_bits;
    const float top = as_float(top_bits);
    const __m256 inverse = _mm256_set1_ps(top > 0 ? most / top : 0);
    __m256i sum = _mm256_setzero_si256();
    std::memset(out + n, 0, size_t(padded - n) * 2);
    for (int64_t k = 0; k < n; k += 8) {
      const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(in + k), inverse));
      sum = _mm256_add_epi32(sum, value);
      _mm_storeu_si128((__m128i*)(out + k),
                       _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1)));
    }
    scales[i] = top / most;
    int32_t parts[8], total = 0;
    _mm256_storeu_si256((__m256i*)parts, sum);
    for (int32_t part : parts) total += part;
    sums[i] = float(total);  // exact: 256 * 32767 < 2^24
    if (form != BYTES) continue;
    int8_t* bytes = (int8_t*)prepared + i * padded;
    for (int64_t k = 0; k < padded; k += 8)
      _mm_storel_epi64((__m128i*)(bytes + order(k)), _mm_packs_epi16(_mm_loadu_si128((const __m128i*)(out + k)),
                                                                     _mm_setzero_si128()));
  }
  split<form>(s, prepared);
}

// --- codes ----------------------------------------------------------------------------------------------------------

template <int bits>
struct Unpacker {
  __m256i spread, shift;

  struct Tables {
    alignas(32) uint8_t spread[32] = {};
    alignas(32) uint16_t shift[16] = {};
    constexpr Tables() {
      for (int i = 0; i < 16; i++) {
        const int first = i * bits / 8, offset = i * bits % 8;
        spread[2 * i] = uint8_t(first);
        spread[2 * i + 1] = uint8_t(offset + bits > 8 ? first + 1 : 0x80);  // 0x80 gives a zero
        shift[i] = uint16_t(1u << (16 - bits - offset));
      }
    }
  };

  WITH_AVX2 Unpacker() {
    static constexpr Tables tables;
    spread = _mm256_load_si256((const __m256i*)tables.spread);
    shift = _mm256_load_si256((const __m256i*)tables.shift);
  }

  // 16 codes from 2 * bits bytes; it reads 16 bytes.
  WITH_AVX2 inline __m256i operator()(const uint8_t* codes) const {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)codes));
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, spread), shift), 16 - bits);
  }
};

// 64 codes of up to 4 bits as bytes: those of even inputs, and those of odd ones. Pairs of codes are brought to the
// lower end of each byte; at 3 bits, four codes are first brought to the upper end of each lane of 16 bits.
template <int bits>
struct ByteUnpacker {
  __m256i spread, shift, mask, upper;

  struct Tables {
    alignas(32) uint8_t spread[32] = {};
    constexpr Tables() {
      for (int i = 0; i < 16; i++) {
        const int first = i % 8 / 2 * 3 + i % 2 + (i < 8 ? FRONT : 0);  // the upper lane begins with its codes
        spread[2 * i] = uint8_t(first), spread[2 * i + 1] = uint8_t(first + 1);
      }
    }
  };

  WITH_AVX2 ByteUnpacker() {
    static_assert(bits >= 2 && bits <= 4);
    static constexpr Tables tables;
    spread = _mm256_load_si256((const __m256i*)tables.spread);
    shift = _mm256_set1_epi32(1 << 16 | 16);
    mask = _mm256_set1_epi8((1 << bits) - 1), upper = _mm256_set1_epi16(int16_t(0xff00));
  }

  WITH_AVX2 inline void operator()(const uint8_t* codes, __m256i& even, __m256i& odd) const {
    __m256i pairs;
    if constexpr (bits == 2) {
      const __m256i four = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
      pairs = _mm256_or_si256(four, _mm256_slli_epi16(four, 4));
    } else if constexpr (bits == 3) {
      const __m256i both = _mm256_loadu_si256((const __m256i*)(codes - FRONT));
      const __m256i four = _mm256_mullo_epi16(_mm256_shuffle_epi8(both, spread), shift);
      pairs = _mm256_blendv_epi8(_mm256_srli_epi16(four, 4), _mm256_srli_epi16(four, 2), upper);
    } else {
      pairs = _mm256_loadu_si256((const __m256i*)codes);
    }
    even = _mm256_and_si256(pairs, mask), odd = _mm256_and_si256(_mm256_srli_epi16(pairs, bits), mask);
  }
};

// A row's codes, with FRONT readable bytes before and SLACK after them; for the first and last rows a copy at `copy`.
static inline const uint8_t* row_codes(const Packed& p, int64_t row, uint8_t* copy) {
  const int64_t bytes = p.row_bytes();
  if (row * bytes >= FRONT && (p.rows - 1 - row) * bytes >= SLACK) return p.codes + row * bytes;
  std::memcpy(copy + FRONT, p.codes + row * bytes, size_t(bytes));
  return copy + FRONT;
}
// Size of such a copy.
static inline int64_t copy_bytes(const Packed& p) { return FRONT + p.row_bytes() + SLACK; }

WITH_AVX2 static inline float half(const uint16_t* h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*h))); }

WITH_AVX2 static inline void read_halves(const uint16_t* h, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + i))));
  for (; i < n; i++) out[i] = half(h + i);
}

// sums += products, in place: with intrinsics gcc 12 copies every accumulator to another register and back.
WITH_AVX2 static inline void add32(__m256i& sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
}
WITH_AVX2 static inline void add16(__m256i& sums, __m256i products) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
}
WITH_AVX2 static inline void fma(__m256& sums, __m256 w, __m256 x) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
}

WITH_AVX2 static inline __m256 low_floats(__m256i words) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(words)));
}
WITH_AVX2 static inline __m256 high_floats(__m256i words) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(words, 1)));
}

WITH_AVX2 static inline float add_lanes(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

}  // namespace avx2
}  // namespace eacmoe
#endif

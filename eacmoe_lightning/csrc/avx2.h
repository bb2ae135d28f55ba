// For CPUs with AVX2, which have neither bfloat16 nor 8-bit dot products. It multiplies 16-bit integers, bytes or
// float32:
//
//     WORDS   bfloat16 and float16 activations as 16-bit integers, with one scale for each token and segment. The
//             rounding error (1 in 65535 of the segment's largest) is far below the rounding of the result. Codes less
//             zero points fit 16-bit integers; sums are exact in 32 bits (256 * 255 * 32767 < 2^31).
//     BYTES   the int8 option: codes of up to 4 bits as unsigned bytes, sums of up to 256 products in 16 bits
//             (8 * 2 * 15 * 127 < 2^15). Wider codes are multiplied as in WORDS, with the same 8-bit activations.
//     FLOATS  float32 activations.
//
// Three instructions turn 16 codes of any width into 16-bit integers: bring the two bytes of each code into its lane,
// shift it to the lane's upper end (a multiplication), shift all lanes down. Lanes past a segment's end hold codes of
// the next one, which are multiplied by zeros.
//
// Few tokens: a row's codes are multiplied with the tokens lane by lane (lanes hold inputs). Codes of up to 4 bits
// become bytes there, 64 at once, those of even inputs apart from those of odd ones; a 16-bit input is 256 times one
// signed byte plus another. Many tokens: the codes of 2 x 16 rows are transposed into a tile (lanes hold outputs), and
// every token is multiplied with the tile.
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
  if (form == FLOATS) return s.padded() * 4;
  return terms_at(s, form) + lines((s.cols / s.group + 8) * 4);
}

static void prepare_floats(const float* x, const Segments& s, uint8_t* prepared) {
  float* out = (float*)prepared;
  const int64_t padded = s.chunks * CHUNK;
  for (int64_t i = 0; i < s.count; i++, out += padded) {
    std::memcpy(out, x + s.start(i), size_t(s.size(i)) * 4);
    std::memset(out + s.size(i), 0, size_t(padded - s.size(i)) * 4);
  }
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
    __m256 largest = _mm256_setzero_ps();
    for (int64_t k = 0; k < n; k += 8)
      largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(in + k)));
    float most_of[8], top = 0;
    _mm256_storeu_ps(most_of, largest);
    for (float each : most_of) top = each > top ? each : top;
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

// --- few tokens: inputs in the lanes --------------------------------------------------------------------------------

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

// --- many tokens: outputs in the lanes ------------------------------------------------------------------------------

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

template <int bits, Form input, Form form>
static void multiply_bits(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                          const Rows& rows, float* out) {
  static_assert(FEW == 3);
  switch (M) {
    case 1: return few<bits, form, 1>(p, s, input, tokens, rows, out);
    case 2: return few<bits, form, 2>(p, s, input, tokens, rows, out);
    case 3: return few<bits, form, 3>(p, s, input, tokens, rows, out);
    default: return many<bits, input, form>(p, s, tokens, M, rows, out);
  }
}

template <Form form>
static void multiply(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M, const Rows& rows,
                     float* out) {
  constexpr Form wide = form == BYTES ? WORDS : form;
  switch (p.bits) {
    case 2: return multiply_bits<2, form, form>(p, s, tokens, M, rows, out);
    case 3: return multiply_bits<3, form, form>(p, s, tokens, M, rows, out);
    case 4: return multiply_bits<4, form, form>(p, s, tokens, M, rows, out);
    case 5: return multiply_bits<5, form, wide>(p, s, tokens, M, rows, out);
    case 6: return multiply_bits<6, form, wide>(p, s, tokens, M, rows, out);
    case 7: return multiply_bits<7, form, wide>(p, s, tokens, M, rows, out);
    case 8: return multiply_bits<8, form, wide>(p, s, tokens, M, rows, out);
  }
}

static const Engine floats = {token_bytes<FLOATS>, prepare_floats, multiply<FLOATS>};
static const Engine words = {token_bytes<WORDS>, prepare<WORDS>, multiply<WORDS>};
static const Engine bytes = {token_bytes<BYTES>, prepare<BYTES>, multiply<BYTES>};

}  // namespace avx2
}  // namespace eacmoe
#endif

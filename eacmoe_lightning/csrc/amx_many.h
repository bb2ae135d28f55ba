// For avx512.h: products of many tokens on CPUs with AMX, which multiplies 16 outputs with 16 tokens at once.
//
// It reads codes in the order of the weight, and tokens in one that `arrange` makes, once for many rows. Its sums are
// the integers of avx512_many.h, and what becomes of them is the same, so both give the same bits.
#pragma once
#if defined(__x86_64__)
#include "avx512_many.h"

#if defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_AMX \
  __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,f16c")))

namespace eacmoe {
namespace amx {

using namespace avx512;

constexpr int64_t FROM = 8;  // tokens: below, a tile is mostly empty

// Whether this process may use tiles: the CPU has them, the system keeps their content for each thread (XCR0), and Linux
// grants the room that this takes.
static bool allowed() {
  static const bool granted = [] {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return false;  // AMX-TILE, AMX-INT8
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr long request_permission = 0x1023, tile_data = 18;
    return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
}

WITH_AMX static inline void configure() {
  struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  alignas(64) static const Config config;
  _tile_loadconfig(&config);
}

// --- arranged tokens ----------------------------------------------------------------------------------------------
// Blocks of 16 tokens. For each segment, chunk and byte of the activations the tile that AMX reads: for each 4 inputs
// the bytes of all 16 tokens. After them, for each segment, the tokens' scales, sums and (24 bits) sums of what lies
// below the upper bytes.

constexpr int64_t TILE_BYTES = 1024;

template <int bytes>
static int64_t block_floats(const Segments& s) {
  return s.padded() / CHUNK * bytes * TILE_BYTES;
}
template <int bytes>
static int64_t block_bytes(const Segments& s) {
  return block_floats<bytes>(s) + s.count * (bytes == 3 ? 3 : 2) * 64;
}
template <int bytes>
static int64_t arranged_bytes(const Segments& s, int64_t M) {
  return (M + TILE - 1) / TILE * block_bytes<bytes>(s);
}

template <int bytes>
WITH_AVX512 static void arrange(const Segments& s, const uint8_t* const* tokens, int64_t M, uint8_t* arranged) {
  constexpr int kinds = bytes == 3 ? 3 : 2;
  const int64_t at[3] = {scales_at<bytes>(s), sums_at<bytes>(s), lower_sums_at<bytes>(s)};
  for (int64_t m = 0; m < M; m += TILE, arranged += block_bytes<bytes>(s)) {
    const int64_t count = M - m < TILE ? M - m : TILE;
    for (int64_t line = 0; line < s.padded() / CHUNK * bytes; line++) {
      __m512i v[16];
      for (int64_t j = 0; j < TILE; j++)
        v[j] = j < count ? _mm512_load_si512(tokens[m + j] + line * CHUNK) : _mm512_setzero_si512();
      transpose(v);
      for (int64_t j = 0; j < 16; j++) _mm512_store_si512(arranged + line * TILE_BYTES + j * 64, v[j]);
    }
    float* floats = (float*)(arranged + block_floats<bytes>(s));
    for (int64_t i = 0; i < s.count; i++)
      for (int kind = 0; kind < kinds; kind++)
        for (int64_t j = 0; j < TILE; j++)
          floats[(i * kinds + kind) * TILE + j] = j < count ? ((const float*)(tokens[m + j] + at[kind]))[i] : 0;
  }
}

// --- products -------------------------------------------------------------------------------------------------------

// One segment's codes of a tile of the weight, [half][chunk][16 outputs][64 inputs].
template <int bits>
WITH_AVX512 static inline void fill_rows(const Packed& p, const Segments& s, int64_t i, const Rows& rows,
                                         const Unpacker<bits>& unpack, __m512i* tile) {
  const int64_t stride = p.row_bytes();
  for (int h = 0; h < 2; h++) {
    int64_t rest = s.size(i);
    for (int64_t c = 0; c < s.chunks; c++, rest -= CHUNK, tile += TILE) {
      const int64_t n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
      const uint8_t* codes = p.codes + rows.first[h] * stride + (s.start(i) + c * CHUNK) / 8 * bits;
      const int64_t valid = n ? rows.valid[h] : 0;
      for (int64_t r = 0; r < valid; r++, codes += stride) {
        tile[r] = unpack(unpack.load(codes, n), 0);
        _mm_prefetch((const char*)codes + TILE * stride, _MM_HINT_T0);  // the same position in the next tile
      }
      for (int64_t r = valid; r < TILE; r++) tile[r] = _mm512_setzero_si512();
    }
  }
}

// sums [byte][half][16 outputs][16 tokens] of one segment: its codes times a block's bytes at `tokens`.
template <int bytes>
WITH_AMX static inline void multiply_tile(const __m512i* codes, int64_t chunks, const uint8_t* tokens, int32_t* sums) {
  constexpr int64_t size = TILE * TILE;
  const __m512i* upper = codes + chunks * TILE;  // the second half
  _tile_zero(0);
  _tile_zero(1);
  if (bytes > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if (bytes > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
  for (int64_t c = 0; c < chunks; c++, codes += TILE, upper += TILE, tokens += bytes * TILE_BYTES) {
    _tile_loadd(6, codes, 64);
    _tile_loadd(7, tokens, 64);
    _tile_dpbusd(0, 6, 7);
    if (bytes == 3) {  // 6 of 8 tiles are sums
      _tile_loadd(7, tokens + TILE_BYTES, 64);
      _tile_dpbusd(2, 6, 7);
      _tile_loadd(7, tokens + 2 * TILE_BYTES, 64);
      _tile_dpbusd(4, 6, 7);
      _tile_loadd(6, upper, 64);
      _tile_dpbusd(5, 6, 7);
      _tile_loadd(7, tokens + TILE_BYTES, 64);
      _tile_dpbusd(3, 6, 7);
      _tile_loadd(7, tokens, 64);
      _tile_dpbusd(1, 6, 7);
    } else {
      _tile_loadd(5, upper, 64);
      _tile_dpbusd(1, 5, 7);
      if (bytes == 2) {
        _tile_loadd(4, tokens + TILE_BYTES, 64);
        _tile_dpbusd(2, 6, 4);
        _tile_dpbusd(3, 5, 4);
      }
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + size, 64);
  if (bytes > 1) {
    _tile_stored(2, sums + 2 * size, 64);
    _tile_stored(3, sums + 3 * size, 64);
  }
  if (bytes > 2) {
    _tile_stored(4, sums + 4 * size, 64);
    _tile_stored(5, sums + 5 * size, 64);
  }
}

// out [half][16 outputs][16 tokens] gets a segment's share.
template <int bytes>
WITH_AVX512 static inline void add_block(const int32_t* sums, const float* token_floats, const float* scale_and_zero,
                                         __m512* out) {
  const __m512 x_scale = _mm512_load_ps(token_floats), x_sum = _mm512_load_ps(token_floats + TILE);
  const __m512 below = bytes == 3 ? _mm512_load_ps(token_floats + 2 * TILE) : x_sum;
  for (int64_t o = 0; o < 2 * TILE; o++) {
    const __m512 scale = _mm512_set1_ps(scale_and_zero[o]), zero = _mm512_set1_ps(scale_and_zero[2 * TILE + o]);
    __m512i sum[bytes];
    for (int b = 0; b < bytes; b++) sum[b] = _mm512_load_si512(sums + (b * 2 * TILE + o) * TILE);
    out[o] = with_segment<bytes>(out[o], sum, scale, zero, x_scale, x_sum, below);
  }
}

// `tokens[0]` is where `arrange` has put them.
template <int bits, int bytes>
WITH_AMX static void many(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M, const Rows& rows,
                          float* out) {
  const Unpacker<bits> unpack;
  alignas(64) __m512i codes[MAX_SEGMENT / CHUNK * 2 * TILE];
  alignas(64) int32_t sums[bytes * 2 * TILE * TILE];
  const int64_t blocks = (M + TILE - 1) / TILE, block = block_bytes<bytes>(s), kinds = bytes == 3 ? 3 : 2;
  __m512* scales = (__m512*)scratch(SCALES, size_t(p.groups()) * 4 * sizeof(__m512));
  tile_scales(p, rows, scales);
  __m512* results = (__m512*)scratch(BLOCKS, size_t(blocks * 2 * TILE) * sizeof(__m512));
  std::memset(results, 0, size_t(blocks * 2 * TILE) * sizeof(__m512));
  configure();
  for (int64_t i = 0; i < s.count; i++) {
    fill_rows<bits>(p, s, i, rows, unpack, codes);
    const float* scale_and_zero = (const float*)(scales + i / s.per_group * 4);
    for (int64_t b = 0; b < blocks; b++) {
      const uint8_t* at = tokens[0] + b * block;
      multiply_tile<bytes>(codes, s.chunks, at + i * s.chunks * bytes * TILE_BYTES, sums);
      const float* floats = (const float*)(at + block_floats<bytes>(s)) + i * kinds * TILE;
      add_block<bytes>(sums, floats, scale_and_zero, results + b * 2 * TILE);
    }
  }
  _tile_release();
  for (int64_t b = 0; b < blocks; b++)
    for (int h = 0; h < 2; h++) {
      __m512i v[16];
      for (int64_t o = 0; o < TILE; o++) v[o] = _mm512_castps_si512(results[(b * 2 + h) * TILE + o]);
      transpose(v);
      for (int64_t j = 0; j < TILE && b * TILE + j < M; j++)
        _mm512_storeu_si512(out + (b * TILE + j) * 2 * TILE + h * TILE, v[j]);
    }
}

}  // namespace amx
}  // namespace eacmoe
#endif
#endif

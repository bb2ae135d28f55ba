// All activations on CPUs with AVX512, VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// Activations are signed bytes, with one scale for each token and segment: one byte (the int8 option); two for bfloat16
// and float16, 256 times an upper byte plus a lower one; or three for float32. The rounding error of two (1 in 65279 of
// the segment's largest) is far below the rounding of the result, that of three (1 in 16.7 million) like float32's. Codes
// of any width are unsigned bytes; VNNI multiplies both and sums in 32 bits, exactly (256 * 255 * 32639 < 2^31). Zero
// points are taken off afterwards, through the sum of a segment's activations.
//
// Two instructions turn 64 codes of any width into 64 bytes: spread `bits` bytes into each quadword, shift every byte
// of it into place; a third masks its neighbours' bits.
//
// Few tokens: a row's codes are multiplied with the tokens lane by lane (lanes hold inputs). Many tokens: the codes of
// 2 x 16 rows are transposed into a tile (lanes hold outputs), and every token is multiplied with the tile. CPUs with AMX
// (Sapphire Rapids and later) multiply 16 tokens with a tile at once.
#pragma once
#if defined(__x86_64__)
#include "amx_many.h"
#include "avx512_few.h"
#include "avx512_many.h"

namespace eacmoe {
namespace avx512 {

template <int bits, int bytes, bool tiles>
static void multiply_bits(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                          const Rows& rows, float* out) {
  static_assert(FEW == 4);
  switch (M) {
    case 1: return few<bits, bytes, 1>(p, s, tokens, rows, out);
    case 2: return few<bits, bytes, 2>(p, s, tokens, rows, out);
    case 3: return few<bits, bytes, 3>(p, s, tokens, rows, out);
    case 4: return few<bits, bytes, 4>(p, s, tokens, rows, out);
  }
#if defined(HAS_AMX)
  if (tiles && M >= amx::FROM) return amx::many<bits, bytes>(p, s, tokens, M, rows, out);
#endif
  many<bits, bytes>(p, s, tokens, M, rows, out);
}

template <int bytes, bool tiles>
static void multiply(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                     const Rows& rows, float* out) {
  with_bits(p.bits, [&](auto bits) { multiply_bits<bits, bytes, tiles>(p, s, tokens, M, rows, out); });
}

#if defined(HAS_AMX)
template <int bytes>
static const Engine with_tiles = {token_bytes<bytes>, prepare<bytes>, multiply<bytes, true>,
                                  amx::FROM, amx::arranged_bytes<bytes>, amx::arrange<bytes>};
#endif
template <int bytes>
static const Engine engine = {token_bytes<bytes>, prepare<bytes>, multiply<bytes, false>};

}  // namespace avx512
}  // namespace eacmoe
#endif

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
#include "avx2_few.h"
#include "avx2_many.h"

namespace eacmoe {
namespace avx2 {

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
  with_bits(p.bits, [&](auto bits) {
    constexpr Form chosen = form == BYTES && bits() > 4 ? WORDS : form;
    multiply_bits<bits, form, chosen>(p, s, tokens, M, rows, out);
  });
}

static const Engine floats = {token_bytes<FLOATS>, prepare_floats, multiply<FLOATS>};
static const Engine words = {token_bytes<WORDS>, prepare<WORDS>, multiply<WORDS>};
static const Engine bytes = {token_bytes<BYTES>, prepare<BYTES>, multiply<BYTES>};

}  // namespace avx2
}  // namespace eacmoe
#endif

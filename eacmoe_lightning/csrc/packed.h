// Shared by all kernels: a packed weight, its division into segments, and the interface of an engine.
//
// Letters: M tokens, O outputs (rows of a weight), I inputs, F expert width, D hidden, E experts, K top_k.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace eacmoe {

// One weight [O, I], packed as on disk (packing.py): eight codes in `bits` bytes, row after row; per row and group of
// inputs a float16 scale and a uint8 zero point. w = (code - zero) * scale.
struct Packed {
  const uint8_t* codes;
  const uint16_t* scale;
  const uint8_t* zero;
  const float* bias;  // [O] or null
  int64_t rows, cols;
  int32_t group, bits;

  int64_t groups() const { return cols / group; }
  int64_t row_bytes() const { return cols / 8 * bits; }
  // The next expert of a stack; it has the same bits unless the caller changes them.
  Packed following() const {
    Packed p = *this;
    p.codes += rows * row_bytes();
    p.scale += rows * groups();
    p.zero += rows * groups();
    if (bias) p.bias += rows;
    return p;
  }
};

// Inputs are processed in segments: parts of one group, at most MAX_SEGMENT long, padded with zeros to whole chunks.
constexpr int CHUNK = 64, MAX_SEGMENT = 256;

struct Segments {
  int64_t cols, group;
  int64_t length, per_group, count, chunks;  // inputs per segment; segments per group, in all; chunks per segment

  explicit Segments(const Packed& p) : cols(p.cols), group(p.group) {
    length = group < MAX_SEGMENT ? group : MAX_SEGMENT;
    per_group = (group + length - 1) / length;
    count = cols / group * per_group;
    chunks = (length + CHUNK - 1) / CHUNK;
  }
  int64_t start(int64_t s) const { return s / per_group * group + s % per_group * length; }
  int64_t size(int64_t s) const {
    int64_t rest = group - s % per_group * length;
    return rest < length ? rest : length;
  }
  int64_t padded() const { return count * chunks * CHUNK; }
};

constexpr int TILE = 16;  // outputs of half a tile; a tile has two halves, for example gate and up rows

// The rows of a tile. valid[1] <= valid[0]. The next tile has the next 16 rows in both halves.
struct Rows {
  int64_t first[2], valid[2];
};

// each(width), where the type of `width` is std::integral_constant of the bits, from 2 to 8.
template <class Each>
static inline void with_bits(int32_t bits, const Each& each) {
  switch (bits) {
    case 2: return each(std::integral_constant<int, 2>());
    case 3: return each(std::integral_constant<int, 3>());
    case 4: return each(std::integral_constant<int, 4>());
    case 5: return each(std::integral_constant<int, 5>());
    case 6: return each(std::integral_constant<int, 6>());
    case 7: return each(std::integral_constant<int, 7>());
    case 8: return each(std::integral_constant<int, 8>());
  }
}

// Multiplies tokens with weights, for one instruction set and one type of activations.
struct Engine {
  // Size of one prepared token.
  int64_t (*token_bytes)(const Segments&);
  // Writes one token [I] in the form that `multiply` reads.
  void (*prepare)(const float* x, const Segments&, uint8_t* prepared);
  // out[m * 2 * TILE + h * TILE + i] = <token m, row first[h] + i>, for i < valid[h], h < 2 and m < M; without bias.
  void (*multiply)(const Packed&, const Segments&, const uint8_t* const* tokens, int64_t M, const Rows&, float* out);
  // With so many tokens or more, tokens[0] is a copy of them all that `arrange` has made, `arranged_bytes` long.
  int64_t arranged_from = INT64_MAX;
  int64_t (*arranged_bytes)(const Segments&, int64_t M) = nullptr;
  void (*arrange)(const Segments&, const uint8_t* const* tokens, int64_t M, uint8_t* arranged) = nullptr;
};

// Float32 activations: inputs, segments padded with zeros.
inline int64_t float_bytes(const Segments& s) { return s.padded() * 4; }
inline void prepare_floats(const float* x, const Segments& s, uint8_t* prepared) {
  float* out = (float*)prepared;
  const int64_t padded = s.chunks * CHUNK;
  for (int64_t i = 0; i < s.count; i++, out += padded) {
    std::memcpy(out, x + s.start(i), size_t(s.size(i)) * 4);
    std::memset(out + s.size(i), 0, size_t(padded - s.size(i)) * 4);
  }
}

constexpr int64_t KEYS = 256;  // of a chunk

// Some keys [length, width] and values [length, value_width], float32 or bfloat16; mask bool [length] or null. Strides
// are in elements.
struct Chunk {
  const void *keys, *values;
  const uint8_t* mask;
  int64_t key_stride, value_stride, length, width, value_width;
};

// Scratch memory of the calling thread, 64-byte aligned. It is kept from call to call, because fresh pages would cost
// more than the arithmetic on them. A larger request loses the slot's content.
enum Slot { SCALES, ROW, OUT_TILE, SUMS, TOKENS_IN, HIDDEN, TOKENS_INNER, ARRANGED, BLOCKS, SLOTS };
uint8_t* scratch(Slot slot, size_t bytes);

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    float value = float(mantissa) * (1.0f / 16777216);
    return sign ? -value : value;
  }
  return as_float(bits);
}

inline float bf16_to_float(uint16_t b) { return as_float(uint32_t(b) << 16); }

inline uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace eacmoe

// float32 activations on any CPU: rows are decoded to float32 segments and multiplied with the compiler's vector types.
//
// Included after small.h, where ISA and the others stand for the instructions that every CPU has; AVX2 and AVX512 have
// engines of their own.
namespace eacmoe {
namespace ISA {

typedef float Floats8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

constexpr int64_t BLOCK = 4;  // tokens for which a decoded segment is read once

// Decodes codes [n], n a multiple of 8, to (code - zero) * scale.
template <int bits>
ISA_TARGET static inline void decode(const uint8_t* codes, int64_t n, float scale, float zero, float* out) {
  const uint32_t mask = (1u << bits) - 1;
  const Words8 shift = {0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits};
  for (int64_t k = 0; k < n; k += 8, codes += bits) {
    uint64_t word = 0;
    for (int i = 0; i < bits; i++) word |= uint64_t(codes[i]) << (8 * i);  // memcpy would stall on store forwarding
    const uint32_t low = uint32_t(word), high = uint32_t(word >> (4 * bits));
    Words8 four = {low, low, low, low, high, high, high, high};
    Ints8 code = Ints8((four >> shift) & mask);
    Floats8 value = (__builtin_convertvector(code, Floats8) - zero) * scale;
    std::memcpy(out + k, &value, 32);
  }
}

// out[m * 2 * TILE] += <x[m], w> for `count` tokens.
template <int64_t count>
ISA_TARGET static inline void dot(const float* const* x, const float* w, int64_t padded, float* out) {
  Floats sums[count][2] = {};
  for (int64_t k = 0; k < padded; k += 2 * ISA_WIDTH)
    for (int64_t m = 0; m < count; m++)
      for (int64_t i = 0; i < 2; i++)
        sums[m][i] += *(const Floats*)(x[m] + k + i * ISA_WIDTH) * *(const Floats*)(w + k + i * ISA_WIDTH);
  for (int64_t m = 0; m < count; m++) out[m * 2 * TILE] += sum(sums[m][0] + sums[m][1]);
}

template <int bits>
ISA_TARGET static void multiply_bits(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M,
                                     const Rows& rows, float* out) {
  const int64_t padded = s.chunks * CHUNK;
  alignas(64) float w[MAX_SEGMENT];
  std::memset(w, 0, sizeof w);
  std::memset(out, 0, size_t(M) * 2 * TILE * 4);
  for (int64_t r = 0; r < 2 * TILE; r++) {
    const int64_t row = rows.first[r / TILE] + r % TILE;
    if (r % TILE >= rows.valid[r / TILE]) continue;
    for (int64_t i = 0; i < s.count; i++) {
      const int64_t g = row * p.groups() + i / s.per_group, size = s.size(i);
      decode<bits>(p.codes + row * p.row_bytes() + s.start(i) / 8 * bits, size, half_to_float(p.scale[g]),
                   float(p.zero[g]), w);
      for (int64_t m = 0; m < M; m += BLOCK) {
        const float* x[BLOCK];
        const int64_t count = M - m < BLOCK ? M - m : BLOCK;
        for (int64_t b = 0; b < count; b++) x[b] = (const float*)tokens[m + b] + i * padded;
        if (count == BLOCK) {
          dot<BLOCK>(x, w, padded, out + m * 2 * TILE + r);
        } else {
          for (int64_t b = 0; b < count; b++) dot<1>(x + b, w, padded, out + (m + b) * 2 * TILE + r);
        }
      }
    }
  }
}

static void multiply(const Packed& p, const Segments& s, const uint8_t* const* tokens, int64_t M, const Rows& rows,
                     float* out) {
  with_bits(p.bits, [&](auto bits) { multiply_bits<bits>(p, s, tokens, M, rows, out); });
}

static const Engine engine = {float_bytes, prepare_floats, multiply};

}  // namespace ISA
}  // namespace eacmoe

// float32 activations on any CPU: rows are decoded to float32 segments and multiplied with the compiler's vector types.
//
// Included once per instruction set, with these defined: ISA (the namespace), ISA_TARGET (the function attribute),
// ISA_WIDTH (floats of a vector).
namespace eacmoe {
namespace ISA {

typedef float Floats __attribute__((vector_size(ISA_WIDTH * 4), aligned(4)));
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

ISA_TARGET static inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < ISA_WIDTH; i++) total += v[i];
  return total;
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
  switch (p.bits) {
    case 2: return multiply_bits<2>(p, s, tokens, M, rows, out);
    case 3: return multiply_bits<3>(p, s, tokens, M, rows, out);
    case 4: return multiply_bits<4>(p, s, tokens, M, rows, out);
    case 5: return multiply_bits<5>(p, s, tokens, M, rows, out);
    case 6: return multiply_bits<6>(p, s, tokens, M, rows, out);
    case 7: return multiply_bits<7>(p, s, tokens, M, rows, out);
    case 8: return multiply_bits<8>(p, s, tokens, M, rows, out);
  }
}

// exp(x) to about 2 units in the last place, in a form that compilers vectorize; clamps x to +-87.
ISA_TARGET static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // n = round(x / ln 2)
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1;
  const int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return y * scale;
}

// gate[i] = f(gate[i]) * up[i], or f(gate[i]) without `up`.
template <class Activation>
ISA_TARGET static void activate(Activation kind, float* gate, const float* up, int64_t n) {
  switch (int(kind)) {
    case 0:  // SiLU
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + exponential(-gate[i]));
      break;
    case 1:  // GELU
      for (int64_t i = 0; i < n; i++) gate[i] = 0.5f * gate[i] * (1 + std::erf(gate[i] * 0.70710678f));
      break;
    case 2:  // GELU by tanh: x * sigmoid(2 y)
      for (int64_t i = 0; i < n; i++) {
        const float y = 1.59576912f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]);
        gate[i] = gate[i] / (1 + exponential(-y));
      }
      break;
    case 3:  // ReLU
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] < 0 ? 0 : gate[i];
      break;
  }
  for (int64_t i = 0; up && i < n; i++) gate[i] *= up[i];
}

static const Engine engine = {float_bytes, prepare_floats, multiply};

}  // namespace ISA
}  // namespace eacmoe

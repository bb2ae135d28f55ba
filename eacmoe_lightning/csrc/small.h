// What one token needs beside the packed products: norms, and small dense matrices such as a router's.
//
// Included once per instruction set, as portable.h is, with ISA, ISA_TARGET and ISA_WIDTH defined.
namespace eacmoe {
namespace ISA {

typedef uint16_t Halves __attribute__((vector_size(ISA_WIDTH * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(ISA_WIDTH * 4)));

// <x, w> with w [n] in bfloat16; sums in float32.
ISA_TARGET static float dot_bf16(const float* x, const uint16_t* w, int64_t n) {
  Floats sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * ISA_WIDTH <= n; k += 2 * ISA_WIDTH) {
    for (int64_t i = 0; i < 2; i++) {
      const Words wide = __builtin_convertvector(*(const Halves*)(w + k + i * ISA_WIDTH), Words) << 16;
      sums[i] += *(const Floats*)(x + k + i * ISA_WIDTH) * Floats(wide);
    }
  }
  float rest = 0;
  for (; k < n; k++) rest += x[k] * bf16_to_float(w[k]);
  return sum(sums[0] + sums[1]) + rest;
}

ISA_TARGET static float dot_float(const float* x, const float* w, int64_t n) {
  Floats sums[2] = {};
  int64_t k = 0;
  for (; k + 2 * ISA_WIDTH <= n; k += 2 * ISA_WIDTH)
    for (int64_t i = 0; i < 2; i++)
      sums[i] += *(const Floats*)(x + k + i * ISA_WIDTH) * *(const Floats*)(w + k + i * ISA_WIDTH);
  float rest = 0;
  for (; k < n; k++) rest += x[k] * w[k];
  return sum(sums[0] + sums[1]) + rest;
}

// x[i] *= factor, then, if `rounded`, to bfloat16.
ISA_TARGET static void multiply_by(float factor, bool rounded, float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
  for (int64_t i = 0; rounded && i < n; i++) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

}  // namespace ISA
}  // namespace eacmoe

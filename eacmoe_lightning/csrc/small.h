// What is needed beside the packed products, in the compiler's vector types: numbers on their way in and out,
// activations, and for one token norms and small dense matrices such as a router's.
//
// Included once per instruction set, with these defined: ISA (the namespace), ISA_TARGET (the function attribute),
// ISA_WIDTH (floats of a vector).
namespace eacmoe {
namespace ISA {

typedef float Floats __attribute__((vector_size(ISA_WIDTH * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(ISA_WIDTH * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(ISA_WIDTH * 4)));

ISA_TARGET static inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < ISA_WIDTH; i++) total += v[i];
  return total;
}

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

template <class Dtype>
ISA_TARGET static void read(const void* from, Dtype dtype, int64_t at, int64_t n, float* to) {
  switch (int(dtype)) {
    case 0: std::memcpy(to, (const float*)from + at, size_t(n) * 4); break;
    case 1:
      for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(((const uint16_t*)from)[at + i]);
      break;
    case 2:
      for (int64_t i = 0; i < n; i++) to[i] = half_to_float(((const uint16_t*)from)[at + i]);
      break;
  }
}

template <class Dtype>
ISA_TARGET static void write(const float* from, int64_t n, void* to, Dtype dtype, int64_t at) {
  switch (int(dtype)) {
    case 0: std::memcpy((float*)to + at, from, size_t(n) * 4); break;
    case 1:
      for (int64_t i = 0; i < n; i++) ((uint16_t*)to)[at + i] = float_to_bf16(from[i]);
      break;
    case 2:
      for (int64_t i = 0; i < n; i++) ((_Float16*)to)[at + i] = (_Float16)from[i];
      break;
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
  return y * as_float(uint32_t(int32_t(n) + 127) << 23);
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

}  // namespace ISA
}  // namespace eacmoe

// The CPU kernels' plain C interface, loaded through ctypes (runtime/kernels.py). No dependencies.

#include "products.h"
#include "attention.h"
#include "decode_step.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raise this whenever the interface below changes.
EXPORT int eacmoe_interface() { return 7; }

EXPORT int eacmoe_level() { return eacmoe::best_level(); }

// From now on the kernels use the threads behind this `GOMP_parallel`; null: their own.
EXPORT void eacmoe_use_openmp(void* parallel) {
  eacmoe::openmp = eacmoe::Parallel(parallel), eacmoe::openmp_owner = eacmoe::this_process();
}

EXPORT void eacmoe_linear(int level, int int8, const eacmoe::Packed* p, const void* x, int dtype, int64_t M, void* out,
                          int threads) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::linear(eacmoe::kit(eacmoe::Level(level), d, int8), *p, x, d, M, out, threads);
}

// up_bits and down_bits: the bits of each expert; null: all have those of the stack.
EXPORT void eacmoe_experts(int level, int int8, const eacmoe::Packed* up, const uint8_t* up_bits,
                           const eacmoe::Packed* down, const uint8_t* down_bits, int gated, int activation,
                           const void* x, int dtype, int64_t N, const int64_t* ids, const float* weights, int64_t K,
                           int64_t E, void* out, int threads) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::experts(eacmoe::kit(eacmoe::Level(level), d, int8), eacmoe::unstack(*up, up_bits, E),
                  eacmoe::unstack(*down, down_bits, E), gated, eacmoe::Activation(activation), x, d, N, ids, weights,
                  K, out, threads);
}

EXPORT void eacmoe_mlp(int level, int int8, const eacmoe::Packed* gate, const eacmoe::Packed* up,
                       const eacmoe::Packed* down, int activation, const void* x, int dtype, int64_t M, void* out,
                       int threads) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::mlp(eacmoe::kit(eacmoe::Level(level), d, int8), *gate, *up, *down, eacmoe::Activation(activation), x, d, M,
              out, threads);
}

EXPORT void eacmoe_dense(int level, const eacmoe::Dense* w, const void* x, int dtype, int64_t N, void* out,
                         int threads) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::dense(eacmoe::kit(eacmoe::Level(level), d, false), *w, x, d, N, out, threads);
}

EXPORT void eacmoe_route(int level, const eacmoe::Dense* w, const eacmoe::Choice* choice, const void* x, int dtype,
                         int64_t N, void* logits, int logits_dtype, int64_t* ids, void* weights, int weights_dtype,
                         int threads) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::route(eacmoe::kit(eacmoe::Level(level), d, false), *w, *choice, x, d, N, logits,
                eacmoe::Dtype(logits_dtype), ids, weights, eacmoe::Dtype(weights_dtype), threads);
}

EXPORT void eacmoe_norm(int level, int form, const void* weight, int weight_dtype, float eps, const void* x, int dtype,
                        int64_t N, int64_t D, void* out) {
  const auto d = eacmoe::Dtype(dtype);
  eacmoe::norm(eacmoe::kit(eacmoe::Level(level), d, false), eacmoe::Norm(form), weight, eacmoe::Dtype(weight_dtype),
               eps, x, d, N, D, out);
}

// For AVX512 alone.
EXPORT void eacmoe_attention(const eacmoe::Attention* a, void* out, int threads) {
#if defined(__x86_64__)
  eacmoe::attention(*a, out, threads);
#endif
}

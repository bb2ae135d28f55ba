// The inner loops of GPTQ on CPU: a plain C interface, loaded through ctypes (column_loop.py). No dependencies.

#include <cmath>
#include <cstdint>
#include <cstdlib>

namespace eacmoe {

// S problems of `rows` rows and one group of g columns (a multiple of 4). Row r of problem p is row p * rows + r.
struct Columns {
  const float* value;    // rows of g values, `value_stride` floats apart
  const float* old;      // rows of g values, `old_stride` floats apart
  const float* factor;   // [S, g, g], read only right of the diagonal; null: columns are independent
  const float* weight;   // [S, g], weights of the squared rounding errors
  const float* scale;    // [S, rows, candidates]
  const float* zero;     // [S, rows, candidates]
  uint8_t* codes;        // [S, rows, g]; null: only `chosen` is computed
  float* errors;         // [S, rows, g]
  int32_t* chosen;       // [S, rows], the candidate with the least loss, the first one on a tie
  int64_t problems, rows, columns, value_stride, old_stride, candidates;
  float top;  // the largest code
};

}  // namespace eacmoe

#define ISA baseline
#define ISA_TARGET
#define ISA_WIDTH 4
#include "column_loop.h"
#if defined(__x86_64__)
#define ISA avx2
#define ISA_TARGET __attribute__((target("avx2,fma")))
#define ISA_WIDTH 8
#include "column_loop.h"
#define ISA avx512
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ISA_WIDTH 16
#include "column_loop.h"
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The instruction set to use on this CPU: 0 baseline, 1 AVX2, 2 AVX512.
EXPORT int eacmoe_column_loop_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Processes rows [first, last), numbered across all problems.
EXPORT void eacmoe_column_loop(int level, const eacmoe::Columns* c, int64_t first, int64_t last) {
  float* area = (float*)std::aligned_alloc(64, size_t(c->columns) * 4 * 48 * 4);
#if defined(__x86_64__)
  if (level == 2) eacmoe::avx512::columns(*c, first, last, area);
  if (level == 1) eacmoe::avx2::columns(*c, first, last, area);
#endif
  if (level == 0) eacmoe::baseline::columns(*c, first, last, area);
  std::free(area);
}

// The engines for all instruction sets, and which of them a call takes.
#pragma once

#include <cstdlib>

#include "packed.h"

#define ISA baseline
#define ISA_TARGET
#define ISA_WIDTH 4
#include "small.h"
#include "portable.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#if defined(__x86_64__)
#include <immintrin.h>
#define ISA avx2_portable
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA_WIDTH 8
#include "small.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#define ISA avx512f
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ISA_WIDTH 16
#include "small.h"
#include "attend.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#include "avx2.h"
#include "avx512.h"
#endif

namespace eacmoe {

uint8_t* scratch(Slot slot, size_t bytes) {
  struct Area {
    void* at = nullptr;
    size_t size = 0;
    ~Area() { std::free(at); }
  };
  thread_local Area areas[SLOTS];
  Area& area = areas[slot];
  if (area.size < bytes) {
    std::free(area.at);
    area.size = (bytes + 4095) / 4096 * 4096;
    area.at = std::aligned_alloc(64, area.size);
  }
  return (uint8_t*)area.at;
}

enum Level { PORTABLE, AVX2, AVX512, AMX };
enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Activation { SILU, GELU, GELU_TANH, RELU };

static Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(HAS_AMX)
    if (amx::allowed()) return AMX;
#endif
    return AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return PORTABLE;
}

struct Kit {
  const Engine* engine;
  void (*activate)(Activation, float* gate, const float* up, int64_t n);
  float (*dot_bf16)(const float* x, const uint16_t* w, int64_t n);
  float (*dot_float)(const float* x, const float* w, int64_t n);
  void (*multiply_by)(float factor, bool rounded, float* x, int64_t n);
  void (*read)(const void* from, Dtype dtype, int64_t at, int64_t n, float* to);
  void (*write)(const float* from, int64_t n, void* to, Dtype dtype, int64_t at);
};

#define EACMOE_KIT(engine, isa)                                                                  \
  Kit {                                                                                         \
    engine, isa::activate<Activation>, isa::dot_bf16, isa::dot_float, isa::multiply_by,         \
        isa::read<Dtype>, isa::write<Dtype>                                                     \
  }

static Kit kit(Level level, Dtype dtype, bool int8) {
#if defined(HAS_AMX)
  if (level == AMX) {
    const Engine* engine = int8               ? &avx512::with_tiles<1>
                           : dtype == FLOAT32 ? &avx512::with_tiles<3>
                                              : &avx512::with_tiles<2>;
    return EACMOE_KIT(engine, avx512f);
  }
#endif
#if defined(__x86_64__)
  if (level == AVX512) {
    const Engine* engine = int8 ? &avx512::engine<1> : dtype == FLOAT32 ? &avx512::engine<3> : &avx512::engine<2>;
    return EACMOE_KIT(engine, avx512f);
  }
  if (level == AVX2) {
    const Engine* engine = int8 ? &avx2::bytes : dtype == FLOAT32 ? &avx2::floats : &avx2::words;
    return EACMOE_KIT(engine, avx2_portable);
  }
#endif
  return EACMOE_KIT(&baseline::engine, baseline);
}

}  // namespace eacmoe

// Packed linears and packed experts on CPU: a plain C interface, loaded through ctypes (kernels.py). No dependencies.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cmath>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "packed.h"

#define ISA baseline
#define ISA_TARGET
#define ISA_WIDTH 4
#include "portable.h"
#include "small.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#if defined(__x86_64__)
#define ISA avx2_portable
#define ISA_TARGET __attribute__((target("avx2,fma,f16c")))
#define ISA_WIDTH 8
#include "portable.h"
#include "small.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#define ISA avx512f
#define ISA_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define ISA_WIDTH 16
#include "portable.h"
#include "small.h"
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH
#include "avx2.h"
#include "avx512.h"
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
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

// --- threads ------------------------------------------------------------------------------------------------------

// One loop: task(0) .. task(tasks - 1), each once. Every thread takes the next tasks when it is free.
struct Loop {
  void (*job)(const void*, int64_t);
  const void* context;
  int64_t tasks, grain;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < tasks;)
      for (int64_t i = first; i < first + grain && i < tasks; i++) job(context, i);
  }
};

// The caller and up to threads - 1 helpers. The caller waits only for helpers that have started, so one that the system
// has put to sleep delays nothing; OpenMP's threads wait for each other, which on a busy machine takes longer than the
// work. Idle helpers look for work for as long as the pauses of a decode step last, then sleep.
class Pool {
 public:
  void run(Loop& loop, int threads) {
    if (!busy_.try_lock()) return loop.work();  // another thread's call has the helpers
    start(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop, wanted_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      wanted_ = 0;
    }
    while (active_.load(std::memory_order_acquire)) std::this_thread::yield();
    busy_.unlock();
  }

 private:
  static constexpr std::chrono::microseconds AWAKE{300};

  void start(int helpers) {
    while (int(helpers_.size()) < helpers) {
      helpers_.emplace_back([this] { help(); });
      helpers_.back().detach();
    }
  }

  void help() {
    uint64_t seen = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + AWAKE;
      while (generation_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) {
        for (int i = 0; i < 32 && generation_.load(std::memory_order_acquire) == seen; i++) {
#if defined(__x86_64__)
          __builtin_ia32_pause();
#endif
        }
        if (generation_.load(std::memory_order_acquire) == seen) std::this_thread::yield();  // to whoever needs the core
      }
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (wanted_ == 0) continue;
        wanted_--;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      loop_->work();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  int wanted_ = 0;
  Loop* loop_ = nullptr;
};

static long this_process() {
#if defined(__linux__) || defined(__APPLE__)
  return long(getpid());
#else
  return 0;
#endif
}

// The pool of this process: a fork has none of its parent's helpers. Never freed: helpers may outlive static objects.
static Pool& pool() {
  static std::mutex mutex;
  static Pool* own = nullptr;
  static long owner = -1;
  std::lock_guard<std::mutex> lock(mutex);
  if (const long process = this_process(); process != owner) own = new Pool, owner = process;
  return *own;
}

// `GOMP_parallel` of torch's OpenMP, which runs a function on each of its threads; or null. Where these threads spin
// for long, helpers of our own would fight them for the cores. A fork cannot use its parent's.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
static Parallel openmp = nullptr;
static long openmp_owner = -1;

template <class Task>
static void run(int64_t tasks, int threads, const Task& task) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  Loop loop;
  loop.job = [](const void* context, int64_t i) { (*(const Task*)context)(i); };
  loop.context = &task, loop.tasks = tasks;
  loop.grain = tasks / (threads * 16) + 1;  // neighbouring tasks read neighbouring memory
  if (openmp && this_process() == openmp_owner)
    openmp([](void* shared) { ((Loop*)shared)->work(); }, &loop, unsigned(threads), 0);
  else
    pool().run(loop, threads);
}

// --- choosing an engine ---------------------------------------------------------------------------------------------

enum Level { PORTABLE, AVX2, AVX512 };
enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Activation { SILU, GELU, GELU_TANH, RELU };

static Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return AVX512;
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
};

#define EACMOE_KIT(engine, isa) \
  Kit { engine, isa::activate<Activation>, isa::dot_bf16, isa::dot_float, isa::multiply_by }

static Kit kit(Level level, Dtype dtype, bool int8) {
#if defined(__x86_64__)
  if (level == AVX512) {
    const Engine* engine = int8 ? &avx512::bytes : dtype == FLOAT32 ? &avx512f::engine : &avx512::words;
    return EACMOE_KIT(engine, avx512f);
  }
  if (level == AVX2) {
    const Engine* engine = int8 ? &avx2::bytes : dtype == FLOAT32 ? &avx2::floats : &avx2::words;
    return EACMOE_KIT(engine, avx2_portable);
  }
#endif
  return EACMOE_KIT(&baseline::engine, baseline);
}

// --- numbers in and out -----------------------------------------------------------------------------------------------

static void read(const void* from, Dtype dtype, int64_t at, int64_t n, float* to) {
  switch (dtype) {
    case FLOAT32: std::memcpy(to, (const float*)from + at, size_t(n) * 4); break;
    case BFLOAT16:
      for (int64_t i = 0; i < n; i++) to[i] = bf16_to_float(((const uint16_t*)from)[at + i]);
      break;
    case FLOAT16:
      for (int64_t i = 0; i < n; i++) to[i] = half_to_float(((const uint16_t*)from)[at + i]);
      break;
  }
}

static void write(const float* from, int64_t n, void* to, Dtype dtype, int64_t at) {
  switch (dtype) {
    case FLOAT32: std::memcpy((float*)to + at, from, size_t(n) * 4); break;
    case BFLOAT16:
      for (int64_t i = 0; i < n; i++) ((uint16_t*)to)[at + i] = float_to_bf16(from[i]);
      break;
    case FLOAT16:
      for (int64_t i = 0; i < n; i++) ((_Float16*)to)[at + i] = (_Float16)from[i];
      break;
  }
}

constexpr int64_t TOKENS = 16;  // tokens that one task prepares

// Tokens [n, cols], prepared for an engine.
struct Prepared {
  Prepared(Slot slot, const Engine& engine, const Segments& segments, const void* x, Dtype dtype, int64_t n,
           int threads)
      : stride((engine.token_bytes(segments) + 63) / 64 * 64), at(scratch(slot, size_t(n * stride))) {
    const int64_t cols = segments.cols;
    run((n + TOKENS - 1) / TOKENS, threads, [&](int64_t task) {
      float* row = (float*)scratch(ROW, size_t(cols) * 4);
      for (int64_t i = task * TOKENS; i < n && i < (task + 1) * TOKENS; i++) {
        if (dtype != FLOAT32) read(x, dtype, i * cols, cols, row);
        engine.prepare(dtype == FLOAT32 ? (const float*)x + i * cols : row, segments, token(i));
      }
    });
  }
  uint8_t* token(int64_t i) const { return at + i * stride; }
  std::vector<const uint8_t*> tokens(int64_t n) const {
    std::vector<const uint8_t*> all;
    for (int64_t i = 0; i < n; i++) all.push_back(token(i));
    return all;
  }

  const int64_t stride;
  uint8_t* const at;
};

static void add_bias(const Packed& p, const Rows& rows, int64_t M, float* out) {
  if (!p.bias) return;
  for (int64_t m = 0; m < M; m++)
    for (int h = 0; h < 2; h++)
      for (int64_t i = 0; i < rows.valid[h]; i++) out[(m * 2 + h) * TILE + i] += p.bias[rows.first[h] + i];
}

// Tile `i` of a weight: 16 rows of the weight's first half and 16 of its second.
static Rows halves(int64_t i, int64_t rows) {
  const int64_t middle = (rows + 1) / 2, lower = middle - i * TILE, upper = rows - middle - i * TILE;
  return {{i * TILE, middle + i * TILE}, {lower < TILE ? lower : TILE, upper < 0 ? 0 : upper < TILE ? upper : TILE}};
}

static int64_t num_tiles(int64_t rows) { return ((rows + 1) / 2 + TILE - 1) / TILE; }

// --- linear ---------------------------------------------------------------------------------------------------------

// out [M, rows] from prepared tokens.
static void multiply_all(const Kit& kit, const Packed& p, const Segments& segments, const Prepared& prepared,
                         int64_t M, void* out, Dtype dtype, int threads) {
  const std::vector<const uint8_t*> tokens = prepared.tokens(M);
  run(num_tiles(p.rows), threads, [&](int64_t task) {
    const Rows rows = halves(task, p.rows);
    float* tile = (float*)scratch(OUT_TILE, size_t(M) * 2 * TILE * 4);
    kit.engine->multiply(p, segments, tokens.data(), M, rows, tile);
    add_bias(p, rows, M, tile);
    for (int64_t m = 0; m < M; m++)
      for (int h = 0; h < 2; h++)
        write(tile + (m * 2 + h) * TILE, rows.valid[h], out, dtype, m * p.rows + rows.first[h]);
  });
}

static void linear(const Kit& kit, const Packed& p, const void* x, Dtype dtype, int64_t M, void* out, int threads) {
  const Segments segments(p);
  const Prepared prepared(TOKENS_IN, *kit.engine, segments, x, dtype, M, threads);
  multiply_all(kit, p, segments, prepared, M, out, dtype, threads);
}

// --- a gated MLP ----------------------------------------------------------------------------------------------------

// down(activation(gate(x)) * up(x)), for a shared expert or a dense block: one call instead of three. gate and up
// [F, D] have one group size, down [D, F].
static void mlp(const Kit& kit, const Packed& gate, const Packed& up, const Packed& down, Activation activation,
                const void* x, Dtype dtype, int64_t M, void* out, int threads) {
  const int64_t F = gate.rows;
  const Segments segments(gate), down_segments(down);
  const Engine& engine = *kit.engine;
  const Prepared prepared(TOKENS_IN, engine, segments, x, dtype, M, threads);
  const std::vector<const uint8_t*> tokens = prepared.tokens(M);
  float* hidden = (float*)scratch(HIDDEN, size_t(M * F) * 4);
  run(num_tiles(F), threads, [&](int64_t task) {
    const Rows rows = halves(task, F);
    float* tile = (float*)scratch(OUT_TILE, size_t(M) * 4 * TILE * 4);
    float* upper = tile + M * 2 * TILE;
    engine.multiply(gate, segments, tokens.data(), M, rows, tile);
    engine.multiply(up, segments, tokens.data(), M, rows, upper);
    add_bias(gate, rows, M, tile);
    add_bias(up, rows, M, upper);
    kit.activate(activation, tile, upper, M * 2 * TILE);
    for (int64_t m = 0; m < M; m++)
      for (int h = 0; h < 2; h++)
        std::memcpy(hidden + m * F + rows.first[h], tile + (m * 2 + h) * TILE, size_t(rows.valid[h]) * 4);
  });
  const Prepared inner(TOKENS_INNER, engine, down_segments, hidden, FLOAT32, M, threads);
  multiply_all(kit, down, down_segments, inner, M, out, dtype, threads);
}

// --- experts --------------------------------------------------------------------------------------------------------

// The experts of a stack, which lie one after another: all with the bits of `stack`, or each with those of `bits` [E].
static std::vector<Packed> unstack(const Packed& stack, const uint8_t* bits, int64_t E) {
  std::vector<Packed> experts;
  Packed next = stack;
  for (int64_t e = 0; e < E; e++) {
    if (bits) next.bits = bits[e];
    experts.push_back(next);
    next = next.following();
  }
  return experts;
}

// The routed experts of one block. x [N, D]; ids and weights [N, K], an id outside of 0 .. E - 1 is skipped;
// up [E, 2F or F, D] (gate rows, then up rows), down [E, D, F]; out [N, D]. Sums are in float32, in the order of the
// experts for any number of threads.
static void experts(const Kit& kit, const std::vector<Packed>& up, const std::vector<Packed>& down, bool gated,
                    Activation activation, const void* x, Dtype dtype, int64_t N, const int64_t* ids,
                    const float* weights, int64_t K, void* out, int threads) {
  const int64_t E = int64_t(up.size()), D = up[0].cols, F = down[0].cols;
  const Segments up_segments(up[0]), down_segments(down[0]);
  const Engine& engine = *kit.engine;

  // Sort the (token, choice) pairs by expert.
  std::vector<int64_t> begin(size_t(E) + 1, 0), pairs, active;
  for (int64_t i = 0; i < N * K; i++)
    if (ids[i] >= 0 && ids[i] < E) begin[size_t(ids[i]) + 1]++;
  for (int64_t e = 0; e < E; e++) {
    if (begin[size_t(e) + 1]) active.push_back(e);
    begin[size_t(e) + 1] += begin[size_t(e)];
  }
  pairs.resize(size_t(begin[size_t(E)]));
  std::vector<int64_t> place(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < N * K; i++)
    if (ids[i] >= 0 && ids[i] < E) pairs[size_t(place[size_t(ids[i])]++)] = i;
  const int64_t P = int64_t(pairs.size());

  const Prepared prepared(TOKENS_IN, engine, up_segments, x, dtype, N, threads);
  std::vector<const uint8_t*> tokens(size_t(P), nullptr);
  for (int64_t i = 0; i < P; i++) tokens[size_t(i)] = prepared.token(pairs[size_t(i)] / K);

  // Gate, up and activation. The halves of a tile are 16 gate rows and the matching up rows.
  float* hidden = (float*)scratch(HIDDEN, size_t(P * F) * 4);
  const int64_t up_tasks = gated ? (F + TILE - 1) / TILE : num_tiles(F);
  run(int64_t(active.size()) * up_tasks, threads, [&](int64_t task) {
    const int64_t e = active[size_t(task / up_tasks)], tile_index = task % up_tasks, first = begin[size_t(e)];
    const int64_t M = begin[size_t(e) + 1] - first;
    const Packed& p = up[size_t(e)];
    const Rows rows = halves(tile_index, gated ? 2 * F : F);
    float* tile = (float*)scratch(OUT_TILE, size_t(M) * 2 * TILE * 4);
    engine.multiply(p, up_segments, tokens.data() + first, M, rows, tile);
    add_bias(p, rows, M, tile);
    for (int64_t m = 0; m < M; m++) {
      float* row = tile + m * 2 * TILE;
      kit.activate(activation, row, gated ? row + TILE : nullptr, gated ? TILE : 2 * TILE);
      for (int h = 0; h < (gated ? 1 : 2); h++)
        std::memcpy(hidden + (first + m) * F + rows.first[h], row + h * TILE, size_t(rows.valid[h]) * 4);
    }
  });

  const Prepared inner(TOKENS_INNER, engine, down_segments, hidden, FLOAT32, P, threads);
  tokens = inner.tokens(P);

  // Down. A task owns the output columns of a tile and goes through all experts.
  run(num_tiles(D), threads, [&](int64_t task) {
    const Rows rows = halves(task, D);
    float* sum = (float*)scratch(SUMS, size_t(N) * 2 * TILE * 4);
    std::memset(sum, 0, size_t(N) * 2 * TILE * 4);
    for (int64_t e : active) {
      const int64_t first = begin[size_t(e)], M = begin[size_t(e) + 1] - first;
      const Packed& p = down[size_t(e)];
      float* tile = (float*)scratch(OUT_TILE, size_t(M) * 2 * TILE * 4);
      engine.multiply(p, down_segments, tokens.data() + first, M, rows, tile);
      add_bias(p, rows, M, tile);
      for (int64_t m = 0; m < M; m++) {
        const int64_t pair = pairs[size_t(first + m)];
        float* to = sum + pair / K * 2 * TILE;
        for (int i = 0; i < 2 * TILE; i++) to[i] += weights[pair] * tile[m * 2 * TILE + i];
      }
    }
    for (int64_t n = 0; n < N; n++)
      for (int h = 0; h < 2; h++)
        write(sum + (n * 2 + h) * TILE, rows.valid[h], out, dtype, n * D + rows.first[h]);
  });
}

// --- what lies between the products -----------------------------------------------------------------------------------

// A dense matrix [rows, cols] in float32 or bfloat16, with a float32 bias or null.
struct Dense {
  const void* weight;
  const float* bias;
  int64_t rows, cols;
  int32_t dtype;
};

// out[r] = <x, row r> + bias[r], for one token in float32.
static void dense_row(const Kit& kit, const Dense& w, const float* x, float* out, int threads) {
  constexpr int64_t rows_a_task = 16, worth_sharing = 1 << 19;
  const int64_t tasks = (w.rows + rows_a_task - 1) / rows_a_task;
  run(tasks, w.rows * w.cols < worth_sharing ? 1 : threads, [&](int64_t task) {
    for (int64_t r = task * rows_a_task; r < w.rows && r < (task + 1) * rows_a_task; r++) {
      out[r] = w.dtype == BFLOAT16 ? kit.dot_bf16(x, (const uint16_t*)w.weight + r * w.cols, w.cols)
                                   : kit.dot_float(x, (const float*)w.weight + r * w.cols, w.cols);
      if (w.bias) out[r] += w.bias[r];
    }
  });
}

static void dense(const Kit& kit, const Dense& w, const void* x, Dtype dtype, int64_t N, void* out, int threads) {
  float *row = (float*)scratch(ROW, size_t(w.cols) * 4), *result = (float*)scratch(SUMS, size_t(w.rows) * 4);
  for (int64_t n = 0; n < N; n++) {
    read(x, dtype, n * w.cols, w.cols, row);
    dense_row(kit, w, row, result, threads);
    write(result, w.rows, out, dtype, n * w.rows);
  }
}

// How a router turns its logits into a selection and weights.
struct Choice {
  const float* correction;  // [E], added to the scores for the selection alone; or null
  int64_t chosen;           // experts a token gets
  float scale;              // of the weights
  int32_t sigmoid;          // scores are sigmoids, else a softmax over all experts
  int32_t normalised;       // weights are divided by their sum
  int32_t rounded;          // logits are rounded to bfloat16 first
};

// logits, weights: [N, E] and [N, K] in their dtypes; ids [N, K], best first, the lower id first among equals.
static void route(const Kit& kit, const Dense& w, const Choice& choice, const void* x, Dtype dtype, int64_t N,
                  void* logits, Dtype logits_dtype, int64_t* ids, void* weights, Dtype weights_dtype, int threads) {
  const int64_t E = w.rows, K = choice.chosen;
  float *row = (float*)scratch(ROW, size_t(w.cols) * 4), *logit = (float*)scratch(SUMS, size_t(3 * E + K) * 4);
  float *score = logit + E, *rank = score + E, *chosen = rank + E;
  for (int64_t n = 0; n < N; n++) {
    read(x, dtype, n * w.cols, w.cols, row);
    dense_row(kit, w, row, logit, threads);
    if (choice.rounded) kit.multiply_by(1, true, logit, E);
    write(logit, E, logits, logits_dtype, n * E);
    float most = logit[0], sum = 0;
    for (int64_t e = 1; e < E; e++) most = logit[e] > most ? logit[e] : most;
    for (int64_t e = 0; e < E; e++) {
      score[e] = choice.sigmoid ? 1 / (1 + std::exp(-logit[e])) : std::exp(logit[e] - most);
      sum += score[e];
    }
    for (int64_t e = 0; e < E; e++) {
      if (!choice.sigmoid) score[e] /= sum;
      rank[e] = choice.correction ? score[e] + choice.correction[e] : logit[e];
    }
    float selected = 0;
    for (int64_t k = 0; k < K; k++) {
      int64_t best = 0;
      for (int64_t e = 1; e < E; e++) best = rank[e] > rank[best] ? e : best;
      ids[n * K + k] = best, rank[best] = -INFINITY;
      chosen[k] = score[best], selected += score[best];
    }
    for (int64_t k = 0; k < K; k++) chosen[k] *= choice.scale / (choice.normalised ? selected : 1);
    write(chosen, K, weights, weights_dtype, n * K);
  }
}

enum Norm { ROUNDED, IN_FLOAT, PLUS_ONE };  // weight * round(x / rms); round(weight * x / rms); the same with 1 + weight

// x [N, D] divided by the root of its mean square plus eps, times weight [D].
static void norm(const Kit& kit, Norm form, const void* weight, Dtype weight_dtype, float eps, const void* x,
                 Dtype dtype, int64_t N, int64_t D, void* out) {
  float *row = (float*)scratch(ROW, size_t(2 * D) * 4), *w = row + D;
  read(weight, weight_dtype, 0, D, w);
  for (int64_t i = 0; form == PLUS_ONE && i < D; i++) w[i] += 1;
  for (int64_t n = 0; n < N; n++) {
    read(x, dtype, n * D, D, row);
    const float factor = 1 / std::sqrt(kit.dot_float(row, row, D) / float(D) + eps);
    kit.multiply_by(factor, form == ROUNDED && dtype == BFLOAT16, row, D);
    for (int64_t i = 0; i < D; i++) row[i] *= w[i];
    write(row, D, out, dtype, n * D);
  }
}

}  // namespace eacmoe

// --- the interface ----------------------------------------------------------------------------------------------------

// Raise this whenever the interface below changes.
EXPORT int eacmoe_interface() { return 5; }

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

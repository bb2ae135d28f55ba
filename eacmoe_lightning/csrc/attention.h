// Attention of one new token per sequence to all keys before it (runtime/attention.py).
#pragma once

#include "engines.h"
#include "threads.h"

namespace eacmoe {

// q [B, H, D], k [B, H / G, T, D], v [B, H / G, T, V], mask bool [B, T] or null; strides are in elements.
struct Attention {
  const void *q, *k, *v;
  const uint8_t* mask;
  int64_t batch, heads, kv_heads, length, width, value_width;
  int64_t q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch;
  float scale;
  int32_t dtype;  // FLOAT32 or BFLOAT16
};

#if defined(__x86_64__)
// out [B, H, V]. Each task has a chunk of the keys and all queries that share them, so each key is read once; then the
// chunks' results are put together. The result does not depend on the number of threads.
static void attention(const Attention& a, void* out, int threads) {
  constexpr int64_t worth_sharing = 1 << 17;  // numbers in keys and values
  const int64_t chunks = (a.length + KEYS - 1) / KEYS, G = a.heads / a.kv_heads, D = a.width, V = a.value_width;
  const int64_t tasks = a.batch * a.kv_heads * chunks, item = a.dtype == BFLOAT16 ? 2 : 4;
  if (a.batch * a.kv_heads * a.length * (D + V) < worth_sharing) threads = 1;
  // of each task: best [G], total [G], sums [G, V]
  float* parts = (float*)scratch(HIDDEN, size_t(tasks * G * (V + 2)) * 4);
  run(tasks, threads, [&](int64_t task) {
    const int64_t chunk = task % chunks, h = task / chunks % a.kv_heads, b = task / chunks / a.kv_heads;
    const int64_t first = chunk * KEYS, rest = a.length - first;
    const auto keys = (const uint8_t*)a.k + (b * a.k_batch + h * a.k_head + first * a.k_token) * item;
    const auto values = (const uint8_t*)a.v + (b * a.v_batch + h * a.v_head + first * a.v_token) * item;
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_batch + first : nullptr;
    const Chunk c{keys, values, mask, a.k_token, a.v_token, rest < KEYS ? rest : KEYS, D, V};
    float *q = (float*)scratch(ROW, size_t(G * D) * 4), *score = (float*)scratch(SUMS, size_t(4 * KEYS) * 4);
    for (int64_t g = 0; g < G; g++)
      avx512f::read(a.q, Dtype(a.dtype), b * a.q_batch + (h * G + g) * a.q_head, D, q + g * D);
    for (int64_t i = 0; i < G * D; i++) q[i] *= a.scale;
    float* part = parts + task * G * (V + 2);
    avx512f::attend(c, a.dtype == BFLOAT16, q, G, score, part, part + G, part + 2 * G);
  });
  run(a.batch * a.heads, chunks > 8 ? threads : 1, [&](int64_t row) {
    const int64_t g = row % G;
    const float* first = parts + row / G * chunks * G * (V + 2);
    float *sums = (float*)scratch(OUT_TILE, size_t(V) * 4), best = -INFINITY, total = 0;
    std::memset(sums, 0, size_t(V) * 4);
    for (int64_t i = 0; i < chunks; i++) best = std::fmax(best, first[i * G * (V + 2) + g]);
    for (int64_t i = 0; best > -INFINITY && i < chunks; i++) {
      const float *part = first + i * G * (V + 2), factor = std::exp(part[g] - best), *values = part + 2 * G + g * V;
      total += factor * part[G + g];
      for (int64_t v = 0; v < V; v++) sums[v] += factor * values[v];
    }
    for (int64_t v = 0; total > 0 && v < V; v++) sums[v] /= total;
    avx512f::write(sums, V, out, Dtype(a.dtype), row * V);
  });
}
#endif

}  // namespace eacmoe

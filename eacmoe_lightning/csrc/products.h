// Products with packed weights: a linear, a gated MLP, and the routed experts of a block.
#pragma once

#include "engines.h"
#include "threads.h"

namespace eacmoe {

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

}  // namespace eacmoe

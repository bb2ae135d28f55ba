// Products with packed weights: a linear, a gated MLP, and the routed experts of a block.
#pragma once

#include "engines.h"
#include "threads.h"

namespace eacmoe {

constexpr int64_t TOKENS = 16;  // tokens that one task prepares

// Tokens [n, cols], prepared for an engine.
struct Prepared {
  Prepared(Slot slot, const Kit& kit, const Segments& segments, const void* x, Dtype dtype, int64_t n, int threads)
      : stride((kit.engine->token_bytes(segments) + 63) / 64 * 64), at(scratch(slot, size_t(n * stride))) {
    const int64_t cols = segments.cols;
    run((n + TOKENS - 1) / TOKENS, threads, [&](int64_t task) {
      float* row = (float*)scratch(ROW, size_t(cols) * 4);
      for (int64_t i = task * TOKENS; i < n && i < (task + 1) * TOKENS; i++) {
        if (dtype != FLOAT32) kit.read(x, dtype, i * cols, cols, row);
        kit.engine->prepare(dtype == FLOAT32 ? (const float*)x + i * cols : row, segments, token(i));
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

// Tokens in the form that the engine multiplies so many of.
static const uint8_t* const* arranged(const Engine& engine, const Segments& segments, const uint8_t* const* tokens,
                                      int64_t M) {
  if (M < engine.arranged_from) return tokens;
  constexpr int64_t head = 64;  // the address
  uint8_t* copy = scratch(ARRANGED, size_t(head + engine.arranged_bytes(segments, M)));
  engine.arrange(segments, tokens, M, copy + head);
  *(const uint8_t**)copy = copy + head;
  return (const uint8_t* const*)copy;
}

// How a product is divided: a task owns neighbouring tiles, a stripe, and multiplies all of them with a piece of the
// tokens, while that is in its core's cache, before it takes the next piece.
struct Division {
  int64_t tiles, stripe, piece;

  // M: the tokens of a product, about; `widest`: tiles of a stripe.
  Division(int64_t tiles, int64_t token_bytes, int64_t M, int threads, int64_t widest = 16) : tiles(tiles) {
    constexpr int64_t cache = 768 << 10, few = 4, shortest = 96, longest = 192;  // bytes; tokens
    const int64_t fair = tiles / (4 * threads), most = fair < widest ? fair : widest;
    const int64_t fitting = cache / token_bytes / TILE * TILE;
    stripe = M <= few || most < 1 ? 1 : most;
    piece = fitting < shortest ? shortest : fitting < longest ? fitting : longest;
  }

  int64_t tasks() const { return (tiles + stripe - 1) / stripe; }
  int64_t first(int64_t task) const { return task * stripe; }

  // each(tile, first token, tokens, M) for a task's tiles and M tokens, piece by piece.
  template <class Each>
  void run_task(int64_t task, const Engine& engine, const Segments& segments, const uint8_t* const* tokens, int64_t M,
                const Each& each) const {
    const int64_t end = first(task + 1) < tiles ? first(task + 1) : tiles;
    for (int64_t m = 0; m < M; m += piece) {
      const int64_t n = M - m < piece ? M - m : piece;
      const uint8_t* const* own = arranged(engine, segments, tokens + m, n);
      for (int64_t i = first(task); i < end; i++) each(i, m, own, n);
    }
  }
};

// --- linear ---------------------------------------------------------------------------------------------------------

// out [M, rows] from prepared tokens.
static void multiply_all(const Kit& kit, const Packed& p, const Segments& segments, const Prepared& prepared,
                         int64_t M, void* out, Dtype dtype, int threads) {
  const std::vector<const uint8_t*> tokens = prepared.tokens(M);
  const Engine& engine = *kit.engine;
  const Division division(num_tiles(p.rows), prepared.stride, M, threads);
  run(division.tasks(), threads, [&](int64_t task) {
    float* tile = (float*)scratch(OUT_TILE, size_t(division.piece) * 2 * TILE * 4);
    division.run_task(task, engine, segments, tokens.data(), M, [&](int64_t i, int64_t first, auto piece, int64_t n) {
      const Rows rows = halves(i, p.rows);
      engine.multiply(p, segments, piece, n, rows, tile);
      add_bias(p, rows, n, tile);
      for (int64_t m = 0; m < n; m++)
        for (int h = 0; h < 2; h++)
          kit.write(tile + (m * 2 + h) * TILE, rows.valid[h], out, dtype, (first + m) * p.rows + rows.first[h]);
    });
  });
}

static void linear(const Kit& kit, const Packed& p, const void* x, Dtype dtype, int64_t M, void* out, int threads) {
  const Segments segments(p);
  const Prepared prepared(TOKENS_IN, kit, segments, x, dtype, M, threads);
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
  const Prepared prepared(TOKENS_IN, kit, segments, x, dtype, M, threads);
  const std::vector<const uint8_t*> tokens = prepared.tokens(M);
  float* hidden = (float*)scratch(HIDDEN, size_t(M * F) * 4);
  const Division division(num_tiles(F), prepared.stride, M, threads);
  run(division.tasks(), threads, [&](int64_t task) {
    float* tile = (float*)scratch(OUT_TILE, size_t(division.piece) * 4 * TILE * 4);
    division.run_task(task, engine, segments, tokens.data(), M, [&](int64_t i, int64_t first, auto piece, int64_t n) {
      const Rows rows = halves(i, F);
      float* upper = tile + n * 2 * TILE;
      engine.multiply(gate, segments, piece, n, rows, tile);
      engine.multiply(up, segments, piece, n, rows, upper);
      add_bias(gate, rows, n, tile);
      add_bias(up, rows, n, upper);
      kit.activate(activation, tile, upper, n * 2 * TILE);
      for (int64_t m = 0; m < n; m++)
        for (int h = 0; h < 2; h++)
          std::memcpy(hidden + (first + m) * F + rows.first[h], tile + (m * 2 + h) * TILE, size_t(rows.valid[h]) * 4);
    });
  });
  const Prepared inner(TOKENS_INNER, kit, down_segments, hidden, FLOAT32, M, threads);
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
  if (N == 0) return;
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

  const Prepared prepared(TOKENS_IN, kit, up_segments, x, dtype, N, threads);
  std::vector<const uint8_t*> tokens(size_t(P), nullptr);
  for (int64_t i = 0; i < P; i++) tokens[size_t(i)] = prepared.token(pairs[size_t(i)] / K);

  // Gate, up and activation. The halves of a tile are 16 gate rows and the matching up rows.
  float* hidden = (float*)scratch(HIDDEN, size_t(P * F) * 4);
  const int64_t each = active.empty() ? 0 : P / int64_t(active.size());  // tokens an expert, about
  const Division ups(gated ? (F + TILE - 1) / TILE : num_tiles(F), prepared.stride, each, threads);
  run(int64_t(active.size()) * ups.tasks(), threads, [&](int64_t index) {
    const int64_t e = active[size_t(index / ups.tasks())], task = index % ups.tasks(), own = begin[size_t(e)];
    const Packed& p = up[size_t(e)];
    float* tile = (float*)scratch(OUT_TILE, size_t(ups.piece) * 2 * TILE * 4);
    const int64_t M = begin[size_t(e) + 1] - own;
    const auto from = tokens.data() + own;
    ups.run_task(task, engine, up_segments, from, M, [&](int64_t i, int64_t first, auto piece, int64_t n) {
      const Rows rows = halves(i, gated ? 2 * F : F);
      engine.multiply(p, up_segments, piece, n, rows, tile);
      add_bias(p, rows, n, tile);
      for (int64_t m = 0; m < n; m++) {
        float* row = tile + m * 2 * TILE;
        kit.activate(activation, row, gated ? row + TILE : nullptr, gated ? TILE : 2 * TILE);
        for (int h = 0; h < (gated ? 1 : 2); h++)
          std::memcpy(hidden + (own + first + m) * F + rows.first[h], row + h * TILE, size_t(rows.valid[h]) * 4);
      }
    });
  });

  const Prepared inner(TOKENS_INNER, kit, down_segments, hidden, FLOAT32, P, threads);
  tokens = inner.tokens(P);

  // Down. A task goes through all experts.
  const int64_t size = N * 2 * TILE;  // of a tile's sums, which stay in the cache too
  const Division downs(num_tiles(D), inner.stride, each, threads, (256 << 10) / size);
  run(downs.tasks(), threads, [&](int64_t task) {
    float* tile = (float*)scratch(OUT_TILE, size_t(downs.piece) * 2 * TILE * 4);
    float* sums = (float*)scratch(SUMS, size_t(downs.stripe * size) * 4);
    std::memset(sums, 0, size_t(downs.stripe * size) * 4);
    for (int64_t e : active) {
      const int64_t own = begin[size_t(e)];
      const Packed& p = down[size_t(e)];
      const int64_t M = begin[size_t(e) + 1] - own;
      const auto from = tokens.data() + own;
      downs.run_task(task, engine, down_segments, from, M, [&](int64_t i, int64_t first, auto piece, int64_t n) {
        const Rows rows = halves(i, D);
        engine.multiply(p, down_segments, piece, n, rows, tile);
        add_bias(p, rows, n, tile);
        for (int64_t m = 0; m < n; m++) {
          const int64_t pair = pairs[size_t(own + first + m)];
          float* to = sums + (i - downs.first(task)) * size + pair / K * 2 * TILE;
          for (int j = 0; j < 2 * TILE; j++) to[j] += weights[pair] * tile[m * 2 * TILE + j];
        }
      });
    }
    for (int64_t i = downs.first(task); i < downs.tiles && i < downs.first(task + 1); i++) {
      const Rows rows = halves(i, D);
      const float* sum = sums + (i - downs.first(task)) * size;
      for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < 2; h++)
          kit.write(sum + (n * 2 + h) * TILE, rows.valid[h], out, dtype, n * D + rows.first[h]);
    }
  });
}

}  // namespace eacmoe

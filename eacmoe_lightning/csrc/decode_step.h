// What lies between a decode step's products: small dense matrices, routers and norms (runtime/decode_step.py).
#pragma once

#include "engines.h"
#include "threads.h"

namespace eacmoe {

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
    kit.read(x, dtype, n * w.cols, w.cols, row);
    dense_row(kit, w, row, result, threads);
    kit.write(result, w.rows, out, dtype, n * w.rows);
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
    kit.read(x, dtype, n * w.cols, w.cols, row);
    dense_row(kit, w, row, logit, threads);
    if (choice.rounded) kit.multiply_by(1, true, logit, E);
    kit.write(logit, E, logits, logits_dtype, n * E);
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
    kit.write(chosen, K, weights, weights_dtype, n * K);
  }
}

enum Norm { ROUNDED, IN_FLOAT, PLUS_ONE };  // weight * round(x / rms); round(weight * x / rms); the same with 1 + weight

// x [N, D] divided by the root of its mean square plus eps, times weight [D].
static void norm(const Kit& kit, Norm form, const void* weight, Dtype weight_dtype, float eps, const void* x,
                 Dtype dtype, int64_t N, int64_t D, void* out) {
  float *row = (float*)scratch(ROW, size_t(2 * D) * 4), *w = row + D;
  kit.read(weight, weight_dtype, 0, D, w);
  for (int64_t i = 0; form == PLUS_ONE && i < D; i++) w[i] += 1;
  for (int64_t n = 0; n < N; n++) {
    kit.read(x, dtype, n * D, D, row);
    const float factor = 1 / std::sqrt(kit.dot_float(row, row, D) / float(D) + eps);
    kit.multiply_by(factor, form == ROUNDED && dtype == BFLOAT16, row, D);
    for (int64_t i = 0; i < D; i++) row[i] *= w[i];
    kit.write(row, D, out, dtype, n * D);
  }
}

}  // namespace eacmoe

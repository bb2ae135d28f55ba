// GPTQ's inner loops with the compiler's vector types. A lane is a row of the weight, because rows are independent.
//
// Included once per instruction set, with these defined: ISA (the namespace), ISA_TARGET (the function attribute),
// ISA_WIDTH (floats of a vector).
namespace eacmoe {
namespace ISA {

typedef float Lanes __attribute__((vector_size(ISA_WIDTH * 4), aligned(4)));
typedef int32_t Flags __attribute__((vector_size(ISA_WIDTH * 4)));

constexpr int64_t VECTORS = 3, ROWS = VECTORS * ISA_WIDTH;  // rows of a tile
constexpr int64_t COLUMNS = 4;  // columns whose sums stay in registers: with 3 vectors each, 12 of 16 registers

ISA_TARGET static inline Lanes all(float x) { return x - Lanes{}; }

// The nearest integer (ties to even) from 0 to `top`, as torch rounds and clamps.
ISA_TARGET static inline Lanes to_code(Lanes x, float top) {
  x = x < 0.0f ? all(0.0f) : x > top ? all(top) : x;
  return (x + 12582912.0f) - 12582912.0f;
}

// Transposes rows [count, g] to columns [g, ROWS], padded with zeros.
ISA_TARGET static inline void gather(const float* from, int64_t stride, int64_t count, int64_t g, float* to) {
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t j = 0; j < g; j++) to[j * ROWS + r] = r < count ? from[r * stride + j] : 0.0f;
}

// Takes one tile through the columns of a group: v_j = value_j - sum_{k<j} e_k factor_kj is rounded to q_j, whose code
// is code_j, and e_j = q_j - old_j. The loss is the sum of weight_j (v_j - q_j)^2. Returns false as soon as no row's
// loss can stay below `bound`.
ISA_TARGET static bool pass(const Columns& c, const float* factor, const float* weight, const float* value,
                            const float* old, const float* scale, const float* zero, const float* bound, float* codes,
                            float* errors, float* loss) {
  const int64_t g = c.columns;
  Lanes s[VECTORS], z[VECTORS], total[VECTORS];
  for (int v = 0; v < VECTORS; v++) {
    s[v] = *(const Lanes*)(scale + v * ISA_WIDTH), z[v] = *(const Lanes*)(zero + v * ISA_WIDTH);
    total[v] = all(0.0f);
  }
  for (int64_t j = 0; j < g; j += COLUMNS) {
    Lanes sum[COLUMNS][VECTORS];
    for (int i = 0; i < COLUMNS; i++)
      for (int v = 0; v < VECTORS; v++) sum[i][v] = *(const Lanes*)(value + (j + i) * ROWS + v * ISA_WIDTH);
    for (int64_t k = 0; factor && k < j; k++) {
      const float* row = factor + k * g + j;
      Lanes e[VECTORS];
      for (int v = 0; v < VECTORS; v++) e[v] = *(const Lanes*)(errors + k * ROWS + v * ISA_WIDTH);
      for (int i = 0; i < COLUMNS; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] -= e[v] * row[i];
    }
    for (int i = 0; i < COLUMNS; i++) {
      for (int v = 0; v < VECTORS; v++) {
        const int64_t at = (j + i) * ROWS + v * ISA_WIDTH;
        const Lanes code = to_code(sum[i][v] / s[v] + z[v], c.top), q = (code - z[v]) * s[v];
        const Lanes e = q - *(const Lanes*)(old + at), away = sum[i][v] - q;
        *(Lanes*)(codes + at) = code, *(Lanes*)(errors + at) = e;
        total[v] += away * away * weight[j + i];
        for (int later = i + 1; factor && later < COLUMNS; later++) sum[later][v] -= e * factor[(j + i) * g + j + later];
      }
    }
    if (bound) {
      int32_t open = 0;
      for (int v = 0; v < VECTORS; v++) {
        const Flags below = total[v] < *(const Lanes*)(bound + v * ISA_WIDTH);
        for (int i = 0; i < ISA_WIDTH; i++) open |= below[i];
      }
      if (!open) return false;
    }
  }
  for (int v = 0; v < VECTORS; v++) *(Lanes*)(loss + v * ISA_WIDTH) = total[v];
  return true;
}

// Chooses the candidate of each of rows [first, first + count) of problem p, count <= ROWS; writes codes and errors.
ISA_TARGET static void tile(const Columns& c, int64_t p, int64_t first, int64_t count, float* area) {
  const int64_t g = c.columns, row = p * c.rows + first;
  float *value = area, *old = value + g * ROWS, *codes = old + g * ROWS, *errors = codes + g * ROWS;
  alignas(64) float scale[ROWS], zero[ROWS], loss[ROWS], best_loss[ROWS], best_scale[ROWS], best_zero[ROWS];
  int32_t best[ROWS] = {};
  gather(c.value + row * c.value_stride, c.value_stride, count, g, value);
  gather(c.old + row * c.old_stride, c.old_stride, count, g, old);
  const float *factor = c.factor ? c.factor + p * g * g : nullptr, *weight = c.weight + p * g;
  for (int64_t r = 0; r < ROWS; r++)  // padding rows are zeros, which any scale rounds to zero
    best_loss[r] = r < count ? INFINITY : 0.0f, best_scale[r] = 1.0f, best_zero[r] = 0.0f;
  const auto candidate = [&](int64_t i) {
    for (int64_t r = 0; r < ROWS; r++) {
      scale[r] = r < count ? c.scale[(row + r) * c.candidates + i] : 1.0f;
      zero[r] = r < count ? c.zero[(row + r) * c.candidates + i] : 0.0f;
    }
  };
  for (int64_t i = 0; c.candidates > 1 && i < c.candidates; i++) {
    candidate(i);
    if (!pass(c, factor, weight, value, old, scale, zero, best_loss, codes, errors, loss)) continue;
    for (int64_t r = 0; r < count; r++)
      if (loss[r] < best_loss[r]) best_loss[r] = loss[r], best[r] = int32_t(i);
  }
  for (int64_t r = 0; r < count; r++) {
    best_scale[r] = c.scale[(row + r) * c.candidates + best[r]];
    best_zero[r] = c.zero[(row + r) * c.candidates + best[r]];
    c.chosen[row + r] = best[r];
  }
  if (!c.codes) return;
  pass(c, factor, weight, value, old, best_scale, best_zero, nullptr, codes, errors, loss);
  for (int64_t r = 0; r < count; r++)
    for (int64_t j = 0; j < g; j++) {
      c.codes[(row + r) * g + j] = uint8_t(codes[j * ROWS + r]);
      c.errors[(row + r) * g + j] = errors[j * ROWS + r];
    }
}

ISA_TARGET static void columns(const Columns& c, int64_t first, int64_t last, float* area) {
  for (int64_t p = first / c.rows; p * c.rows < last; p++) {  // rows are numbered across all problems
    const int64_t begin = p * c.rows < first ? first - p * c.rows : 0;
    const int64_t end = (p + 1) * c.rows > last ? last - p * c.rows : c.rows;
    for (int64_t r = begin; r < end; r += ROWS) tile(c, p, r, end - r < ROWS ? end - r : ROWS, area);
  }
}

}  // namespace ISA
}  // namespace eacmoe
#undef ISA
#undef ISA_TARGET
#undef ISA_WIDTH

// Attention of a few queries that share keys and values: one chunk of keys at a time.
//
// Included after small.h for AVX512 alone: on AVX2 it was no faster than torch.
namespace eacmoe {
namespace ISA {

constexpr int SUMS_AT_ONCE = 16;  // half of the registers

ISA_TARGET static inline Floats widened(const float* x) { return *(const Floats*)x; }
ISA_TARGET static inline Floats widened(const uint16_t* x) {
  return Floats(__builtin_convertvector(*(const Halves*)x, Words) << 16);
}
ISA_TARGET static inline float dot_of(const float* x, const float* w, int64_t n) { return dot_float(x, w, n); }
ISA_TARGET static inline float dot_of(const float* x, const uint16_t* w, int64_t n) { return dot_bf16(x, w, n); }

// out[i] = the sum of v[i], for 16 vectors.
ISA_TARGET static inline void add_up(const Floats* v, float* out) {
  __m512 a[16];
  for (int i = 0; i < 16; i++) a[i] = __m512(v[i]);
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; i++)
    a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xEE));
  for (int n = 2; n; n /= 2)
    for (int i = 0; i < n; i++)
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xDD));
  _mm512_storeu_ps(out, a[0]);
}

// score[r * KEYS + t] = <query r, key t> for `count` queries [count, D].
template <int count, class T>
ISA_TARGET static void score_keys(const float* q, const T* keys, int64_t stride, int64_t n, int64_t D, float* score) {
  constexpr int at_once = SUMS_AT_ONCE / count;
  int64_t t = 0;
  for (; t + at_once <= n; t += at_once) {
    Floats sums[SUMS_AT_ONCE] = {};
    const T* key = keys + t * stride;
    for (int64_t d = 0; d < D; d += ISA_WIDTH)
      for (int j = 0; j < at_once; j++) {
        const Floats k = widened(key + j * stride + d);
        for (int r = 0; r < count; r++) sums[r * at_once + j] += *(const Floats*)(q + r * D + d) * k;
      }
    float totals[SUMS_AT_ONCE];
    add_up(sums, totals);
    for (int r = 0; r < count; r++) std::memcpy(score + r * KEYS + t, totals + r * at_once, at_once * 4);
  }
  for (; t < n; t++)
    for (int r = 0; r < count; r++) score[r * KEYS + t] = dot_of(q + r * D, keys + t * stride, D);
}

// out[r * V + i] = the sum over t of weight[r * KEYS + t] * value t, for `vectors` vectors of the values from here on.
template <int count, int vectors, class T>
ISA_TARGET static void mix_values(const float* weight, const T* values, int64_t stride, int64_t n, int64_t V, float* out) {
  Floats sums[count * vectors] = {};
  for (int64_t t = 0; t < n; t++) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++) {
      const Floats v = widened(values + t * stride + i * ISA_WIDTH);
#pragma GCC unroll 4
      for (int r = 0; r < count; r++) sums[r * vectors + i] += weight[r * KEYS + t] * v;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < count * vectors; i++)
    *(Floats*)(out + i / vectors * V + i % vectors * ISA_WIDTH) = sums[i];
}

// Scores [KEYS] become exp(score - best), 0 where they are masked; the first n count.
ISA_TARGET static void weights_of(float* score, const uint8_t* mask, int64_t n, float* best, float* total) {
  for (int64_t t = 0; mask && t < n; t++) score[t] = mask[t] ? score[t] : -INFINITY;
  int64_t end = n;
  for (; end % ISA_WIDTH; end++) score[end] = -INFINITY;
  Floats most = Floats{} - INFINITY, all = {};
  for (int64_t t = 0; t < end; t += ISA_WIDTH) most = *(Floats*)(score + t) > most ? *(Floats*)(score + t) : most;
  *best = -INFINITY;
  for (int i = 0; i < ISA_WIDTH; i++) *best = most[i] > *best ? most[i] : *best;
  const float least = *best == -INFINITY ? 0 : *best;  // all are masked
  for (int64_t t = 0; t < end; t++) score[t] = score[t] == -INFINITY ? 0 : exponential(score[t] - least);
  for (int64_t t = 0; t < end; t += ISA_WIDTH) all += *(Floats*)(score + t);
  *total = sum(all);
}

template <int count, class T>
ISA_TARGET static void attend_few(const Chunk& c, const float* q, float* score, float* best, float* total, float* out) {
  const int64_t n = c.length;
  score_keys<count>(q, (const T*)c.keys, c.key_stride, n, c.width, score);
  for (int r = 0; r < count; r++) weights_of(score + r * KEYS, c.mask, n, best + r, total + r);
  constexpr int vectors = 4;
  int64_t i = 0;
  const T* values = (const T*)c.values;
  for (; i + vectors * ISA_WIDTH <= c.value_width; i += vectors * ISA_WIDTH)
    mix_values<count, vectors>(score, values + i, c.value_stride, n, c.value_width, out + i);
  for (; i < c.value_width; i += ISA_WIDTH)
    mix_values<count, 1>(score, values + i, c.value_stride, n, c.value_width, out + i);
}

// Queries [count, D], scaled, on a chunk: the best score and the sum of weights of each [count], and the sums of
// weighted values [count, V]; weights are exp(score - best). `score` has room for KEYS of each query.
template <class T>
ISA_TARGET static void attend_to(const Chunk& c, const float* q, int64_t count, float* score, float* best, float* total,
                                 float* out) {
  int64_t r = 0;
  const int64_t D = c.width, V = c.value_width;
  for (; r + 4 <= count; r += 4) attend_few<4, T>(c, q + r * D, score, best + r, total + r, out + r * V);
  for (; r + 2 <= count; r += 2) attend_few<2, T>(c, q + r * D, score, best + r, total + r, out + r * V);
  for (; r < count; r++) attend_few<1, T>(c, q + r * D, score, best + r, total + r, out + r * V);
}

static void attend(const Chunk& c, bool is_bf16, const float* q, int64_t count, float* score, float* best, float* total,
                   float* out) {
  if (is_bf16)
    attend_to<uint16_t>(c, q, count, score, best, total, out);
  else
    attend_to<float>(c, q, count, score, best, total, out);
}

}  // namespace ISA
}  // namespace eacmoe

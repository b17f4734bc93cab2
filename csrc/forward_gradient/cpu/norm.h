// The layer norm and its derivative, which is its own transpose: LN'(z; v) = r (w - zh mean(zh w)), w = v - mean v.
// Rows have a lane each; columns have one where the norm's dimension is not the last.
#pragma once
#include "forward_gradient/cpu/sums.h"

namespace lgk::cpu::LGK_ISA {

// Of SIZE rows or columns; `along` = r^2 mean(d w) with d = z - mean.
template <int64_t SIZE>
struct NormMoments {
  alignas(64) float mean[SIZE], v_mean[SIZE], r[SIZE], along[SIZE];
};
using LaneMoments = NormMoments<V>;

// Of rows <= V rows of z, and with V_TOO of v. The variance is that of the differences from the mean.
template <bool V_TOO>
inline void row_moments(const float* z, const float* v, int64_t rows, int64_t length, float eps, LaneMoments* m) {
  constexpr int K = V_TOO ? 2 : 1;
  const float size = static_cast<float>(length);
  vf total[K];
  row_sums<K>(
      rows, length,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        t[0] = load_some(z + i * length + j, n);
        if constexpr (V_TOO) t[1] = load_some(v + i * length + j, n);
      },
      total);
  store(m->mean, total[0] / size);
  if constexpr (V_TOO) store(m->v_mean, total[1] / size);
  row_sums<K>(
      rows, length,
      [&](int64_t i, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        const vf d = load_some(z + i * length + j, n) - m->mean[i];
        t[0] = d * d;
        if constexpr (V_TOO) t[1] = d * (load_some(v + i * length + j, n) - m->v_mean[i]);
      },
      total);
  const vf r = 1.f / square_root(total[0] / size + eps);
  store(m->r, r);
  if constexpr (V_TOO) store(m->along, total[1] / size * r * r);
}

// The same over columns `z_stride` and `v_stride` apart in memory from row to row.
template <bool V_TOO, int64_t SIZE>
inline void column_moments(const float* z, int64_t z_stride, const float* v, int64_t v_stride, int64_t length,
                           int64_t width, float eps, NormMoments<SIZE>* m) {
  constexpr int K = V_TOO ? 2 : 1;
  const float size = static_cast<float>(length);
  float* const means[] = {m->mean, m->v_mean};
  column_sums<K>(
      length, width,
      [&](int64_t l, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        t[0] = load_some(z + l * z_stride + j, n);
        if constexpr (V_TOO) t[1] = load_some(v + l * v_stride + j, n);
      },
      means);
  for (int k = 0; k < K; ++k)
    for (int64_t j = 0; j < width; j += V) store(means[k] + j, load(means[k] + j) / size);
  float* const products[] = {m->r, m->along};
  column_sums<K>(
      length, width,
      [&](int64_t l, int64_t j, int64_t n, vf* t) LGK_INLINE_LAMBDA {
        const vf d = load_some(z + l * z_stride + j, n) - load(m->mean + j);
        t[0] = d * d;
        if constexpr (V_TOO) t[1] = d * (load_some(v + l * v_stride + j, n) - load(m->v_mean + j));
      },
      products);
  for (int64_t j = 0; j < width; j += V) {
    const vf r = 1.f / square_root(load(m->r + j) / size + eps);
    store(m->r + j, r);
    if constexpr (V_TOO) store(m->along + j, load(m->along + j) / size * r * r);
  }
}

}  // namespace lgk::cpu::LGK_ISA

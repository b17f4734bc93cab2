// Moments (count, mean, sum of squared deviations) of parts of a set, merged pairwise in a fixed order. Threads sum
// deviations from the first value that they see, and means are counted from an origin near the set's mean: a mean far
// from zero cancels nothing.
#pragma once
#include "common/cuda/device.h"

namespace lgk::cuda {

struct Moments {
  float count, mean, m2;
};

LGK_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return a;
  const float delta = b.mean - a.mean, share = b.count / count;
  return Moments{count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Moments, counted from `origin`, of `count` values with deviation sums `sum` and `square` from `pivot`.
LGK_DEVICE Moments moments(float count, float origin, float pivot, float sum, float square) {
  if (count == 0.0f) return Moments{0.0f, 0.0f, 0.0f};
  const float shift = sum / count;
  const float m2 = square - sum * shift;
  return Moments{count, (pivot - origin) + shift, m2 < 0.0f ? 0.0f : m2};  // nan stays
}

// Mean of the first four of a channel's `count` values, `stride` apart, cut to twelve bits: the difference of a half
// value and it is exact. 0 where it is no larger than the spread: another origin would cost the mean digits.
template <typename T>
LGK_DEVICE float near_mean(const T* z, int64_t stride, int64_t count) {
  const int probes = static_cast<int>(min(count, int64_t{4}));
  if (probes == 0) return 0.0f;
  float sum = 0.0f;
  for (int k = 0; k < probes; ++k) sum += to_float(z[k * stride]);
  const float mean = sum / static_cast<float>(probes);
  float spread = 0.0f;
  for (int k = 0; k < probes; ++k) spread = fmaxf(spread, fabsf(to_float(z[k * stride]) - mean));
  return fabsf(mean) > 8.0f * spread ? __uint_as_float(__float_as_uint(mean) & 0xfffff000u) : 0.0f;
}

}  // namespace lgk::cuda

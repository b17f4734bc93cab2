// Batch norm in training with a leaky ReLU and a 2x2 max-pool: the pieces that families build their passes from.
#pragma once
#include "common/cpu/simd.h"
#include "common/norm.h"

namespace lgk::cpu::LGK_ISA {

// Batch norm and leaky ReLU at V positions; d = z - mean, so that xhat = d * rstd.
struct Unit {
  vf mean, gain, beta, slope;
  LGK_INLINE vf centred(vf z) const { return z - mean; }
  LGK_INLINE vf affine(vf d) const { return d * gain + beta; }
  LGK_INLINE vf lambda(vf u) const { return u > 0.f ? splat(1.f) : slope; }
  LGK_INLINE vf activation(vf u) const { return (u < 0.f) & (slope == 0.f) ? vf{} : u * lambda(u); }  // 0, not -inf * 0
};

LGK_INLINE Unit unit_of_channel(const Norm& norm, int64_t c) {
  return {splat(norm.mean[c]), splat(norm.gamma[c] * norm.rstd[c]), splat(norm.beta[c]), splat(norm.negative_slope)};
}

LGK_INLINE Unit unit_of_channels(const Norm& norm, int64_t c, int64_t n) {
  return {load_some(norm.mean + c, n), load_some(norm.gamma + c, n) * load_some(norm.rstd + c, n),
          load_some(norm.beta + c, n), splat(norm.negative_slope)};
}

LGK_INLINE vf wins(vf candidate, vf best) {  // as torch's max_pool: nan wins
  return (candidate > best) | (candidate != candidate) ? candidate : best;
}

// 2x2 maximum of two rows of `width` pairs of one plane.
template <class T>
inline void max_pool_rows(const float* top, const float* bottom, int64_t width, T* out) {
  for (int64_t w = 0; w < width; w += V) {
    const int64_t n = smaller(V, width - w), left = smaller(V, 2 * n), right = 2 * n - left;
    const float *t = top + 2 * w, *b = bottom + 2 * w;
    const vf low = wins(load_some(b, left), load_some(t, left));
    const vf high = right ? wins(load_some(b + V, right), load_some(t + V, right)) : vf{};
    store_some(out + w, wins(shuffle<Odd>(low, high), shuffle<Even>(low, high)), n);
  }
}

// -- statistics of a batch ---------------------------------------------------------------------------------------

// Sums of (z - shift) and its square: in float over short runs, in double across them. `shift` is near the mean,
// so that the variance keeps its digits when the mean is large, and short, so that z - shift is exact for coarse z
// (else all bfloat16 values of one exponent would be rounded the same way).
struct Moments {
  static constexpr int kRun = 64;
  vf shift = {}, sum = {}, square = {};
  double total[V] = {}, total_square[V] = {};
  int pending = 0;

  void start(vf mean) { shift = bits<vf>(bits<vu>(mean) & 0xfffff000); }
  LGK_INLINE void add(vf d) {
    sum += d;
    square += d * d;
    if (++pending == kRun) flush();
  }
  void flush() {
    for (int l = 0; l < V; ++l) total[l] += sum[l], total_square[l] += square[l];
    sum = square = vf{};
    pending = 0;
  }
};

inline void finish(double sum, double square, double shift, int64_t count, int64_t c, const BatchStatistics& s) {
  const double n = static_cast<double>(count), offset = sum / n, average = shift + offset;
  const double spread = square / n - offset * offset, var = spread < 0 ? 0 : spread;
  s.mean[c] = static_cast<float>(average);
  s.rstd[c] = static_cast<float>(1 / __builtin_sqrt(var + s.eps));
  if (!s.running_mean) return;
  const double shifted = average + (s.bias ? s.bias[c] : 0.f), unbiased = var * (n / (n > 1 ? n - 1 : 1));
  s.running_mean[c] += s.momentum * static_cast<float>(shifted - s.running_mean[c]);
  s.running_var[c] += s.momentum * static_cast<float>(unbiased - s.running_var[c]);
}

constexpr int64_t kGroups = 4;  // vectors of channels side by side: a run of rows then stays in few pages

template <class T>
inline void channels_last_stats(const T* z, int64_t count, int64_t channels, int64_t c, int64_t wide,
                                const BatchStatistics& s) {
  const int64_t groups = (wide + V - 1) / V, probe = smaller(32, count);
  Moments moments[kGroups];
  for (int64_t g = 0; g < groups; ++g) {
    vf shift = {};
    for (int64_t r = 0; r < probe; ++r) shift += load_some(z + r * channels + c + g * V, smaller(V, wide - g * V));
    moments[g].start(shift / static_cast<float>(probe));
  }
  for (int64_t run = 0; run < count; run += Moments::kRun)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = smaller(V, wide - g * V), end = smaller(run + Moments::kRun, count);
      Moments m = moments[g];
      for (int64_t r = run; r < end; ++r) m.add(load_some(z + r * channels + c + g * V, n) - m.shift);
      m.flush();
      moments[g] = m;
    }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t l = 0; l < smaller(V, wide - g * V); ++l)
      finish(moments[g].total[l], moments[g].total_square[l], moments[g].shift[l], count, c + g * V + l, s);
}

// Of channel c in planes.
template <class T>
inline void channel_stats(const T* z, int64_t batch, int64_t channels, int64_t area, int64_t c,
                          const BatchStatistics& s) {
  const int64_t probe = smaller(32, batch);
  vf shift = {};
  for (int64_t b = 0; b < probe; ++b)  // the start of each of the first samples' planes
    shift += load(z + (b * channels + c) * area, smaller(V - 1, area));
  Moments m;
  m.start(splat(sum(shift) / static_cast<float>(probe * smaller(V - 1, area))));
  for (int64_t b = 0; b < batch; ++b) {
    const T* plane = z + (b * channels + c) * area;
    for (int64_t i = 0; i < area; i += V) {
      const int64_t n = smaller(V, area - i);
      const vf d = load_some(plane + i, n) - m.shift;
      m.add(n == V ? d : first(d, n));
    }
  }
  m.flush();
  double total = 0, square = 0;
  for (int l = 0; l < V; ++l) total += m.total[l], square += m.total_square[l];
  finish(total, square, m.shift[0], batch * area, c, s);
}

}  // namespace lgk::cpu::LGK_ISA

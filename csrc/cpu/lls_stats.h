// Batch statistics, and the gradients of the normalisation's parameters.
#pragma once
#include "lls_activation.h"

namespace lgk::LGK_ISA {

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

struct Running {
  const float* bias;
  float *mean, *var, momentum;
};

inline void finish(double sum, double square, double shift, int64_t count, float eps, int64_t c, const Running& running,
                   float* mean, float* rstd) {
  const double n = static_cast<double>(count), offset = sum / n, average = shift + offset;
  const double spread = square / n - offset * offset, var = spread < 0 ? 0 : spread;
  mean[c] = static_cast<float>(average);
  rstd[c] = static_cast<float>(1 / __builtin_sqrt(var + eps));
  if (!running.mean) return;
  const double shifted = average + (running.bias ? running.bias[c] : 0.f), unbiased = var * (n / (n > 1 ? n - 1 : 1));
  running.mean[c] += running.momentum * static_cast<float>(shifted - running.mean[c]);
  running.var[c] += running.momentum * static_cast<float>(unbiased - running.var[c]);
}

constexpr int64_t kGroups = 4;  // vectors of channels side by side: a run of rows then stays in few pages

template <class T>
inline void channels_last_stats(const T* z, int64_t count, int64_t channels, int64_t c, int64_t wide, float eps,
                                const Running& running, float* mean, float* rstd) {
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
      finish(moments[g].total[l], moments[g].total_square[l], moments[g].shift[l], count, eps, c + g * V + l, running,
             mean, rstd);
}

// Of channel c in planes.
template <class T>
inline void channel_stats(const T* z, int64_t batch, int64_t channels, int64_t area, int64_t c, float eps,
                          const Running& running, float* mean, float* rstd) {
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
  finish(total, square, m.shift[0], batch * area, eps, c, running, mean, rstd);
}

inline int batch_stats(const Activation& a, const float* bias, float* running_mean, float* running_var, float momentum,
                       float eps, float* mean, float* rstd, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Running running{bias, running_mean, running_var, momentum};
    const T* z = static_cast<const T*>(a.data);
    const int64_t channels = a.channels, area = a.height * a.width, count = a.batch * area;
    const int64_t share = ((channels + V - 1) / V + threads - 1) / threads;
    const int64_t block = a.channels_last ? smaller(share, kGroups) * V : 1;
    parallel((channels + block - 1) / block, elements(a), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; ++g) {
        if (a.channels_last) {
          channels_last_stats(z, count, channels, g * block, smaller(block, channels - g * block), eps, running, mean,
                              rstd);
        } else {
          channel_stats(z, a.batch, channels, area, g, eps, running, mean, rstd);
        }
      }
    });
    return 0;
  });
}

inline int norm_grads(int64_t batch, int64_t channels, int64_t bins, const float* grad, const float* s1,
                      const float* s2, const float* area, float* grad_gamma, float* grad_beta, float* grad_bias,
                      int threads) {
  parallel(channels, batch * channels * bins, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      double gamma = 0, beta = 0;
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0, at = (b * channels + c) * bins; i < bins; ++i, ++at) {
          const float g = grad[at] / area[i];
          gamma += g * s2[at];
          beta += g * s1[at];
        }
      grad_gamma[c] = static_cast<float>(gamma);
      grad_beta[c] = static_cast<float>(beta);
      grad_bias[c] = 0;  // the normalisation cancels the layer's bias
    }
  });
  return 0;
}

}  // namespace lgk::LGK_ISA

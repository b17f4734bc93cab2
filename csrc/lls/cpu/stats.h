// Batch statistics, and the gradients of the normalisation's parameters.
#pragma once
#include "lls/cpu/activation.h"

namespace lgk::cpu::LGK_ISA {

inline int batch_stats(const Activation& a, const BatchStatistics& statistics, int threads) {
  return for_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const T* z = static_cast<const T*>(a.data);
    const int64_t channels = a.channels, area = a.height * a.width, count = a.batch * area;
    const int64_t share = ((channels + V - 1) / V + threads - 1) / threads;
    const int64_t block = a.channels_last ? smaller(share, kGroups) * V : 1;
    parallel((channels + block - 1) / block, elements(a), threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t g = begin; g < end; ++g) {
        if (a.channels_last) {
          channels_last_stats(z, count, channels, g * block, smaller(block, channels - g * block), statistics);
        } else {
          channel_stats(z, a.batch, channels, area, g, statistics);
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

}  // namespace lgk::cpu::LGK_ISA

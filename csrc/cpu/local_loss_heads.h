// From logits, or from sums of squares, to loss and gradient.
#pragma once
#include <cmath>

#include "lls_head.h"
#include "local_loss_maps.h"

namespace lgk::LGK_ISA {

inline int logit_loss(int64_t batch, int64_t classes, const float* logits, const int64_t* target, float smoothing,
                      double divisor, bool none, float* loss, float* grad, int threads) {
  Head h{};
  h.classes = classes;
  h.smoothing = smoothing;
  Scratch rows(none ? 0 : batch, 1), spare(classes, threads);
  if (!rows || !spare) return 1;
  float* losses = none ? loss : rows.of(0);
  const float weight = static_cast<float>(1 / divisor);
  parallel(batch, batch * classes * 8, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t b = begin; b < end; ++b) {
      float* g = grad ? grad + b * classes : spare.of(thread);
      losses[b] = static_cast<float>(row_loss(h, const_cast<float*>(logits) + b * classes, target[b], g));
      if (grad)
        for (int64_t c = 0; c < classes; ++c) g[c] *= weight;
    }
  });
  if (none) return 0;
  double total = 0;
  for (int64_t b = 0; b < batch; ++b) total += losses[b];
  *loss = static_cast<float>(total / divisor);
  return 0;
}

inline int goodness(const Goodness& g, int threads) {
  const int64_t pieces = (g.size + kPiece - 1) / kPiece;
  Scratch partial(g.batch * pieces, 1);
  if (!partial) return 1;
  const int status = for_dtype(g.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(g.data);
    parallel(g.batch * pieces, g.batch * g.size, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t low = i % pieces * kPiece;
        partial.of(0)[i] =
            sum(run_sum<true>(x + i / pieces * g.size + low, smaller(kPiece, g.size - low), 0.f));
      }
    });
    return 0;
  });
  if (status != 0) return status;
  double total = 0;
  for (int64_t b = 0; b < g.batch; ++b) {
    double square = 0;
    for (int64_t p = 0; p < pieces; ++p) square += partial.of(0)[b * pieces + p];
    g.squares[b] = static_cast<float>(square);
    const double sign = g.is_positive[b] ? 1 : -1, margin = sign * (g.threshold - square * g.factor);
    const double e = std::exp(-std::fabs(margin)), sigmoid = (margin > 0 ? 1 : e) / (1 + e);
    total += (margin > 0 ? margin : 0) + std::log1p(e);
    if (g.kappa) g.kappa[b] = static_cast<float>(-sign * sigmoid * 2 * g.factor / static_cast<double>(g.batch));
  }
  *g.loss = static_cast<float>(total / static_cast<double>(g.batch));  // of no rows: nan, the mean over nothing
  return 0;
}

}  // namespace lgk::LGK_ISA

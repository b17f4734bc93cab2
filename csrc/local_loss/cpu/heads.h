// From logits, or from sums of squares, to loss and gradient.
#pragma once
#include <cmath>

#include "common/cpu/cross_entropy.h"
#include "common/cpu/gemm.h"
#include "local_loss/cpu/maps.h"

namespace lgk::cpu::LGK_ISA {

inline int logit_loss(const LogitInputs& l, float label_smoothing, double divisor, bool none, const LogitOutputs& out,
                      int threads) {
  constexpr int64_t kRows = 4;  // of a piece of work
  Scratch rows(none ? 0 : l.batch, 1), spare(l.classes, threads), products(kRows * l.classes, threads);
  if (!rows || !spare || !products) return 1;
  float* losses = none ? out.loss : rows.of(0);
  const float weight = static_cast<float>(1 / divisor);
  const int64_t work = l.batch * l.classes * (8 + (l.pooled ? 2 * l.channels / V : 0));
  parallel((l.batch + kRows - 1) / kRows, work, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t start = begin * kRows; start < smaller(end * kRows, l.batch); start += kRows) {
      const int64_t count = smaller(kRows, l.batch - start);
      float* logits = products.of(thread);
      if (l.pooled)
        dots(l.pooled + start * l.channels, l.channels, count, l.weight, l.channels, l.classes, l.channels, logits,
             l.classes);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = start + r;
        float *g = out.grad ? out.grad + b * l.classes : spare.of(thread), *v = logits + r * l.classes;
        if (!l.pooled) std::memcpy(v, l.logits + b * l.classes, l.classes * sizeof *v);
        if (l.bias)
          for (int64_t c = 0; c < l.classes; ++c) v[c] += l.bias[c];
        losses[b] = static_cast<float>(cross_entropy(l.classes, label_smoothing, v, l.target[b], g));
        if (out.grad)
          for (int64_t c = 0; c < l.classes; ++c) g[c] *= weight;
      }
      if (!out.grad_pooled) continue;
      float* down = out.grad_pooled + start * l.channels;
      product(out.grad + start * l.classes, l.classes, 1, count, l.weight, l.channels, l.classes, l.channels, down,
              l.channels);
      for (int64_t i = 0; i < count * l.channels; ++i) down[i] *= out.pooled_scale;
    }
  });
  if (none) return 0;
  double total = 0;
  for (int64_t b = 0; b < l.batch; ++b) total += losses[b];
  *out.loss = static_cast<float>(total / divisor);
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
        partial.of(0)[i] = sum(run_sum<true>(x + i / pieces * g.size + low, smaller(kPiece, g.size - low), 0.f));
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

}  // namespace lgk::cpu::LGK_ISA

// The head: latents to loss and gradients, all of it in one parallel region over blocks of samples.
#pragma once
#include <cmath>

#include "common/cpu/cross_entropy.h"
#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "lls/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kSamples = 64;  // of a block at most: the basis is read from the cache once for all of them

inline double inverse_norm(const float* x, int64_t dim, float eps, bool* below) {
  vf total[4] = {};
  int64_t j = 0;
  for (; j + 4 * V <= dim; j += 4 * V)
    for (int i = 0; i < 4; ++i) {
      const vf v = load(x + j + i * V);
      total[i] += v * v;
    }
  for (; j < dim; j += V) {
    const vf v = load_some(x + j, smaller(V, dim - j));
    total[0] += v * v;
  }
  float lanes[V];
  store(lanes, (total[0] + total[1]) + (total[2] + total[3]));
  double square = 0;
  for (int l = 0; l < V; ++l) square += lanes[l];
  const double norm = std::sqrt(square);
  *below = !(norm >= eps);
  return 1 / (norm < eps ? eps : norm);
}

// Loss of one row of logits v (already divided by the temperature) and its gradient with respect to v.
inline double row_loss(const Head& h, const float* v, int64_t target, float* grad) {
  const int64_t classes = h.num_classes;
  if (h.loss == kCrossEntropy) return cross_entropy(classes, h.label_smoothing, v, target, grad);
  float total = 0;
  for (int64_t c = 0; c < classes; ++c) {  // the straight-through difference
    const float level = v[c] / 4 + 0.5f, clamped = level < 0 ? 0 : level > 1 ? 1 : level;
    const float difference = clamped - (c == target ? 1.f : 0.f);
    total += difference * difference;
    grad[c] = difference * (2.f / static_cast<float>(classes));
  }
  return total / static_cast<float>(classes);
}

// similarity -> logits -> loss and the gradients of logits and similarity, for `count` samples from `b` on.
inline void loss_rows(const Head& h, int64_t b, int64_t count, float weight, float* losses, float* logits,
                      float* grad_logits, float* grad_similarity) {
  const float* s = h.similarity + b * h.rows;
  if (h.modulation && !h.vector_modulation)
    product(s, h.rows, 1, count, h.modulation, h.num_classes, h.rows, h.num_classes, logits, h.num_classes);
  for (int64_t i = 0; i < count; ++i) {
    float *v = logits + i * h.num_classes, *g = grad_logits + i * h.num_classes;
    for (int64_t c = 0; c < h.num_classes; ++c) {
      const float z = !h.modulation         ? s[i * h.rows + c]
                      : h.vector_modulation ? s[i * h.rows + c] * h.modulation[c]
                                            : v[c];
      v[c] = z / h.temperature;
    }
    const int64_t target = h.target[b + i];
    const bool valid = target != h.ignore_index;
    const double loss = row_loss(h, v, valid ? target : 0, g);
    losses[b + i] = valid ? static_cast<float>(loss) : 0;
    for (int64_t c = 0; c < h.num_classes; ++c) g[c] = valid ? g[c] * weight : 0;
    if (h.compute_grad && (!h.modulation || h.vector_modulation))
      for (int64_t c = 0; c < h.num_classes; ++c)
        grad_similarity[i * h.rows + c] = h.modulation ? g[c] * h.modulation[c] : g[c];
  }
  if (h.compute_grad && h.modulation && !h.vector_modulation)
    dots(grad_logits, h.num_classes, count, h.modulation, h.num_classes, h.rows, h.num_classes, grad_similarity,
         h.rows);
}

// grad (dim,) = (grad - x * inverse * rho) * inverse: the gradient through x / max(|x|, eps).
inline void project(const float* x, int64_t dim, float gain, float shrink, float* grad) {
  for (int64_t j = 0; j < dim; j += V) {
    const int64_t n = smaller(V, dim - j);
    store_some(grad + j, load_some(grad + j, n) * gain - load_some(x + j, n) * shrink, n);
  }
}

inline int64_t valid_rows(const Head& h) {
  int64_t count = 0;
  for (int64_t b = 0; b < h.batch; ++b) count += h.target[b] != h.ignore_index;
  return count;
}

// Products{h} computes (count, K) similarities and (count, d) gradients for the basis in its form, samples() at a time.
template <class Products>
inline int run_head(const Head& h, const Products& products, int threads) {
  const int64_t share = (h.batch + threads - 1) / threads, each = (share + products.samples() - 1) / products.samples();
  const int64_t size = each > 1 ? (share + each - 1) / each : share > 1 ? share : 1;
  const int64_t blocks = (h.batch + size - 1) / size, classes = h.num_classes;
  const float divisor = h.reduction == kMean ? static_cast<float>(valid_rows(h)) : 1.f;
  const float weight = 1 / (h.temperature * divisor);
  Scratch rows(h.reduction == kNone ? 0 : h.batch, 1), scratch(size * (2 * classes + h.rows + 2), threads);
  if (!rows || !scratch) return 1;
  float* losses = h.reduction == kNone ? h.value : rows.of(0);
  parallel(blocks, h.batch * h.dim * (h.rows / 8 + 1), threads, [&](int64_t begin, int64_t end, int thread) {
    float *logits = scratch.of(thread), *spare = logits + size * classes;
    float *grad_similarity = spare + size * classes, *inverse = grad_similarity + size * h.rows;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t b = block * size, count = smaller(size, h.batch - b);
      const float* x = h.x + b * h.dim;
      float* s = h.similarity + b * h.rows;
      bool below[kSamples] = {};
      products.similarity(x, count, s);
      for (int64_t i = 0; i < count; ++i) {
        const double scale = h.normalize ? inverse_norm(x + i * h.dim, h.dim, h.eps, &below[i]) : 1.0;
        inverse[i] = static_cast<float>(scale);
        for (int64_t k = 0; k < h.rows; ++k)
          s[i * h.rows + k] = static_cast<float>(s[i * h.rows + k] * (scale * h.basis_scale));
      }
      loss_rows(h, b, count, weight, losses, logits, h.compute_grad ? h.grad_logits + b * classes : spare,
                grad_similarity);
      if (!h.compute_grad) continue;
      float* grad = h.grad_latents + b * h.dim;
      products.gradient(grad_similarity, count, grad);
      for (int64_t i = 0; i < count; ++i) {
        float rho = 0;
        for (int64_t k = 0; k < h.rows; ++k) rho += grad_similarity[i * h.rows + k] * s[i * h.rows + k];
        float gain = h.basis_scale * inverse[i], shrink = h.normalize ? inverse[i] * inverse[i] * rho : 0;
        if (below[i]) gain = h.below_eps(h.basis_scale), shrink = 0;
        project(x + i * h.dim, h.dim, gain, shrink, grad + i * h.dim);
      }
    }
  });
  if (h.reduction == kNone) return 0;
  double total = 0;
  for (int64_t b = 0; b < h.batch; ++b) total += losses[b];
  *h.value = static_cast<float>(total / divisor);
  return 0;
}

// A float table (K, d).
struct TableProducts {
  const Head& h;
  int64_t samples() const {  // their latents stay in the second-level cache
    const int64_t fitting = (1 << 16) / (h.dim > 0 ? h.dim : 1);
    return fitting < 16 ? 16 : smaller(fitting, kSamples);
  }
  void similarity(const float* x, int64_t count, float* s) const {
    dots(x, h.dim, count, h.basis, h.dim, h.rows, h.dim, s, h.rows);
  }
  void gradient(const float* g, int64_t count, float* grad) const {
    product(g, h.rows, 1, count, h.basis, h.dim, h.rows, h.dim, grad, h.dim);
  }
};

// dL/dm (C,) = sum_b scale_b g s, or dL/dM (K, C) = sum_b s^T scale_b g.
inline int modulation_grad(const ModulationGrad& p, int threads) {
  const int64_t batch = p.batch, rows = p.rows, classes = p.classes;
  const float *s = p.similarity, *g = p.grad_logits, *scale = p.scale;
  const bool per_row = p.scale_per_row;
  float* out = p.grad;
  if (p.vector) {
    for (int64_t c = 0; c < classes; c += V) {
      const int64_t n = smaller(V, classes - c);
      vf total = {};
      for (int64_t b = 0; b < batch; ++b)
        total += load_some(g + b * classes + c, n) * load_some(s + b * classes + c, n) * scale[per_row ? b : 0];
      store_some(out + c, total, n);
    }
    return 0;
  }
  Scratch scaled(batch * classes, 1);
  if (!scaled) return 1;
  for (int64_t i = 0; i < batch * classes; ++i) scaled.of(0)[i] = g[i] * scale[per_row ? i / classes : 0];
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  parallel(blocks, batch * rows * classes / 16, threads, [&](int64_t begin, int64_t end, int) {
    const int64_t k = begin * kRowBlock, count = smaller(end * kRowBlock, rows) - k;
    product(s + k, 1, rows, count, scaled.of(0), classes, batch, classes, out + k * classes, classes);
  });
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA

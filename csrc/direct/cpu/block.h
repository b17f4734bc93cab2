// A block of DFA behind its convolution: batch norm, leaky ReLU and max-pool forward; backward the gradient of z from
// the direct signal, in place.
//
// A thread takes whole channels, so that the second pass over a channel finds it in the cache: z comes from memory once
// forward and once backward, and goes back once as its gradient. The signal error @ F is made for a few channels at a
// time, as columns of F of which the cache holds all rows' share.
#pragma once
#include "common/cpu/batch_norm.h"
#include "common/cpu/formula_tiles.h"
#include "common/cpu/parallel.h"
#include "direct/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

inline Unit unit_of(const DirectBlock& block, int64_t c) {
  return unit_of_channel({block.mean, block.rstd, block.gamma, block.beta, block.negative_slope}, c);
}

inline int direct_forward(const DirectBlock& block, float* running_mean, float* running_var, float momentum, float eps,
                          float* out, int threads) {
  const int64_t channels = block.channels, height = block.height, width = block.width, area = height * width;
  const int64_t out_width = width / 2, out_area = block.max_pool ? height / 2 * out_width : area;
  const BatchStatistics statistics{nullptr, running_mean, running_var, momentum, eps, block.mean, block.rstd};
  Scratch planes(area, threads);
  if (!planes) return 1;
  parallel(channels, block.batch * channels * area, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t c = begin; c < end; ++c) {
      channel_stats(block.z, block.batch, channels, area, c, statistics);
      const Unit unit = unit_of(block, c);
      for (int64_t b = 0; b < block.batch; ++b) {
        const float* z = block.z + (b * channels + c) * area;
        float* own = out + (b * channels + c) * out_area;
        float* activation = block.max_pool ? planes.of(thread) : own;
        for (int64_t i = 0; i < area; i += V) {
          const int64_t n = smaller(V, area - i);
          const vf u = unit.affine(unit.centred(load_some(z + i, n)));
          store_some(activation + i, unit.activation(u), n);
        }
        if (block.max_pool)
          for (int64_t h = 0; h < height / 2; ++h)
            max_pool_rows(activation + 2 * h * width, activation + (2 * h + 1) * width, out_width, own + h * out_width);
      }
    }
  });
  return 0;
}

// Gradients of u over one plane, their sum and that of gradient * (z - mean).
struct PlaneGradient {
  const Unit& unit;
  vf sum = {}, product = {};

  LGK_INLINE vf of(vf d, vf delta) {
    const vf g = delta * unit.lambda(unit.affine(d));
    sum += g;
    product += g * d;
    return g;
  }

  void plain(const float* z, int64_t area, const float* delta, float* grad) {
    for (int64_t i = 0; i < area; i += V) {
      const int64_t n = smaller(V, area - i);
      store_some(grad + i, of(unit.centred(load_some(z + i, n)), load_some(delta + i, n)), n);
    }
  }

  // The first of the greatest of each 2 x 2 has the gradient, as in torch; a nan is greatest.
  void pooled(const float* z, int64_t height, int64_t width, const float* delta, float* grad) {
    const int64_t out_width = width / 2;
    for (int64_t h = 0; h < height / 2; ++h, delta += out_width)
      for (int64_t w = 0; w < width; w += 2 * V) {
        const int64_t left = smaller(V, width - w), right = smaller(V, width - w - left);
        const int64_t outputs = smaller(V, out_width - w / 2);
        const vf signal = outputs > 0 ? load_some(delta + w / 2, outputs) : vf{};
        vf d[4], best = {};
        vi winner = {};
        for (int row = 0; row < 2; ++row) {
          const float* p = z + (2 * h + row) * width + w;
          const vf low = unit.centred(load_some(p, left));
          const vf high = right ? unit.centred(load_some(p + V, right)) : vf{};
          d[2 * row] = shuffle<Even>(low, high);
          d[2 * row + 1] = shuffle<Odd>(low, high);
        }
        for (int i = 0; i < 4; ++i) {
          const vf u = unit.affine(d[i]), a = unit.activation(u);
          const vi wins = i ? (a > best) | (a != a) : vi{} - 1;
          best = wins ? a : best;
          winner = wins ? vi{} + i : winner;
        }
        for (int row = 0; row < 2; ++row) {
          float* p = grad + (2 * h + row) * width + w;
          vf g[2];
          for (int i = 0; i < 2; ++i) g[i] = of(d[2 * row + i], winner == 2 * row + i ? signal : vf{});
          store_some(p, shuffle<Interleave<0>>(g[0], g[1]), left);
          if (right) store_some(p + V, shuffle<Interleave<1>>(g[0], g[1]), right);
        }
      }
    if (height % 2) std::memset(grad + (height - 1) * width, 0, width * sizeof *grad);
  }
};

// out (batch, width) = error @ F's columns from `col` (a multiple of 128) on; error is packed, width whole groups.
inline void signal_columns(const Formula& f, const float* error, int64_t depth, int64_t batch, int64_t col,
                           int64_t width, float* rows, float* out) {
  std::memset(out, 0, rounded(batch, kBlock) * width * sizeof *out);
  for (int64_t row = 0; row < f.rows; row += kDepth) {
    const int64_t mine = smaller(f.rows - row, kDepth);
    for (int64_t r = 0; r < mine; ++r)
      for (int64_t j = 0; j < width; j += kSegment)
        formula_row(f, row + r, col + j, smaller(width - j, kSegment), rows + r * width + j);
    for (int64_t b = 0; b < batch; b += kBlock) {
      const int64_t block = block_rows(batch - b);
      for_block(block, [&](auto size) {
        multiply_values<decltype(size)::value>(error + b * depth + row * block, rows, mine, width, width, Next(),
                                               out + b * width);
      });
    }
  }
}

inline int direct_backward(const DirectBlock& block, const float* given, const Formula& f, const Matrix& error,
                           float* grad_gamma, float* grad_beta, int threads) {
  const int64_t batch = block.batch, channels = block.channels, height = block.height, width = block.width;
  const int64_t area = height * width, out_area = block.max_pool ? (height / 2) * (width / 2) : area;
  const int64_t depth = rounded(f.rows, kDepth), held = rounded(batch, kBlock);
  // channels whose signal is made together: of a few hundred columns, so that little is made twice at their ends
  const int64_t wanted = out_area ? (4 * kGroup + out_area - 1) / out_area : 1;
  const int64_t share = (channels + threads - 1) / threads, together = smaller(wanted, share > 0 ? share : 1);
  const int64_t groups = (channels + together - 1) / together, most = rounded(together * out_area + kGroup, kGroup);
  Scratch packed(given ? 0 : held * depth, 1), signals(given ? 0 : held * most, threads);
  Scratch rows(given ? 0 : kDepth * most, threads), grads(batch * area, threads);
  if (!packed || !signals || !rows || !grads) return 1;
  if (!given) pack_grad<float>(error, 0, batch, 0, depth, f.rows, depth, packed.of(0));

  parallel(groups, batch * channels * area, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t from = group * together, to = smaller(from + together, channels);
      const int64_t col = from * out_area / kGroup * kGroup, columns = rounded(to * out_area - col, kGroup);
      if (!given) signal_columns(f, packed.of(0), depth, batch, col, columns, rows.of(thread), signals.of(thread));
      for (int64_t c = from; c < to; ++c) {
        const Unit unit = unit_of(block, c);
        double sum_grad = 0, sum_product = 0;
        for (int64_t b = 0; b < batch; ++b) {
          const float* z = block.z + (b * channels + c) * area;
          const float* delta =
              given ? given + (b * channels + c) * out_area : signals.of(thread) + b * columns + c * out_area - col;
          PlaneGradient plane{unit};
          if (block.max_pool)
            plane.pooled(z, height, width, delta, grads.of(thread) + b * area);
          else
            plane.plain(z, area, delta, grads.of(thread) + b * area);
          sum_grad += sum(plane.sum);
          sum_product += sum(plane.product);
        }
        const float count = static_cast<float>(batch * area), rstd = block.rstd[c];
        grad_beta[c] = static_cast<float>(sum_grad);
        grad_gamma[c] = static_cast<float>(sum_product) * rstd;
        const vf centre = splat(grad_beta[c] / count), along = splat(grad_gamma[c] * rstd / count);
        for (int64_t b = 0; b < batch; ++b) {
          float* z = block.z + (b * channels + c) * area;
          const float* grad = grads.of(thread) + b * area;
          for (int64_t i = 0; i < area; i += V) {
            const int64_t n = smaller(V, area - i);
            const vf d = unit.centred(load_some(z + i, n));
            store_some(z + i, unit.gain * (load_some(grad + i, n) - centre - d * along), n);
          }
        }
      }
    }
  });
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA

// The weight gradient grad^T x and the optimizer's step in one pass over the weight: a register tile of dW is summed
// over the whole batch, then meets its tile of the weight and of the momentum buffer; dW never reaches memory.
#pragma once
#include "common/cpu/formula_tiles.h"
#include "common/cpu/parallel.h"
#include "feedback/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kUpdateRows = 4;                // of the weight in a register tile
constexpr int kUpdateTile = V == 16 ? 4 : 2;  // vectors of columns in it
constexpr int64_t kPanelBytes = 256 * 1024;   // of x in the cache: (batch, panel) floats

// rows [0, batch) of columns [col, col + n) of x, or of grad, as dense floats with rows of `width`, zero-padded
template <class T>
inline void pack_rows(const Matrix& x, int64_t batch, int64_t col, int64_t n, int64_t width, float* out) {
  for (int64_t m = 0; m < batch; ++m)
    for (int64_t j = 0; j < width; j += V)
      store(out + m * width + j, j < n ? load_some(at<T>(x, m, col + j), smaller(n - j, V)) : vf{});
}

struct Step {
  SgdOptions options;
  float fresh;  // 1 - dampening

  // gradient before its scale -> new weight; v is the momentum buffer, updated
  LGK_INLINE vf apply(vf sum, vf w, vf* v) const {
    vf g = sum * options.grad_scale;
    if (options.manhattan) {
      const vi s = (g < 0.f) - (g > 0.f);
      g = __builtin_convertvector(s, vf);
    }
    g += options.weight_decay * w;
    if (v) {
      *v = options.momentum * *v + fresh * g;
      g = options.nesterov ? g + options.momentum * *v : *v;
    }
    return w - options.lr * g;
  }
};

// Tile (ROWS, kUpdateTile * V) of the weight at w; x (batch, width) and g (batch, kUpdateRows) are packed.
template <int ROWS, class T>
inline void update_tile(const Step& step, int64_t batch, const float* g, const float* x, int64_t width, int64_t n, T* w,
                        int64_t weight_stride, T* buffer, int64_t buffer_stride) {
  vf acc[ROWS][kUpdateTile] = {};
  for (int64_t m = 0; m < batch; ++m) {
    vf right[kUpdateTile];
    for (int t = 0; t < kUpdateTile; ++t) right[t] = load(x + m * width + t * V);
    for (int r = 0; r < ROWS; ++r) {
      const vf left = splat(g[m * kUpdateRows + r]);
      for (int t = 0; t < kUpdateTile; ++t) acc[r][t] += left * right[t];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < kUpdateTile; ++t) {
      const int64_t left = smaller(n - t * V, V);
      if (left <= 0) break;
      T* weight = w + r * weight_stride + t * V;
      T* of_buffer = buffer + r * buffer_stride + t * V;
      vf v = {};
      if (buffer) v = load_some(of_buffer, left);
      store_some(weight, step.apply(acc[r][t], load_some(weight, left), buffer ? &v : nullptr), left);
      if (buffer) store_some(of_buffer, v, left);
    }
}

template <class T>
inline int run_update(const SgdOptions& options, const UpdateShape& u, const Matrix& weight,
                      const Matrix& momentum_buffer, const Matrix& grad, const Matrix& input, int threads) {
  constexpr int64_t tile = kUpdateTile * V;
  const Step step{options, 1.f - options.dampening};
  if (u.rows == 0 || u.columns == 0) return 0;
  const int64_t fitting = kPanelBytes / 4 / (u.batch > 0 ? u.batch : 1) / tile * tile;
  const int64_t width = fitting < tile ? tile : smaller(fitting, rounded(u.columns, tile));
  const int64_t panels = (u.columns + width - 1) / width, groups = (u.rows + kUpdateRows - 1) / kUpdateRows;
  Scratch grads(groups * kUpdateRows * u.batch, 1), inputs(width * u.batch, threads);
  if (!grads || !inputs) return 1;
  parallel(groups, u.rows * u.batch, threads, [&](int64_t begin, int64_t end, int) {
    for_dtype(grad.dtype, [&](auto type) {
      for (int64_t i = begin; i < end; ++i) {
        float* out = grads.of(0) + i * kUpdateRows * u.batch;
        const int64_t row = i * kUpdateRows, n = smaller(u.rows - row, kUpdateRows);
        for (int64_t m = 0; m < u.batch; ++m) {
          const vf v = load(at<decltype(type)>(grad, m, row), n);
          for (int r = 0; r < kUpdateRows; ++r) out[m * kUpdateRows + r] = v[r];
        }
      }
      return 0;
    });
  });
  // A thread owns a range of row groups and walks it once for each panel of x in its cache.
  parallel(groups, u.rows * u.columns, threads, [&](int64_t begin, int64_t end, int thread) {
    float* x = inputs.of(thread);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t col = p * width, n = smaller(u.columns - col, width);
      for_dtype(input.dtype, [&](auto type) {
        pack_rows<decltype(type)>(input, u.batch, col, n, width, x);
        return 0;
      });
      for (int64_t i = begin; i < end; ++i) {
        const float* g = grads.of(0) + i * kUpdateRows * u.batch;
        for (int64_t j = 0; j < n; j += tile) {
          T* w = static_cast<T*>(weight.data) + i * kUpdateRows * weight.stride + col + j;
          T* v = momentum_buffer.data
                     ? static_cast<T*>(momentum_buffer.data) + i * kUpdateRows * momentum_buffer.stride + col + j
                     : nullptr;
          if ((i + 1) * kUpdateRows <= u.rows)
            update_tile<kUpdateRows>(step, u.batch, g, x + j, width, n - j, w, weight.stride, v,
                                     momentum_buffer.stride);
          else
            for (int64_t r = 0; r < u.rows - i * kUpdateRows; ++r)
              update_tile<1>(step, u.batch, g + r, x + j, width, n - j, w + r * weight.stride, weight.stride,
                             v ? v + r * momentum_buffer.stride : v, momentum_buffer.stride);
        }
      }
    }
  });
  return 0;
}

inline int sgd_update(const SgdOptions& options, const UpdateShape& shape, const Matrix& weight,
                      const Matrix& momentum_buffer, const Matrix& grad, const Matrix& x, int threads) {
  return for_dtype(weight.dtype, [&](auto type) {
    return run_update<decltype(type)>(options, shape, weight, momentum_buffer, grad, x, threads);
  });
}

}  // namespace lgk::cpu::LGK_ISA

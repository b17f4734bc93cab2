// The weight gradient grad^T x and the optimizer's step in one pass over the weight: a register tile of dW is summed
// over the whole batch, then meets its tile of the weight and of its states; dW never reaches memory.
#pragma once
#include <type_traits>

#include "common/cpu/formula_tiles.h"
#include "common/cpu/parallel.h"
#include "fused_update/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kUpdateRows = 4;                // of the weight in a register tile
constexpr int kUpdateTile = V == 16 ? 4 : 2;  // vectors of columns in it
constexpr int64_t kPanelBytes = 256 * 1024;   // of x in the cache: (batch, panel) floats

constexpr int64_t kUpdateWidth = kUpdateTile * V;

// Columns [col, col + n) of x, kUpdateWidth at a time: (tiles, batch, kUpdateWidth) floats, zero-padded, so that a tile
// is read in the order of its memory. Column j of the panel begins at out + j * batch.
inline void pack_panel(const Matrix& x, int64_t batch, int64_t col, int64_t n, float* out) {
  for_dtype(x.dtype, [&](auto type) {
    for (int64_t m = 0; m < batch; ++m)
      for (int64_t j = 0; j < n; j += kUpdateWidth)
        for (int64_t t = 0; t < kUpdateWidth; t += V) {
          const int64_t left = n - j - t;
          const vf v = left > 0 ? load_some(at<decltype(type)>(x, m, col + j + t), smaller(left, V)) : vf{};
          store(out + j * batch + m * kUpdateWidth + t, v);
        }
    return 0;
  });
}

// Columns of grad, kUpdateRows at a time: (groups, batch, kUpdateRows), zero-padded.
class PackedColumns {
 public:
  const int64_t groups;

  PackedColumns(const UpdateShape& u, const Matrix& grad, int threads)
      : groups((u.rows + kUpdateRows - 1) / kUpdateRows), size_(kUpdateRows * u.batch), all_(groups * size_, 1) {
    if (!all_) return;
    parallel(groups, u.rows * u.batch, threads, [&](int64_t begin, int64_t end, int) {
      for_dtype(grad.dtype, [&](auto type) {
        for (int64_t i = begin; i < end; ++i) {
          float* out = all_.of(0) + i * size_;
          const int64_t row = i * kUpdateRows, n = smaller(u.rows - row, kUpdateRows);
          for (int64_t m = 0; m < u.batch; ++m) {
            const vf v = load(at<decltype(type)>(grad, m, row), n);
            for (int r = 0; r < kUpdateRows; ++r) out[m * kUpdateRows + r] = v[r];
          }
        }
        return 0;
      });
    });
  }
  explicit operator bool() const { return static_cast<bool>(all_); }
  const float* group(int64_t i) const { return all_.of(0) + i * size_; }

 private:
  int64_t size_;
  Scratch all_;
};

// acc = tile of grad^T x; x (batch, kUpdateWidth) and g (batch, kUpdateRows) are packed
template <int ROWS>
LGK_INLINE void sum_tile(int64_t batch, const float* g, const float* x, vf (&acc)[ROWS][kUpdateTile]) {
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < kUpdateTile; ++t) acc[r][t] = vf{};
  for (int64_t m = 0; m < batch; ++m) {
    vf right[kUpdateTile];
    for (int t = 0; t < kUpdateTile; ++t) right[t] = load(x + m * kUpdateWidth + t * V);
    for (int r = 0; r < ROWS; ++r) {
      const vf left = splat(g[m * kUpdateRows + r]);
      for (int t = 0; t < kUpdateTile; ++t) acc[r][t] += left * right[t];
    }
  }
}

LGK_INLINE vf load_of(const Matrix& matrix, int64_t row, int64_t col, int64_t n) {
  if (matrix.dtype == kFloat32) return load_some(at<float>(matrix, row, col), n);
  if (matrix.dtype == kBFloat16) return load_some(at<bf16>(matrix, row, col), n);
  return load_some(at<f16>(matrix, row, col), n);
}

struct Step {
  UpdateRule rule;
  float beta2, fresh2, inverse_root;

  explicit Step(const UpdateRule& r)
      : rule(r), beta2(static_cast<float>(r.beta2)), fresh2(r.fresh2()), inverse_root(1.f / r.root) {}

  // sum of the gradient -> new weight; the states m (or none) and, of Adam, v are updated
  template <bool ADAM>
  LGK_INLINE vf apply(vf sum, vf w, vf* m, vf* v) const {
    const vf limit = splat(rule.clip_value);
    vf g = sum * rule.grad_scale;
    g = g > limit ? limit : g < -limit ? -limit : g;  // NaN stays
    if (rule.rule == kManhattan) {
      const vi s = (g < 0.f) - (g > 0.f);
      g = __builtin_convertvector(s, vf);
    }
    g += rule.weight_decay * w;
    vf step = g;
    if (m) {
      *m = rule.momentum * *m + rule.fresh * g;
      step = rule.nesterov ? g + rule.momentum * *m : *m;
    }
    if constexpr (ADAM) {
      *v = beta2 * *v + fresh2 * g * g;
      step = *m / (square_root(*v) * inverse_root + rule.eps);
    }
    return rule.keep * w - rule.lr * step;
  }
};

// What a step reads and writes besides its factors.
struct Tensors {
  Matrix weight, first, second, gradient;
};

template <class T>
LGK_INLINE T* element_of(const Matrix& matrix, int64_t row, int64_t col) {
  return static_cast<T*>(matrix.data) + row * matrix.stride + col;
}

// Tile (ROWS, kUpdateWidth) of the weight at (row, col), n columns to its end; x (batch, kUpdateWidth) and g (batch,
// kUpdateRows) are packed.
template <int ROWS, bool ADAM, class T>
inline void update_tile(const Step& step, const Tensors& tensors, int64_t batch, const float* g, const float* x,
                        int64_t row, int64_t col, int64_t n) {
  vf acc[ROWS][kUpdateTile];
  sum_tile<ROWS>(batch, g, x, acc);
  const bool first = ADAM || tensors.first.data;
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < kUpdateTile; ++t) {
      const int64_t left = smaller(n - t * V, V), column = col + t * V;
      if (left <= 0) break;
      T* w = element_of<T>(tensors.weight, row + r, column);
      T* at_m = first ? element_of<T>(tensors.first, row + r, column) : nullptr;
      T* at_v = ADAM ? element_of<T>(tensors.second, row + r, column) : nullptr;
      vf sum = acc[r][t], m = {}, v = {};
      if (tensors.gradient.data) sum += load_of(tensors.gradient, row + r, column, left);
      if (first) m = load_some(at_m, left);
      if (ADAM) v = load_some(at_v, left);
      store_some(w, step.apply<ADAM>(sum, load_some(w, left), first ? &m : nullptr, &v), left);
      if (first) store_some(at_m, m, left);
      if (ADAM) store_some(at_v, v, left);
    }
}

// body(ROWS, g, x, row, col, n): ROWS rows of W at (row, col), an integral constant, n columns to the panel's end; g
// and x are packed, `tile` columns of x, whole tiles of kUpdateWidth.
template <class Body>
inline int over_tiles(const UpdateShape& u, const Matrix& grad, const Matrix& input, int64_t tile, int threads,
                      const Body& body) {
  if (u.rows == 0 || u.columns == 0) return 0;
  const int64_t fitting = kPanelBytes / 4 / (u.batch > 0 ? u.batch : 1) / tile * tile;
  const int64_t width = smaller(fitting < tile ? tile : fitting, rounded(u.columns, kUpdateWidth));
  const PackedColumns packed(u, grad, threads);
  Scratch inputs(width * u.batch, threads);
  if (!packed || !inputs) return 1;
  // A thread owns a range of row groups and walks it once for each panel of x in its cache.
  parallel(packed.groups, u.rows * u.columns, threads, [&](int64_t begin, int64_t end, int thread) {
    float* x = inputs.of(thread);
    for (int64_t first = 0; first < u.columns; first += width) {
      const int64_t n = smaller(u.columns - first, width);
      pack_panel(input, u.batch, first, n, x);
      for (int64_t i = begin; i < end; ++i) {
        const float* g = packed.group(i);
        const int64_t row = i * kUpdateRows;
        for (int64_t j = 0; j < n; j += tile) {
          if (row + kUpdateRows <= u.rows)
            body(std::integral_constant<int, kUpdateRows>{}, g, x + j * u.batch, row, first + j, n - j);
          else
            for (int64_t r = 0; r < u.rows - row; ++r)
              body(std::integral_constant<int, 1>{}, g + r, x + j * u.batch, row + r, first + j, n - j);
        }
      }
    }
  });
  return 0;
}

template <bool ADAM, class T>
inline int run_update(const UpdateRule& rule, const UpdateShape& u, const Tensors& tensors, const Matrix& grad,
                      const Matrix& input, int threads) {
  const Step step(rule);
  return over_tiles(u, grad, input, kUpdateWidth, threads,
                    [&](auto rows, const float* g, const float* x, int64_t row, int64_t col, int64_t n) {
                      update_tile<rows.value, ADAM, T>(step, tensors, u.batch, g, x, row, col, n);
                    });
}

inline int update(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const Matrix& first,
                  const Matrix& second, const Matrix& gradient, const Matrix& grad, const Matrix& x, int threads) {
  const Tensors tensors{weight, first, second, gradient};
  return for_dtype(weight.dtype, [&](auto type) {
    using T = decltype(type);
    return rule.rule == kAdam ? run_update<true, T>(rule, shape, tensors, grad, x, threads)
                              : run_update<false, T>(rule, shape, tensors, grad, x, threads);
  });
}

}  // namespace lgk::cpu::LGK_ISA

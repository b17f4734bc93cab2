// The step of update.h with states of 8 bits. A block of 256 entries of a few rows is stepped tile by tile; its new
// states wait in the first cache until their largest is known, and are rounded to codes then.
#pragma once
#include "fused_update/cpu/codes.h"
#include "fused_update/cpu/update.h"

namespace lgk::cpu::LGK_ISA {

struct CodedTensors {
  Matrix weight, gradient;
  CodedState first, second;
  int64_t columns, blocks;
};

// New states of a block of one row.
struct BlockState {
  alignas(64) float values[kCodeBlock];
  vi largest;
};

// ROWS rows of a block at (row, col), n columns to its end
template <int ROWS, bool ADAM, class T>
inline void update_block(const Step& step, const CodedTensors& tensors, int64_t batch, const float* g, const float* x,
                         int64_t row, int64_t col, int64_t n) {
  BlockState m[ROWS], v[ROWS];
  float m_scale[ROWS], v_scale[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    const int64_t place = (row + r) * tensors.blocks + col / kCodeBlock;
    m_scale[r] = tensors.first.absmax[place];
    m[r].largest = vi{};
    if (ADAM) v_scale[r] = tensors.second.absmax[place], v[r].largest = vi{};
  }
  for (int64_t j = 0; j < n; j += kUpdateWidth) {
    vf acc[ROWS][kUpdateTile];
    sum_tile<ROWS>(batch, g, x + j * batch, acc);
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < kUpdateTile; ++t) {
        const int64_t in_block = j + t * V, left = smaller(n - in_block, V), column = col + in_block;
        if (left <= 0) break;
        const int64_t place = (row + r) * tensors.columns + column;
        T* w = element_of<T>(tensors.weight, row + r, column);
        vf sum = acc[r][t];
        if (tensors.gradient.data) sum += load_of(tensors.gradient, row + r, column, left);
        vf one = decode<true>(load_codes(tensors.first.codes + place, left)) * m_scale[r], two = {};
        if (ADAM) two = decode<false>(load_codes(tensors.second.codes + place, left)) * v_scale[r];
        store_some(w, step.apply<ADAM>(sum, load_some(w, left), &one, &two), left);
        if (left < V) one = first(one, left), two = first(two, left);
        store(m[r].values + in_block, one);
        m[r].largest = larger_size(m[r].largest, one);
        if (ADAM) store(v[r].values + in_block, two), v[r].largest = larger_size(v[r].largest, two);
      }
  }
  for (int r = 0; r < ROWS; ++r) {
    const int64_t place = (row + r) * tensors.blocks + col / kCodeBlock, at = (row + r) * tensors.columns + col;
    encode_block<true>(m[r].values, n, m[r].largest, tensors.first.codes + at, tensors.first.absmax + place);
    if (ADAM)
      encode_block<false>(v[r].values, n, v[r].largest, tensors.second.codes + at, tensors.second.absmax + place);
  }
}

template <bool ADAM, class T>
inline int run_update_8bit(const UpdateRule& rule, const UpdateShape& u, const CodedTensors& tensors,
                           const Matrix& grad, const Matrix& input, int threads) {
  const Step step(rule);
  return over_tiles(u, grad, input, kCodeBlock, threads,
                    [&](auto rows, const float* g, const float* x, int64_t row, int64_t col, int64_t n) {
                      update_block<rows.value, ADAM, T>(step, tensors, u.batch, g, x, row, col, smaller(n, kCodeBlock));
                    });
}

inline int update_8bit(const UpdateRule& rule, const UpdateShape& shape, const Matrix& weight, const CodedState& first,
                       const CodedState& second, const Matrix& gradient, const Matrix& grad, const Matrix& x,
                       int threads) {
  const CodedTensors tensors{weight, gradient,      first,
                             second, shape.columns, rounded(shape.columns, kCodeBlock) / kCodeBlock};
  return for_dtype(weight.dtype, [&](auto type) {
    using T = decltype(type);
    return rule.rule == kAdam ? run_update_8bit<true, T>(rule, shape, tensors, grad, x, threads)
                              : run_update_8bit<false, T>(rule, shape, tensors, grad, x, threads);
  });
}

}  // namespace lgk::cpu::LGK_ISA

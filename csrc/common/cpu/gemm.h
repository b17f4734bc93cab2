// Two small matrix products that need no packing: rows against rows, and rows against columns.
#pragma once
#include "common/cpu/simd.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kRowBlock = 4;                   // a tile's rows of a
constexpr int kColumnBlock = V == 16 ? 4 : 2;  // and its rows of b, or vectors of columns: few loads a multiply-add

template <int M, int N>
inline void dots_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* out,
                       int64_t ldo) {
  vf acc[M][N] = {};
  int64_t j = 0;
  for (; j + V <= depth; j += V) {
    vf right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + n * ldb + j);
    for (int m = 0; m < M; ++m) {
      const vf left = load(a + m * lda + j);
      for (int n = 0; n < N; ++n) acc[m][n] += left * right[n];
    }
  }
  if (j < depth)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] += load(a + m * lda + j, depth - j) * load(b + n * ldb + j, depth - j);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * ldo + n] = sum(acc[m][n]);
}

template <int N>
inline void dots_columns(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth,
                         float* out, int64_t ldo) {
  int64_t m = 0;
  for (; m + kRowBlock <= rows; m += kRowBlock)
    dots_block<kRowBlock, N>(a + m * lda, lda, b, ldb, depth, out + m * ldo, ldo);
  for (; m < rows; ++m) dots_block<1, N>(a + m * lda, lda, b, ldb, depth, out + m * ldo, ldo);
}

// out (rows, columns) = a (rows, depth) @ b (columns, depth)^T; a few rows of b stay in the first-level cache for all
// of a, which should stay in the second.
inline void dots(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t columns, int64_t depth,
                 float* out, int64_t ldo) {
  int64_t n = 0;
  for (; n + kColumnBlock <= columns; n += kColumnBlock)
    dots_columns<kColumnBlock>(a, lda, rows, b + n * ldb, ldb, depth, out + n, ldo);
  for (; n < columns; ++n) dots_columns<1>(a, lda, rows, b + n * ldb, ldb, depth, out + n, ldo);
}

constexpr int64_t kPanelDepth = V == 16 ? 64 : 128;  // rows of b copied side by side, 16, 8, 4 kB

template <int M, int N>
inline void rows_block(const float* a, int64_t row_stride, int64_t depth_stride, const float* b, int64_t ldb,
                       int64_t depth, bool add, float* out, int64_t ldo, int64_t width, int64_t tail) {
  vf acc[M][N] = {};
  if (add)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = load_some(out + m * ldo + n * V, tail);
  for (int64_t k = 0; k < depth; ++k) {
    vf right[N];
    for (int n = 0; n < N; ++n) right[n] = load_some(b + k * ldb + n * V, width);
    for (int m = 0; m < M; ++m) {
      const vf left = splat(a[m * row_stride + k * depth_stride]);
      for (int n = 0; n < N; ++n) acc[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store_some(out + m * ldo + n * V, acc[m][n], tail);
}

// N vectors of columns; one alone may have `tail` elements. Rows of b that several blocks of a read are copied to lie
// side by side: a power of two apart, they would drive each other out of the first-level cache.
template <int N>
inline void product_columns(const float* a, int64_t row_stride, int64_t depth_stride, int64_t rows, const float* b,
                            int64_t ldb, int64_t depth, float* out, int64_t ldo, int64_t tail) {
  alignas(64) float panel[kPanelDepth][N * V];
  const bool copied = rows > kRowBlock;
  for (int64_t k = 0; k < depth || k == 0; k += kPanelDepth) {
    const int64_t deep = depth - k < kPanelDepth ? depth - k : kPanelDepth;
    const float *from = b + k * ldb, *left = a + k * depth_stride;
    if (copied)
      for (int64_t i = 0; i < deep; ++i)
        for (int n = 0; n < N; ++n) store(panel[i] + n * V, load_some(from + i * ldb + n * V, tail));
    const float* right = copied ? panel[0] : from;
    const int64_t ldr = copied ? N * V : ldb, whole = copied ? V : tail;
    int64_t m = 0;
    for (; m + kRowBlock <= rows; m += kRowBlock)
      rows_block<kRowBlock, N>(left + m * row_stride, row_stride, depth_stride, right, ldr, deep, k > 0, out + m * ldo,
                               ldo, whole, tail);
    for (; m < rows; ++m)
      rows_block<1, N>(left + m * row_stride, row_stride, depth_stride, right, ldr, deep, k > 0, out + m * ldo, ldo,
                       whole, tail);
  }
}

// out (rows, columns) = a (rows, depth) @ b (depth, columns); element (i, k) of a at i * row_stride + k * depth_stride
inline void product(const float* a, int64_t row_stride, int64_t depth_stride, int64_t rows, const float* b, int64_t ldb,
                    int64_t depth, int64_t columns, float* out, int64_t ldo) {
  int64_t n = 0;
  for (; n + kColumnBlock * V <= columns; n += kColumnBlock * V)
    product_columns<kColumnBlock>(a, row_stride, depth_stride, rows, b + n, ldb, depth, out + n, ldo, V);
  for (; n < columns; n += V)
    product_columns<1>(a, row_stride, depth_stride, rows, b + n, ldb, depth, out + n, ldo,
                       columns - n < V ? columns - n : V);
}

}  // namespace lgk::cpu::LGK_ISA

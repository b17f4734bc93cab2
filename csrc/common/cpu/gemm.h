// Two small matrix products that need no packing: rows against rows, and rows against columns.
#pragma once
#include "common/cpu/simd.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kRowBlock = V == 16 ? 4 : 2;  // accumulators of a 4-row block fill the 32 registers of AVX-512

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

// out (rows, columns) = a (rows, depth) @ b (columns, depth)^T
inline void dots(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t columns, int64_t depth,
                 float* out, int64_t ldo) {
  for (int64_t m = 0; m < rows;) {
    const bool wide = m + kRowBlock <= rows;
    int64_t n = 0;
    for (; n + 4 <= columns; n += 4) {
      if (wide)
        dots_block<kRowBlock, 4>(a + m * lda, lda, b + n * ldb, ldb, depth, out + m * ldo + n, ldo);
      else
        dots_block<1, 4>(a + m * lda, lda, b + n * ldb, ldb, depth, out + m * ldo + n, ldo);
    }
    for (; n < columns; ++n) {
      if (wide)
        dots_block<kRowBlock, 1>(a + m * lda, lda, b + n * ldb, ldb, depth, out + m * ldo + n, ldo);
      else
        dots_block<1, 1>(a + m * lda, lda, b + n * ldb, ldb, depth, out + m * ldo + n, ldo);
    }
    m += wide ? kRowBlock : 1;
  }
}

template <int M, int N>
inline void rows_block(const float* a, int64_t row_stride, int64_t depth_stride, const float* b, int64_t ldb,
                       int64_t depth, float* out, int64_t ldo, int64_t tail) {
  vf acc[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf right[N];
    for (int n = 0; n < N; ++n) right[n] = tail == V ? load(b + k * ldb + n * V) : load(b + k * ldb + n * V, tail);
    for (int m = 0; m < M; ++m) {
      const vf left = splat(a[m * row_stride + k * depth_stride]);
      for (int n = 0; n < N; ++n) acc[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store_some(out + m * ldo + n * V, acc[m][n], tail);
}

// out (rows, columns) = a (rows, depth) @ b (depth, columns); element (i, k) of a at i * row_stride + k * depth_stride
inline void product(const float* a, int64_t row_stride, int64_t depth_stride, int64_t rows, const float* b, int64_t ldb,
                    int64_t depth, int64_t columns, float* out, int64_t ldo) {
  for (int64_t m = 0; m < rows;) {
    const bool wide = m + kRowBlock <= rows;
    const float* left = a + m * row_stride;
    int64_t n = 0;
    for (; n + 4 * V <= columns; n += 4 * V) {
      if (wide)
        rows_block<kRowBlock, 4>(left, row_stride, depth_stride, b + n, ldb, depth, out + m * ldo + n, ldo, V);
      else
        rows_block<1, 4>(left, row_stride, depth_stride, b + n, ldb, depth, out + m * ldo + n, ldo, V);
    }
    for (; n < columns; n += V) {
      const int64_t tail = columns - n < V ? columns - n : V;
      if (wide)
        rows_block<kRowBlock, 1>(left, row_stride, depth_stride, b + n, ldb, depth, out + m * ldo + n, ldo, tail);
      else
        rows_block<1, 1>(left, row_stride, depth_stride, b + n, ldb, depth, out + m * ldo + n, ldo, tail);
    }
    m += wide ? kRowBlock : 1;
  }
}

}  // namespace lgk::cpu::LGK_ISA

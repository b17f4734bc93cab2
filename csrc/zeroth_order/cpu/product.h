// x[m] (W + c_m Z_m)^T for few rows of x: eight rows of W and of Z come into the first-level cache, a segment of
// columns at a time; each member's perturbed rows are made there and meet its rows of x, four by four. W is read once
// for all members.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/parallel.h"
#include "zeroth_order/cpu/update.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kPart = 512;  // columns of a segment: eight rows of perturbed weights and four of x in 24 KB
constexpr int kOutputs = 8;     // rows of W that are taken together
constexpr int kTogether = 4;    // of these in a register tile

// sums (M, kTogether) += a (M, depth) @ b (kTogether, depth)^T, each a vector whose lanes are added up at the end;
// depth is whole vectors. Rows of `sums` are kOutputs vectors apart.
template <int M>
inline void add_dots(const float* a, int64_t lda, const float* b, int64_t depth, float* sums) {
  vf acc[M][kTogether];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kTogether; ++n) acc[m][n] = load(sums + (m * kOutputs + n) * V);
  for (int64_t j = 0; j < depth; j += V) {
    vf right[kTogether];
    for (int n = 0; n < kTogether; ++n) right[n] = load(b + n * kPart + j);
    for (int m = 0; m < M; ++m) {
      const vf left = load(a + m * lda + j);
      for (int n = 0; n < kTogether; ++n) acc[m][n] += left * right[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < kTogether; ++n) store(sums + (m * kOutputs + n) * V, acc[m][n]);
}

template <class T>
inline int product_of(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const float* x,
                      int64_t width, float* out, int threads) {
  const int64_t all = shape.members * shape.rows, blocks = (shape.outputs + kOutputs - 1) / kOutputs;
  Scratch sums(all * kOutputs * V, threads);
  if (!sums) return 1;
  parallel(blocks, shape.outputs * shape.inputs, threads, [&](int64_t begin, int64_t end, int thread) {
    alignas(64) float z[kOutputs][kPart + 2 * V], perturbed[kOutputs][kPart];
    float* c = sums.of(thread);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first_row = block * kOutputs, outputs = smaller(shape.outputs - first_row, kOutputs);
      std::memset(c, 0, all * kOutputs * V * sizeof *c);
      for (int64_t col = 0; col < shape.inputs; col += kPart) {
        const int64_t n = smaller(shape.inputs - col, kPart);
        for (int64_t m = 0; m < shape.members; ++m) {
          for (int64_t r = 0; r < outputs; ++r) {
            if (m == 0 || noise.count > 1) law_row(noise.formula(m, 0, 0), first_row + r, col, n, z[r]);
            perturb<T>(weight, first_row + r, col, n, noise.coefficients[m], z[r], perturbed[r]);
          }
          const float* rows = x + m * shape.rows * width + col;
          float* into = c + m * shape.rows * kOutputs * V;
          const int64_t depth = (n + V - 1) / V * V;
          int64_t i = 0;
          for (; i + kRowBlock <= shape.rows; i += kRowBlock)
            for (int r = 0; r < outputs; r += kTogether)
              add_dots<kRowBlock>(rows + i * width, width, perturbed[r], depth, into + (i * kOutputs + r) * V);
          for (; i < shape.rows; ++i)
            for (int r = 0; r < outputs; r += kTogether)
              add_dots<1>(rows + i * width, width, perturbed[r], depth, into + (i * kOutputs + r) * V);
        }
      }
      for (int64_t i = 0; i < all; ++i)
        for (int64_t r = 0; r < outputs; ++r)
          out[i * shape.outputs + first_row + r] = sum(load(c + (i * kOutputs + r) * V));
    }
  });
  return 0;
}

// x as dense floats, its rows of whole vectors with zeros behind them; all (members * rows) of them lie one behind the
// other in `x`.
inline int perturbed_product(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const Matrix& x,
                             float* out, int threads) {
  // one vector more: rows a power of two apart would share a few sets of the caches
  const int64_t width = (shape.inputs + V - 1) / V * V + V, all = shape.members * shape.rows;
  Scratch packed(all * width, 1);
  if (!packed) return 1;
  const int status = for_dtype(x.dtype, [&](auto type) {
    for (int64_t i = 0; i < all; ++i)
      for (int64_t j = 0; j < width; j += V) {
        const int64_t left = smaller(shape.inputs - j, V);
        store(packed.of(0) + i * width + j, left > 0 ? load_some(at<decltype(type)>(x, i, j), left) : vf{});
      }
    return 0;
  });
  if (status) return status;
  return for_dtype(weight.dtype, [&](auto type) {
    return product_of<decltype(type)>(noise, shape, weight, packed.of(0), width, out, threads);
  });
}

}  // namespace lgk::cpu::LGK_ISA

// What a rank-1 factor of an adapter needs beside the layer's own products: a function is one pass over (rows, size).
#pragma once
#include "lgk/local_loss_cpu.h"
#include "parallel.h"
#include "simd.h"

namespace lgk::LGK_ISA {

constexpr int64_t kRankRows = 512;  // rows whose share of a sum over rows is added up by one thread

// along (rows) = x . vector and across (size) = the sum over rows of coefficient * row, where they are wanted.
inline int rank_one_sums(int64_t rows, int64_t size, const float* x, const float* vector, const float* coefficient,
                         float* along, float* across, int threads) {
  const int64_t blocks = (rows + kRankRows - 1) / kRankRows, width = (size + V - 1) / V * V;
  Scratch partial(across ? blocks * width : 0, 1);
  if (!partial) return 1;
  parallel(blocks, rows * size, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      float* total = across ? partial.of(0) + block * width : nullptr;
      for (int64_t j = 0; total && j < width; j += V) store(total + j, vf{});
      for (int64_t r = block * kRankRows; r < smaller(rows, (block + 1) * kRankRows); ++r) {
        const float* row = x + r * size;
        const float by = across ? coefficient[r] : 0.f;
        vf dot = {};
        for (int64_t j = 0; j < size; j += V) {
          const int64_t n = smaller(V, size - j);
          const vf v = load_some(row + j, n);
          if (along) dot += v * load_some(vector + j, n);
          if (total) store(total + j, load(total + j) + v * by);
        }
        if (along) along[r] = sum(dot);
      }
    }
  });
  for (int64_t j = 0; across && j < size; j += V) {
    vf total = {};
    for (int64_t block = 0; block < blocks; ++block) total += load(partial.of(0) + block * width + j);
    store_some(across + j, total, smaller(V, size - j));
  }
  return 0;
}

// y (rows, size) += scale * coefficient (rows) vector (size)^T
inline int add_outer(int64_t rows, int64_t size, const float* coefficient, const float* vector, float scale, float* y,
                     int threads) {
  parallel(rows, rows * size, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      const float by = scale * coefficient[r];
      for (int64_t j = 0; j < size; j += V) {
        const int64_t n = smaller(V, size - j);
        store_some(y + r * size + j, load_some(y + r * size + j, n) + load_some(vector + j, n) * by, n);
      }
    }
  });
  return 0;
}

}  // namespace lgk::LGK_ISA

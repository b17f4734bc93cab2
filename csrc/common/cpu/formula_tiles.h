// Register tiles of grad (M, N) @ F (N, K), for F that is made a few rows at a time, in the cache.
#pragma once
#include "common/cpu/formula.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kBlock = V == 16 ? 8 : 4;  // rows of grad in a register tile
constexpr int kTile = 2;                 // vectors of columns in it
constexpr int64_t kGroup = 128;          // columns that are made together
static_assert(kGroup % (kTile * V) == 0 && kSegment / kGroup <= 32, "groups are whole tiles and bits of a word");

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a block: kBlock, or for the last the power of two that holds what is left.
inline int64_t block_rows(int64_t left) {
  int64_t rows = kBlock;
  while (rows > 1 && rows / 2 >= left) rows /= 2;
  return rows;
}

template <class F>
LGK_INLINE void for_block(int64_t rows, const F& f) {
  switch (rows) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 4: return f(std::integral_constant<int, 4>());
    default: return f(std::integral_constant<int, kBlock>());
  }
}

// The weight's rows that are needed next, from this panel's first column on; every second one, as for_row brings the
// others, and counted so: `stride` is that of two rows. The blocks of a product share them out, so that memory is asked
// for all the time and never in a rush.
struct Next {
  const char* data = nullptr;
  int64_t stride = 0, element = 0, rows = 0;

  Next part(int64_t i, int64_t of) const {
    const int64_t first = rows * i / of;
    return {data + first * stride, stride, element, rows * (i + 1) / of - first};
  }
  LGK_INLINE void prefetch(int64_t row, int64_t col) const {  // kTile vectors of columns
    const char* p = data + row * stride + col * element;
    for (int64_t byte = 0; byte < kTile * V * element; byte += 64) __builtin_prefetch(p + byte, 0, 2);
  }
};

// grad's rows [m, m + count) as blocks of (depth, rows) floats, padded with zeros to whole blocks and `depth`.
template <class T>
inline void pack_grad(const Matrix& grad, int64_t m, int64_t count, int64_t begin, int64_t end, int64_t columns,
                      int64_t depth, float* out) {
  for (int64_t b = 0; b < count; b += kBlock) {
    const int64_t rows = block_rows(count - b), real = smaller(count - b, rows);
    float* block = out + b * depth;
    for (int64_t n = begin; n < end; n += V) {
      vf row[kBlock] = {};
      for (int64_t i = 0; i < real; ++i)
        if (n < columns) row[i] = load_some(at<T>(grad, m + b + i, n), smaller(columns - n, V));
      float* target = block + n * rows;
      if (rows == kBlock && end - n >= V) {
        store_in_turn<kBlock>(row, target);
        continue;
      }
      const int64_t stop = smaller(end - n, V);
      for (int64_t l = 0; l < stop; ++l)
        for (int64_t i = 0; i < rows; ++i) target[l * rows + i] = row[i][l];
    }
  }
}

// c (ROWS, width) += a (depth, ROWS)^T @ f (depth, width), rows of c and f `stride` apart
template <int ROWS>
inline void multiply_values(const float* a, const float* f, int64_t depth, int64_t width, int64_t stride,
                            const Next& next, float* c) {
  for (int64_t j = 0; j < width; j += kTile * V) {
    vf acc[ROWS][kTile];
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < kTile; ++t) acc[i][t] = load(c + i * stride + j + t * V);
    const auto add_row = [&](int64_t n) {
      vf right[kTile];
      for (int t = 0; t < kTile; ++t) right[t] = load(f + n * stride + j + t * V);
      for (int i = 0; i < ROWS; ++i) {
        const vf left = splat(a[n * ROWS + i]);
        for (int t = 0; t < kTile; ++t) acc[i][t] += left * right[t];
      }
    };
    int64_t n = 0;
    for (; n < smaller(next.rows, depth); ++n) next.prefetch(n, j), add_row(n);
    for (; n < depth; ++n) add_row(n);
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < kTile; ++t) store(c + i * stride + j + t * V, acc[i][t]);
  }
}

}  // namespace lgk::cpu::LGK_ISA

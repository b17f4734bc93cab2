// Products of rows of activities with weights that are packed once and read in every step: a register tile takes a
// panel of two vectors of columns over the whole depth. A sum goes over the operands one after the other, each from its
// first row on, whatever the tile's size: so a row's result does not depend on the rows beside it.
#pragma once
#include <utility>

#include "common/cpu/formula_tiles.h"
#include "common/cpu/parallel.h"

namespace lgk::cpu::LGK_ISA {

constexpr int kTileRows = V == 16 ? 12 : 6;

struct Operand {
  const float* rows;
  int64_t stride, depth;
};

// Columns of the panel that begins where `left` are left.
inline int64_t panel_columns(int64_t left) { return left > V ? 2 * V : V; }

// Elements (k, j), at k * row_stride + j * column_stride, to rows `first`, first + 1, ... of the panels, which have
// `total` of them.
inline void pack_panels(const float* matrix, int64_t row_stride, int64_t column_stride, int64_t depth, int64_t columns,
                        int64_t first, int64_t total, float* panels, int threads) {
  const int64_t count = (columns + 2 * V - 1) / (2 * V);
  parallel(count, depth * columns / 8, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t j = begin * 2 * V; j < smaller(end * 2 * V, columns); j += 2 * V) {
      const int64_t width = panel_columns(columns - j), real = smaller(columns - j, width);
      float* panel = panels + j * total + first * width;
      for (int64_t k = 0; k < depth; ++k, panel += width) {
        const float* row = matrix + k * row_stride + j * column_stride;
        if (column_stride == 1 && real == 2 * V) {
          store(panel, load(row)), store(panel + V, load(row + V));
          continue;
        }
        for (int64_t i = 0; i < width; ++i) panel[i] = i < real ? row[i * column_stride] : 0.f;
      }
    }
  });
}

// tile (M, N vectors) = the operands' rows from `row` on @ panel; N == 4: two panels, `next` apart
template <int M, int N>
inline void product_tile(const Operand* operands, int count, int64_t row, const float* panel, int64_t next,
                         float* tile) {
  vf acc[M][N] = {};
  for (const Operand* o = operands; o < operands + count; ++o) {
    const float* left = o->rows + row * o->stride;
    const int64_t stride = o->stride;
    for (int64_t k = 0; k < o->depth; ++k, panel += (N == 1 ? 1 : 2) * V) {
      vf right[N];
      for (int n = 0; n < N; ++n) right[n] = load(panel + n / 2 * next + n % 2 * V);
      for (int m = 0; m < M; ++m) {
        const vf a = splat(left[m * stride + k]);
        for (int n = 0; n < N; ++n) acc[m][n] += a * right[n];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(tile + (m * N + n) * V, acc[m][n]);
}

using ProductTile = void (*)(const Operand*, int, int64_t, const float*, int64_t, float*);
struct ProductTiles {
  ProductTile one, two, four;
};

template <int... M>
constexpr auto product_tiles(std::integer_sequence<int, M...>) {
  struct {
    ProductTiles of[sizeof...(M)];
  } all = {{{product_tile<M + 1, 1>, product_tile<M + 1, 2>, product_tile<(M < kTileRows / 2 ? M + 1 : 1), 4>}...}};
  return all;
}

// Rows [begin, end) of the operands, in whole pairs where `unit` is 2, @ panels; finish(row, rows, column, vectors,
// tile).
template <class Finish>
inline void multiply_panels(int64_t begin, int64_t end, int unit, const Operand* operands, int count,
                            const float* panels, int64_t depth, int64_t columns, const Finish& finish) {
  static constexpr auto tiles = product_tiles(std::make_integer_sequence<int, kTileRows>());
  const int64_t items = (end - begin) / unit, most = kTileRows / unit, blocks = (items + most - 1) / most;
  if (!items) return;
  const bool few = (items + blocks - 1) / blocks * unit <= kTileRows / 2;
  alignas(64) float tile[kTileRows * 2 * V];
  for (int64_t j = 0; j < columns;) {
    const int64_t left = columns - j;
    const int vectors = left <= V ? 1 : few && left > 3 * V ? 4 : 2;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = items * b / blocks, rows = items * (b + 1) / blocks - row;
      const ProductTiles& t = tiles.of[rows * unit - 1];
      (vectors == 1   ? t.one
       : vectors == 2 ? t.two
                      : t.four)(operands, count, begin + row * unit, panels + j * depth, 2 * V * depth, tile);
      finish(begin + row * unit, rows * unit, j, vectors, tile);
    }
    j += vectors * V;
  }
}

}  // namespace lgk::cpu::LGK_ISA

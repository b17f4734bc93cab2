// grad (M, N) @ F (N, K) with F made where it is used: for 32 rows and a panel of columns at a time, in the cache.
//
// Two inner products. Of any F: the 32 rows are written out as floats, and a register tile of the output takes one
// multiply-add an element. Of signs alone (AVX-512): 32 rows become one word a column, and four rows at once are one
// look-up in a register of the 16 sums +-g0 +-g1 +-g2 +-g3 and one addition; no bit holds the sign of a zero, so 128
// columns that have one among the 32 rows take the first way.
#pragma once
#include "common/cpu/formula_tiles.h"
#include "common/cpu/parallel.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kBatch = 512;                 // rows of grad for which F is made once
constexpr int64_t kSums = 192 * 1024;           // floats of the output that stay in the second-level cache meanwhile
constexpr int64_t kValues = kDepth * kSegment;  // floats of F made at a time, 128 kB: with 256 kB 1.1 times as long
constexpr int64_t kPacked = 1 << 22;            // floats of grad packed at a time
constexpr int64_t kDeep = 2 * kDepth;  // rows of F made together for many rows of grad: half as often through the sums

// Panels of columns: whole groups, about as many for every thread, and wide rather than narrow, as far as the sums of
// `batch` rows and `step` rows of F allow.
inline int64_t panel_width(int64_t columns, int64_t batch, int64_t step, int threads) {
  const int64_t widest = kSums / smaller(batch < 1 ? 1 : batch, kBatch) / kGroup * kGroup;
  int64_t best = kGroup, cost = INT64_MAX;
  for (int64_t width = smaller(kValues / step, widest); width >= kGroup; width -= kGroup) {
    const int64_t panels = (columns + width - 1) / width, mine = (panels + threads - 1) / threads * width;
    if (mine < cost) best = width, cost = mine;
  }
  return best;
}

#ifdef __AVX512F__
// Bit i of words[j] is the sign of row i, column j. Returns the groups that hold a zero or nan, which have no such bit.
template <class T>
inline uint32_t pack_columns(const Matrix& weight, int64_t row, int64_t col, int64_t rows, int64_t n, int64_t width,
                             uint32_t* words) {
  std::memset(words, 0, width * sizeof *words);
  uint32_t groups = 0;
  for (int64_t r = 0; r < rows; r += 4) {
    const T* source[4];
    for (int i = 0; i < 4; ++i) source[i] = at<T>(weight, row + smaller(r + i, rows - 1), col);
    for (int64_t start = 0; start < n; start += kGroup) {
      __mmask16 special = 0;
      for (int64_t j = start; j < smaller(n, start + kGroup); j += V) {
        const int64_t m = smaller(n - j, V);
        vu word = load(words + j) >> 4;
        for (int i = 0; i < 4; ++i) {
          if (i % 2) prefetch_below(source[i] + j, weight.stride);
          const vf w = load_some(source[i] + j, m);
          special |= _mm512_mask_fpclass_ps_mask((1u << m) - 1, w, 0x87);  // quiet nan, +0, -0, signalling nan
          word = bits<vu>(_mm512_ternarylogic_epi32(bits<__m512i>(word), bits<__m512i>(bits<vu>(w) >> (3 - i)),
                                                    _mm512_set1_epi32(1 << (28 + i)), 0xf8));  // word | (w & bit)
        }
        std::memcpy(words + j, &word, sizeof word);
      }
      if (special) groups |= 1u << start / kGroup;
    }
  }
  const int64_t missing = kDepth - (rows + 3) / 4 * 4;
  if (missing)
    for (int64_t j = 0; j < width; ++j) words[j] >>= missing;
  return groups;
}

inline uint32_t pack_columns_of_bits(const Matrix& weight, int64_t row, int64_t col, int64_t rows, int64_t n,
                                     int64_t width, uint32_t* words) {
  for (int64_t j = 0; j < width; j += V) {
    __m512i word = {};
    if (j < n)
      for (int64_t r = 0; r < rows; ++r) {
        const uint32_t bits = *at<uint32_t>(weight, row + r, (col + j) / 32) >> j % 32;
        word = _mm512_mask_or_epi32(word, static_cast<__mmask16>(bits), word, _mm512_set1_epi32(1u << r));
      }
    std::memcpy(words + j, &word, sizeof word);
  }
  return 0;
}

// c (ROWS, width) += a (32, ROWS)^T @ signs, rows of c `stride` apart
template <int ROWS>
inline void multiply_signs(const float* a, const uint32_t* words, int64_t width, int64_t stride, const Next& next,
                           float* c) {
  alignas(64) float tables[8][ROWS][V];
  const vi lane = bits<vi>(lanes());
  for (int g = 0; g < 8; ++g)
    for (int i = 0; i < ROWS; ++i) {
      vf sums = {};
      for (int r = 0; r < 4; ++r) {
        const vf x = splat(a[(4 * g + r) * ROWS + i]);
        sums += bits<vf>(bits<vu>(x) ^ (bits<vu>(lane) >> r << 31));
      }
      store(tables[g][i], sums);
    }
  for (int64_t j = 0; j < width; j += kTile * V) {
    vf acc[ROWS][kTile];
    vu index[kTile];
    for (int t = 0; t < kTile; ++t) index[t] = load(words + j + t * V);
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < kTile; ++t) acc[i][t] = load(c + i * stride + j + t * V);
    for (int g = 0; g < 8; ++g) {
      for (int64_t row = 2 * g; row < smaller(2 * g + 2, next.rows); ++row) next.prefetch(row, j);
      for (int i = 0; i < ROWS; ++i) {
        const vf table = load(tables[g][i]);
        for (int t = 0; t < kTile; ++t) acc[i][t] += look_up(table, bits<vi>(index[t]));  // by the low four bits
      }
      for (int t = 0; t < kTile; ++t) index[t] >>= 4;
    }
    for (int i = 0; i < ROWS; ++i)
      for (int t = 0; t < kTile; ++t) store(c + i * stride + j + t * V, acc[i][t]);
  }
}
#endif

inline int product(const Formula& f, const Matrix& grad, int64_t batch, void* out, int dtype, int threads) {
#ifdef __AVX512F__
  const bool by_signs = f.weight.data && !f.magnitude.data && !f.state;
#else
  const bool by_signs = false;
#endif
  const int64_t step = by_signs || batch < 64 ? kDepth : kDeep;
  const int64_t width = panel_width(f.columns, batch, step, threads), panels = (f.columns + width - 1) / width;
  const int64_t depth = rounded(f.rows, kDepth), work = f.rows * f.columns;
  const int64_t fitting = kPacked / (depth > 0 ? depth : 1) / kBatch * kBatch, round = fitting > 0 ? fitting : kBatch;
  const int64_t rows_held = rounded(smaller(batch, round), kBlock);
  Scratch packed(rows_held * depth, 1), sums(smaller(rows_held, kBatch) * width, threads);
  Scratch values(step * width, threads), columns(width, threads);
  if (!packed || !sums || !values || !columns) return 1;
  const int status = for_dtype(grad.dtype, [](auto) { return 0; }) | for_dtype(dtype, [](auto) { return 0; });
  if (status) return status;

  for (int64_t start = 0; start < batch; start += round) {
    const int64_t together = smaller(batch - start, round), chunks = (together + kBatch - 1) / kBatch;
    parallel((depth + V - 1) / V, together * depth, threads, [&](int64_t begin, int64_t end, int) {
      for_dtype(grad.dtype, [&](auto type) {
        pack_grad<decltype(type)>(grad, start, together, begin * V, smaller(end * V, depth), f.rows, depth,
                                  packed.of(0));
        return 0;
      });
    });
    parallel(panels * chunks, work * chunks, threads, [&](int64_t begin, int64_t end, int thread) {
      float *c = sums.of(thread), *rows = values.of(thread);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t col = i / chunks * width, n = smaller(f.columns - col, width);
        const int64_t m = start + i % chunks * kBatch, count = smaller(start + together - m, kBatch);
        const float* a = packed.of(0) + (m - start) * depth;
        std::memset(c, 0, rounded(count, kBlock) * width * sizeof(float));
        for (int64_t row = 0; row < f.rows; row += step) {
          const int64_t mine = smaller(f.rows - row, step);
          Next next;
          if (f.weight.data && f.weight.dtype != kPackedSigns) {
            next.element = f.weight.dtype == kFloat32 ? 4 : 2;
            const int64_t stride = f.weight.stride * next.element;
            next.data = static_cast<const char*>(f.weight.data) + col * next.element;
            next.data += row + step < f.rows ? (row + step) * stride : width * next.element;
            next.stride = 2 * stride, next.rows = step / 2;  // every second row
          }
          uint32_t by_values = ~0u;  // the groups that go by the first way
#ifdef __AVX512F__
          uint32_t* words = reinterpret_cast<uint32_t*>(columns.of(thread));
          if (by_signs) {
            if (f.weight.dtype == kPackedSigns)
              by_values = pack_columns_of_bits(f.weight, row, col, mine, n, width, words);
            else
              for_dtype(f.weight.dtype, [&](auto type) {
                by_values = pack_columns<decltype(type)>(f.weight, row, col, mine, n, width, words);
                return 0;
              });
          }
#endif
          const bool one_way = by_values == 0 || by_values == ~0u;
          for (int64_t j = 0; j < n; j += one_way ? width : kGroup) {
            const int64_t wide = one_way ? width : kGroup;
            const bool values_needed = by_values >> j / kGroup & 1;
            if (values_needed)
              for (int64_t r = 0; r < mine; ++r)
                formula_row(f, row + r, col + j, smaller(n - j, wide), rows + r * width + j);
            for (int64_t b = 0; b < count; b += kBlock) {
              const int64_t block = block_rows(count - b);
              const float* left = a + b * depth + row * block;
              const Next ahead = j ? Next() : next.part(b / kBlock, (count + kBlock - 1) / kBlock);
              for_block(block, [&](auto size) {
                constexpr int kRows = decltype(size)::value;
#ifdef __AVX512F__
                if (!values_needed) {
                  multiply_signs<kRows>(left, words + j, wide, width, ahead, c + b * width + j);
                  return;
                }
#endif
                multiply_values<kRows>(left, rows + j, mine, wide, width, ahead, c + b * width + j);
              });
            }
          }
        }
        for_dtype(dtype, [&](auto type) {
          using T = decltype(type);
          for (int64_t b = 0; b < count; ++b) {
            T* target = static_cast<T*>(out) + (m + b) * f.columns + col;
            for (int64_t j = 0; j < n; j += V)
              store_some(target + j, load(c + b * width + j) * f.scale, smaller(n - j, V));
          }
          return 0;
        });
      }
    });
  }
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA

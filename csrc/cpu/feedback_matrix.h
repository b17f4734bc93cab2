// F written out in one pass, rows of it, and the packed signs of a weight.
#pragma once
#include "feedback_laws.h"
#include "parallel.h"

namespace lgk::LGK_ISA {

// The segment of `row` from column `col` on, times the scale, to out.
template <class T>
LGK_INLINE void write_segment(const Feedback& f, int64_t row, int64_t col, float* buffer, T* out) {
  const int64_t n = smaller(f.columns - col, kSegment);
  feedback_row(f, row, col, n, buffer);
  for (int64_t j = 0; j < n; j += V) store_some(out + j, load(buffer + j) * f.scale, smaller(n - j, V));
}

// Row i of out is row index[i] of F, or row i without an index.
inline int rows(const Feedback& f, const int64_t* index, int64_t count, void* out, int dtype, int threads) {
  const int64_t segments = (f.columns + kSegment - 1) / kSegment;
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel(count * segments, count * f.columns, threads, [&](int64_t begin, int64_t end, int) {
      alignas(64) float buffer[kSegment];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / segments, col = i % segments * kSegment;
        write_segment(f, index ? index[row] : row, col, buffer, static_cast<T*>(out) + row * f.columns + col);
      }
    });
    return 0;
  });
}

inline int matrix(const Feedback& f, void* out, int dtype, int threads) {
  return rows(f, nullptr, f.rows, out, dtype, threads);
}

inline int pack_signs(const Matrix& weight, int64_t rows, int64_t columns, uint32_t* out, int threads) {
  const int64_t words = (columns + 31) / 32;
  return for_dtype(weight.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(rows * words, rows * columns, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / words, col = i % words * 32;
        uint32_t word = 0;
        for (int64_t j = 0; j < smaller(32, columns - col); j += V) {
          const int64_t n = smaller(columns - col - j, V);
          const vf w = load_some(at<T>(weight, row, col + j), n);
#ifdef __AVX512F__
          word |= static_cast<uint32_t>(_mm512_cmp_ps_mask(w, vf{}, _CMP_LT_OQ)) << j;
#else
          const vi negative = w < 0.f;
          for (int l = 0; l < V; ++l) word |= (static_cast<uint32_t>(negative[l]) & 1) << (j + l);
#endif
        }
        out[i] = word;
      }
    });
    return 0;
  });
}

}  // namespace lgk::LGK_ISA

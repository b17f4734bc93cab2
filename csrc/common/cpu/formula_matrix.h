// F written out in one pass, rows of it, and the packed signs of a weight.
#pragma once
#include "common/cpu/formula.h"
#include "common/cpu/parallel.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kStreamed = 1 << 22;  // bytes of an F that the second-level cache won't hold for its reader

// n elements of `row` from column `col` on (a multiple of 128), times the scale, but for the first `skip` of them, to
// out; past the caches where that is asked for.
template <class T>
LGK_INLINE void write_segment(const Formula& f, int64_t row, int64_t col, int64_t n, int64_t skip, bool streamed,
                              float* buffer, T* out) {
  if (skip) {
    formula_row(f, row, col, n, buffer);
    for (int64_t j = skip; j < n; j += V) store_some(out + (j - skip), load(buffer + j) * f.scale, smaller(n - j, V));
  } else if (streamed && std::is_same_v<T, float>) {
    for_row(f, row, col, n, buffer, [&](int64_t j, vf v) { stream(out + j, v * f.scale); });
  } else {
    for_row(f, row, col, n, buffer, [&](int64_t j, vf v) { store_some(out + j, v * f.scale, smaller(n - j, V)); });
  }
}

// Row i of out is row index[i] of F, or without an index row first_row + i, from column `first` on. A large F of floats
// is written without being read into the caches first: on two Zen 4 cores (512, 4608) takes 0.35 against 0.75 ms with
// signs alone, 0.85 against 1.4 with random magnitudes, and its reader loses 0.1 ms.
inline int write_rows(const Formula& f, const int64_t* index, int64_t first_row, int64_t first, int64_t count,
                      void* out, int dtype, int threads) {
  const int64_t skip = first % 128, size = kSegment - (skip ? 128 : 0), segments = (f.columns + size - 1) / size;
  const bool streamed = count * f.columns * 4 >= kStreamed && f.columns % V == 0 &&
                        reinterpret_cast<uintptr_t>(out) % LGK_VECTOR_BYTES == 0;
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel(count * segments, count * f.columns, threads, [&](int64_t begin, int64_t end, int) {
      alignas(64) float buffer[kSegment + V];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / segments, col = i % segments * size, n = smaller(f.columns - col, size);
        write_segment(f, index ? index[row] : first_row + row, first - skip + col, skip + n, skip, streamed, buffer,
                      static_cast<T*>(out) + row * f.columns + col);
      }
      if (streamed) stream_fence();
    });
    return 0;
  });
}

inline int rows(const Formula& f, const int64_t* index, int64_t count, void* out, int dtype, int threads) {
  return write_rows(f, index, 0, 0, count, out, dtype, threads);
}

// f.rows rows and f.columns columns of F from (row, column) on.
inline int matrix(const Formula& f, int64_t row, int64_t column, void* out, int dtype, int threads) {
  return write_rows(f, nullptr, row, column, f.rows, out, dtype, threads);
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

}  // namespace lgk::cpu::LGK_ISA

// F written out in one pass, rows of it, and the packed signs of a weight.
#pragma once
#include "common/cpu/formula.h"
#include "common/cpu/parallel.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kStreamed = 1 << 22;  // bytes of an F that the second-level cache won't hold for its reader

// The segment of `row` from column `col` on, times the scale, to out; past the caches where that is asked for.
template <class T>
LGK_INLINE void write_segment(const Formula& f, int64_t row, int64_t col, bool streamed, float* buffer, T* out) {
  const int64_t n = smaller(f.columns - col, kSegment);
  if (streamed && std::is_same_v<T, float>)
    for_row(f, row, col, n, buffer, [&](int64_t j, vf v) { stream(out + j, v * f.scale); });
  else
    for_row(f, row, col, n, buffer, [&](int64_t j, vf v) { store_some(out + j, v * f.scale, smaller(n - j, V)); });
}

// Row i of out is row index[i] of F, or row i without an index. A large F of floats is written without being read
// into the caches first: on two Zen 4 cores (512, 4608) takes 0.35 against 0.75 ms with signs alone, 0.85 against 1.4
// with random magnitudes, and its reader loses 0.1 ms.
inline int rows(const Formula& f, const int64_t* index, int64_t count, void* out, int dtype, int threads) {
  const int64_t segments = (f.columns + kSegment - 1) / kSegment;
  const bool streamed = count * f.columns * 4 >= kStreamed && f.columns % V == 0 &&
                        reinterpret_cast<uintptr_t>(out) % LGK_VECTOR_BYTES == 0;
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel(count * segments, count * f.columns, threads, [&](int64_t begin, int64_t end, int) {
      alignas(64) float buffer[kSegment];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / segments, col = i % segments * kSegment;
        write_segment(f, index ? index[row] : row, col, streamed, buffer, static_cast<T*>(out) + row * f.columns + col);
      }
      if (streamed) stream_fence();
    });
    return 0;
  });
}

inline int matrix(const Formula& f, void* out, int dtype, int threads) {
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

}  // namespace lgk::cpu::LGK_ISA

// Sums over rows and columns of tensors that are read a few thousand elements at a time, as floats in the cache.
// Every sum has an order that depends on its length alone.
#pragma once
#include "common/cpu/formula.h"
#include "common/cpu/parallel.h"
#include "forward_gradient/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

#define LGK_INLINE_LAMBDA __attribute__((always_inline))  // the compiler leaves those with several calls alone

constexpr int64_t kStreamedBytes = 1 << 22;  // of an output that the second-level cache won't hold for its reader

// Asks for the n elements that lie `distance` after p: the processor's own prefetch stops where a page ends, and its
// window, full of arithmetic, sees less far than that of a plain sum. (Beyond the tensor's end this does nothing.)
template <class T>
LGK_INLINE void ask_for(const T* p, int64_t n, int64_t distance) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(p) + distance * sizeof(T);
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(start + byte));
}

// f(j, count) for the vectors of n elements: count is V, but for what is left at the end.
template <class F>
LGK_INLINE void for_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + V <= n; j += V) f(j, int64_t{V});
  if (j < n) f(j, n - j);
}

// n elements from `offset` on as floats: in place, or widened into the buffer.
inline const float* widened(const Array& x, int64_t offset, int64_t n, float* buffer) {
  if (x.dtype == kFloat32) return static_cast<const float*>(x.data) + offset;
  for_dtype(x.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(x.data) + offset;
    for_vectors(
        n, [&](int64_t j, int64_t some) LGK_INLINE_LAMBDA { store_some(buffer + j, load_some(from + j, some), some); });
    return 0;
  });
  return buffer;
}

// Where n floats of the output go: in place, or into a buffer that `narrowed` rounds.
inline float* room(void* out, int dtype, int64_t offset, float* buffer) {
  return out && dtype == kFloat32 ? static_cast<float*>(out) + offset : buffer;
}

inline void narrowed(const float* values, void* out, int dtype, int64_t offset, int64_t n) {
  if (dtype == kFloat32 || !out) return;
  for_dtype(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(out) + offset;
    for_vectors(
        n, [&](int64_t j, int64_t some) LGK_INLINE_LAMBDA { store_some(to + j, load_some(values + j, some), some); });
    return 0;
  });
}

// Whether rows of `length` floats can be written past the caches, and whether that pays.
inline bool streams(const void* out, int dtype, int64_t length, int64_t size) {
  return dtype == kFloat32 && size * 4 >= kStreamedBytes && length % V == 0 &&
         reinterpret_cast<uintptr_t>(out) % LGK_VECTOR_BYTES == 0;
}

LGK_INLINE void put(float* p, vf v, int64_t n, bool streamed) {
  if (n < V) return store(p, v, n);
  streamed ? stream(p, v) : store(p, v);
}

// Rows of `length` that are read together: few enough that they stay in the first-level cache for another pass.
inline int64_t rows_at_once(int64_t length, int64_t most) {
  const int64_t rows = most / (length > 0 ? length : 1);
  return rows >= V ? rows / V * V : rows > 0 ? rows : 1;
}

// out[k] = the lanes of the sum of t[k] over j < n; term(j, count, t) gives `count` of V terms.
template <int K, class Term>
LGK_INLINE void lane_sums(int64_t n, const Term& term, vf* out) {
  vf total[2][K] = {}, t[K];
  int64_t j = 0;
  for (; j + 2 * V <= n; j += 2 * V)
    for (int u = 0; u < 2; ++u) {
      term(j + u * V, int64_t{V}, t);
      for (int k = 0; k < K; ++k) total[u][k] += t[k];
    }
  if (j + V <= n) {
    term(j, int64_t{V}, t);
    for (int k = 0; k < K; ++k) total[0][k] += t[k];
    j += V;
  }
  if (j < n) {
    term(j, n - j, t);
    for (int k = 0; k < K; ++k) total[1][k] += first(t[k], n - j);
  }
  for (int k = 0; k < K; ++k) out[k] = total[0][k] + total[1][k];
}

// Halves N vectors log2(N) times: each lane pairs with the one N/2, N/4, ... 1 away, and so do the vectors. Lane l of
// the one that is left is the sum of the N lanes of vector l % N around l.
template <int N>
LGK_INLINE vf sum_of_lanes(vf* t) {
  if constexpr (N > 1) {
    constexpr int S = N / 2;
    for (int i = 0; i < S; ++i) t[i] = shuffle<UpperLeft<S>>(t[i], t[i + S]) + shuffle<LowerRight<S>>(t[i], t[i + S]);
    sum_of_lanes<S>(t);
  }
  return t[0];
}

// Lane i of out[k] = the sum of t[k] over row i < rows <= V; term(i, j, count, t).
template <int K, class Term>
LGK_INLINE void row_sums(int64_t rows, int64_t n, const Term& term, vf* out) {
  vf part[K][V] = {};
  for (int64_t i = 0; i < rows; ++i) {
    vf lanes[K];
    lane_sums<K>(n, [&](int64_t j, int64_t count, vf* t) LGK_INLINE_LAMBDA { term(i, j, count, t); }, lanes);
    for (int k = 0; k < K; ++k) part[k][i] = lanes[k];
  }
  for (int k = 0; k < K; ++k) out[k] = rows == 1 ? splat(sum(part[k][0])) : sum_of_lanes<V>(part[k]);
}

constexpr int kRowsAdded = 8;  // one after the other, before they join the total

// out[k][j] = the sum of t[k] over the rows, for columns j < width; term(row, j, count, t).
template <int K, class Term>
LGK_INLINE void column_sums(int64_t rows, int64_t width, const Term& term, float* const* out) {
  for (int k = 0; k < K; ++k)
    for (int64_t j = 0; j < width; j += V) store(out[k] + j, vf{});
  for (int64_t row = 0; row < rows; row += kRowsAdded) {
    const int64_t count = smaller(kRowsAdded, rows - row);
    for (int64_t j = 0; j < width; j += V) {
      vf t[K], total[K] = {};
      if (j + V > width) {
        for (int64_t r = 0; r < count; ++r) {
          term(row + r, j, width - j, t);
          for (int k = 0; k < K; ++k) total[k] += t[k];
        }
      } else if (count < kRowsAdded) {
        for (int64_t r = 0; r < count; ++r) {
          term(row + r, j, int64_t{V}, t);
          for (int k = 0; k < K; ++k) total[k] += t[k];
        }
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < kRowsAdded; ++r) {
          term(row + r, j, int64_t{V}, t);
          for (int k = 0; k < K; ++k) total[k] += t[k];
        }
      }
      for (int k = 0; k < K; ++k) store(out[k] + j, load(out[k] + j) + total[k]);
    }
  }
}

}  // namespace lgk::cpu::LGK_ISA

// The step along noise by formula, in one pass over the weight, and rows of perturbed weights.
#pragma once
#include "common/cpu/formula.h"
#include "common/cpu/parallel.h"
#include "zeroth_order/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

// v as it is, where the compiler would fuse the product that it is into the sum that follows: the step is defined to
// the bit, each operation rounded by itself.
LGK_INLINE vf by_itself(vf v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  volatile vf kept = v;
  v = kept;
#endif
  return v;
}

// sum_i c_i Z_i of n elements of `row` from column `col` on; both buffers have room for n rounded up to 2 V. Returns
// where they are.
inline const float* noise_row(const FormulaNoise& noise, int64_t row, int64_t col, int64_t n, float* values,
                              float* sum) {
  for (int64_t i = 0; i < noise.count; ++i) {
    Formula f = noise.formula(i, 0, 0);
    const float c = noise.coefficients[i];
    float* into = i ? values : sum;
    if (noise.law == kSign) {  // c times a sign is a sign: the product of the two numbers has the same bits
      f.range.scale *= c;
      law_row(f, row, col, n, into);
    } else {
      law_row(f, row, col, n, into);
      for (int64_t j = 0; j < n; j += V) store(into + j, by_itself(load(into + j) * c));
    }
    if (i)
      for (int64_t j = 0; j < n; j += V) store(sum + j, load(sum + j) + load(values + j));
  }
  return sum;
}

template <class T>
inline int update_rows(const FormulaNoise& noise, const Matrix& weight, int64_t rows, int64_t columns, float keep,
                       int threads) {
  parallel(rows, rows * columns, threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) float values[kSegment + 2 * V], sum[kSegment + 2 * V];
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < columns; col += kSegment) {
        const int64_t n = smaller(columns - col, kSegment);
        const float* step = noise_row(noise, row, col, n, values, sum);
        T* w = static_cast<T*>(weight.data) + row * weight.stride + col;
        for (int64_t j = 0; j < n; j += V) {
          const int64_t some = smaller(n - j, V);
          store_some(w + j, by_itself(load_some(w + j, some) * keep) + load(step + j), some);
        }
      }
  });
  return 0;
}

inline int formula_update(const FormulaNoise& noise, const Matrix& weight, int64_t rows, int64_t columns, float keep,
                          int threads) {
  return for_dtype(weight.dtype,
                   [&](auto type) { return update_rows<decltype(type)>(noise, weight, rows, columns, keep, threads); });
}

// n elements of W + c Z in `row`, from column `col` on, to out, which has room for n rounded up to V; zeros
// behind the n where W ends
template <class T>
LGK_INLINE void perturb(const Matrix& weight, int64_t row, int64_t col, int64_t n, float c, const float* z,
                        float* out) {
  const T* w = at<T>(weight, row, col);
  int64_t j = 0;
  for (; j + V <= n; j += V) store(out + j, load(w + j) + c * load(z + j));
  if (j < n) store(out + j, first(load(w + j, n - j) + c * load(z + j), n - j));
}

inline int perturbed_rows(const FormulaNoise& noise, const Members& shape, const Matrix& weight, const int64_t* index,
                          int64_t first_row, float* out, int threads) {
  const int64_t columns = shape.inputs, count = shape.rows;
  return for_dtype(weight.dtype, [&](auto type) {
    using T = decltype(type);
    parallel(count, shape.members * count * columns, threads, [&](int64_t begin, int64_t end, int) {
      alignas(64) float z[kSegment + 2 * V], sum[kSegment + V];
      for (int64_t r = begin; r < end; ++r)
        for (int64_t col = 0; col < columns; col += kSegment) {
          const int64_t n = smaller(columns - col, kSegment);
          for (int64_t m = 0; m < shape.members; ++m) {
            const int64_t row = index ? index[m * count + r] : first_row + r;
            if (m == 0 || index || noise.count > 1) law_row(noise.formula(m, 0, 0), row, col, n, z);
            float* into = out + (m * count + r) * columns + col;
            const bool inside = n % V == 0;
            perturb<T>(weight, row, col, n, noise.coefficients[m], z, inside ? into : sum);
            if (!inside) std::memcpy(into, sum, n * sizeof(float));
          }
        }
    });
    return 0;
  });
}

}  // namespace lgk::cpu::LGK_ISA

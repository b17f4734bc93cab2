// Products with a table of signs, AVX-512. Four columns of signs are one of 16 sums: a vector of these 16 sums, made
// once for four inputs, is looked up by vpermps with four bits of 16 packed words, one addition per 64 products.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>

#include "common/cpu/simd.h"
#include "lls/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

// Lane i: the sum of x[0..3] in which term t is negated when bit t of i is set.
LGK_INLINE __m512 signed_sums(const float* x) {
  alignas(64) static const float sign[4][16] = {{1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1},
                                                {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
                                                {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1},
                                                {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
  const __m512 low = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), _mm512_load_ps(sign[1]),
                                     _mm512_mul_ps(_mm512_set1_ps(x[0]), _mm512_load_ps(sign[0])));
  const __m512 high = _mm512_fmadd_ps(_mm512_set1_ps(x[3]), _mm512_load_ps(sign[3]),
                                      _mm512_mul_ps(_mm512_set1_ps(x[2]), _mm512_load_ps(sign[2])));
  return _mm512_add_ps(low, high);
}

constexpr int64_t kChunk = 8;  // words of depth at a time: their sums for four samples fill half of L1

using Sums = float[kChunk * 8][16];

// out (B, 16 * N) = or += the signs of `groups` groups of four columns, for 16 * N rows.
template <int B, int N>
inline void sign_block(const Sums* sums, int64_t groups, const uint32_t* words, int64_t stride, bool add, float* out,
                       int64_t ldo, int64_t rows) {
  __m512 acc[B][N];
  __mmask16 mask[N];
  for (int n = 0; n < N; ++n) mask[n] = static_cast<__mmask16>((1u << (rows - n * 16 < 16 ? rows - n * 16 : 16)) - 1);
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n)
      acc[b][n] = add ? _mm512_maskz_loadu_ps(mask[n], out + b * ldo + n * 16) : _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; words += stride) {
    vu word[N];
    for (int n = 0; n < N; ++n) std::memcpy(&word[n], words + n * 16, sizeof(vu));
    for (int64_t end = g + 8 < groups ? g + 8 : groups; g < end; ++g) {
      for (int b = 0; b < B; ++b) {
        const __m512 table = _mm512_load_ps(sums[b][g]);
        for (int n = 0; n < N; ++n) acc[b][n] += look_up(table, bits<vi>(word[n]));  // by the low four bits
      }
      for (int n = 0; n < N; ++n) word[n] >>= 4;
    }
  }
  for (int b = 0; b < B; ++b)
    for (int n = 0; n < N; ++n) _mm512_mask_storeu_ps(out + b * ldo + n * 16, mask[n], acc[b][n]);
}

template <int B>
inline void sign_samples(const float* x, int64_t ldx, int64_t depth, bool skip_first, const uint32_t* words,
                         int64_t stride, float* out, int64_t ldo, int64_t rows) {
  alignas(64) Sums sums[B];
  for (int64_t begin = 0; begin < depth; begin += 32 * kChunk) {
    const int64_t count = depth - begin < 32 * kChunk ? depth - begin : 32 * kChunk, groups = (count + 3) / 4;
    for (int b = 0; b < B; ++b)
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = x + b * ldx + begin + 4 * g;
        float padded[4] = {};
        if (4 * g + 4 > count || (begin + g == 0 && skip_first)) {
          for (int64_t i = begin + g == 0 && skip_first; i < 4 && 4 * g + i < count; ++i) padded[i] = from[i];
          from = padded;
        }
        _mm512_store_ps(sums[b][g], signed_sums(from));
      }
    const uint32_t* at = words + begin / 32 * stride;
    for (int64_t r = 0; r < rows;) {
      const int64_t left = rows - r;
      if (left > 48)
        sign_block<B, 4>(sums, groups, at + r, stride, begin > 0, out + r, ldo, left), r += 64;
      else if (left > 32)
        sign_block<B, 3>(sums, groups, at + r, stride, begin > 0, out + r, ldo, left), r += 48;
      else if (left > 16)
        sign_block<B, 2>(sums, groups, at + r, stride, begin > 0, out + r, ldo, left), r += 32;
      else
        sign_block<B, 1>(sums, groups, at + r, stride, begin > 0, out + r, ldo, left), r += 16;
    }
  }
}

// out (count, rows) = x (count, depth) @ signs (rows, depth)^T. Bits 0..31 of words[w * stride + r] are columns
// 32w .. 32w+31 of row r, set where negative; stride is a multiple of 16. `skip_first`: column 0 is zero.
inline void sign_product(const float* x, int64_t ldx, int64_t count, int64_t depth, bool skip_first,
                         const uint32_t* words, int64_t stride, float* out, int64_t ldo, int64_t rows) {
  int64_t b = 0;
  for (; b + 4 <= count; b += 4)
    sign_samples<4>(x + b * ldx, ldx, depth, skip_first, words, stride, out + b * ldo, ldo, rows);
  for (; b < count; ++b) sign_samples<1>(x + b * ldx, ldx, depth, skip_first, words, stride, out + b * ldo, ldo, rows);
}

// Products with the square basis; HeadInputs::signs is sign_layouts' result.
struct SignProducts {
  const Head& h;
  int64_t samples() const { return 16; }
  int64_t by_row() const { return (h.dim + 31) / 32 * round16(h.rows); }
  static int64_t round16(int64_t n) { return (n + 15) / 16 * 16; }
  void similarity(const float* x, int64_t count, float* s) const {
    sign_product(x, h.dim, count, h.dim, true, h.signs, round16(h.rows), s, h.rows, h.rows);
    for (int64_t i = 0; i < count; ++i) {  // column 0 is zero, and zero times inf or nan is nan
      const float first = x[i * h.dim] * 0.f;
      for (int64_t r = 0; first != first && r < h.rows; ++r) s[i * h.rows + r] = first;
    }
  }
  void gradient(const float* g, int64_t count, float* grad) const {
    sign_product(g, h.rows, count, h.rows, false, h.signs + by_row(), round16(h.dim), grad, h.dim, h.dim);
    for (int64_t i = 0; i < count; ++i) {
      float first = 0;
      for (int64_t r = 0; r < h.rows; ++r) first += g[i * h.rows + r] * 0.f;
      grad[i * h.dim] = first;
    }
  }
};

}  // namespace lgk::cpu::LGK_ISA
#endif

// One row of a feedback matrix: the law's values, the magnitudes, the signs.
#pragma once
#include "common/cpu/philox.h"
#include "common/formula.h"

namespace lgk::cpu::LGK_ISA {

typedef uint8_t vb __attribute__((vector_size(V)));
constexpr int64_t kSegment = 1024;  // most columns of a row segment; segments begin at multiples of 128

// -- the laws: words to values ---------------------------------------------------------------------------------------

LGK_INLINE vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LGK_INLINE vf to_float(vu v) { return __builtin_convertvector(bits<vi>(v), vf); }

LGK_INLINE vu lanes() {
  vu lane = {};
  for (int i = 0; i < V; ++i) lane[i] = i;
  return lane;
}

LGK_INLINE vf load_bytes(const uint8_t* p) {
  vb bytes;
  std::memcpy(&bytes, p, sizeof bytes);
#if defined(__AVX512F__)  // GCC takes the bytes one by one
  return to_float(bits<vu>(_mm512_maskz_cvtepu8_epi32(0xffff, bits<__m128i>(bytes))));
#elif defined(__AVX2__)
  return to_float(bits<vu>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  return to_float(__builtin_convertvector(bytes, vu));
#endif
}

// Bits j, j + 1, ... of `words` as sign bits of the lanes (j a multiple of V).
LGK_INLINE vu sign_bits(const uint32_t* words, int64_t j) {
  return (((vu{} + words[j / 32]) >> (lanes() + static_cast<uint32_t>(j % 32))) << 31);
}

LGK_INLINE vf fused_multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int i = 0; i < V; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// u in (0, 1), exact -> scale * (2u - 1), where the product with 2 is exact, or low + span * u, rounded once
LGK_INLINE vf in_range(vf u, const Range& r) {
  if (!r.has_low) return (2.f * u - 1.f) * r.scale;
  if (r.low == 0.f) return u * r.span;  // the same, also where the processor has no fused multiply-add
  return fused_multiply_add(u, splat(r.span), splat(r.low));
}

LGK_INLINE vf unit(vu word) { return (to_float(word >> 9) + 0.5f) * 0x1p-23f; }

// ln u for u in (0, 1), within one unit in the last place: Cephes' polynomial about 1.
LGK_INLINE vf log_unit(vf u) {
  vu raw = bits<vu>(u);
  const vu shifted = raw - 0x3f3504f3;  // so that the mantissa falls into [sqrt(1/2), sqrt(2))
  const vf e = __builtin_convertvector(bits<vi>(shifted) >> 23, vf);
  const vf x = bits<vf>((shifted & 0x7fffff) + 0x3f3504f3) - 1.f;
  vf p = splat(7.0376836292e-2f);
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const vf square = x * x;
  vf y = p * x * square + e * -2.12194440e-4f - 0.5f * square;
  return x + y + e * 0.693359375f;
}

// sin and cos of an angle in [0, 2 pi]: Cephes, pi/2 in three parts of few enough bits that products are exact.
LGK_INLINE void sin_cos(vf angle, vf* sine, vf* cosine) {
  const vi quarter = __builtin_convertvector(angle * 0.636619772f + 0.5f, vi);
  const vf n = __builtin_convertvector(quarter, vf);
  const vf r = ((angle - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.54978995489188216e-8f;
  const vf z = r * r;
  const vf s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const vf c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.f;
  const vi odd = -(quarter & 1);
  const vu sine_sign = bits<vu>((quarter & 2) << 30), cosine_sign = bits<vu>(((quarter + 1) & 2) << 30);
  *sine = bits<vf>(bits<vu>(odd ? c : s) ^ sine_sign);
  *cosine = bits<vf>(bits<vu>(odd ? s : c) ^ cosine_sign);
}

LGK_INLINE vf square_root(vf x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < V; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

template <int PART>
struct Interleave {  // lanes of a and b in turn, from the first or the second half
  static constexpr int lane(int l) { return l % 2 * V + l / 2 + PART * (V / 2); }
};

// n values of `row` from column `col` on (a multiple of 128) into out, which has room for n rounded up to 2 V.
inline void law_row(const Formula& f, int64_t row, int64_t col, int64_t n, float* out) {
  alignas(64) uint32_t words[kSegment + 4 * kLanes];
  const Range& r = f.range;
  const int v = f.law == kUniform8 ? 16 : f.law == kSign ? 128 : 4;
  philox_words(f.state, static_cast<uint32_t>(row), static_cast<uint32_t>(col / v), (n + v - 1) / v, words);
  switch (f.law) {
    case kUniform:
      for (int64_t j = 0; j < n; j += V) store(out + j, in_range(unit(load(words + j)), r));
      break;
    case kUniform8: {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words);
      for (int64_t j = 0; j < n; j += V)  // 2u - 1 = (2 byte - 255) / 256
        store(out + j, in_range((load_bytes(bytes + j) + 0.5f) * 0x1p-8f, r));
      break;
    }
    case kSign:
      for (int64_t j = 0; j < n; j += V) store(out + j, bits<vf>(bits<vu>(splat(r.scale)) ^ sign_bits(words, j)));
      break;
    case kNormal:
      for (int64_t j = 0; j < n; j += 2 * V) {
        const vf w0 = bits<vf>(load(words + j)), w1 = bits<vf>(load(words + j + V));
        const vf radius = square_root(-2.f * log_unit(unit(bits<vu>(shuffle<Even>(w0, w1)))));
        vf sine, cosine;
        sin_cos(unit(bits<vu>(shuffle<Odd>(w0, w1))) * 6.28318530717958647692f, &sine, &cosine);
        cosine = radius * cosine * r.scale;
        sine = radius * sine * r.scale;
        store(out + j, shuffle<Interleave<0>>(cosine, sine));
        store(out + j + V, shuffle<Interleave<1>>(cosine, sine));
      }
  }
}

// -- signs and magnitudes ----------------------------------------------------------------------------------------

LGK_INLINE vf sign_of(vf w, bool plus) {
#if defined(__AVX512F__)
  const __m512 one = _mm512_set1_ps(1.f);
  if (plus) return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(w, vf{}, _CMP_LT_OQ), one, -one);
  const __mmask16 nonzero = _mm512_cmp_ps_mask(w, vf{}, _CMP_NEQ_OQ);  // not of nan
  return bits<vf>(_mm512_maskz_ternarylogic_epi32(nonzero, bits<__m512i>(w), _mm512_set1_epi32(INT32_MIN),
                                                  bits<__m512i>(one), 0xea));  // (w & signs) | one
#else
  const vi negative = w < 0.f, other = plus ? ~negative : w > 0.f;
  return __builtin_convertvector(negative - other, vf);
#endif
}

template <class T>
inline const T* at(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const T*>(m.data) + row * m.stride + col;
}

constexpr int64_t kDepth = 32;  // rows of F that a product holds in the cache at a time

// The weight's lines of the next kDepth rows come into the second-level cache while this thread computes: odd rows
// with the reading of this block (here), even rows with its multiplication. Left to itself the processor waits for
// memory at the start of every row of a panel. (Beyond the matrix's end a prefetch does nothing.)
template <class T>
LGK_INLINE void prefetch_below(const T* p, int64_t stride) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kDepth * stride * sizeof(T)), 0, 2);
}

// put(j, F's elements j, j + 1, ... / scale) for the n elements of `row` from column `col` on (a multiple of 128); the
// last vector may be longer than what is left. `buffer` has room for n rounded up to 2 V.
template <class Put>
LGK_INLINE void for_row(const Formula& f, int64_t row, int64_t col, int64_t n, float* buffer, const Put& put) {
  const bool has_value = f.state || f.magnitude.data;
  if (f.state) law_row(f, row, col, n, buffer);
  if (f.magnitude.data)
    for_dtype(f.magnitude.dtype, [&](auto type) {
      const auto* magnitude = at<decltype(type)>(f.magnitude, row, col);
      for (int64_t j = 0; j < n; j += V) {
        if (row % 2) prefetch_below(magnitude + j, f.magnitude.stride);
        store(buffer + j, load_some(magnitude + j, smaller(n - j, V)));
      }
      return 0;
    });
  const auto value = [&](int64_t j) { return has_value ? load(buffer + j) : splat(1.f); };
  const auto signed_value = [&](int64_t j, vf sign) {
    return has_value ? bits<vf>(bits<vu>(load(buffer + j)) & 0x7fffffff) * sign : sign;
  };
  if (!f.weight.data) {
    for (int64_t j = 0; j < n; j += V) put(j, value(j));
  } else if (f.weight.dtype == kPackedSigns) {
    const uint32_t* words = at<uint32_t>(f.weight, row, col / 32);
    for (int64_t j = 0; j < n; j += V) put(j, signed_value(j, bits<vf>(bits<vu>(splat(1.f)) | sign_bits(words, j))));
  } else {
    for_dtype(f.weight.dtype, [&](auto type) {
      const auto* weight = at<decltype(type)>(f.weight, row, col);
      int64_t j = 0;
      for (; j + V <= n; j += V) {
        if (row % 2) prefetch_below(weight + j, f.weight.stride);
        put(j, signed_value(j, sign_of(load(weight + j), f.sign_plus)));
      }
      if (j < n) put(j, signed_value(j, sign_of(load(weight + j, n - j), f.sign_plus)));
      return 0;
    });
  }
}

// Those elements into out, which has room for n rounded up to 2 V.
inline void formula_row(const Formula& f, int64_t row, int64_t col, int64_t n, float* out) {
  for_row(f, row, col, n, out, [&](int64_t j, vf v) { store(out + j, v); });
}

}  // namespace lgk::cpu::LGK_ISA

// A vector of V floats for each instruction-set level, on the compiler's vector extension (GCC and Clang).
// Everything lies in the namespace LGK_ISA, so that no function of one level is ever linked into another.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "common/dtypes.h"

#if defined(__AVX512F__)
#define LGK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LGK_VECTOR_BYTES 32
#else
#define LGK_VECTOR_BYTES 16
#endif
#define LGK_INLINE inline __attribute__((always_inline))

namespace lgk::cpu::LGK_ISA {

constexpr int V = LGK_VECTOR_BYTES / 4;
typedef float vf __attribute__((vector_size(LGK_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(LGK_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(LGK_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(LGK_VECTOR_BYTES / 2)));

LGK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class F>
inline int for_dtype(int dtype, const F& f) {  // f of an element; status out
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(bf16{});
    case kFloat16: return f(f16{});
    default: return 2;
  }
}

template <class To, class From>
LGK_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

LGK_INLINE vf splat(float x) { return x - vf{}; }

LGK_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LGK_INLINE vu load_half(const void* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
}

LGK_INLINE vf load(const bf16* p) { return bits<vf>(load_half(p) << 16); }

LGK_INLINE vf load(const f16* p) {
  const vu h = load_half(p), magnitude = (h & 0x7fff) << 13, exponent = h & 0x7c00, denormal = vu{} + (113u << 23);
  const vu normal = magnitude + (exponent == 0x7c00 ? vu{} + (224u << 23) : vu{} + (112u << 23));
  const vf tiny = bits<vf>(magnitude + denormal) - bits<vf>(denormal);  // exact, also where denormals are flushed
  return bits<vf>((exponent == 0 ? bits<vu>(tiny) : normal) | ((h & 0x8000) << 16));
}

LGK_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

LGK_INLINE void store_half(void* p, vu w) {
  const vh h = __builtin_convertvector(w, vh);
  std::memcpy(p, &h, sizeof h);
}

LGK_INLINE void store(bf16* p, vf v) {
  const vu u = bits<vu>(v), rounded = u + 0x7fff + ((u >> 16) & 1);
  store_half(p, (v != v ? u | 0x400000 : rounded) >> 16);
}

LGK_INLINE void store(f16* p, vf v) {
  const vu u = bits<vu>(v), magnitude = u & 0x7fffffff, half = vu{} + (126u << 23);
  const vu special = magnitude > (255u << 23) ? vu{} + 0x7e00 : vu{} + 0x7c00;
  const vu denormal = bits<vu>(bits<vf>(magnitude) + bits<vf>(half)) - half;
  const vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const vu h = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? denormal : normal;
  store_half(p, h | ((u >> 16) & 0x8000));
}

// The first n < V elements; the others read as zero.
template <class T>
LGK_INLINE vf load(const T* p, int64_t n) {
  T buffer[V] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
LGK_INLINE void store(T* p, vf v, int64_t n) {
  T buffer[V];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

#ifdef __AVX512F__
LGK_INLINE vf load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
LGK_INLINE void store(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
#endif

// n elements, n <= V
template <class T>
LGK_INLINE vf load_some(const T* p, int64_t n) {
  return n == V ? load(p) : load(p, n);
}
template <class T>
LGK_INLINE void store_some(T* p, vf v, int64_t n) {
  n == V ? store(p, v) : store(p, v, n);
}

// To an aligned p, past the caches; for another thread to see it, a fence.
LGK_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
template <class T>
LGK_INLINE void stream(T* p, vf v) {
  store(p, v);
}

LGK_INLINE void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

LGK_INLINE vf first(vf v, int64_t n) {  // lanes from n on are set to zero
  vi lane;
  for (int i = 0; i < V; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : vf{};
}

LGK_INLINE float sum(vf v) {
  float buffer[V];
  store(buffer, v);
  for (int width = V / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) buffer[i] += buffer[i + width];
  return buffer[0];
}

// Lanes of a and b (b's numbered from V on) picked by a constant function of the lane.
template <class Pick, size_t... I>
LGK_INLINE vf shuffle_lanes(vf a, vf b, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Pick::lane(I)...);
#else
  return __builtin_shuffle(a, b, vi{Pick::lane(I)...});
#endif
}
template <class Pick>
LGK_INLINE vf shuffle(vf a, vf b) {
  return shuffle_lanes<Pick>(a, b, std::make_index_sequence<V>());
}

template <int S>
struct UpperLeft {
  static constexpr int lane(int l) { return l & S ? V + l - S : l; }
};
template <int S>
struct LowerRight {
  static constexpr int lane(int l) { return l & S ? V + l : l + S; }
};
template <int FROM>
struct InTurn {  // of a and of b, from lane FROM on
  static constexpr int lane(int l) { return l % 2 * V + FROM + l / 2; }
};
struct Even {
  static constexpr int lane(int l) { return 2 * l; }
};
struct Odd {
  static constexpr int lane(int l) { return 2 * l + 1; }
};

// Transposes V x V in registers: blocks of S x S off the diagonal change places, S = V/2 ... 1.
template <int S = V / 2>
LGK_INLINE void transpose(vf* row) {
  for (int i = 0; i < V; ++i)
    if (!(i & S)) {
      const vf a = row[i], b = row[i + S];
      row[i] = shuffle<UpperLeft<S>>(a, b);
      row[i + S] = shuffle<LowerRight<S>>(a, b);
    }
  if constexpr (S > 1) transpose<S / 2>(row);
}

// Writes the first lanes of all R rows, then their second lanes, ...
template <int R>
LGK_INLINE void store_in_turn(const vf* row, float* out) {
  vf from[R], to[R];
  std::memcpy(from, row, sizeof from);
  for (int step = 1; step < R; step *= 2) {  // a perfect shuffle of the two halves each
    for (int i = 0; i < R / 2; ++i) {
      to[2 * i] = shuffle<InTurn<0>>(from[i], from[i + R / 2]);
      to[2 * i + 1] = shuffle<InTurn<V / 2>>(from[i], from[i + R / 2]);
    }
    std::memcpy(from, to, sizeof from);
  }
  for (int i = 0; i < R; ++i) store(out + i * V, from[i]);
}

// Any lanes of one vector.
LGK_INLINE vf look_up(vf table, vi index) {
#if defined(__AVX512F__)
  return _mm512_maskz_permutexvar_ps(0xffff, bits<__m512i>(index), table);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(table, bits<__m256i>(index));
#else
  vf v = {};
  for (int i = 0; i < V; ++i) v[i] = table[index[i] & (V - 1)];
  return v;
#endif
}

// exp(x) for |x| <= 87, relative error below 2e-7.
LGK_INLINE vf exp_moderate(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = x * 1.44269504f + magic, n = shifted - magic;
  const vf r = x - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const vu power = (bits<vu>(shifted) - bits<vu>(magic) + 127) << 23;
  return p * bits<vf>(power);
}

// exp(x) for x <= 0; zero below -87.
LGK_INLINE vf exp_negative(vf x) {
  const vf e = exp_moderate(x < -87.f ? splat(-87.f) : x);
  return x < -87.f ? vf{} : e;
}

}  // namespace lgk::cpu::LGK_ISA

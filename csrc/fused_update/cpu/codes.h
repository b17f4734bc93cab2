// Vectors of states of 8 bits: codes to values and back (fused_update/codes.h).
#pragma once
#include "common/cpu/simd.h"
#include "fused_update/codes.h"

namespace lgk::cpu::LGK_ISA {

typedef uint8_t vb __attribute__((vector_size(V)));

// n codes, n <= V; the others read as zero. The compiler's own conversions between bytes and words go one by one.
LGK_INLINE vi load_codes(const uint8_t* p, int64_t n) {
  uint8_t buffer[V] = {};
  if (n < V) p = static_cast<uint8_t*>(std::memcpy(buffer, p, n));
#ifdef __AVX512F__
  return bits<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bits<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb codes;
  std::memcpy(&codes, p, V);
  return __builtin_convertvector(codes, vi);
#endif
}

LGK_INLINE void store_codes(uint8_t* p, vi code, int64_t n) {
#ifdef __AVX512F__
  const vb codes = bits<vb>(_mm512_cvtepi32_epi8(bits<__m512i>(code)));
#elif defined(__AVX2__)
  const __m256i all = bits<__m256i>(code);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const vb codes = bits<vb>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  const vb codes = __builtin_convertvector(code, vb);
#endif
  if (n == V) {
    std::memcpy(p, &codes, V);
  } else {
    uint8_t buffer[V];
    std::memcpy(buffer, &codes, V);
    std::memcpy(p, buffer, n);
  }
}

LGK_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// By the last bits of the exponent of j + 0.5 (+ 1, unsigned), j the code counted from 0: a decade's first boundary and
// the width of its parts, so that the middles of its parts are `start` + (whole number + 0.5) * `width`.
struct Decades {
  float start[16], width[16];
};

constexpr Decades decades(bool is_signed) {
  Decades d{};
  double power = 1e-6, parts = is_signed ? 1 : 2;
  for (int i = 0; i <= kDecades; ++i, power *= 10, parts *= 2) {
    const int k = (127 + i + (is_signed ? 0 : 1)) % V;
    d.start[k] = i < kDecades ? static_cast<float>(0.1 * power) : 1.f;
    d.width[k] = i < kDecades ? static_cast<float>(0.9 * power / parts) : 0.f;
  }
  return d;
}

// Values in [-1, 1]
template <bool SIGNED>
LGK_INLINE vf decode(vi code) {
  if constexpr (V < 8) {
    static constexpr CodeValues values = code_values(SIGNED);
    vf value = {};
    for (int i = 0; i < V; ++i) value[i] = values.of[code[i]];
    return value;
  } else {
    static constexpr Decades d = decades(SIGNED);
    const vf from_zero = SIGNED ? to_floats(code) - kZeroCode : to_floats(code);
    const vf place = SIGNED ? bits<vf>(bits<vu>(from_zero) & 0x7fffffffu) + 0.5f : from_zero + 1.5f;
    const vu u = bits<vu>(place);
    const vi k = bits<vi>(u >> 23);
    vf value = look_up(load(d.start), k) + (place - bits<vf>(u & 0xff800000u)) * look_up(load(d.width), k);
    if (V == 8) value = from_zero == 0.f ? vf{} : value;  // 0 and 1 have the same last three bits
    return SIGNED ? bits<vf>(bits<vu>(value) | (bits<vu>(from_zero) & 0x80000000u)) : value;
  }
}

#ifdef __AVX512F__
// By the last four bits of half the exponent of q in [2^-31, 1], which leave [x, 4 x): there the nearest code is that
// of 0, one of a decade, or that of 1, and of two of these at most: [1] where q is above `middle`, else [0]. Counted
// from 0 it is the whole part of at_zero + slope * q, and of [0] of no more than `most`.
struct NearLines {
  float middle[16], at_zero[2][16], slope[2][16], most[16];
};

constexpr NearLines near_lines(bool is_signed) {
  constexpr int pieces = kDecades + 2;
  const double shift = is_signed ? 0 : 1;  // of the code against F
  double begin[pieces] = {}, at_zero[pieces] = {0.5}, slope[pieces] = {}, most[pieces] = {0.5};
  double power = 1e-6, parts = is_signed ? 1 : 2;
  for (int i = 1; i < pieces; ++i, power *= 10, parts *= 2) {
    const bool decade = i <= kDecades;
    begin[i] = decade ? power * (0.1 + 0.9 * 0.2 / parts) : 1 - 0.9 * 0.25 / (parts / 2);
    at_zero[i] = (decade ? parts * 8 / 9 : parts) - shift;
    slope[i] = decade ? parts / (0.9 * power) : 0;
    most[i] = 2 * parts - 0.5 - shift;
  }
  begin[1] = is_signed ? 0.275e-6 : 0.1625e-6;  // half of the first value
  NearLines near{};
  double high = 2;  // of the range
  for (int k = 15; k >= 0; --k, high /= 4) {
    int lower = 0, upper = 0;
    while (lower + 1 < pieces && begin[lower + 1] <= high / 4) ++lower;
    while (upper + 1 < pieces && begin[upper + 1] < high) ++upper;
    near.middle[k] = static_cast<float>(upper > lower ? begin[upper] : high);
    near.most[k] = static_cast<float>(most[lower]);
    for (int above = 0; above < 2; ++above) {
      near.at_zero[above][k] = static_cast<float>(at_zero[above ? upper : lower]);
      near.slope[above][k] = static_cast<float>(slope[above ? upper : lower]);
    }
  }
  return near;
}

// The nearest code of q, in [-1, 1]; unsigned: never that of 0 for a positive q
template <bool SIGNED>
LGK_INLINE vi encode(vf q) {
  static constexpr NearLines near = near_lines(SIGNED);
  const vf size = _mm512_range_ps(q, splat(4.656612873e-10f), 0b1011);  // the larger size of the two
  const __m512i k = bits<__m512i>(bits<vu>(size) >> 24);
  const __mmask16 above = _mm512_cmp_ps_mask(size, look_up(load(near.middle), bits<vi>(k)), _CMP_GT_OQ);
  const auto line = [&](const float (&table)[2][16]) {
    const vf below = look_up(load(table[0]), bits<vi>(k));
    return vf(_mm512_mask_permutexvar_ps(below, above, k, load(table[1])));
  };
  vf f = line(near.at_zero) + line(near.slope) * size;
  f = _mm512_mask_min_ps(f, static_cast<__mmask16>(~above), f, look_up(load(near.most), bits<vi>(k)));
  const vi j = __builtin_convertvector(f, vi);
  if constexpr (SIGNED) {
    const vi code = q < 0.f ? kZeroCode - j : kZeroCode + j;
    return code > 0 ? code : vi{};  // -1 has no code
  } else {
    return q > 0.f ? (j > 1 ? j : vi{} + 1) : vi{};
  }
}
#else
// The nearest code of q, in [-1, 1]; unsigned: never that of 0 for a positive q
template <bool SIGNED>
LGK_INLINE vi encode(vf q) {
  static constexpr CodeLines lines = code_lines(SIGNED);
  const vf size = SIGNED ? bits<vf>(bits<vu>(q) & 0x7fffffffu) : q;
  vf f = lines.at_zero[0] + lines.slope[0] * size;
  for (int i = 1; i < kDecades; ++i) {
    const vf other = lines.at_zero[i] + lines.slope[i] * size;
    f = other < f ? other : f;
  }
  const vf power = bits<vf>(bits<vu>(f) & 0xff800000u);
  vi j = __builtin_convertvector(f, vi) + (f - power < 0.2f);
  if constexpr (SIGNED) {
    j -= (q > 0.f) & (f >= lines.last);
    return q < 0.f ? kZeroCode - j : kZeroCode + j;
  } else {
    j -= f >= lines.last;
    j = j > 2 ? j - 1 : vi{} + 1;
    return q > 0.f ? j : vi{};
  }
}
#endif

// The largest of absolute values, as bits: inf and NaN are the largest of all.
LGK_INLINE vi larger_size(vi largest, vf x) {
  const vi size = bits<vi>(bits<vu>(x) & 0x7fffffffu);
  return size > largest ? size : largest;
}

// x (n floats) to codes; `largest` of larger_size over them
template <bool SIGNED>
LGK_INLINE void encode_block(const float* x, int64_t n, vi largest, uint8_t* codes, float* absmax) {
  constexpr float kSmall = 1e-30f, kUp = 1.2089258e24f;  // below which 1 / absmax may be infinite; 2^80
  int32_t most = 0;
  for (int i = 0; i < V; ++i) most = largest[i] > most ? largest[i] : most;
  const float size = most < 0x7f800000 ? bits<float>(most) : __builtin_nanf("");
  *absmax = size;
  const bool usable = size > 0.f;
  const float up = size < kSmall ? kUp : 1.f, inverse = usable ? 1.f / (size * up) : 0.f;
  for (int64_t j = 0; j < n; j += V) {
    const vf q = usable ? load(x + j) * up * inverse : vf{};
    store_codes(codes + j, encode<SIGNED>(q), smaller(n - j, V));
  }
}

}  // namespace lgk::cpu::LGK_ISA

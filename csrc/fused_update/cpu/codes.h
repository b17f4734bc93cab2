// Vectors of states of 8 bits: codes to values and back (fused_update/codes.h).
#pragma once
#include "common/cpu/simd.h"
#include "fused_update/codes.h"

namespace lgk::cpu::LGK_ISA {

typedef uint8_t vb __attribute__((vector_size(V)));

LGK_INLINE vi load_codes(const uint8_t* p, int64_t n) {
  vb codes = {};
  if (n == V)
    std::memcpy(&codes, p, V);
  else
    for (int64_t i = 0; i < n; ++i) codes[i] = p[i];
  return __builtin_convertvector(codes, vi);
}

LGK_INLINE void store_codes(uint8_t* p, vi code, int64_t n) {
  const vb codes = __builtin_convertvector(code, vb);
  if (n == V)
    std::memcpy(p, &codes, V);
  else
    for (int64_t i = 0; i < n; ++i) p[i] = codes[i];
}

LGK_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// By exponent of 2 j + 1 (+ 2, unsigned), j the code counted from 0: a decade's first boundary and half of its parts'
// width, so that the middles of its parts are `start` + odd numbers * `half`.
struct Decades {
  float start[16], half[16];
};

constexpr Decades decades(bool is_signed) {
  Decades d{};
  const int first = is_signed ? 1 : 2;
  double power = 1e-6, parts = is_signed ? 2 : 4;
  for (int i = 0; i < kDecades; ++i, power *= 10, parts *= 2) {
    d.start[first + i] = static_cast<float>(0.1 * power);
    d.half[first + i] = static_cast<float>(0.9 * power / parts);
  }
  d.start[first + kDecades] = 1.f;
  return d;
}

// Values in [-1, 1]
template <bool SIGNED>
LGK_INLINE vf decode(vi code) {
  if constexpr (V == 16) {
    static constexpr Decades d = decades(SIGNED);
    const vi from_zero = SIGNED ? code - kZeroCode : code;
    const vi j = SIGNED ? (from_zero < 0 ? -from_zero : from_zero) : from_zero;
    const vf place = to_floats(2 * j + (SIGNED ? 1 : 3));
    const vu u = bits<vu>(place);
    const vi exponent = bits<vi>(u >> 23) - 127;
    const vf odd = place - bits<vf>(u & 0xff800000u);
    const vf value = look_up(load(d.start), exponent) + odd * look_up(load(d.half), exponent);
    return SIGNED ? bits<vf>(bits<vu>(value) | (bits<vu>(from_zero) & 0x80000000u)) : value;
  } else {
    static constexpr CodeValues values = code_values(SIGNED);
    vf value = {};
    for (int i = 0; i < V; ++i) value[i] = values.of[code[i]];
    return value;
  }
}

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
    const vi is_last = (q > 0.f) & (f >= lines.last), negative = q < 0.f;
    j = (j > 127 ? vi{} + 127 : j) - is_last;
    return kZeroCode + (negative ? -j : j);
  } else {
    j -= f >= lines.last;
    j = j > 2 ? j - 1 : vi{} + 1;
    return q > 0.f ? j : vi{};
  }
}

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

// Activations of vectors of states: real, of complex pairs (Re, Im), and of duals (value, tangent).
// Formulas: lgkernels/ops/equilibrium/activations.py.
#pragma once
#include "common/cpu/formula.h"
#include "equilibrium/options.h"

namespace lgk::cpu::LGK_ISA {

constexpr float kExpTwo = 7.38905609893065f;

struct Complex {
  vf re, im;
};

LGK_INLINE vf between(vf x, float low, float high) {  // keeps nan
  const vf v = x < low ? splat(low) : x;
  return v > high ? splat(high) : v;
}

LGK_INLINE vf absolute(vf x) { return bits<vf>(bits<vu>(x) & 0x7fffffff); }

// -- real -------------------------------------------------------------------------------------------------------------

LGK_INLINE vf logistic(vf x) { return 1.f / (1.f + exp_moderate(between(-x, -87.f, 87.f))); }

// s(u) and s(u - 2) by one exponential
LGK_INLINE void logistic_pair(vf u, vf* s, vf* s2) {
  const vf e = exp_moderate(between(-u, -87.f, 85.f));
  *s = 1.f / (1.f + e);
  *s2 = 1.f / (1.f + kExpTwo * e);
}

template <StateActivation A>
LGK_INLINE vf activity(vf u) {
  if constexpr (A == StateActivation::kSigmoid) return logistic(4.f * u - 2.f);
  if constexpr (A == StateActivation::kDsilu) {
    vf s, s2;
    logistic_pair(u, &s, &s2);
    return 0.5f * u * s + (1.f - 0.5f * u) * s2;
  }
  if constexpr (A == StateActivation::kHardSigmoid) return between(0.5f * u, 0.f, 1.f);
  return between(u, 0.f, 1.f);
}

template <StateActivation A>
LGK_INLINE vf slope(vf u) {
  if constexpr (A == StateActivation::kSigmoid) {
    const vf s = logistic(4.f * u - 2.f);
    return 4.f * s * (1.f - s);
  }
  if constexpr (A == StateActivation::kDsilu) {
    vf s, s2;
    logistic_pair(u, &s, &s2);
    return 0.5f * (s - s2) + 0.5f * u * s * (1.f - s) + (1.f - 0.5f * u) * s2 * (1.f - s2);
  }
  const float width = A == StateActivation::kHardSigmoid ? 2.f : 1.f;
  return u > 0.f && u < width ? splat(1.f / width) : vf{};
}

// -- complex ----------------------------------------------------------------------------------------------------------

LGK_INLINE bool everywhere(vi mask) {
  int64_t parts[V / 2], all = -1;
  std::memcpy(parts, &mask, sizeof mask);
  for (int i = 0; i < V / 2; ++i) all &= parts[i];
  return all == -1;
}

// cos x and sin x: reduced by multiples of pi/2 that are exact up to a few thousand; above, by the library.
LGK_INLINE Complex turned(vf x) {
  const vf angle = absolute(x);
  const vi small = angle < 4096.f;
  Complex c;
  sin_cos(small ? angle : vf{}, &c.im, &c.re);
  if (__builtin_expect(!everywhere(small), 0))
    for (int i = 0; i < V; ++i)
      if (!small[i]) c.re[i] = __builtin_cosf(angle[i]), c.im[i] = __builtin_sinf(angle[i]);
  c.im = bits<vf>(bits<vu>(c.im) ^ (bits<vu>(x) & 0x80000000u));
  return c;
}

// 1 / (1 + exp(-(a + i b))), `turn` of b; by the exponential that does not overflow.
LGK_INLINE Complex logistic(vf a, Complex turn) {
  const vf e = exp_negative(-absolute(a));
  const vf re = e * turn.re, im = a >= 0.f ? -e * turn.im : e * turn.im;
  const vf scale = 1.f / ((1.f + re) * (1.f + re) + im * im);
  return {scale * (a >= 0.f ? 1.f + re : re + e * e), scale * (a >= 0.f ? -im : im)};
}

template <StateActivation A>
LGK_INLINE Complex complex_activity(Complex u) {
  if constexpr (A == StateActivation::kSigmoid) return logistic(4.f * u.re - 2.f, turned(4.f * u.im));
  const Complex turn = turned(u.im), s = logistic(u.re, turn), s2 = logistic(u.re - 2.f, turn);
  const vf re = 0.5f * u.re, im = 0.5f * u.im;
  return {re * s.re - im * s.im + (1.f - re) * s2.re + im * s2.im,
          re * s.im + im * s.re + (1.f - re) * s2.im - im * s2.re};
}

}  // namespace lgk::cpu::LGK_ISA

// Activations of states: real, of complex pairs (Re, Im), and of pairs (value, tangent).
// Formulas: lgkernels/ops/equilibrium/activations.py.
#pragma once
#include "common/cuda/formula.h"
#include "equilibrium/options.h"

namespace lgk::cuda::settling {

struct Pair {
  float re, im;
};

LGK_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

LGK_DEVICE float between(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }  // 0 and 1; keeps nan

LGK_DEVICE float activity(StateActivation kind, float u) {
  switch (kind) {
    case StateActivation::kSigmoid: return logistic(4.0f * u - 2.0f);
    case StateActivation::kDsilu: return 0.5f * u * logistic(u) + (1.0f - 0.5f * u) * logistic(u - 2.0f);
    case StateActivation::kHardSigmoid: return between(0.5f * u);
    default: return between(u);
  }
}

LGK_DEVICE float slope(StateActivation kind, float u) {
  if (kind == StateActivation::kSigmoid) {
    const float s = logistic(4.0f * u - 2.0f);
    return 4.0f * s * (1.0f - s);
  }
  if (kind == StateActivation::kDsilu) {
    const float s = logistic(u), s2 = logistic(u - 2.0f);
    return 0.5f * (s - s2) + 0.5f * u * s * (1.0f - s) + (1.0f - 0.5f * u) * s2 * (1.0f - s2);
  }
  const float width = kind == StateActivation::kHardSigmoid ? 2.0f : 1.0f;
  return u > 0.0f && u < width ? 1.0f / width : 0.0f;
}

// (cos x, sin x) of any angle; beyond some thousands, where a float is no exact angle, of what 2 pi leaves over.
LGK_DEVICE Pair turned(float x) {
  float angle = fabsf(x);
  if (!(angle < 8192.0f)) {
    const float turns = angle * 0.15915494309189535f;
    angle = (turns - floorf(turns)) * 6.283185307179586f;
  }
  Pair turn;
  sine_cosine(angle, &turn.im, &turn.re);
  if (x < 0.0f) turn.im = -turn.im;
  return turn;
}

// 1 / (1 + exp(-(a + i b))), `turn` of b; by the exponential that does not overflow.
LGK_DEVICE Pair logistic(float a, Pair turn) {
  const float e = expf(-fabsf(a)), re = e * turn.re, im = e * turn.im;
  const float scale = 1.0f / ((1.0f + re) * (1.0f + re) + im * im);
  return Pair{(a >= 0.0f ? 1.0f + re : re + e * e) * scale, im * scale};
}

LGK_DEVICE Pair complex_activity(StateActivation kind, Pair u) {
  if (kind == StateActivation::kSigmoid) return logistic(4.0f * u.re - 2.0f, turned(4.0f * u.im));
  const Pair turn = turned(u.im), s = logistic(u.re, turn), s2 = logistic(u.re - 2.0f, turn);
  const float re = 0.5f * u.re, im = 0.5f * u.im;
  return Pair{re * s.re - im * s.im + (1.0f - re) * s2.re + im * s2.im,
              re * s.im + im * s.re + (1.0f - re) * s2.im - im * s2.re};
}

}  // namespace lgk::cuda::settling

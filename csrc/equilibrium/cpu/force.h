// The nudge of one sample's last layer: beta dL/dr of the cross entropy's logits z, or of half the squared error's
// activities z, in place. Rows are padded to whole vectors. Formulas: force in lgkernels/ops/equilibrium/field.py.
#pragma once
#include "equilibrium/cpu/activations.h"
#include "equilibrium/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

inline float largest_of(const float* z, int64_t n) {
  float highest = z[0];
  for (int64_t i = 1; i < n; ++i) highest = z[i] > highest ? z[i] : highest;
  return highest;
}

// z <- scale (softmax(z) - goal), or scale (z - goal)
inline void nudge_real(float* z, int64_t n, const float* goal, bool mse, float scale) {
  vf mass = {};
  const float highest = mse ? 0.f : largest_of(z, n);
  for (int64_t j = 0; j < n && !mse; j += V) {
    const vf e = first(exp_negative(load(z + j) - highest), n - j);
    store(z + j, e);
    mass += e;
  }
  const float inverse = mse ? 1.f : 1.f / sum(mass);
  for (int64_t j = 0; j < n; j += V)
    store(z + j, (load(z + j) * inverse - load_some(goal + j, smaller(n - j, V))) * scale);
}

// The same of complex z and beta; goal is real.
inline void nudge_complex(float* re, float* im, int64_t n, const float* goal, bool mse, const float* beta) {
  vf mass_re = {}, mass_im = {};
  const float highest = mse ? 0.f : largest_of(re, n);
  for (int64_t j = 0; j < n && !mse; j += V) {
    const vf e = first(exp_negative(load(re + j) - highest), n - j);
    const Complex turn = turned(load(im + j));
    store(re + j, e * turn.re), store(im + j, e * turn.im);
    mass_re += first(e * turn.re, n - j), mass_im += first(e * turn.im, n - j);
  }
  float a = 1.f, b = 0.f;  // 1 / mass
  if (!mse) {
    const float x = sum(mass_re), y = sum(mass_im), scale = 1.f / (x * x + y * y);
    a = x * scale, b = -y * scale;
  }
  for (int64_t j = 0; j < n; j += V) {
    const vf x = load(re + j), y = load(im + j);
    const vf p = x * a - y * b - load_some(goal + j, smaller(n - j, V)), q = x * b + y * a;
    store(re + j, p * beta[0] - q * beta[1]), store(im + j, p * beta[1] + q * beta[0]);
  }
}

}  // namespace lgk::cpu::LGK_ISA

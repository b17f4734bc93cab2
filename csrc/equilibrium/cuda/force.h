// The force on the last layer: beta dL/dr of a block's rows.
#pragma once
#include "equilibrium/cuda/block.h"

namespace lgk::cuda::settling {

// Row k of z (n), or rows k and k + 1, become beta dL/dr of the logits; a warp each.
template <int R>
LGK_DEVICE void force_of_item(const Problem& p, const Own& own, int k, Rows<R>* z) {
  const int lane = threadIdx.x % 32, n = p.nudge;
  const bool mse = p.options.loss == StateLoss::kMse, complex = own.kind == Kind::kComplex;
  const int64_t item = own.item(k);
  const float* goal = p.readout.goal + item % p.samples * n;
  const float* beta = p.beta[item / p.samples];
  float re = 1.0f, im = 0.0f, most = 0.0f;  // of the inverse of the exponentials' sum
  if (!mse) {
    most = -INFINITY;
    for (int c = lane; c < n; c += 32) most = fmaxf(most, z[c].element[k]);
    most = warp_max(most);
    float x = 0.0f, y = 0.0f;
    for (int c = lane; c < n; c += 32) {
      const float e = expf(z[c].element[k] - most);
      const Pair turn = complex ? turned(z[c].element[k + 1]) : Pair{1.0f, 0.0f};
      z[c].element[k] = e * turn.re;
      if (complex) z[c].element[k + 1] = e * turn.im;
      x += e * turn.re;
      y += e * turn.im;
    }
    x = warp_sum(x);
    y = warp_sum(y);
    const float scale = 1.0f / (x * x + y * y);
    re = complex ? x * scale : 1.0f / x;
    im = -y * scale;
  }
  for (int c = lane; c < n; c += 32) {
    const float a = z[c].element[k], b = complex ? z[c].element[k + 1] : 0.0f;
    const float force = (complex ? a * re - b * im : a * re) - goal[c], along = complex ? a * im + b * re : 0.0f;
    if (own.kind == Kind::kTangent) {  // the derivative by beta, at beta = 0
      z[c].element[k] = 0.0f;
      z[c].element[k + 1] = force;
    } else if (complex) {
      z[c].element[k] = force * beta[0] - along * beta[1];
      z[c].element[k + 1] = force * beta[1] + along * beta[0];
    } else {
      z[c].element[k] = force * beta[0];
    }
  }
}

template <int R>
LGK_DEVICE void force(const Problem& p, const Own& own, const Rows<R>* last, Rows<R>* z, Rows<R>* partial) {
  const int units = static_cast<int>(p.layers[p.layer_count - 1].units), n = p.nudge;
  const float* bias = p.options.loss == StateLoss::kMse ? nullptr : p.readout.bias;
  const auto finish = [&](int c, const float (&sum)[R]) {
#pragma unroll
    for (int k = 0; k < R; ++k) z[c].element[k] = sum[k] + (bias != nullptr && own.part(k) == 0 ? bias[c] : 0.0f);
  };
  if (p.by_readout()) {
    over_units<R>(
        n, partial,
        [&](int c, int part, int parts, float (&sum)[R]) {
          multiply<R>(last, p.readout.weight + c, n, share(units, part, parts), share(units, part + 1, parts), sum);
        },
        finish);
  } else {
    for (int c = threadIdx.x; c < n; c += kThreads) {
      float sum[R];
#pragma unroll
      for (int k = 0; k < R; ++k) sum[k] = last[c].element[k];
      finish(c, sum);
    }
  }
  __syncthreads();
  const int rows = own.kind == Kind::kReal ? 1 : 2, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < R; ++k)
    if (k % rows == 0 && warp == k / rows) force_of_item<R>(p, own, k, z);
  __syncthreads();
}

}  // namespace lgk::cuda::settling

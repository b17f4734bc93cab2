// The CPU kernels of the family lls: what one instruction-set level offers, over dense memory.
// Formulas: lgkernels/ops/lls/reference.py.
#pragma once
#include <cstdint>

#include "common/cpu/level.h"
#include "common/norm.h"
#include "lls/options.h"

namespace lgk::cpu {

// A dense activation (batch, channels, height, width), rows of either planes (NCHW) or channels (NHWC).
// A linear block's (B, N) is (B, 1, 1, N) to the pooling functions and (B, N, 1, 1) to the normalisation.
struct Activation {
  void* data;
  int64_t batch, channels, height, width;
  bool channels_last;
  int dtype;
};

// Adaptive-pooling bins along one axis, cut into segments at every bin boundary. Segments are disjoint, so that a
// pass over the activation adds each element once, whether bins tile, overlap or repeat (up-sampling).
struct Axis {
  int64_t size, pool, segments;
  const int64_t* bound;         // (segments + 1) segment s is [bound[s], bound[s+1])
  const int64_t *first, *last;  // (pool) bin i is segments [first[i], last[i])
  const int64_t *low, *high;    // (segments) segment s is in bins [low[s], high[s])
  const float* inverse;         // (pool) 1 / length of bin i
};

struct HeadInputs {
  int64_t batch, dim, rows;
  const float* x;           // (batch, dim)
  const int64_t* target;    // (batch)
  const float* modulation;  // null, (num_classes) or (rows, num_classes)
  bool vector_modulation;   // modulation is (num_classes)
  const float* basis;       // (rows, dim), or null with
  const uint32_t* signs;    // the square basis as laid out by sign_layouts; column 0 is zero
  bool compute_grad;
};

struct HeadOutputs {
  float *value, *similarity, *grad_latents, *grad_logits;
};

struct Head : HeadOptions, HeadInputs, HeadOutputs {};

struct LlsKernels {
  bool packed_signs;  // head reads HeadInputs::signs
  int (*latents)(const Activation&, const Axis& rows, const Axis& columns, float* latents, int threads);
  int (*expand_grad)(const Activation& out, const Axis& rows, const Axis& columns, const float* grad_latents,
                     const float* scale, bool per_row, int threads);
  int (*batch_stats)(const Activation&, const BatchStatistics&, int threads);
  int (*norm_act_pool)(const Activation&, const Axis& rows, const Axis& columns, const Norm&, bool max_pool, void* out,
                       bool out_channels_last, float* latents, float* s1, float* s2, int threads);
  int (*norm_grads)(int64_t batch, int64_t channels, int64_t bins, const float* grad_latents, const float* s1,
                    const float* s2, const float* area, float* grad_gamma, float* grad_beta, float* grad_bias,
                    int threads);
  int (*grad_preactivation)(const Activation&, const Axis& rows, const Axis& columns, const Norm&,
                            const float* grad_latents, const float* grad_gamma, const float* grad_beta, float scale,
                            int threads);
  int (*linear_grad_preactivation)(const Activation&, const Norm&, const float* grad, float* grad_gamma,
                                   float* grad_beta, float* grad_bias, float scale, int threads);
  int (*head)(const HeadOptions&, const HeadInputs&, const HeadOutputs&, int threads);
  int (*modulation_grad)(const ModulationGrad&, int threads);
  int (*to_channels_last)(const Activation& planes, void* out, int threads);
};

LGK_LEVELS(LlsKernels, lls)

}  // namespace lgk::cpu

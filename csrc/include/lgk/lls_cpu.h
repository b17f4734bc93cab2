// The CPU kernels of the family lls: what one instruction-set level offers, and the choice between levels.
// Every function returns a status (0: ok) and takes raw pointers to dense memory; formulas: ops/lls/reference.py.
#pragma once
#include <cstdint>

namespace lgk {

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

struct Norm {
  const float *mean, *rstd, *gamma, *beta;
  float slope;
};

struct Head {
  int64_t batch, dim, rows, classes;
  const float* x;           // (batch, dim)
  const int64_t* target;    // (batch)
  const float* modulation;  // null, (classes) or (rows, classes)
  bool vector;              // modulation is (classes)
  const float* basis;       // (rows, dim), or null with
  const uint32_t* signs;    // the square basis as laid out by sign_layouts; column 0 is zero
  float temperature, smoothing, eps, basis_scale;
  bool normalize, zero_below_eps, hard_sigmoid, mean, none, compute_grad;
  int64_t ignore_index;
  float *loss, *similarity, *grad_latents, *grad_logits;
};

struct LlsKernels {
  const char* level;
  bool packed_signs;  // head reads Head::signs
  int (*latents)(const Activation&, const Axis& rows, const Axis& columns, float* latents, int threads);
  int (*expand_grad)(const Activation& out, const Axis& rows, const Axis& columns, const float* grad_latents,
                     const float* scale, bool per_row, int threads);
  int (*batch_stats)(const Activation&, const float* bias, float* running_mean, float* running_var, float momentum,
                     float eps, float* mean, float* rstd, int threads);
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
  int (*head)(const Head&, int threads);
  int (*modulation_grad)(int64_t batch, int64_t rows, int64_t classes, bool vector, const float* similarity,
                         const float* grad_logits, const float* scale, bool per_row, float* out, int threads);
  int (*to_channels_last)(const Activation& planes, void* out, int threads);
};

// (rows, ceil(dim / 32)) packed signs, bit j % 32 of word j / 32 set where negative, in the two orders that the
// products read: out[w][row] = signs[row][w], rows padded to 16, then the transposed bits (ceil(rows / 32), dim).
int64_t sign_layouts_size(int64_t rows, int64_t dim);
void sign_layouts(const uint32_t* signs, int64_t rows, int64_t dim, uint32_t* out);

namespace base {
extern const LlsKernels kernels;
}
namespace avx2 {
extern const LlsKernels kernels;
}
namespace avx512 {
extern const LlsKernels kernels;
}

// The level chosen by cpuid, or by LGKERNELS_CPU=default|avx2|avx512 where this machine can run it.
const LlsKernels& lls_kernels();

}  // namespace lgk

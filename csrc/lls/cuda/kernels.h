// The CUDA entry points of the family lls (lgkernels/ops/lls/reference.py defines what they compute).
// Device pointers and a stream in, status out: 0, or a CUDA error code. Nothing synchronises.
#pragma once
#include "common/norm.h"
#include "lls/options.h"

namespace lgk::cuda {

// A dense (batch, channels, height, width) tensor in either memory format, pooled to pool_rows x pool_columns bins.
struct Image {
  int64_t batch;
  int channels, height, width, pool_rows, pool_columns;
  bool channels_last;
  int dtype;
};

// What a head that was asked for its rows' losses leaves to a later launch: their mean, and the gradient of the
// modulation unless that is nullptr. Nothing where loss is nullptr.
struct Finish {
  const int64_t* target;
  int64_t ignore_index;
  const float* row_loss;
  float* loss;
  ModulationGrad modulation;
};

// Partial sums of each channel that batch_stats needs room for: 4 * splits * channels floats of scratch.
int lls_batch_stats_splits(const Image& image);
int lls_batch_stats(const Image& image, const void* z, const BatchStatistics& statistics, float* scratch, void* stream);

// out may be nullptr (latents alone), s1 and s2 too. A norm of nullptrs is none: a = z, with a negative_slope of 1.
int lls_norm_act_pool(const Image& image, const Norm& norm, const void* z, bool max_pool, void* out, float* latents,
                      float* s1, float* s2, void* stream);
int lls_norm_grads(int64_t batch, int channels, int bins, const float* grad_latents, const float* s1, const float* s2,
                   const float* area, float* grad_gamma, float* grad_beta, float* grad_bias, const Finish& finish,
                   void* stream);
int lls_grad_preactivation(const Image& image, const Norm& norm, void* z, const float* grad_latents,
                           const float* grad_gamma, const float* grad_beta, float scale, void* stream);
// scale: one float, or with scale_per_row one a row of the batch.
int lls_expand_grad(const Image& image, const float* grad_latents, const float* scale, bool scale_per_row, void* out,
                    void* stream);

// Two-dimensional twins: z (batch, features), pooled along the features to `pool` latents.
struct Rows {
  int64_t batch;
  int features, pool, dtype;
};
int lls_linear_norm_act_pool(const Rows& rows, const Norm& norm, const void* z, void* out, float* latents,
                             void* stream);
int lls_linear_grad_preactivation(const Rows& rows, const Norm& norm, void* z, const float* grad_latents, float scale,
                                  float* grad_gamma, float* grad_beta, float* grad_bias, const Finish& finish,
                                  void* stream);

enum Modulation : int { kNoModulation = 0, kVectorModulation = 1, kMatrixModulation = 2 };

struct HeadShape {
  int64_t batch;
  int dim, rows;
  bool packed_basis;  // basis: (rows, ceil(dim / 32)) sign bits, else (rows, dim) float
  int modulation;
  bool compute_grad;
};

struct HeadInputs {
  const float* x;
  const int64_t* target;
  const float* modulation;
  const void* basis;
};

// value nullptr: row_loss (batch) is the result; else row_loss is scratch of the reduction.
struct HeadOutputs {
  float *value, *row_loss, *grad_latents, *similarity, *grad_logits;
};

// Floats of scratch that a head of this shape needs beyond its outputs.
int64_t lls_head_scratch(const HeadOptions& options, const HeadShape& shape);
int lls_head(const HeadOptions& options, const HeadShape& shape, const HeadInputs& inputs, const HeadOutputs& outputs,
             float* scratch, void* stream);
int lls_modulation_grad(const ModulationGrad& problem, void* stream);

}  // namespace lgk::cuda

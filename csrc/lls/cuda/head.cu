// LLS head: from latents to the local loss and its gradients, one block per few samples.
//
//   s = basis_scale Phi x / max(|x|, eps),  z = s | m s | s M,  v = z / temperature
//   L = cross entropy with label smoothing of v, or mean of (hard_sigmoid(v) - onehot)^2
//   g_z = dL/dz,  g_s = g_z | m g_z | g_z M^T,  g = basis_scale Phi^T g_s
//   dL/dx = (g - x / |x| <g_s, s>) / |x|;  g / eps or 0 where |x| < eps
//
// Phi is a float table, or the sign bits of the square wave: bit j % 32 of word j / 32 is 1 where the entry is -1, and
// column 0 is zero. A block keeps its samples' latents in shared memory where they fit.
#include "common/cuda/cross_entropy.h"
#include "lls/cuda/finish.h"

namespace lgk::cuda {
namespace {

struct Head : HeadOptions, HeadShape {};

constexpr int kManySamples = 4;  // samples of a block when there are enough of them to fill the GPU
constexpr int64_t kManyRows = 1024;
constexpr int64_t kMaxBlocks = 1024;

LGK_DEVICE float flip_sign(float value, uint32_t sign_bit) {
  return __uint_as_float(__float_as_uint(value) ^ (sign_bit & 0x80000000u));
}

// One warp: the loss of one sample from its logits z, and g_z in their place.
LGK_DEVICE float sample_loss(const Head& p, int64_t target, float divisor, float* z) {
  const int lane = threadIdx.x % 32;
  const bool valid = target != p.ignore_index;
  const float classes = static_cast<float>(p.num_classes), unit = p.temperature * divisor;
  float loss = 0.0f;
  if (p.loss == kCrossEntropy) {
    loss = warp_cross_entropy(p.num_classes, p.temperature, p.label_smoothing, target, valid, unit, z);
  } else {
    for (int c = lane; c < p.num_classes; c += 32) {
      const float sigmoid = fminf(fmaxf(z[c] / p.temperature / 4.0f + 0.5f, 0.0f), 1.0f);
      const float difference = sigmoid - (c == target ? 1.0f : 0.0f);
      loss += difference * difference / classes;
      z[c] = valid ? difference * (2.0f / classes) / unit : 0.0f;
    }
  }
  loss = warp_sum(loss);
  return valid ? loss : 0.0f;
}

// SAMPLES rows a block; the basis is read once for all of them. `workspace` holds what does not fit into shared memory.
template <int SAMPLES, bool PACKED>
__global__ void __launch_bounds__(kThreads, 2)
    head(Head p, bool stage_x, const float* __restrict__ x, const int64_t* __restrict__ target,
         const float* __restrict__ modulation, const void* __restrict__ basis, HeadOutputs out, float* workspace) {
  [[maybe_unused]] constexpr int kUnroll = SAMPLES == 1 ? 4 : 1;
  LGK_DYNAMIC_SHARED(float, shared);  // reduce (kWarps); s, z, g_s of each sample unless in `workspace`; x if staged
  float* const reduce = shared;
  const int sample_floats = 2 * p.rows + p.num_classes;
  float* const work =
      workspace == nullptr ? shared + kWarps : workspace + int64_t{blockIdx.x} * SAMPLES * sample_floats;
  float* const staged = shared + kWarps + (workspace == nullptr ? SAMPLES * sample_floats : 0);
  float* const s = work;                          // (SAMPLES, rows)
  float* const grad_s = work + SAMPLES * p.rows;  // (SAMPLES, rows)
  float* const z = grad_s + SAMPLES * p.rows;     // (SAMPLES, classes)
  const float* const table = static_cast<const float*>(basis);
  const uint32_t* const signs = static_cast<const uint32_t*>(basis);
  const int words = (p.dim + 31) / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float divisor = p.reduction == kMean ? valid_rows(p.batch, p.ignore_index, target, reduce) : 1.0f;

  for (int64_t first = int64_t{blockIdx.x} * SAMPLES; first < p.batch; first += int64_t{gridDim.x} * SAMPLES) {
    // Samples beyond the batch repeat its last row and are not stored.
    const int samples = static_cast<int>(min(int64_t{SAMPLES}, p.batch - first));
    const float* row[SAMPLES];
    float norm[SAMPLES], inverse[SAMPLES];
#pragma unroll
    for (int r = 0; r < SAMPLES; ++r) {
      const float* const source = x + (first + min(r, samples - 1)) * p.dim;
      row[r] = stage_x ? staged + int64_t{r} * p.dim : source;
      float square = 0.0f;
      for (int j = threadIdx.x; j < p.dim; j += kThreads) {
        const float value = source[j];
        if (stage_x) staged[int64_t{r} * p.dim + j] = value;
        square += value * value;
      }
      norm[r] = sqrtf(block_sum(square, reduce));
      inverse[r] = p.normalize ? 1.0f / fmaxf(norm[r], p.eps) : 1.0f;
    }
    __syncthreads();

    for (int k = warp; k < p.rows; k += kWarps) {
      float dot[SAMPLES] = {};
      if (PACKED) {
#pragma unroll kUnroll
        for (int word = 0; word < words; ++word) {
          const int j = word * 32 + lane;
          const uint32_t sign = signs[int64_t{k} * words + word] << (31 - lane);
          if (j == 0 || j >= p.dim) continue;
#pragma unroll
          for (int r = 0; r < SAMPLES; ++r) dot[r] += flip_sign(row[r][j], sign);
        }
#pragma unroll
        for (int r = 0; r < SAMPLES; ++r)  // column 0: zero times inf is nan
          if (lane == 0) dot[r] = fmaf(row[r][0], 0.0f, dot[r]);
      } else {
#pragma unroll kUnroll
        for (int j = lane; j < p.dim; j += 32) {
          const float phi = table[int64_t{k} * p.dim + j];
#pragma unroll
          for (int r = 0; r < SAMPLES; ++r) dot[r] = fmaf(row[r][j], phi, dot[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < SAMPLES; ++r) {
        const float value = warp_sum(dot[r]) * inverse[r] * p.basis_scale;
        if (lane == 0) {
          s[r * p.rows + k] = value;
          if (r < samples) out.similarity[(first + r) * p.rows + k] = value;
        }
      }
    }
    __syncthreads();

    for (int k = threadIdx.x; k < SAMPLES * p.num_classes; k += kThreads) {
      const int r = k / p.num_classes, c = k % p.num_classes;
      float value = 0.0f;
      if (p.modulation == kMatrixModulation) {
        for (int row_k = 0; row_k < p.rows; ++row_k)
          value = fmaf(s[r * p.rows + row_k], modulation[int64_t{row_k} * p.num_classes + c], value);
      } else {
        value = s[r * p.rows + c] * (p.modulation == kVectorModulation ? modulation[c] : 1.0f);
      }
      z[k] = value;
    }
    __syncthreads();

    if (warp < samples) {
      const float loss = sample_loss(p, target[first + warp], divisor, z + warp * p.num_classes);
      if (lane == 0) out.row_loss[first + warp] = loss;
    }
    __syncthreads();
    if (!p.compute_grad) continue;

    for (int k = threadIdx.x; k < samples * p.num_classes; k += kThreads)
      out.grad_logits[first * p.num_classes + k] = z[k];
    for (int k = warp; k < SAMPLES * p.rows; k += kWarps) {
      const int r = min(k / p.rows, samples - 1), row_k = k % p.rows;
      float value = 0.0f;
      if (p.modulation == kMatrixModulation) {
        for (int c = lane; c < p.num_classes; c += 32)
          value = fmaf(z[r * p.num_classes + c], modulation[int64_t{row_k} * p.num_classes + c], value);
        value = warp_sum(value);
      } else {
        value = z[r * p.num_classes + row_k] * (p.modulation == kVectorModulation ? modulation[row_k] : 1.0f);
      }
      if (lane == 0) grad_s[k] = value;
    }
    __syncthreads();

    float rho[SAMPLES];  // <x / |x|, g>: a dot product over the rows, not a second pass over x
#pragma unroll
    for (int r = 0; r < SAMPLES; ++r) {
      float partial = 0.0f;
      for (int k = threadIdx.x; k < p.rows; k += kThreads)
        partial = fmaf(grad_s[r * p.rows + k], s[r * p.rows + k], partial);
      rho[r] = block_sum(partial, reduce);
    }
    for (int j = threadIdx.x; j < p.dim; j += kThreads) {
      float g[SAMPLES] = {};
      if (!PACKED) {
#pragma unroll kUnroll
        for (int k = 0; k < p.rows; ++k) {
          const float phi = table[int64_t{k} * p.dim + j];
#pragma unroll
          for (int r = 0; r < SAMPLES; ++r) g[r] = fmaf(grad_s[r * p.rows + k], phi, g[r]);
        }
      } else if (j > 0) {
#pragma unroll kUnroll
        for (int k = 0; k < p.rows; ++k) {
          const uint32_t sign = signs[int64_t{k} * words + j / 32] << (31 - j % 32);
#pragma unroll
          for (int r = 0; r < SAMPLES; ++r) g[r] += flip_sign(grad_s[r * p.rows + k], sign);
        }
      } else {
        for (int k = 0; k < p.rows; ++k)
          for (int r = 0; r < SAMPLES; ++r) g[r] = fmaf(grad_s[r * p.rows + k], 0.0f, g[r]);
      }
#pragma unroll
      for (int r = 0; r < SAMPLES; ++r) {
        if (r >= samples) continue;
        const float grad = g[r] * p.basis_scale;
        float value = grad;
        if (p.normalize)
          value = norm[r] >= p.eps ? (grad - row[r][j] * inverse[r] * rho[r]) * inverse[r] : p.below_eps(grad);
        out.grad_latents[(first + r) * p.dim + j] = value;
      }
    }
    __syncthreads();  // shared memory is free for the next samples
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    reduce_loss(Head p, const int64_t* __restrict__ target, const float* __restrict__ row_loss, float* loss) {
  LGK_DYNAMIC_SHARED(float, reduce);
  sum_losses(p.batch, p.reduction == kMean, p.ignore_index, target, row_loss, loss, reduce);
}

struct Plan {
  int samples;
  bool stage_x, work_in_shared;
  int64_t blocks, shared_bytes, work_floats;
};

Plan plan(const Head& p) {
  Plan best{};
  for (int samples : {kManySamples, 1}) {
    if (samples > 1 && p.batch < kManyRows) continue;
    const int64_t work = int64_t{samples} * (2 * int64_t{p.rows} + p.num_classes), staged = int64_t{samples} * p.dim;
    const int64_t room = kMaxShared / static_cast<int64_t>(sizeof(float)) - kWarps;
    const bool work_in_shared = work <= room, stage_x = (work_in_shared ? work : 0) + staged <= room;
    if (samples > 1 && !(work_in_shared && stage_x)) continue;
    const int64_t blocks = std::min(ceil_div<int64_t>(p.batch, samples), kMaxBlocks);
    const int64_t floats = kWarps + (work_in_shared ? work : 0) + (stage_x ? staged : 0);
    best = Plan{samples, stage_x, work_in_shared, blocks, floats * static_cast<int64_t>(sizeof(float)), work * blocks};
    break;
  }
  return best;
}

__global__ void __launch_bounds__(kThreads, 2) modulation_grad(ModulationGrad problem) {
  LGK_DYNAMIC_SHARED(float, shared);
  modulation_tile(problem, blockIdx.x, shared);
}

}  // namespace

int64_t lls_head_scratch(const HeadOptions& options, const HeadShape& shape) {
  const Plan chosen = plan(Head{options, shape});
  return chosen.work_in_shared ? 0 : chosen.work_floats;
}

int lls_head(const HeadOptions& options, const HeadShape& shape, const HeadInputs& inputs, const HeadOutputs& outputs,
             float* scratch, void* stream) {
  const Head p{options, shape};
  const bool keep_rows = outputs.value == nullptr;
  if (p.batch > 0) {
    const Plan chosen = plan(p);
    float* const workspace = chosen.work_in_shared ? nullptr : scratch;
    const dim3 grid(chosen.blocks), block(kThreads);
    const auto kernel = chosen.samples == 1 ? (p.packed_basis ? head<1, true> : head<1, false>)
                                            : (p.packed_basis ? head<kManySamples, true> : head<kManySamples, false>);
    LGK_LAUNCH(kernel, grid, block, chosen.shared_bytes, stream, p, chosen.stage_x, inputs.x, inputs.target,
               inputs.modulation, inputs.basis, outputs, workspace);
    const int status = launch_status();
    if (status != 0 || keep_rows) return status;
  }
  if (keep_rows) return 0;
  LGK_LAUNCH(reduce_loss, dim3(1), dim3(kThreads), kWarps * sizeof(float), stream, p, inputs.target, outputs.row_loss,
             outputs.value);
  return launch_status();
}

int lls_modulation_grad(const ModulationGrad& problem, void* stream) {
  LGK_LAUNCH(modulation_grad, dim3(modulation_tiles(problem)), dim3(kThreads), kFinishShared, stream, problem);
  return launch_status();
}

}  // namespace lgk::cuda

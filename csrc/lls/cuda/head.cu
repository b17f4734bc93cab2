// LLS head: from latents to the local loss and its gradients, one block per few samples.
//
//   s = basis_scale Phi x / max(|x|, eps),  z = s | m s | s M,  v = z / temperature
//   L = cross entropy with label smoothing of v, or mean of (hard_sigmoid(v) - onehot)^2
//   g_z = dL/dz,  g_s = g_z | m g_z | g_z M^T,  g = basis_scale Phi^T g_s
//   dL/dx = (g - x / |x| <g_s, s>) / |x|;  g / eps or 0 where |x| < eps
//
// Phi is a float table, or the sign bits of the square wave: bit j % 32 of word j / 32 is 1 where the entry is -1, and
// column 0 is zero. A block keeps its samples' latents in shared memory where they fit. Four columns are taken at a
// time: an element of Phi is made, or loaded, once for all samples of the block, and a latent once for two rows of Phi.
#include "common/cuda/cross_entropy.h"
#include "lls/cuda/finish.h"

namespace lgk::cuda {
namespace {

struct Head : HeadOptions, HeadShape {};

constexpr int kManySamples = 4;  // samples of a block when there are enough of them to fill the GPU
constexpr int64_t kManyRows = 1024;
constexpr int64_t kMaxBlocks = 1024;
constexpr int kWarpRows = 2;  // rows of Phi that a warp multiplies at a time
constexpr int kQuad = 4;      // columns that a thread takes at a time

using Quad = Pack<float, kQuad>;

LGK_DEVICE int padded(int columns) { return ceil_div(columns, kQuad) * kQuad; }

// Phi[k, j] to Phi[k, j + 3], j a multiple of four; finite past the last column.
template <bool PACKED>
LGK_DEVICE Quad basis_quad(const Head& p, const void* basis, bool vectors, int k, int j) {
  if constexpr (PACKED) {
    const uint32_t* const words = static_cast<const uint32_t*>(basis) + int64_t{k} * ceil_div(p.dim, 32);
    const uint32_t signs = words[j / 32] << (28 - j % 32);  // of the last column in bit 31
    Quad phi;
#pragma unroll
    for (int c = 0; c < kQuad; ++c) phi.element[c] = __uint_as_float((signs << (3 - c) & 0x80000000u) | 0x3f800000u);
    if (j == 0) phi.element[0] = 0.0f;
    return phi;
  } else {
    return load<float, kQuad>(static_cast<const float*>(basis) + int64_t{k} * p.dim + j, p.dim - j, vectors);
  }
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
      const float line = z[c] / p.temperature / 4.0f + 0.5f;
      const float sigmoid = line < 0.0f ? 0.0f : line > 1.0f ? 1.0f : line;  // nan stays
      const float difference = sigmoid - (c == target ? 1.0f : 0.0f);
      loss += difference * difference / classes;
      z[c] = valid ? difference * (2.0f / classes) / unit : 0.0f;
    }
  }
  loss = warp_sum(loss);
  return valid ? loss : 0.0f;
}

// SAMPLES rows a block; the basis is read once for all of them. Where they do not fit into shared memory (not SHARED),
// latents are read again and s, z and g_s lie in `workspace`. `vectors`: all rows of `dim` are aligned to 16 bytes.
template <int SAMPLES, bool PACKED, bool SHARED>
__global__ void __launch_bounds__(kThreads, 2)
    head(Head p, bool vectors, const float* __restrict__ x, const int64_t* __restrict__ target,
         const float* __restrict__ modulation, const void* __restrict__ basis, HeadOutputs out, float* workspace) {
  [[maybe_unused]] constexpr int kUnroll = SAMPLES > 1 ? 1 : SHARED ? 4 : 2;
  LGK_DYNAMIC_SHARED(float, shared);  // reduce (kWarps); if SHARED x, then s, z, g_s of each sample
  float* const reduce = shared;
  float* const staged = shared + kWarps;  // (SAMPLES, padded(dim)), zeros past the last column
  const int sample_floats = 2 * p.rows + p.num_classes;
  float* const work =
      SHARED ? staged + SAMPLES * padded(p.dim) : workspace + int64_t{blockIdx.x} * SAMPLES * sample_floats;
  float* const s = work;                          // (SAMPLES, rows)
  float* const grad_s = work + SAMPLES * p.rows;  // (SAMPLES, rows)
  float* const z = grad_s + SAMPLES * p.rows;     // (SAMPLES, classes)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float divisor = p.reduction == kMean ? valid_rows(p.batch, p.ignore_index, target, reduce) : 1.0f;

  for (int64_t first = int64_t{blockIdx.x} * SAMPLES; first < p.batch; first += int64_t{gridDim.x} * SAMPLES) {
    // Samples beyond the batch repeat its last row and are not stored.
    const int samples = static_cast<int>(min(int64_t{SAMPLES}, p.batch - first));
    const auto from_memory = [&](int r, int j) {
      return load<float, kQuad>(x + (first + min(r, samples - 1)) * p.dim + j, p.dim - j, vectors);
    };
    const auto latents = [&](int r, int j) {
      if constexpr (SHARED) {
        return *reinterpret_cast<const Quad*>(staged + r * padded(p.dim) + j);
      } else {
        return from_memory(r, j);
      }
    };
    float norm[SAMPLES], inverse[SAMPLES];
#pragma unroll
    for (int r = 0; r < SAMPLES; ++r) {
      float square = 0.0f;
      for (int j = kQuad * threadIdx.x; j < p.dim; j += kQuad * kThreads) {
        const Quad value = from_memory(r, j);
        if constexpr (SHARED) *reinterpret_cast<Quad*>(staged + r * padded(p.dim) + j) = value;
#pragma unroll
        for (int c = 0; c < kQuad; ++c) square += value.element[c] * value.element[c];
      }
      norm[r] = sqrtf(block_sum(square, reduce));
      inverse[r] = p.normalize ? 1.0f / fmaxf(norm[r], p.eps) : 1.0f;
    }
    __syncthreads();

    for (int k = warp * kWarpRows; k < p.rows; k += kWarps * kWarpRows) {
      float dot[kWarpRows][SAMPLES] = {};
#pragma unroll kUnroll
      for (int j = kQuad * lane; j < p.dim; j += kQuad * 32) {
        Quad phi[kWarpRows];
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) phi[i] = basis_quad<PACKED>(p, basis, vectors, min(k + i, p.rows - 1), j);
#pragma unroll
        for (int r = 0; r < SAMPLES; ++r) {
          const Quad value = latents(r, j);
#pragma unroll
          for (int i = 0; i < kWarpRows; ++i)
#pragma unroll
            for (int c = 0; c < kQuad; ++c) dot[i][r] = fmaf(value.element[c], phi[i].element[c], dot[i][r]);
        }
      }
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
        for (int r = 0; r < SAMPLES; ++r) {
          const float value = warp_sum(dot[i][r]) * inverse[r] * p.basis_scale;
          if (lane != 0 || k + i >= p.rows) continue;
          s[r * p.rows + k + i] = value;
          if (r < samples) out.similarity[(first + r) * p.rows + k + i] = value;
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
    for (int j = kQuad * threadIdx.x; j < p.dim; j += kQuad * kThreads) {
      float g[SAMPLES][kQuad] = {};
#pragma unroll kUnroll
      for (int k = 0; k < p.rows; ++k) {
        const Quad phi = basis_quad<PACKED>(p, basis, vectors, k, j);
#pragma unroll
        for (int r = 0; r < SAMPLES; ++r)
#pragma unroll
          for (int c = 0; c < kQuad; ++c) g[r][c] = fmaf(grad_s[r * p.rows + k], phi.element[c], g[r][c]);
      }
#pragma unroll
      for (int r = 0; r < SAMPLES; ++r) {
        if (r >= samples) continue;
        const Quad value = latents(r, j);
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          const float grad = g[r][c] * p.basis_scale;
          g[r][c] = grad;
          if (p.normalize)
            g[r][c] =
                norm[r] >= p.eps ? (grad - value.element[c] * inverse[r] * rho[r]) * inverse[r] : p.below_eps(grad);
        }
        store<float, kQuad>(out.grad_latents + (first + r) * p.dim + j, g[r], p.dim - j, vectors);
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
  bool in_shared;
  int64_t blocks, shared_bytes, work_floats;
};

Plan plan(const Head& p) {
  for (int samples : {kManySamples, 1}) {
    const int64_t work = 2 * int64_t{p.rows} + p.num_classes, latents = ceil_div<int64_t>(p.dim, kQuad) * kQuad;
    const int64_t floats = kWarps + samples * (work + latents);
    const bool in_shared = floats * static_cast<int64_t>(sizeof(float)) <= kMaxShared;
    if (samples > 1 && (p.batch < kManyRows || !in_shared)) continue;
    const int64_t blocks = std::min(ceil_div<int64_t>(p.batch, samples), kMaxBlocks);
    const int64_t bytes = (in_shared ? floats : kWarps) * static_cast<int64_t>(sizeof(float));
    return Plan{samples, in_shared, blocks, bytes, in_shared ? 0 : work * blocks};
  }
  return Plan{};
}

template <bool PACKED>
auto kernel_of(const Plan& chosen) {
  if (!chosen.in_shared) return head<1, PACKED, false>;
  return chosen.samples == 1 ? head<1, PACKED, true> : head<kManySamples, PACKED, true>;
}

__global__ void __launch_bounds__(kThreads, 2) modulation_grad(ModulationGrad problem) {
  LGK_DYNAMIC_SHARED(float, shared);
  modulation_tile(problem, blockIdx.x, shared);
}

}  // namespace

int64_t lls_head_scratch(const HeadOptions& options, const HeadShape& shape) {
  return plan(Head{options, shape}).work_floats;
}

int lls_head(const HeadOptions& options, const HeadShape& shape, const HeadInputs& inputs, const HeadOutputs& outputs,
             float* scratch, void* stream) {
  const Head p{options, shape};
  const bool keep_rows = outputs.value == nullptr;
  if (p.batch > 0) {
    const Plan chosen = plan(p);
    const bool vectors = p.dim % kQuad == 0 && is_aligned(inputs.x, sizeof(Quad)) &&
                         is_aligned(outputs.grad_latents, sizeof(Quad)) &&
                         (p.packed_basis || is_aligned(inputs.basis, sizeof(Quad)));
    const auto kernel = p.packed_basis ? kernel_of<true>(chosen) : kernel_of<false>(chosen);
    LGK_LAUNCH(kernel, dim3(chosen.blocks), dim3(kThreads), chosen.shared_bytes, stream, p, vectors, inputs.x,
               inputs.target, inputs.modulation, inputs.basis, outputs, scratch);
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

// The gradient of a convolution's input from the columns grad^T @ F: every element of a window's column is added to the
// pixel that it was read from, positions in their order. A block of channels is small enough for the first-level cache,
// and its columns are a few cache lines of every position.
#pragma once
#include "common/cpu/parallel.h"
#include "common/cpu/simd.h"
#include "feedback/cpu/kernels.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kFoldBlock = 16;  // channels

inline int fold(const Fold& f, const float* columns, float* out, int threads) {
  const int64_t window = f.kernel[0] * f.kernel[1], pixels = f.height * f.width;
  const int64_t positions = f.positions[0] * f.positions[1], blocks = (f.channels + kFoldBlock - 1) / kFoldBlock;
  parallel(
      f.batch * blocks, f.batch * f.channels * (pixels + positions * window), threads,
      [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t b = item / blocks, c = item % blocks * kFoldBlock, count = smaller(f.channels - c, kFoldBlock);
          float* maps = out + (b * f.channels + c) * pixels;
          std::memset(maps, 0, count * pixels * sizeof *maps);
          for (int64_t position = 0; position < positions; ++position) {
            const float* column = columns + ((b * positions + position) * f.channels + c) * window;
            const int64_t top = position / f.positions[1] * f.stride[0] - f.padding[0];
            const int64_t left = position % f.positions[1] * f.stride[1] - f.padding[1];
            for (int64_t i = 0; i < window; ++i) {
              const int64_t row = top + i / f.kernel[1] * f.dilation[0], col = left + i % f.kernel[1] * f.dilation[1];
              if (row < 0 || row >= f.height || col < 0 || col >= f.width) continue;
              float* pixel = maps + row * f.width + col;
              for (int64_t n = 0; n < count; ++n) pixel[n * pixels] += column[n * window + i];
            }
          }
        }
      });
  return 0;
}

}  // namespace lgk::cpu::LGK_ISA

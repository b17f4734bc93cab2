// States of 8 bits on the device: codes to values and back (fused_update/codes.h), blocks whose largest a warp finds.
#pragma once
#include "common/cuda/formula.h"
#include "fused_update/codes.h"

namespace lgk::cuda {

// Values in [-1, 1]: the largest of the lines of the seven decades, by the middle of the code's part.
template <bool SIGNED>
LGK_DEVICE float decode(int code) {
  const int c = SIGNED ? code - kZeroCode : code, j = SIGNED ? abs(c) : c + 1;
  const float middle = static_cast<float>(j) + 0.5f;
  float parts = SIGNED ? 1.0f : 2.0f, value = 0.0f;
  constexpr float kWidth[kDecades] = {0.9e-6f, 0.9e-5f, 0.9e-4f, 0.9e-3f, 0.9e-2f, 0.9e-1f, 0.9f};
#pragma unroll
  for (int i = 0; i < kDecades; ++i, parts *= 2.0f)
    value = fmaxf(value, ((middle - parts) + parts / 9.0f) * (kWidth[i] / parts));
  if (code == 255) value = 1.0f;
  if (c == 0) value = 0.0f;
  return SIGNED && c < 0 ? -value : value;
}

// The nearest code of q, in [-1, 1]; unsigned: never that of 0 for a positive q
template <bool SIGNED>
LGK_DEVICE int encode(float q) {
  constexpr CodeLines lines = code_lines(SIGNED);
  const float size = fabsf(q);
  float f = fmaf(lines.slope[0], size, lines.at_zero[0]);
#pragma unroll
  for (int i = 1; i < kDecades; ++i) f = fminf(f, fmaf(lines.slope[i], size, lines.at_zero[i]));
  int j = static_cast<int>(f);
  if (j > 0 && (j & (j - 1)) == 0 && f - static_cast<float>(j) < 0.2f) --j;
  const bool last = f >= lines.last;
  if (SIGNED) return kZeroCode + (q < 0.0f ? -min(j, 127) : last ? 128 : min(j, 127));
  return q > 0.0f ? max(last ? 255 : min(j - 1, 254), 1) : 0;
}

// |x|, infinity for NaN as well
LGK_DEVICE float finite_size(float x) {
  const float infinity = __uint_as_float(0x7f800000u);
  return fabsf(x) < infinity ? fabsf(x) : infinity;
}

// The absmax of a block of which each lane of a warp holds some sizes: NaN where one is not finite.
LGK_DEVICE float block_absmax(float size) {
  const float most = warp_max(size);
  return most < __uint_as_float(0x7f800000u) ? most : __uint_as_float(0x7fc00000u);
}

}  // namespace lgk::cuda

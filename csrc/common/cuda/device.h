// Pieces that kernels share: conversions, vector access, warp and block sums in a fixed order.
#pragma once
#include "common/cuda/launch.h"
#include "common/dtypes.h"

#if !defined(LGK_SIMT)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace lgk::cuda {

// -- conversions: kernels compute in float and round once, to nearest even, on store -----------------------------

LGK_DEVICE float to_float(float value) { return value; }

LGK_DEVICE float to_float(bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
#if defined(LGK_SIMT)
LGK_DEVICE float to_float(f16 value) {
  const float magnitude = (value.bits & 0x7c00) == 0x7c00
                              ? __uint_as_float(0x7f800000u | (value.bits & 0x3ffu) << 13)
                              : std::ldexp(static_cast<float>((value.bits & 0x3ff) | (value.bits & 0x7c00 ? 0x400 : 0)),
                                           std::max(value.bits >> 10 & 31, 1) - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}
template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (value != value) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return f16{static_cast<uint16_t>(sign | 0x7c00)};
  // Units of the result's last place: 2^-24 below the normal range, else 2^(exponent - 10).
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return f16{static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}
#else
LGK_DEVICE float to_float(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
template <typename T>
LGK_DEVICE T from_float(float value);
template <>
LGK_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
LGK_DEVICE bf16 from_float<bf16>(float value) {
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
LGK_DEVICE f16 from_float<f16>(float value) {
  return f16{__half_as_ushort(__float2half_rn(value))};
}
#endif

// -- vector access -------------------------------------------------------------------------------------------------

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte access

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T element[V];
};

// V elements from `address`; where it is not `aligned`, one by one and only the first `count` (the rest are zero).
template <typename T, int V>
LGK_DEVICE Pack<T, V> load(const T* address, int count, bool aligned) {
  if (aligned) return *reinterpret_cast<const Pack<T, V>*>(address);
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.element[v] = v < count ? address[v] : from_float<T>(0.0f);
  return pack;
}

template <typename T, int V>
LGK_DEVICE void store(T* address, const float (&value)[V], int count, bool aligned) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.element[v] = from_float<T>(value[v]);
  if (aligned) {
    *reinterpret_cast<Pack<T, V>*>(address) = pack;
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < count) address[v] = pack.element[v];
}

inline bool is_aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// -- sums in a fixed order ----------------------------------------------------------------------------------------

constexpr uint32_t kAllLanes = 0xffffffffu;

template <typename Value>
LGK_DEVICE Value warp_sum(Value value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

LGK_DEVICE float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// -- launch shapes ------------------------------------------------------------------------------------------------

template <typename N>
__host__ __device__ constexpr N ceil_div(N value, N divisor) {
  return (value + divisor - 1) / divisor;
}

inline int power_of_two_from(int64_t value, int largest) {
  int power = 1;
  while (power < value && power < largest) power *= 2;
  return power;
}

constexpr int kInvalidArgument = 1;  // cudaErrorInvalidValue

// Calls f(element of the type that `dtype` names) and returns its status.
template <typename F>
int with_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(float{});
    case kBFloat16: return f(bf16{});
    case kFloat16: return f(f16{});
    default: return kInvalidArgument;
  }
}

}  // namespace lgk::cuda

// CUDA entry points of lgkernels._C, and of the CPU executor's module of the tests: pointers and stream as integers
// in, status out (0, or a CUDA error code for cuda_error_string). The caller owns device, stream and memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "lgk/launch.h"
#include "lgk/lls_cuda.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }
float* floats(Address address) { return pointer<float>(address); }

// (batch, channels, height, width, pool rows, pool columns, channels_last, dtype code)
lgk::Image image(const std::array<int64_t, 8>& v) {
  return {v[0], static_cast<int>(v[1]), static_cast<int>(v[2]), static_cast<int>(v[3]), static_cast<int>(v[4]),
          static_cast<int>(v[5]), v[6] != 0, static_cast<int>(v[7])};
}

// Addresses of mean, rstd, gamma, beta
lgk::Norm norm(const std::array<Address, 4>& v, float slope) {
  return {floats(v[0]), floats(v[1]), floats(v[2]), floats(v[3]), slope};
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("lls_norm_act_pool",
        [](std::array<int64_t, 8> shape, std::array<Address, 4> parameters, float slope, Address z, bool max_pool,
           Address out, Address latents, Address s1, Address s2, Address stream) {
          return lgk::lls_norm_act_pool(image(shape), norm(parameters, slope), pointer<void>(z), max_pool,
                                        pointer<void>(out), floats(latents), floats(s1), floats(s2),
                                        pointer<void>(stream));
        });
}

// Bindings of the tests' module: the CUDA entry points of lgkernels._C on the CPU executor, and wrong_kernels.cu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "lgk/launch.h"

namespace py = pybind11;
using lgk::simt::Executor;
using lgk::simt::Order;

void bind_cuda(py::module_&);

// wrong_kernels.cu
void launch_rotate(const float* in, float* out, int blocks, int threads, bool with_barrier);
void launch_two_sums(const float* in, float* out, int threads, bool with_barrier);
void launch_overflow(float* out, int threads, int beyond);
void launch_divergent_barrier(int threads, int waiting);
void launch_two_barriers(unsigned blocks, unsigned threads, size_t shared);
void launch_warp_collectives(const int* in, int* out, int threads);

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(lgk_simt, m) {
  bind_cuda(m);
  m.def("set_order", [](const std::string& name) {
    Executor::instance().order = name == "ascending"    ? Order::kAscending
                                 : name == "descending" ? Order::kDescending
                                 : name == "shuffled"   ? Order::kShuffled
                                                        : throw py::value_error("order: got " + name);
  });
  m.def("set_dry", [](bool dry) { Executor::instance().dry = dry; });
  // (blocks, threads of a block, bytes of dynamic shared memory) of every launch since the last call
  m.def("launches", [] { return std::exchange(Executor::instance().log, {}); });
  m.def("rotate", [](std::uintptr_t in, std::uintptr_t out, int blocks, int threads, bool with_barrier) {
    launch_rotate(pointer<float>(in), pointer<float>(out), blocks, threads, with_barrier);
  });
  m.def("two_sums", [](std::uintptr_t in, std::uintptr_t out, int threads, bool with_barrier) {
    launch_two_sums(pointer<float>(in), pointer<float>(out), threads, with_barrier);
  });
  m.def("overflow",
        [](std::uintptr_t out, int threads, int beyond) { launch_overflow(pointer<float>(out), threads, beyond); });
  m.def("divergent_barrier", &launch_divergent_barrier);
  m.def("two_barriers", [](int threads) { launch_two_barriers(1, threads, 0); });
  m.def("warp_collectives", [](std::uintptr_t in, std::uintptr_t out, int threads) {
    launch_warp_collectives(pointer<int>(in), pointer<int>(out), threads);
  });
  m.def("launch_shape", &launch_two_barriers);
}

// Bindings of the tests' module: the CUDA entry points of lgkernels._C on the CPU executor, and wrong_kernels.cu.
#include <utility>

#include "common/bindings.h"
#include "common/cuda/launch.h"

using lgk::define;
using lgk::simt::Executor;
using lgk::simt::Order;

// wrong_kernels.cu
void launch_rotate(const float* in, float* out, int blocks, int threads, bool with_barrier);
void launch_two_sums(const float* in, float* out, int threads, bool with_barrier);
void launch_overflow(float* out, int threads, int beyond);
void launch_divergent_barrier(int threads, int waiting);
void launch_two_barriers(unsigned blocks, unsigned threads, size_t shared);
void launch_warp_collectives(const int* in, int* out, int threads);

PYBIND11_MODULE(lgk_simt, m) {
  for (lgk::Binder bind : lgk::binders(lgk::Processor::kCuda)) bind(m);
  m.def("set_order", [](const std::string& name) {
    Executor::instance().order = name == "ascending"    ? Order::kAscending
                                 : name == "descending" ? Order::kDescending
                                 : name == "shuffled"   ? Order::kShuffled
                                                        : throw lgk::py::value_error("order: got " + name);
  });
  m.def("set_dry", [](bool dry) { Executor::instance().dry = dry; });
  // (blocks, threads of a block, bytes of dynamic shared memory) of every launch since the last call
  m.def("launches", [] { return std::exchange(Executor::instance().log, {}); });
  define(m, "rotate", &launch_rotate);
  define(m, "two_sums", &launch_two_sums);
  define(m, "overflow", &launch_overflow);
  define(m, "divergent_barrier", &launch_divergent_barrier);
  m.def("two_barriers", [](int threads) { launch_two_barriers(1, threads, 0); });
  define(m, "warp_collectives", &launch_warp_collectives);
  define(m, "launch_shape", &launch_two_barriers);
}

// The module lgkernels._C: integers (addresses, sizes, dtype codes, thread counts) in, errors as Python exceptions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "lgk/dtypes.h"
#include "lgk/feedback_cpu.h"
#include "lgk/lls_cpu.h"
#include "lgk/local_loss_cpu.h"

namespace py = pybind11;

#ifdef LGK_WITH_CUDA
void bind_cuda(py::module_&);
#endif

namespace {

using lgk::Activation;
using lgk::lls_kernels;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_for(int status) {
  if (status != 0) throw std::runtime_error(std::string("lgkernels CPU kernel: ") + lgk::status_message(status));
}

// Owns the arrays behind a lgk::Axis: bins of adaptive pooling and the segments between their boundaries.
struct Bins {
  std::vector<int64_t> bound, first, last, low, high;
  std::vector<float> inverse;
  lgk::Axis axis;

  Bins(int64_t size, int64_t pool) : first(pool), last(pool), inverse(pool) {
    std::vector<int64_t> start(pool), end(pool);
    for (int64_t i = 0; i < pool; ++i) {
      start[i] = i * size / pool;
      end[i] = ((i + 1) * size + pool - 1) / pool;
      inverse[i] = 1.f / static_cast<float>(end[i] - start[i]);
    }
    for (int64_t i = 0, j = 0; i < pool || j < pool;) {  // merge the two rising sequences
      const int64_t next = i < pool && start[i] <= end[j] ? start[i++] : end[j++];
      if (bound.empty() || bound.back() != next) bound.push_back(next);
    }
    const int64_t segments = static_cast<int64_t>(bound.size()) - 1;
    low.resize(segments);
    high.resize(segments);
    for (int64_t i = 0, s = 0, e = 0; i < pool; ++i) {
      while (bound[s] < start[i]) ++s;
      while (bound[e] < end[i]) ++e;
      first[i] = s;
      last[i] = e;
    }
    for (int64_t s = 0, lo = 0, hi = 0; s < segments; ++s) {
      while (hi < pool && first[hi] <= s) ++hi;
      while (last[lo] <= s) ++lo;
      low[s] = lo;
      high[s] = hi;
    }
    axis = {size, pool, segments, bound.data(), first.data(), last.data(), low.data(), high.data(), inverse.data()};
  }
};

struct Shape {
  Activation a;
  Bins rows, columns;
  Shape(Address data, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, int64_t pool_rows,
        int64_t pool_columns)
      : a{at<void>(data), b, c, h, w, channels_last, dtype}, rows(h, pool_rows), columns(w, pool_columns) {}
};

using Release = py::call_guard<py::gil_scoped_release>;

void bind_lls(py::module_& m) {
  m.def("lls_packed_signs", [] { return lls_kernels().packed_signs; });
  m.def("lls_sign_layouts_size", &lgk::sign_layouts_size);
  m.def(
      "lls_sign_layouts",
      [](Address signs, int64_t rows, int64_t dim, Address out) {
        lgk::sign_layouts(at<uint32_t>(signs), rows, dim, at<uint32_t>(out));
      },
      Release());
  m.def(
      "lls_to_channels_last",
      [](Address x, int64_t b, int64_t c, int64_t h, int64_t w, int dtype, Address out, int threads) {
        const Activation a{at<void>(x), b, c, h, w, false, dtype};
        raise_for(lls_kernels().to_channels_last(a, at<void>(out), threads));
      },
      Release());
  m.def(
      "lls_latents",
      [](Address a, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, int64_t pool_rows,
         int64_t pool_columns, Address latents, int threads) {
        const Shape s(a, b, c, h, w, channels_last, dtype, pool_rows, pool_columns);
        raise_for(lls_kernels().latents(s.a, s.rows.axis, s.columns.axis, at<float>(latents), threads));
      },
      Release());
  m.def(
      "lls_expand_grad",
      [](Address out, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, int64_t pool_rows,
         int64_t pool_columns, Address grad, Address scale, bool per_row, int threads) {
        const Shape s(out, b, c, h, w, channels_last, dtype, pool_rows, pool_columns);
        raise_for(lls_kernels().expand_grad(s.a, s.rows.axis, s.columns.axis, at<float>(grad), at<float>(scale),
                                            per_row, threads));
      },
      Release());
  m.def(
      "lls_batch_stats",
      [](Address z, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, Address bias,
         Address running_mean, Address running_var, float momentum, float eps, Address mean, Address rstd,
         int threads) {
        const Activation a{at<void>(z), b, c, h, w, channels_last, dtype};
        raise_for(lls_kernels().batch_stats(a, at<float>(bias), at<float>(running_mean), at<float>(running_var),
                                            momentum, eps, at<float>(mean), at<float>(rstd), threads));
      },
      Release());
  m.def(
      "lls_norm_act_pool",
      [](Address z, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, int64_t pool_rows,
         int64_t pool_columns, Address mean, Address rstd, Address gamma, Address beta, float slope, bool max_pool,
         Address out, bool out_channels_last, Address latents, Address s1, Address s2, int threads) {
        const Shape s(z, b, c, h, w, channels_last, dtype, pool_rows, pool_columns);
        const lgk::Norm norm{at<float>(mean), at<float>(rstd), at<float>(gamma), at<float>(beta), slope};
        raise_for(lls_kernels().norm_act_pool(s.a, s.rows.axis, s.columns.axis, norm, max_pool, at<void>(out),
                                              out_channels_last, at<float>(latents), at<float>(s1), at<float>(s2),
                                              threads));
      },
      Release());
  m.def(
      "lls_norm_grads",
      [](int64_t batch, int64_t channels, int64_t bins, Address grad, Address s1, Address s2, Address area,
         Address grad_gamma, Address grad_beta, Address grad_bias, int threads) {
        raise_for(lls_kernels().norm_grads(batch, channels, bins, at<float>(grad), at<float>(s1), at<float>(s2),
                                           at<float>(area), at<float>(grad_gamma), at<float>(grad_beta),
                                           at<float>(grad_bias), threads));
      },
      Release());
  m.def(
      "lls_grad_preactivation",
      [](Address z, int64_t b, int64_t c, int64_t h, int64_t w, bool channels_last, int dtype, int64_t pool_rows,
         int64_t pool_columns, Address mean, Address rstd, Address gamma, Address beta, float slope, Address grad,
         Address grad_gamma, Address grad_beta, float scale, int threads) {
        const Shape s(z, b, c, h, w, channels_last, dtype, pool_rows, pool_columns);
        const lgk::Norm norm{at<float>(mean), at<float>(rstd), at<float>(gamma), at<float>(beta), slope};
        raise_for(lls_kernels().grad_preactivation(s.a, s.rows.axis, s.columns.axis, norm, at<float>(grad),
                                                   at<float>(grad_gamma), at<float>(grad_beta), scale, threads));
      },
      Release());
  m.def(
      "lls_linear_grad_preactivation",
      [](Address z, int64_t b, int64_t n, int dtype, Address mean, Address rstd, Address gamma, Address beta,
         float slope, Address grad, Address grad_gamma, Address grad_beta, Address grad_bias, float scale,
         int threads) {
        const Activation a{at<void>(z), b, n, 1, 1, true, dtype};
        const lgk::Norm norm{at<float>(mean), at<float>(rstd), at<float>(gamma), at<float>(beta), slope};
        raise_for(lls_kernels().linear_grad_preactivation(a, norm, at<float>(grad), at<float>(grad_gamma),
                                                          at<float>(grad_beta), at<float>(grad_bias), scale, threads));
      },
      Release());
  m.def(
      "lls_head",
      [](int64_t batch, int64_t dim, int64_t rows, int64_t classes, Address x, Address target, Address modulation,
         bool vector, Address basis, Address signs, float temperature, float smoothing, bool normalize, float eps,
         bool zero_below_eps, float basis_scale, bool hard_sigmoid, int64_t ignore_index, bool mean, bool none,
         bool compute_grad, Address loss, Address similarity, Address grad_latents, Address grad_logits, int threads) {
        const lgk::Head head{batch,
                             dim,
                             rows,
                             classes,
                             at<float>(x),
                             at<int64_t>(target),
                             at<float>(modulation),
                             vector,
                             at<float>(basis),
                             at<uint32_t>(signs),
                             temperature,
                             smoothing,
                             eps,
                             basis_scale,
                             normalize,
                             zero_below_eps,
                             hard_sigmoid,
                             mean,
                             none,
                             compute_grad,
                             ignore_index,
                             at<float>(loss),
                             at<float>(similarity),
                             at<float>(grad_latents),
                             at<float>(grad_logits)};
        raise_for(lls_kernels().head(head, threads));
      },
      Release());
  m.def(
      "lls_modulation_grad",
      [](int64_t batch, int64_t rows, int64_t classes, bool vector, Address similarity, Address grad_logits,
         Address scale, bool per_row, Address out, int threads) {
        raise_for(lls_kernels().modulation_grad(batch, rows, classes, vector, at<float>(similarity),
                                                at<float>(grad_logits), at<float>(scale), per_row, at<float>(out),
                                                threads));
      },
      Release());
}

// A matrix is (address, row stride in elements, dtype code), address 0 for none; a law has state address 0 for none.
void bind_feedback(py::module_& m) {
  using lgk::Feedback;
  using lgk::feedback_kernels;
  using lgk::Matrix;
  py::class_<Matrix>(m, "Matrix").def(py::init([](Address data, int64_t stride, int dtype) {
    return Matrix{at<void>(data), stride, dtype};
  }));
  py::class_<Feedback>(m, "Feedback")
      .def(py::init([](int64_t rows, int64_t columns, const Matrix& weight, const Matrix& magnitude, Address state,
                       int law, double law_scale, double low, bool has_low, float scale, bool sign_plus) {
        return Feedback{rows,
                        columns,
                        weight,
                        magnitude,
                        at<int64_t>(state),
                        static_cast<lgk::Law>(law),
                        has_low ? lgk::range_from(low, law_scale) : lgk::signed_range(law_scale),
                        scale,
                        sign_plus};
      }));
  m.def(
      "feedback_matrix",
      [](const Feedback& f, Address out, int dtype, int threads) {
        raise_for(feedback_kernels().matrix(f, at<void>(out), dtype, threads));
      },
      Release());
  m.def(
      "feedback_product",
      [](const Feedback& f, const Matrix& grad, int64_t batch, Address out, int dtype, int threads) {
        raise_for(feedback_kernels().product(f, grad, batch, at<void>(out), dtype, threads));
      },
      Release());
  m.def(
      "feedback_rows",
      [](const Feedback& f, Address index, int64_t count, Address out, int dtype, int threads) {
        raise_for(feedback_kernels().rows(f, at<int64_t>(index), count, at<void>(out), dtype, threads));
      },
      Release());
  using Pair = std::array<int64_t, 2>;
  m.def(
      "feedback_fold",
      [](std::array<int64_t, 4> shape, Pair kernel, Pair positions, Pair stride, Pair padding, Pair dilation,
         Address columns, Address out, int threads) {
        const lgk::Fold f{shape[0],
                          shape[1],
                          shape[2],
                          shape[3],
                          {kernel[0], kernel[1]},
                          {positions[0], positions[1]},
                          {stride[0], stride[1]},
                          {padding[0], padding[1]},
                          {dilation[0], dilation[1]}};
        raise_for(feedback_kernels().fold(f, at<float>(columns), at<float>(out), threads));
      },
      Release());
  m.def(
      "feedback_pack_signs",
      [](const Matrix& weight, int64_t rows, int64_t columns, Address out, int threads) {
        raise_for(feedback_kernels().pack_signs(weight, rows, columns, at<uint32_t>(out), threads));
      },
      Release());
  m.def(
      "feedback_sgd_update",
      [](int64_t rows, int64_t columns, int64_t batch, Address weight, int64_t weight_stride, Address buffer,
         int64_t buffer_stride, int dtype, const Matrix& grad, const Matrix& x, float rate, float momentum,
         float dampening, float decay, bool nesterov, bool manhattan, float grad_scale, int threads) {
        const lgk::Update update{
            rows,     columns, batch, at<void>(weight), at<void>(buffer), weight_stride, buffer_stride, dtype,
            grad,     x,       rate,  momentum,         dampening,        decay,         grad_scale,    nesterov,
            manhattan};
        raise_for(feedback_kernels().sgd_update(update, threads));
      },
      Release());
  py::class_<lgk::DirectBlock>(m, "DirectBlock")
      .def(py::init([](int64_t batch, int64_t channels, int64_t height, int64_t width, Address z, Address gamma,
                       Address beta, Address mean, Address rstd, float slope, bool max_pool) {
        return lgk::DirectBlock{
            batch,           channels,        height,          width, at<float>(z), at<float>(gamma),
            at<float>(beta), at<float>(mean), at<float>(rstd), slope, max_pool};
      }));
  m.def(
      "direct_forward",
      [](const lgk::DirectBlock& block, Address running_mean, Address running_var, float momentum, float eps,
         Address out, int threads) {
        raise_for(feedback_kernels().direct_forward(block, at<float>(running_mean), at<float>(running_var), momentum,
                                                    eps, at<float>(out), threads));
      },
      Release());
  m.def(
      "direct_backward",
      [](const lgk::DirectBlock& block, Address delta, const Feedback& f, const Matrix& error, Address grad_gamma,
         Address grad_beta, int threads) {
        raise_for(feedback_kernels().direct_backward(block, at<float>(delta), f, error, at<float>(grad_gamma),
                                                     at<float>(grad_beta), threads));
      },
      Release());
}

void bind_local_loss(py::module_& m) {
  using lgk::FeatureMap;
  using lgk::local_loss_kernels;
  py::class_<FeatureMap>(m, "FeatureMap")
      .def(py::init([](Address data, int64_t batch, int64_t channels, int64_t positions, int64_t batch_stride,
                       bool channels_last, int dtype) {
        return FeatureMap{at<void>(data), batch, channels, positions, batch_stride, channels_last, dtype};
      }));
  m.def(
      "local_moments",
      [](const FeatureMap& x, Address mean, Address var, int threads) {
        raise_for(local_loss_kernels().moments(x, at<float>(mean), at<float>(var), threads));
      },
      Release());
  m.def(
      "local_scale_shifted",
      [](const FeatureMap& x, Address shift, Address scale, Address out, int threads) {
        raise_for(local_loss_kernels().scale_shifted(x, at<float>(shift), at<float>(scale), at<void>(out), threads));
      },
      Release());
  m.def(
      "local_logit_loss",
      [](int64_t batch, int64_t classes, int64_t channels, Address pooled, Address weight, Address bias, Address logits,
         Address target, float smoothing, double divisor, bool none, Address loss, Address grad, Address grad_pooled,
         float pooled_scale, int threads) {
        const lgk::LogitLoss l{batch,
                               classes,
                               channels,
                               at<float>(pooled),
                               at<float>(weight),
                               at<float>(bias),
                               at<float>(logits),
                               at<int64_t>(target),
                               smoothing,
                               divisor,
                               none,
                               at<float>(loss),
                               at<float>(grad),
                               at<float>(grad_pooled),
                               pooled_scale};
        raise_for(local_loss_kernels().logit_loss(l, threads));
      },
      Release());
  m.def(
      "local_goodness",
      [](Address data, int64_t batch, int64_t size, int dtype, Address is_positive, double threshold, double factor,
         Address loss, Address kappa, Address squares, int threads) {
        const lgk::Goodness goodness{at<void>(data),
                                     batch,
                                     size,
                                     dtype,
                                     at<bool>(is_positive),
                                     threshold,
                                     factor,
                                     at<float>(loss),
                                     at<float>(kappa),
                                     at<float>(squares)};
        raise_for(local_loss_kernels().goodness(goodness, threads));
      },
      Release());
  // `table`: (count, 6) int64, the fields of lgk::OffsetTensor
  m.def(
      "offset_sgd",
      [](Address table, int64_t count, float rate, float momentum, float decay, float scale, float tilt, int threads) {
        static_assert(sizeof(lgk::OffsetTensor) == 6 * sizeof(int64_t), "the table's rows");
        const lgk::OffsetStep step{rate, momentum, decay, scale, tilt};
        raise_for(local_loss_kernels().offset_sgd(at<lgk::OffsetTensor>(table), count, step, threads));
      },
      Release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of lgkernels. Not a public interface: call lgkernels.functional.";
  m.def(
      "cpu_level", [] { return lls_kernels().level; },
      "Instruction set of the CPU kernels: default, avx2 or avx512 (LGKERNELS_CPU chooses a lower one).");
  m.attr("version") = LGK_VERSION;
#ifdef LGK_WITH_CUDA
  m.attr("has_cuda") = true;
  bind_cuda(m);
#else
  m.attr("has_cuda") = false;
#endif
  bind_lls(m);
  bind_feedback(m);
  bind_local_loss(m);
}

// CUDA entry points of lgkernels._C, and of the CPU executor's module of the tests: pointers and stream as integers
// in, status out (0, or a CUDA error code for cuda_error_string). The caller owns device, stream and memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "lgk/feedback_cuda.h"
#include "lgk/launch.h"
#include "lgk/lls_cuda.h"
#include "lgk/local_loss_cuda.h"
#include "lgk/offset_cuda.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Addresses = std::array<Address, 4>;
using Shape = std::array<int64_t, 8>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}
float* floats(Address address) { return pointer<float>(address); }

// (batch, channels, height, width, pool rows, pool columns, channels_last, dtype code)
lgk::Image image(const Shape& v) {
  return {v[0],
          static_cast<int>(v[1]),
          static_cast<int>(v[2]),
          static_cast<int>(v[3]),
          static_cast<int>(v[4]),
          static_cast<int>(v[5]),
          v[6] != 0,
          static_cast<int>(v[7])};
}

// Addresses of mean, rstd, gamma, beta
lgk::Norm norm(const Addresses& v, float slope) {
  return {floats(v[0]), floats(v[1]), floats(v[2]), floats(v[3]), slope};
}

// Address, dtype code, row stride and column stride in elements
using Strided = std::tuple<Address, int, int64_t, int64_t>;
lgk::Operand operand(const Strided& v) {
  return {pointer<void>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

void bind_feedback(py::module_& m) {
  using lgk::FeedbackMatrix;
  // weight (address, kind, row stride), magnitude (address, dtype code, row stride), state of the law, law, its scale
  // and low
  py::class_<FeedbackMatrix>(m, "FeedbackMatrix")
      .def(py::init([](int64_t rows, int64_t columns, std::tuple<Address, int, int64_t> weight, int value,
                       std::tuple<Address, int, int64_t> magnitude, Address state, int law, double law_scale,
                       std::optional<double> low, float scale, bool sign_plus) {
        const lgk::Range range = low ? lgk::range_from(*low, law_scale) : lgk::signed_range(law_scale);
        return FeedbackMatrix{rows,
                              columns,
                              std::get<1>(weight),
                              value,
                              pointer<void>(std::get<0>(weight)),
                              pointer<void>(std::get<0>(magnitude)),
                              std::get<2>(weight),
                              std::get<2>(magnitude),
                              std::get<1>(magnitude),
                              law,
                              pointer<int64_t>(state),
                              range,
                              scale,
                              sign_plus};
      }));
  m.def("feedback_matrix", [](const FeedbackMatrix& f, Address index, Address out, int dtype, Address stream) {
    return lgk::feedback_matrix(f, pointer<int64_t>(index), pointer<void>(out), dtype, pointer<void>(stream));
  });
  m.def("feedback_product_splits", &lgk::feedback_product_splits);
  m.def("feedback_product", [](const FeedbackMatrix& f, Strided grad, int64_t rows, Address out, int dtype,
                               Address scratch, Address stream) {
    return lgk::feedback_product(f, operand(grad), rows, pointer<void>(out), dtype, floats(scratch),
                                 pointer<void>(stream));
  });
  m.def("feedback_pack_signs", [](const FeedbackMatrix& f, Address out, Address stream) {
    return lgk::feedback_pack_signs(f, pointer<uint32_t>(out), pointer<void>(stream));
  });
  m.def("feedback_sgd_update", [](float lr, float momentum, float dampening, float weight_decay, float grad_scale,
                                  bool nesterov, bool manhattan, std::array<int64_t, 3> shape, Strided grad, Strided x,
                                  std::tuple<Address, int, int64_t> weight, std::tuple<Address, int, int64_t> velocity,
                                  Address stream) {
    return lgk::feedback_sgd_update({lr, momentum, dampening, weight_decay, grad_scale, nesterov, manhattan}, shape[0],
                                    shape[1], shape[2], operand(grad), operand(x), pointer<void>(std::get<0>(weight)),
                                    std::get<1>(weight), std::get<2>(weight), pointer<void>(std::get<0>(velocity)),
                                    std::get<1>(velocity), std::get<2>(velocity), pointer<void>(stream));
  });
}

// (planes, positions, channels, dtype code)
lgk::Planes planes(const std::array<int64_t, 4>& v) {
  return {v[0], v[1], static_cast<int>(v[2]), static_cast<int>(v[3])};
}

void bind_local_loss(py::module_& m) {
  using Shape4 = std::array<int64_t, 4>;
  m.def("local_loss_moments", [](Shape4 shape, Address x, Address mean, Address deviation, Address stream) {
    return lgk::local_loss_moments(planes(shape), pointer<void>(x), floats(mean), floats(deviation),
                                   pointer<void>(stream));
  });
  m.def("local_loss_goodness_splits", [](Shape4 shape) { return lgk::local_loss_goodness_splits(planes(shape)); });
  m.def("local_loss_goodness", [](Shape4 shape, Address x, Address is_positive, float threshold, float factor,
                                  Address partial, Address squares, Address kappa, Address loss, Address stream) {
    return lgk::local_loss_goodness(planes(shape), pointer<void>(x), pointer<uint8_t>(is_positive), threshold, factor,
                                    floats(partial), floats(squares), floats(kappa), floats(loss),
                                    pointer<void>(stream));
  });
  m.def("local_loss_scale",
        [](Shape4 shape, Address x, Address mean, Address factor, Address scale, Address out, Address stream) {
          return lgk::local_loss_scale(planes(shape), pointer<void>(x), floats(mean), floats(factor), floats(scale),
                                       pointer<void>(out), pointer<void>(stream));
        });
  m.def("local_loss_cross_entropy",
        [](int64_t batch, int64_t classes, float label_smoothing, float grad_scale, bool compute_grad, Address target,
           Address logits, Address losses, Address stream) {
          return lgk::local_loss_cross_entropy(batch, classes, label_smoothing, grad_scale, compute_grad,
                                               pointer<int64_t>(target), floats(logits), floats(losses),
                                               pointer<void>(stream));
        });
  m.def("local_loss_normalize_rows",
        [](int64_t batch, int64_t features, int dtype, Address x, Address rows, Address norms, Address stream) {
          return lgk::local_loss_normalize_rows(batch, features, dtype, pointer<void>(x), floats(rows), floats(norms),
                                                pointer<void>(stream));
        });
  m.def("local_loss_match_rows",
        [](int64_t batch, float same, float other, Address target, Address products, Address losses, Address stream) {
          return lgk::local_loss_match_rows(batch, same, other, pointer<int64_t>(target), floats(products),
                                            floats(losses), pointer<void>(stream));
        });
  m.def("local_loss_rows_grad", [](std::array<int64_t, 3> shape, float factor, Address grad, Address rows,
                                   Address norms, Address deviation, Address mean, Address out, Address stream) {
    return lgk::local_loss_rows_grad(shape[0], shape[1], shape[2], factor, floats(grad), floats(rows), floats(norms),
                                     floats(deviation), floats(mean), floats(out), pointer<void>(stream));
  });
}

void bind_offset(py::module_& m) {
  // tensors: (weight, grad, velocity, offset, size, dtype code of the offset) each
  m.def("offset_sgd", [](std::array<float, 5> step, const std::vector<std::array<int64_t, 6>>& tensors,
                         Address stream) {
    std::vector<lgk::OffsetEntry> table;
    table.reserve(tensors.size());
    for (const auto& t : tensors)
      table.push_back({floats(t[0]), floats(t[1]), floats(t[2]), pointer<void>(t[3]), t[4], static_cast<int>(t[5])});
    return lgk::offset_sgd({step[0], step[1], step[2], step[3], step[4]}, table.data(),
                           static_cast<int64_t>(table.size()), pointer<void>(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_error_string", [](int status) { return std::string(lgk::status_string(status)); });
  m.def("cuda_runtime_version", &lgk::runtime_version, "e.g. 13000; 0 where the kernels run on the CPU executor");
  m.def("cuda_driver_version", &lgk::driver_version, "newest runtime that the driver supports; 0 without a driver");

  m.def("lls_batch_stats_splits", [](Shape shape) { return lgk::lls_batch_stats_splits(image(shape)); });
  m.def("lls_batch_stats", [](Shape shape, Address z, Address bias, Address running_mean, Address running_var,
                              float momentum, float eps, Address mean, Address rstd, Address scratch, Address stream) {
    return lgk::lls_batch_stats(image(shape), pointer<void>(z), floats(bias), floats(running_mean), floats(running_var),
                                momentum, eps, floats(mean), floats(rstd), floats(scratch), pointer<void>(stream));
  });
  m.def("lls_norm_act_pool", [](Shape shape, Addresses parameters, float slope, Address z, bool max_pool, Address out,
                                Address latents, Address s1, Address s2, Address stream) {
    return lgk::lls_norm_act_pool(image(shape), norm(parameters, slope), pointer<void>(z), max_pool, pointer<void>(out),
                                  floats(latents), floats(s1), floats(s2), pointer<void>(stream));
  });
  py::class_<lgk::ModulationGrad>(m, "LlsModulationGrad")
      .def(py::init([](int64_t batch, int rows, int classes, bool vector, Address similarity, Address grad_logits,
                       Address scale, bool scale_per_row, Address grad) {
        return lgk::ModulationGrad{
            batch,         rows,          classes,     vector, floats(similarity), floats(grad_logits),
            floats(scale), scale_per_row, floats(grad)};
      }));
  py::class_<lgk::Finish>(m, "LlsFinish")
      .def(py::init([] { return lgk::Finish{}; }))
      .def(py::init([](Address target, int64_t ignore_index, Address row_loss, Address loss,
                       const lgk::ModulationGrad& modulation) {
        return lgk::Finish{pointer<int64_t>(target), ignore_index, floats(row_loss), floats(loss), modulation};
      }));
  m.def("lls_norm_grads", [](int64_t batch, int channels, int bins, Address grad_latents, Address s1, Address s2,
                             Address area, Address grad_gamma, Address grad_beta, Address grad_bias,
                             const lgk::Finish& finish, Address stream) {
    return lgk::lls_norm_grads(batch, channels, bins, floats(grad_latents), floats(s1), floats(s2), floats(area),
                               floats(grad_gamma), floats(grad_beta), floats(grad_bias), finish, pointer<void>(stream));
  });
  m.def("lls_grad_preactivation", [](Shape shape, Addresses parameters, float slope, Address z, Address grad_latents,
                                     Address grad_gamma, Address grad_beta, float scale, Address stream) {
    return lgk::lls_grad_preactivation(image(shape), norm(parameters, slope), pointer<void>(z), floats(grad_latents),
                                       floats(grad_gamma), floats(grad_beta), scale, pointer<void>(stream));
  });
  m.def("lls_expand_grad",
        [](Shape shape, Address grad_latents, Address scale, bool scale_per_row, Address out, Address stream) {
          return lgk::lls_expand_grad(image(shape), floats(grad_latents), floats(scale), scale_per_row,
                                      pointer<void>(out), pointer<void>(stream));
        });
  m.def("lls_linear_norm_act_pool", [](int64_t batch, int features, int pool, int dtype, Addresses parameters,
                                       float slope, Address z, Address out, Address latents, Address stream) {
    return lgk::lls_linear_norm_act_pool(batch, features, pool, dtype, norm(parameters, slope), pointer<void>(z),
                                         pointer<void>(out), floats(latents), pointer<void>(stream));
  });
  m.def("lls_linear_grad_preactivation", [](int64_t batch, int features, int pool, int dtype, Addresses parameters,
                                            float slope, Address z, Address grad_latents, float scale,
                                            Address grad_gamma, Address grad_beta, Address grad_bias,
                                            const lgk::Finish& finish, Address stream) {
    return lgk::lls_linear_grad_preactivation(batch, features, pool, dtype, norm(parameters, slope), pointer<void>(z),
                                              floats(grad_latents), scale, floats(grad_gamma), floats(grad_beta),
                                              floats(grad_bias), finish, pointer<void>(stream));
  });

  py::class_<lgk::Head>(m, "LlsHead")
      .def(py::init([](int64_t batch, int dim, int rows, int classes, bool packed_basis, int modulation, int loss,
                       int reduction, float temperature, float label_smoothing, float eps, float basis_scale,
                       bool normalize, bool zero_gradient_below_eps, bool compute_grad, int64_t ignore_index) {
        return lgk::Head{batch,        dim,
                         rows,         classes,
                         packed_basis, modulation,
                         loss,         reduction,
                         temperature,  label_smoothing,
                         eps,          basis_scale,
                         normalize,    zero_gradient_below_eps,
                         compute_grad, ignore_index};
      }));
  m.def("lls_head_scratch", &lgk::lls_head_scratch);
  m.def("lls_head", [](const lgk::Head& head, Address x, Address target, Address modulation, Address basis,
                       Address loss, Address row_loss, Address grad_latents, Address similarity, Address grad_logits,
                       Address scratch, Address stream) {
    return lgk::lls_head(head, floats(x), pointer<int64_t>(target), floats(modulation), pointer<void>(basis),
                         floats(loss), floats(row_loss), floats(grad_latents), floats(similarity), floats(grad_logits),
                         floats(scratch), pointer<void>(stream));
  });
  m.def("lls_modulation_grad", [](const lgk::ModulationGrad& problem, Address stream) {
    return lgk::lls_modulation_grad(problem, pointer<void>(stream));
  });

  bind_feedback(m);
  bind_local_loss(m);
  bind_offset(m);
}

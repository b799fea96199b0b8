// Python module brc_fast.kernels._cpu: the functions of
// csrc/{layer_norm,categorical,optimizer,policy,summary}.hpp with buffers as addresses, 0 for null, and
// distances in floats. Nothing is checked here: the Python modules that call it check and own the buffers.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "categorical.hpp"
#include "layer_norm.hpp"
#include "optimizer.hpp"
#include "policy.hpp"
#include "summary.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

float* at(Address address) {
  return reinterpret_cast<float*>(address);
}

void forward(std::int64_t networks, std::int64_t batch, std::int64_t width, std::int64_t bias_stride,
             std::int64_t parameter_stride, Address x, Address bias, Address weight, Address shift,
             Address residual, bool relu, float eps, Address y, Address mean, Address rstd) {
  brc::bias_layer_norm_forward({networks, batch, width}, bias_stride, parameter_stride, at(x), at(bias),
                               at(weight), at(shift), at(residual), relu, eps, at(y), at(mean), at(rstd));
}

void backward(std::int64_t networks, std::int64_t batch, std::int64_t width, std::int64_t bias_stride,
              std::int64_t parameter_stride, std::int64_t dbias_stride, std::int64_t grad_stride, Address dy,
              Address x, Address bias, Address weight, Address shift, bool relu, Address mean, Address rstd,
              Address dx, Address dbias, Address dweight, Address dshift) {
  brc::bias_layer_norm_backward({networks, batch, width}, bias_stride, parameter_stride, dbias_stride,
                                grad_stride, at(dy), at(x), at(bias), at(weight), at(shift), relu, at(mean),
                                at(rstd), at(dx), at(dbias), at(dweight), at(dshift));
}

void projection(std::int64_t rows, std::int64_t atoms, Address probs, Address positions, float v_max,
                Address out) {
  brc::categorical_projection(rows, atoms, at(probs), at(positions), v_max, at(out));
}

void bellman(std::int64_t members, std::int64_t next_members, std::int64_t rows, std::int64_t atoms,
             Address logits, std::int64_t member_stride, std::int64_t row_stride, Address next_logits,
             std::int64_t next_member_stride, std::int64_t next_row_stride, Address rewards,
             Address discounts, Address log_probs, float temperature, float v_max, float scale,
             std::int64_t columns, Address losses, Address grads, Address scratch) {
  brc::categorical_bellman(rows, atoms, {at(logits), members, member_stride, row_stride},
                           {at(next_logits), next_members, next_member_stride, next_row_stride}, at(rewards),
                           at(discounts), at(log_probs), temperature, v_max, scale, columns, at(losses),
                           at(grads), at(scratch));
}

void expected(std::int64_t members, std::int64_t rows, std::int64_t atoms, Address logits,
              std::int64_t member_stride, std::int64_t row_stride, Address atom_values, float scale,
              std::int64_t columns, Address values, Address grads) {
  brc::expected_value(rows, atoms, {at(logits), members, member_stride, row_stride}, at(atom_values), scale,
                      columns, at(values), at(grads));
}

void sample(std::int64_t rows, std::int64_t actions, Address mean, Address raw, std::int64_t mean_stride,
            std::int64_t raw_stride, Address noise, Address out_actions, std::int64_t out_stride,
            Address out_log_probs) {
  brc::tanh_gaussian({rows, actions, at(mean), at(raw), mean_stride, raw_stride, at(noise)}, at(out_actions),
                     out_stride, at(out_log_probs));
}

void sample_backward(std::int64_t rows, std::int64_t actions, Address dactions, std::int64_t dactions_stride,
                     float dlog_prob, Address mean, Address raw, std::int64_t mean_stride,
                     std::int64_t raw_stride, Address noise, Address dmean, Address draw,
                     std::int64_t dmean_stride, std::int64_t draw_stride) {
  brc::tanh_gaussian_backward({rows, actions, at(mean), at(raw), mean_stride, raw_stride, at(noise)},
                              at(dactions), dactions_stride, dlog_prob, at(dmean), at(draw), dmean_stride,
                              draw_stride);
}

double adamw(std::int64_t count, Address param, Address grad, Address exp_avg, Address exp_avg_sq,
             Address target, double learning_rate, double beta1, double beta2, double eps,
             double weight_decay, double mean_scale, double root_scale, double tau, double grad_scale) {
  return brc::adamw(
      count, at(param), at(grad), at(exp_avg), at(exp_avg_sq), at(target),
      {learning_rate, beta1, beta2, eps, weight_decay, mean_scale, root_scale, tau, grad_scale});
}

void summary(std::int64_t rows, std::int64_t losses_count, std::int64_t values_count, Address losses,
             Address log_probs, Address q_values, float target_entropy, Address alpha, Address step,
             Address metrics, Address gradient, Address since) {
  brc::update_summary(
      {rows, losses_count, values_count, at(losses), at(log_probs), at(q_values), *at(alpha), target_entropy},
      *at(step), at(metrics), at(gradient), at(since));
}

double squares(std::int64_t count, Address x) {
  return brc::sum_of_squares(count, at(x));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused float32 kernels for the CPU; private to brc_fast.kernels.";
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("bias_layer_norm_forward", &forward, released);
  m.def("bias_layer_norm_backward", &backward, released);
  m.def("categorical_projection", &projection, released);
  m.def("categorical_bellman", &bellman, released);
  m.def("categorical_bellman_scratch", &brc::bellman_scratch);
  m.def("expected_value", &expected, released);
  m.def("tanh_gaussian", &sample, released);
  m.def("tanh_gaussian_backward", &sample_backward, released);
  m.def("adamw", &adamw, released);
  m.def("sum_of_squares", &squares, released);
  m.def("update_summary", &summary, released);
}

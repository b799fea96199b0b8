// Python module brc_fast.kernels._cpu: the functions of
// csrc/{layer_norm,categorical,optimizer,policy,products,row_sums,summary,workers}.hpp with buffers as
// addresses, 0 for null, and distances in elements. Nothing is checked here: the Python modules that call it
// check and own the buffers.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "categorical.hpp"
#include "layer_norm.hpp"
#include "optimizer.hpp"
#include "policy.hpp"
#include "products.hpp"
#include "row_sums.hpp"
#include "summary.hpp"
#include "workers.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

float* at(Address address) {
  return reinterpret_cast<float*>(address);
}

// A pass with all that it takes bound, to be called.
class Step {
 public:
  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  virtual ~Step() = default;
  virtual void operator()() = 0;
};

class RowStep final : public Step {
 public:
  explicit RowStep(std::unique_ptr<brc::RowPass> pass) : pass_(std::move(pass)) {}
  void operator()() override { pass_->run(); }

 private:
  std::unique_ptr<brc::RowPass> pass_;
};

template <class T>
T* of(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
brc::Norm<T> norm_of(std::int64_t networks, std::int64_t rows, std::int64_t width, std::int64_t bias_stride,
                     std::int64_t vector_stride, Address x, Address bias, Address weight, Address shift,
                     bool relu) {
  return {{networks, rows, width}, of<T>(x), at(bias), at(weight), at(shift), bias_stride,
          vector_stride,           relu};
}

template <class T>
std::unique_ptr<Step> forward_step(const brc::Norm<T>& norm, Address residual, float eps, Address y,
                                   Address mean, Address rstd) {
  auto pass = std::make_unique<brc::NormForward<T>>(norm, of<T>(residual), eps, of<T>(y), at(mean), at(rstd));
  return std::make_unique<RowStep>(std::move(pass));
}

template <class T>
std::unique_ptr<Step> backward_step(const brc::Norm<T>& norm, std::int64_t dbias_stride,
                                    std::int64_t grad_stride, Address dy, Address mean, Address rstd,
                                    Address dx, Address dbias, Address dweight, Address dshift) {
  const brc::NormGradients<T> gradients = {of<T>(dbias), of<T>(dweight), of<T>(dshift), dbias_stride,
                                           grad_stride};
  auto pass =
      std::make_unique<brc::NormBackward<T>>(norm, at(mean), at(rstd), of<T>(dy), of<T>(dx), gradients);
  return std::make_unique<RowStep>(std::move(pass));
}

std::unique_ptr<Step> forward(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width,
                              std::int64_t bias_stride, std::int64_t vector_stride, Address x, Address bias,
                              Address weight, Address shift, bool relu, Address residual, float eps,
                              Address y, Address mean, Address rstd) {
  const auto made = [&]<class T>(T) {
    const auto norm =
        norm_of<T>(networks, rows, width, bias_stride, vector_stride, x, bias, weight, shift, relu);
    return forward_step<T>(norm, residual, eps, y, mean, rstd);
  };
  return low ? made(brc::BFloat16{}) : made(float{});
}

std::unique_ptr<Step> backward(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width,
                               std::int64_t bias_stride, std::int64_t vector_stride, Address x, Address bias,
                               Address weight, Address shift, bool relu, std::int64_t dbias_stride,
                               std::int64_t grad_stride, Address dy, Address mean, Address rstd, Address dx,
                               Address dbias, Address dweight, Address dshift) {
  const auto made = [&]<class T>(T) {
    const auto norm =
        norm_of<T>(networks, rows, width, bias_stride, vector_stride, x, bias, weight, shift, relu);
    return backward_step<T>(norm, dbias_stride, grad_stride, dy, mean, rstd, dx, dbias, dweight, dshift);
  };
  return low ? made(brc::BFloat16{}) : made(float{});
}

class Multiply final : public Step {
 public:
  Multiply(std::int64_t networks, std::int64_t rows, std::int64_t depth, std::int64_t columns, bool low,
           Address a, std::int64_t a_network, std::int64_t a_row, std::int64_t a_column, Address b,
           std::int64_t b_network, std::int64_t b_row, std::int64_t b_column, Address bias,
           std::int64_t bias_network, Address out, bool low_out, std::int64_t out_network,
           std::int64_t out_row, bool accumulate)
      : shape_{networks, rows, columns, depth},
        kind_(kind(low)),
        a_{at(a), a_network, a_row, a_column},
        b_{at(b), b_network, b_row, b_column},
        bias_{at(bias), bias_network},
        out_{at(out), kind(low_out), out_network, out_row, accumulate} {}

  void operator()() override { brc::multiply(shape_, kind_, a_, b_, bias_, out_); }

 private:
  static brc::Number kind(bool low) { return low ? brc::Number::bfloat16 : brc::Number::float32; }

  brc::ProductShape shape_;
  brc::Number kind_;
  brc::Factor a_, b_;
  brc::Bias bias_;
  brc::Product out_;
};

void projection(std::int64_t rows, std::int64_t atoms, Address probs, Address positions, float v_max,
                Address out) {
  brc::categorical_projection(rows, atoms, at(probs), at(positions), v_max, at(out));
}

void bellman(std::int64_t members, std::int64_t next_members, std::int64_t rows, std::int64_t atoms,
             Address logits, std::int64_t member_stride, std::int64_t row_stride, Address next_logits,
             std::int64_t next_member_stride, std::int64_t next_row_stride, Address rewards,
             Address discounts, Address log_probs, float temperature, float v_max, float scale,
             std::int64_t columns, Address losses, Address grads) {
  brc::categorical_bellman(rows, atoms, {at(logits), members, member_stride, row_stride},
                           {at(next_logits), next_members, next_member_stride, next_row_stride}, at(rewards),
                           at(discounts), at(log_probs), temperature, v_max, scale, columns, at(losses),
                           at(grads));
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

double adamw(std::int64_t count, Address param, bool low_grad, Address grad, Address exp_avg,
             Address exp_avg_sq, Address target, Address low, Address target_low, double learning_rate,
             double beta1, double beta2, double eps, double weight_decay, double mean_scale,
             double root_scale, double tau, double grad_scale) {
  const brc::AdamW rule = {learning_rate, beta1,      beta2, eps,       weight_decay,
                           mean_scale,    root_scale, tau,   grad_scale};
  const auto step = [&]<class G>(G) {
    const brc::Moved<G> moved = {at(param),
                                 of<const G>(grad),
                                 at(exp_avg),
                                 at(exp_avg_sq),
                                 at(target),
                                 of<brc::BFloat16>(low),
                                 of<brc::BFloat16>(target_low)};
    return brc::adamw(count, moved, rule);
  };
  return low_grad ? step(brc::BFloat16{}) : step(float{});
}

void summary(std::int64_t rows, std::int64_t losses_count, std::int64_t values_count, Address losses,
             Address log_probs, Address q_values, float target_entropy, Address alpha, Address step,
             Address metrics, Address gradient, Address since) {
  brc::update_summary(
      {rows, losses_count, values_count, at(losses), at(log_probs), at(q_values), *at(alpha), target_entropy},
      *at(step), at(metrics), at(gradient), at(since));
}

void sum_rows(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width, Address x, Address out,
              std::int64_t out_stride) {
  const auto sum = [&]<class T>(T) {
    brc::sum_rows<T>({networks, rows, width}, of<T>(x), of<T>(out), out_stride);
  };
  return low ? sum(brc::BFloat16{}) : sum(float{});
}

double squares(std::int64_t count, Address x) {
  return brc::sum_of_squares(count, at(x));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused kernels for the CPU; private to brc_fast.kernels.";
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<Step>(m, "Step", py::dynamic_attr()).def("__call__", &Step::operator(), released);
  using I = std::int64_t;
  using A = Address;
  py::class_<Multiply, Step>(m, "Multiply")
      .def(py::init<I, I, I, I, bool, A, I, I, I, A, I, I, I, A, I, A, bool, I, I, bool>());
  m.def("bias_layer_norm_forward", &forward);
  m.def("bias_layer_norm_backward", &backward);
  m.def("categorical_projection", &projection, released);
  m.def("categorical_bellman", &bellman, released);
  m.def("expected_value", &expected, released);
  m.def("tanh_gaussian", &sample, released);
  m.def("tanh_gaussian_backward", &sample_backward, released);
  m.def("adamw", &adamw, released);
  m.def("multiplies",
        [](bool low) { return brc::multiplies(low ? brc::Number::bfloat16 : brc::Number::float32); });
  m.def("set_threads", &brc::set_threads);
  m.def("sum_of_squares", &squares, released);
  m.def("sum_rows", &sum_rows, released);
  m.def("update_summary", &summary, released);
}

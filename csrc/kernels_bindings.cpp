// Python module brc_fast.kernels._cpu: the functions of
// csrc/{inputs,layer_norm,categorical,optimizer,policy,products,row_sums,summary,workers}.hpp with buffers as
// addresses, 0 for null, and distances in elements. Nothing is checked here: the Python modules that call it
// check and own the buffers.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "categorical.hpp"
#include "inputs.hpp"
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

using Call = std::function<void()>;

// What a thread has called, to be called again: the same functions with the same arguments.
class Tape {
 public:
  // `owner` keeps what the call works on.
  void add(Call call, py::object owner) { calls_.push_back({std::move(call), std::move(owner)}); }

  // Something of Python's, in its turn.
  void append(py::object function) { calls_.push_back({Call(), std::move(function)}); }

  void replay() const {
    for (std::size_t at = 0; at < calls_.size();) {
      if (!calls_[at].native) {
        calls_[at++].python();
        continue;
      }
      const py::gil_scoped_release released;
      for (; at < calls_.size() && calls_[at].native; ++at) calls_[at].native();
    }
  }

  [[nodiscard]] std::size_t size() const { return calls_.size(); }

 private:
  struct Entry {
    Call native;
    py::object python;
  };
  std::vector<Entry> calls_;
};

thread_local Tape* recording = nullptr;  // what this thread calls

void perform(const Call& call, py::object owner) {
  {
    const py::gil_scoped_release released;
    call();
  }
  if (recording != nullptr) recording->add(call, std::move(owner));
}

// A function whose calls are recorded; it returns nothing.
template <auto Function>
struct Recorded;

template <class... Arguments, void (*Function)(Arguments...)>
struct Recorded<Function> {
  static void call(Arguments... arguments) {
    perform([=] { Function(arguments...); }, py::none());
  }
};

// A pass with all that it takes bound, to be called.
class Step {
 public:
  explicit Step(Call call) : call_(std::move(call)) {}
  [[nodiscard]] const Call& call() const { return call_; }

 private:
  Call call_;
};

// A number that is in memory, where another one may be at the next replay, or given.
float number(Address place, float given) {
  return place == 0 ? given : *at(place);
}

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

Step forward(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width, std::int64_t bias_stride,
             std::int64_t vector_stride, Address x, Address bias, Address weight, Address shift, bool relu,
             Address residual, float eps, Address y, Address mean, Address rstd) {
  const auto made = [&]<class T>(T) {
    const auto norm =
        norm_of<T>(networks, rows, width, bias_stride, vector_stride, x, bias, weight, shift, relu);
    const auto pass =
        std::make_shared<brc::NormForward<T>>(norm, of<T>(residual), eps, of<T>(y), at(mean), at(rstd));
    return Step([pass] { pass->run(); });
  };
  return low ? made(brc::BFloat16{}) : made(float{});
}

Step backward(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width,
              std::int64_t bias_stride, std::int64_t vector_stride, Address x, Address bias, Address weight,
              Address shift, bool relu, std::int64_t dbias_stride, std::int64_t grad_stride, Address dy,
              Address mean, Address rstd, Address dx, Address dbias, Address dweight, Address dshift) {
  const auto made = [&]<class T>(T) {
    const auto norm =
        norm_of<T>(networks, rows, width, bias_stride, vector_stride, x, bias, weight, shift, relu);
    const brc::NormGradients<T> gradients = {of<T>(dbias), of<T>(dweight), of<T>(dshift), dbias_stride,
                                             grad_stride};
    const auto pass =
        std::make_shared<brc::NormBackward<T>>(norm, at(mean), at(rstd), of<T>(dy), of<T>(dx), gradients);
    return Step([pass] { pass->run(); });
  };
  return low ? made(brc::BFloat16{}) : made(float{});
}

Step product(std::int64_t networks, std::int64_t rows, std::int64_t depth, std::int64_t columns, bool low,
             Address a, std::int64_t a_network, std::int64_t a_row, std::int64_t a_column, Address b,
             std::int64_t b_network, std::int64_t b_row, std::int64_t b_column, Address bias,
             std::int64_t bias_network, Address out, bool low_out, std::int64_t out_network,
             std::int64_t out_row, bool accumulate) {
  const auto kind = [](bool is_low) { return is_low ? brc::Number::bfloat16 : brc::Number::float32; };
  const brc::ProductShape shape = {networks, rows, columns, depth};
  const brc::Factor left = {at(a), a_network, a_row, a_column}, right = {at(b), b_network, b_row, b_column};
  const brc::Bias added = {at(bias), bias_network};
  const brc::Product made = {at(out), kind(low_out), out_network, out_row, accumulate};
  return Step([=, of_kind = kind(low)] { brc::multiply(shape, of_kind, left, right, added, made); });
}

void projection(std::int64_t rows, std::int64_t atoms, Address probs, Address positions, float v_max,
                Address out) {
  brc::categorical_projection(rows, atoms, at(probs), at(positions), v_max, at(out));
}

void bellman(std::int64_t members, std::int64_t next_members, std::int64_t rows, std::int64_t atoms,
             Address logits, std::int64_t member_stride, std::int64_t row_stride, Address next_logits,
             std::int64_t next_member_stride, std::int64_t next_row_stride, Address rewards,
             Address discounts, Address log_probs, Address temperature_at, float temperature, float v_max,
             float scale, std::int64_t columns, Address losses, Address grads) {
  brc::categorical_bellman(rows, atoms, {at(logits), members, member_stride, row_stride},
                           {at(next_logits), next_members, next_member_stride, next_row_stride}, at(rewards),
                           at(discounts), at(log_probs), number(temperature_at, temperature), v_max, scale,
                           columns, at(losses), at(grads));
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
                     Address dlog_prob_at, float dlog_prob, float scale, Address mean, Address raw,
                     std::int64_t mean_stride, std::int64_t raw_stride, Address noise, Address dmean,
                     Address draw, std::int64_t dmean_stride, std::int64_t draw_stride) {
  brc::tanh_gaussian_backward({rows, actions, at(mean), at(raw), mean_stride, raw_stride, at(noise)},
                              at(dactions), dactions_stride, scale * number(dlog_prob_at, dlog_prob),
                              at(dmean), at(draw), dmean_stride, draw_stride);
}

void adamw(std::int64_t count, Address param, bool low_grad, Address grad, Address exp_avg,
           Address exp_avg_sq, Address target, Address low, Address target_low, Address step,
           Address learning_rate_at, double learning_rate, double beta1, double beta2, double eps,
           double weight_decay, Address tau_at, double tau, double grad_scale, Address norm) {
  const auto rate = learning_rate_at == 0 ? learning_rate : static_cast<double>(*at(learning_rate_at));
  const auto share = tau_at == 0 ? tau : static_cast<double>(*at(tau_at));
  const auto steps = static_cast<double>(*at(step) += 1.0f);
  const brc::AdamW rule = {rate,
                           beta1,
                           beta2,
                           eps,
                           weight_decay,
                           1.0 / (1.0 - std::pow(beta1, steps)),
                           1.0 / std::sqrt(1.0 - std::pow(beta2, steps)),
                           share,
                           grad_scale};
  const auto squares = [&]<class G>(G) {
    const brc::Moved<G> moved = {at(param),
                                 of<const G>(grad),
                                 at(exp_avg),
                                 at(exp_avg_sq),
                                 at(target),
                                 of<brc::BFloat16>(low),
                                 of<brc::BFloat16>(target_low)};
    return brc::adamw(count, moved, rule);
  };
  const double sum = low_grad ? squares(brc::BFloat16{}) : squares(float{});
  if (norm != 0) *at(norm) = static_cast<float>(std::sqrt(sum));
}

void summary(std::int64_t rows, std::int64_t losses_count, std::int64_t values_count, Address losses,
             Address log_probs, Address q_values, float target_entropy, Address alpha, Address step,
             Address metrics, Address gradient, Address since) {
  brc::update_summary(
      {rows, losses_count, values_count, at(losses), at(log_probs), at(q_values), *at(alpha), target_entropy},
      *at(step), at(metrics), at(gradient), at(since));
}

void pack(std::int64_t rows, Address observations, std::int64_t observation_width,
          std::int64_t observation_stride, Address actions, std::int64_t action_width,
          std::int64_t action_stride, Address table, std::int64_t tasks, std::int64_t embedding_width,
          Address ids, bool l1, bool low, Address out, std::int64_t width) {
  const brc::Rows seen = {at(observations), observation_width, observation_stride};
  const brc::Rows done = {at(actions), action_width, action_stride};
  const brc::Embedding embedding = {at(table), tasks, embedding_width, of<std::int64_t>(ids), l1};
  const auto packed = [&]<class T>(T) { brc::pack_inputs(rows, seen, done, embedding, of<T>(out), width); };
  low ? packed(brc::BFloat16{}) : packed(float{});
}

void embedding_gradient(std::int64_t members, std::int64_t rows, Address grad, std::int64_t member_stride,
                        std::int64_t row_stride, Address table, std::int64_t tasks, std::int64_t width,
                        Address ids, bool l1, bool low, Address out) {
  const brc::Embedding embedding = {at(table), tasks, width, of<std::int64_t>(ids), l1};
  const auto made = [&]<class T>(T) {
    brc::embedding_gradient(members, rows, at(grad), member_stride, row_stride, embedding, of<T>(out));
  };
  low ? made(brc::BFloat16{}) : made(float{});
}

void sum_rows(bool low, std::int64_t networks, std::int64_t rows, std::int64_t width, Address x, Address out,
              std::int64_t out_stride) {
  const auto sum = [&]<class T>(T) {
    brc::sum_rows<T>({networks, rows, width}, of<T>(x), of<T>(out), out_stride);
  };
  low ? sum(brc::BFloat16{}) : sum(float{});
}

void round_all(std::int64_t count, Address x, Address out) {
  brc::round_all(count, at(x), of<brc::BFloat16>(out));
}

double squares(std::int64_t count, Address x) {
  return brc::sum_of_squares(count, at(x));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused kernels for the CPU; private to brc_fast.kernels.";
  const auto released = py::call_guard<py::gil_scoped_release>();
  py::class_<Step>(m, "Step", py::dynamic_attr()).def("__call__", [](py::object self) {
    perform(self.cast<const Step&>().call(), self);
  });
  py::class_<Tape>(m, "Tape")
      .def(py::init<>())
      .def("append", &Tape::append)
      .def("replay", &Tape::replay)
      .def("__len__", &Tape::size);
  m.def("record", [](Tape* tape) { recording = tape; }, py::arg().none(true));
  m.def("recording", [] { return recording != nullptr; });
  m.def("product", &product);
  m.def("bias_layer_norm_forward", &forward);
  m.def("bias_layer_norm_backward", &backward);
  m.def("categorical_projection", &Recorded<&projection>::call);
  m.def("categorical_bellman", &Recorded<&bellman>::call);
  m.def("embedding_gradient", &Recorded<&embedding_gradient>::call);
  m.def("expected_value", &Recorded<&expected>::call);
  m.def("tanh_gaussian", &Recorded<&sample>::call);
  m.def("tanh_gaussian_backward", &Recorded<&sample_backward>::call);
  m.def("adamw", &Recorded<&adamw>::call);
  m.def("multiplies",
        [](bool low) { return brc::multiplies(low ? brc::Number::bfloat16 : brc::Number::float32); });
  m.def("pack_inputs", &Recorded<&pack>::call);
  m.def("round_all", &Recorded<&round_all>::call);
  m.def("set_threads", &brc::set_threads);
  m.def("sum_of_squares", &squares, released);
  m.def("sum_rows", &Recorded<&sum_rows>::call);
  m.def("update_summary", &Recorded<&summary>::call);
}

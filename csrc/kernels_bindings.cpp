// Python module brc_fast.kernels._cpu. Buffers come as addresses; kernels/cpu.py checks and owns them.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "categorical.hpp"
#include "layer_norm.hpp"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

float* at(Address address) {
  return reinterpret_cast<float*>(address);
}

void forward(std::int64_t networks, std::int64_t batch, std::int64_t width, Address x, Address bias,
             Address weight, Address shift, Address residual, bool relu, float eps, Address y, Address mean,
             Address rstd) {
  brc::bias_layer_norm_forward({networks, batch, width}, at(x), at(bias), at(weight), at(shift), at(residual),
                               relu, eps, at(y), at(mean), at(rstd));
}

void backward(std::int64_t networks, std::int64_t batch, std::int64_t width, Address dy, Address y, Address x,
              Address bias, Address weight, Address mean, Address rstd, Address dx, Address dbias,
              Address dweight, Address dshift) {
  brc::bias_layer_norm_backward({networks, batch, width}, at(dy), at(y), at(x), at(bias), at(weight),
                                at(mean), at(rstd), at(dx), at(dbias), at(dweight), at(dshift));
}

void projection(std::int64_t rows, std::int64_t atoms, Address probs, Address positions, float v_max,
                Address out) {
  brc::categorical_projection(rows, atoms, at(probs), at(positions), v_max, at(out));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Fused float32 kernels for the CPU; private to brc_fast.kernels.";
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("bias_layer_norm_forward", &forward, released);
  m.def("bias_layer_norm_backward", &backward, released);
  m.def("categorical_projection", &projection, released);
}

// Data of Python arguments that are exactly right, found without a call of Python.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

#include "dlpack.hpp"

namespace brc {

/// What an argument must be.
struct Expected {
  int type;                              // numpy's type number, or -1 where numpy has none
  dlpack::DataType dtype;                // of a tensor
  std::vector<pybind11::ssize_t> shape;  // of one of its rows
};

/// Lets `exact_data` look at the CPU tensors of a type, torch.Tensor. False, and nothing changed, if the type
/// does not offer a `__dlpack_c_exchange_api__` that is known here.
bool read_tensors(pybind11::type type);

/// What `read_tensors` was given offers, or null.
const dlpack::ExchangeApi* exchange_api() noexcept;

/// Data of an exact, contiguous numpy array or tensor of `count` rows (any, and then set, where it is
/// negative); null for everything else. Precondition: the GIL is held.
const void* exact_data(pybind11::handle value, const Expected& expected, pybind11::ssize_t& count);

}  // namespace brc

// The Python face of ReplayStore: it converts, releases the GIL and delegates. Arrays must have the exact
// dtype and be C-contiguous; nothing is cast or copied here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "philox.hpp"
#include "replay_store.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> in(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
std::span<T> out(Array<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

py::array_t<std::int64_t> to_array(const std::vector<std::int64_t>& values) {
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::span<const unsigned char> in(const Array<bool>& array) {
  return {reinterpret_cast<const unsigned char*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::span<unsigned char> out(Array<bool>& array) {
  return {reinterpret_cast<unsigned char*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

using brc::ReplayStore;

void add(ReplayStore& store, const Array<std::int64_t>& streams, const Array<float>& observations,
         const Array<float>& actions, const Array<float>& rewards, const Array<bool>& terminated,
         const Array<bool>& truncated, const Array<float>& successors) {
  const auto ids = in(streams);
  const brc::TransitionColumns<true> columns{in(observations), in(actions),   in(rewards),
                                             in(terminated),   in(truncated), in(successors)};
  const py::gil_scoped_release released;
  store.add(ids, columns);
}

void sample(ReplayStore& store, Array<float> observations, Array<float> actions, Array<float> rewards,
            Array<float> masks, Array<float> next_observations, Array<std::int64_t> task_ids) {
  if (rewards.ndim() != 2) throw std::invalid_argument("rewards must have shape [U, B]");
  const auto num_batches = static_cast<std::size_t>(rewards.shape(0));
  const auto batch_size = static_cast<std::size_t>(rewards.shape(1));
  const brc::BatchColumns columns{out(observations), out(actions),           out(rewards),
                                  out(masks),        out(next_observations), out(task_ids)};
  const py::gil_scoped_release released;
  store.sample(num_batches, batch_size, columns);
}

void read_one(const ReplayStore& store, std::int64_t stream, std::int64_t age, Array<float> observations,
              Array<float> actions, Array<float> rewards, Array<float> masks, Array<float> next_observations,
              Array<std::int64_t> task_ids) {
  const brc::BatchColumns columns{out(observations), out(actions),           out(rewards),
                                  out(masks),        out(next_observations), out(task_ids)};
  const py::gil_scoped_release released;
  store.read(stream, age, columns);
}

void save(const ReplayStore& store, Array<std::int64_t> sizes, Array<float> observations,
          Array<float> actions, Array<float> rewards, Array<bool> terminated, Array<bool> truncated,
          Array<bool> has_successor, Array<float> successors, Array<float> heads, Array<bool> head_valid) {
  const brc::StateColumns<false> columns{
      out(sizes),
      {out(observations), out(actions), out(rewards), out(terminated), out(truncated), out(successors)},
      out(has_successor),
      out(heads),
      out(head_valid)};
  const py::gil_scoped_release released;
  store.save(columns);
}

void load(ReplayStore& store, std::uint64_t seed, std::uint64_t draws, const Array<std::int64_t>& sizes,
          const Array<float>& observations, const Array<float>& actions, const Array<float>& rewards,
          const Array<bool>& terminated, const Array<bool>& truncated, const Array<bool>& has_successor,
          const Array<float>& successors, const Array<float>& heads, const Array<bool>& head_valid) {
  const brc::StateColumns<true> columns{
      in(sizes),
      {in(observations), in(actions), in(rewards), in(terminated), in(truncated), in(successors)},
      in(has_successor),
      in(heads),
      in(head_valid)};
  const py::gil_scoped_release released;
  store.load(columns, seed, draws);
}

py::arg exact(const char* name) {
  py::arg argument(name);
  return argument.noconvert();
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of brc_fast; brc_fast.replay is its typed face.";
  module.def("philox4x32", &brc::philox4x32, "counter"_a, "key"_a);
  py::class_<ReplayStore>(module, "ReplayStore")
      .def(py::init([](std::int64_t capacity, std::int64_t observation_size, std::int64_t action_size,
                       const Array<std::int64_t>& task_ids, std::uint64_t seed) {
             return std::make_unique<ReplayStore>(capacity, observation_size, action_size, in(task_ids),
                                                  seed);
           }),
           "capacity"_a, "observation_size"_a, "action_size"_a, exact("task_ids"), "seed"_a)
      .def("add", &add, exact("streams"), exact("observations"), exact("actions"), exact("rewards"),
           exact("terminated"), exact("truncated"), exact("successors"))
      .def("sample", &sample, exact("observations"), exact("actions"), exact("rewards"), exact("masks"),
           exact("next_observations"), exact("task_ids"))
      .def("read", &read_one, "stream"_a, "age"_a, exact("observations"), exact("actions"), exact("rewards"),
           exact("masks"), exact("next_observations"), exact("task_ids"))
      .def("save", &save, exact("sizes"), exact("observations"), exact("actions"), exact("rewards"),
           exact("terminated"), exact("truncated"), exact("has_successor"), exact("successors"),
           exact("heads"), exact("head_valid"))
      .def("load", &load, "seed"_a, "draws"_a, exact("sizes"), exact("observations"), exact("actions"),
           exact("rewards"), exact("terminated"), exact("truncated"), exact("has_successor"),
           exact("successors"), exact("heads"), exact("head_valid"))
      .def("sizes", [](const ReplayStore& store) { return to_array(store.sizes()); })
      .def("capacities", [](const ReplayStore& store) { return to_array(store.capacities()); })
      .def_property_readonly("size", &ReplayStore::size)
      .def_property_readonly("side_size", &ReplayStore::side_size)
      .def_property_readonly("nbytes", &ReplayStore::nbytes)
      .def_property_readonly("seed", &ReplayStore::seed)
      .def_property_readonly("draws", &ReplayStore::draws);
}

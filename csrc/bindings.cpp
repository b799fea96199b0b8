// The Python face of the replay store: it converts, releases the GIL and delegates. Arrays must have the
// exact size and be C-contiguous; nothing is cast or copied here. brc_fast.replay checks shapes and dtypes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <system_error>

#include "batch_views.hpp"
#include "checksum.hpp"
#include "device_index.hpp"
#include "exact_data.hpp"
#include "philox.hpp"
#include "replay_store.hpp"
#include "returns.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

using brc::DeviceIndex;
using brc::exact_data;
using brc::Expected;
using brc::ReplayStore;
using brc::Request;
using brc::Slot;
using brc::Views;

using Arrays = std::vector<py::array>;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> in(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

std::span<const unsigned char> in(const Array<bool>& array) {
  return {reinterpret_cast<const unsigned char*>(array.data()), static_cast<std::size_t>(array.size())};
}

std::span<unsigned char> out(Array<bool>& array) {
  return {reinterpret_cast<unsigned char*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

template <class T>
std::span<T> out(Array<T>& array) {
  return {array.mutable_data(), static_cast<std::size_t>(array.size())};
}

brc::Bytes in_bytes(const py::array& array) {
  if ((array.flags() & py::array::c_style) == 0) throw std::invalid_argument("arrays must be C-contiguous");
  return {static_cast<const std::byte*>(array.data()), static_cast<std::size_t>(array.nbytes())};
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// ---- Adding

constexpr std::size_t kSmallAdd = std::size_t{1} << 20;  // bytes of rows

/// A store and what its observations and actions must look like.
class BoundStore {
 public:
  BoundStore(brc::Layout layout, const std::vector<std::int64_t>& capacities,
             const std::vector<std::int64_t>& task_ids, std::uint64_t seed, bool allow_not_finite,
             std::optional<double> alpha, Expected observation, Expected action)
      : store(std::move(layout), capacities, task_ids, seed, allow_not_finite, alpha),
        observation_(std::move(observation)),
        action_(std::move(action)) {}

  /// Adds arrays and tensors that are exactly right, and returns whether they were; else nothing happened.
  bool try_add(py::handle streams, py::handle observations, py::handle actions, py::handle rewards,
               py::handle terminated, py::handle truncated, py::handle successors) {
    static const Expected kIds{py::detail::npy_api::NPY_INT64_, {dlpack::kInt, 64, 1}, {}};
    static const Expected kFloats{py::detail::npy_api::NPY_FLOAT_, {dlpack::kFloat, 32, 1}, {}};
    static const Expected kFlags{py::detail::npy_api::NPY_BOOL_, {dlpack::kBool, 8, 1}, {}};
    if (store.layout().fields.size() != 1 || store.layout().parts.size() != 1) return false;
    const bool all = streams.is_none();
    py::ssize_t m = all ? static_cast<py::ssize_t>(store.num_streams()) : -1;
    const auto* ids = all ? nullptr : static_cast<const std::int64_t*>(exact_data(streams, kIds, m));
    if (!all && ids == nullptr) return false;
    const void* data[] = {exact_data(observations, observation_, m), exact_data(actions, action_, m),
                          exact_data(rewards, kFloats, m),           exact_data(terminated, kFlags, m),
                          exact_data(truncated, kFlags, m),          exact_data(successors, observation_, m)};
    for (const void* column : data) {
      if (column == nullptr) return false;
    }
    const auto rows = static_cast<std::size_t>(m);
    const std::size_t frame = store.layout().observation.bytes;
    brc::TransitionColumns columns;
    columns.observations[0] = {static_cast<const std::byte*>(data[0]), rows * frame};
    columns.fields[0] = {static_cast<const std::byte*>(data[1]), rows * store.layout().fields[0].bytes};
    columns.rewards = {static_cast<const float*>(data[2]), rows};
    columns.terminated = {static_cast<const unsigned char*>(data[3]), rows};
    columns.truncated = {static_cast<const unsigned char*>(data[4]), rows};
    columns.successors[0] = {static_cast<const std::byte*>(data[5]), rows * frame};
    append(all ? store.all_streams() : std::span(ids, rows), columns);
    return true;
  }

  void add(const Array<std::int64_t>& streams, const Arrays& observations, const Arrays& fields,
           const Array<float>& rewards, const Array<bool>& terminated, const Array<bool>& truncated,
           const Arrays& successors) {
    const brc::TransitionColumns columns =
        columns_of(observations, fields, rewards, terminated, truncated, successors);
    append(in(streams), columns);
  }

  std::size_t extend(std::int64_t stream, const Arrays& observations, const Arrays& fields,
                     const Array<float>& rewards, const Array<bool>& terminated, const Array<bool>& truncated,
                     const Arrays& successors, const std::optional<Array<bool>>& starts) {
    brc::TransitionColumns columns =
        columns_of(observations, fields, rewards, terminated, truncated, successors);
    if (starts) columns.starts = in(*starts);
    const py::gil_scoped_release released;
    return store.extend(stream, columns);
  }

  ReplayStore store;

 private:
  /// Keeps the GIL where this takes microseconds: whoever gives it up beside threads that sample gets it back
  /// only when the system has time for one more thread, milliseconds later.
  void append(std::span<const std::int64_t> ids, const brc::TransitionColumns& columns) {
    if (ids.size() * store.layout().stride <= kSmallAdd && store.add_if_first(ids, columns)) return;
    const py::gil_scoped_release released;
    store.add(ids, columns);
  }

  brc::TransitionColumns columns_of(const Arrays& observations, const Arrays& fields,
                                    const Array<float>& rewards, const Array<bool>& terminated,
                                    const Array<bool>& truncated, const Arrays& successors) const {
    brc::TransitionColumns columns;
    const auto put = [](brc::Columns<brc::Bytes>& to, const Arrays& from, std::size_t count) {
      if (from.size() != count) brc::refuse("another number of columns is expected");
      for (std::size_t i = 0; i < count; ++i) to[i] = in_bytes(from[i]);
    };
    put(columns.observations, observations, store.layout().parts.size());
    put(columns.fields, fields, store.layout().fields.size());
    if (!successors.empty()) put(columns.successors, successors, store.layout().parts.size());
    columns.rewards = in(rewards);
    columns.terminated = in(terminated);
    columns.truncated = in(truncated);
    return columns;
  }

  Expected observation_;
  Expected action_;
};

// ---- Sampling

void sample(BoundStore& self, const Request& request, std::size_t num_batches, std::size_t batch_size,
            const Views& views, Slot& slot) {
  const brc::BatchColumns columns = views.columns(slot, self.store.layout());
  const py::gil_scoped_release released;
  self.store.sample(request, num_batches, batch_size, columns);
}

void gather_ahead(const BoundStore& self, const Request& request, std::uint64_t draw, std::size_t num_batches,
                  std::size_t batch_size, const Views& views, Slot& slot, brc::Ahead& ahead) {
  const brc::BatchColumns columns = views.columns(slot, self.store.layout());
  const py::gil_scoped_release released;
  self.store.gather_ahead(request, draw, num_batches, batch_size, columns, ahead);
}

std::size_t settle(BoundStore& self, const Request& request, std::size_t num_batches, std::size_t batch_size,
                   const Views& views, Slot& slot, brc::Ahead& ahead) {
  const brc::BatchColumns columns = views.columns(slot, self.store.layout());
  const py::gil_scoped_release released;
  return self.store.settle(request, num_batches, batch_size, columns, ahead);
}

void read_transitions(const BoundStore& self, const Array<std::int64_t>& indices, const Request& request,
                      const Views& views, Slot& slot) {
  const brc::BatchColumns columns = views.columns(slot, self.store.layout());
  const auto names = in(indices);
  const py::gil_scoped_release released;
  self.store.read(names, request, columns);
}

ReplayStore& index_of(BoundStore& self) {
  return self.store;
}
DeviceIndex& index_of(DeviceIndex& self) {
  return self;
}

template <class Index>
std::size_t set_priorities(Index& self, const Array<std::int64_t>& indices, const Array<float>& priorities) {
  const py::gil_scoped_release released;
  return index_of(self).set_priorities(in(indices), in(priorities));
}

// ---- Files

template <class T>
std::vector<T> list(const py::dict& from, const char* name) {
  return from[name].cast<std::vector<T>>();
}

py::dict write_segment(const BoundStore& self, int file, const std::vector<std::uint64_t>& from) {
  brc::Snapshot snapshot;
  {
    const py::gil_scoped_release released;
    snapshot = self.store.write_segment(file, from);
  }
  const auto& [content, table] = snapshot;
  const std::vector<int> head(table.head.begin(), table.head.end());
  const py::dict counters("count"_a = content.count, "size"_a = content.size, "kept"_a = content.kept,
                          "phase"_a = content.phase, "capacity"_a = content.capacity,
                          "draws"_a = content.draws);
  py::dict rows("first"_a = table.first, "rows"_a = table.rows, "side"_a = table.side, "head"_a = head,
                "bytes"_a = table.bytes, "checksums"_a = table.checksums);
  if (table.priorities > 0) rows["priorities"] = table.priorities;
  return py::dict("content"_a = counters, "table"_a = rows);
}

void load(BoundStore& self, const py::dict& content_, const std::vector<py::tuple>& segments,
          std::uint64_t seed) {
  brc::Content content{list<std::uint64_t>(content_, "count"),   list<std::uint32_t>(content_, "size"),
                       list<std::uint32_t>(content_, "kept"),    list<std::uint32_t>(content_, "phase"),
                       list<std::int64_t>(content_, "capacity"), content_["draws"].cast<std::uint64_t>()};
  std::vector<brc::SegmentFile> files;
  for (const py::tuple& segment : segments) {
    const auto table = segment[2].cast<py::dict>();
    const auto head = list<int>(table, "head");
    files.push_back({segment[0].cast<int>(),
                     {list<std::uint64_t>(table, "first"),
                      list<std::uint32_t>(table, "rows"),
                      list<std::uint32_t>(table, "side"),
                      {head.begin(), head.end()},
                      table.contains("priorities") ? table["priorities"].cast<std::uint64_t>() : 0,
                      table["bytes"].cast<std::uint64_t>(),
                      list<std::uint32_t>(table, "checksums")},
                     segment[1].cast<std::string>()});
  }
  const py::gil_scoped_release released;
  self.store.load(content, files, seed);
}

// ---- An index whose rows lie elsewhere

struct Plan {
  Array<std::int64_t> steps, observations, successors;
  Array<float> masks;
  Array<std::int64_t> task_ids;
  Array<bool> terminated, truncated;
  Array<std::int64_t> summed, indices;
  Array<float> weights;

  explicit Plan(const py::dict& columns)
      : steps(columns["steps"]),
        observations(columns["observations"]),
        successors(columns["successors"]),
        masks(columns["masks"]),
        task_ids(columns["task_ids"]),
        terminated(columns["terminated"]),
        truncated(columns["truncated"]),
        summed(columns["summed"]),
        indices(columns["indices"]),
        weights(columns["weights"]) {}
  brc::PlanColumns columns() {
    return {out(steps),      out(observations), out(successors), out(masks),   out(task_ids),
            out(terminated), out(truncated),    out(summed),     out(indices), out(weights)};
  }
};

void plan(DeviceIndex& index, const Request& request, std::size_t num_batches, std::size_t batch_size,
          const py::dict& arrays) {
  Plan into(arrays);
  const brc::PlanColumns columns = into.columns();
  const py::gil_scoped_release released;
  index.plan(request, num_batches, batch_size, columns);
}

void plan_named(DeviceIndex& index, const Request& request, const Array<std::int64_t>& names,
                const py::dict& arrays) {
  index.plan_named(request, in(names), Plan(arrays).columns());
}

void index_add(DeviceIndex& index, const Array<std::int64_t>& streams, const Array<bool>& departs,
               const Array<bool>& terminated, const Array<bool>& truncated, Array<std::int64_t> rows,
               Array<std::int64_t> moved, Array<std::int64_t> successors) {
  index.add(in(streams), in(departs), in(terminated), in(truncated), out(rows), out(moved), out(successors));
}

void index_adopt(DeviceIndex& index, const BoundStore& self) {
  const brc::ReplayIndex from = self.store.index();
  std::vector<std::uint32_t> links(from.rows());
  for (std::size_t row = 0; row < links.size(); ++row) links[row] = self.store.link(row);
  index.adopt(from, self.store.draws(), links);
}

/// A view of the store's memory: `count` rows from `first`.
py::array rows_view(BoundStore& self, py::object owner, std::size_t first, std::size_t count) {
  const std::size_t stride = self.store.layout().stride;
  if (first + count > self.store.index().rows()) throw std::out_of_range("no such rows");
  self.store.write_heads();
  return Array<unsigned char>({count, stride}, reinterpret_cast<unsigned char*>(self.store.row(first)),
                              owner);
}

/// The first side slots [count, bytes of an observation], written or read.
void put_slots(BoundStore& self, const Array<unsigned char>& slots) {
  const std::size_t bytes = self.store.layout().observation.bytes;
  for (py::ssize_t slot = 0; slot < slots.shape(0); ++slot) {
    std::memcpy(self.store.slot(static_cast<std::size_t>(slot)), slots.data(slot, 0), bytes);
  }
}

py::array get_slots(BoundStore& self, std::size_t count) {
  const std::size_t bytes = self.store.layout().observation.bytes;
  Array<unsigned char> slots({count, bytes});
  for (std::size_t slot = 0; slot < count; ++slot) {
    std::memcpy(slots.mutable_data(static_cast<py::ssize_t>(slot), 0), self.store.slot(slot), bytes);
  }
  return slots;
}

template <class Value>
py::array_t<std::int64_t> of_streams(const DeviceIndex& index, Value value) {
  std::vector<std::int64_t> values;
  for (const brc::Stream& stream : index.index().streams()) values.push_back(stream.*value);
  return to_array(values);
}

/// A property of a store. Whoever waits for its lock must not keep the GIL from a thread that is about to
/// fork.
template <class Value>
auto property(Value (ReplayStore::*get)() const) {
  return py::cpp_function([get](const BoundStore& self) { return (self.store.*get)(); },
                          py::call_guard<py::gil_scoped_release>());
}

/// The same, of arrays.
template <class Get>
auto unlocked(const Get& get) {
  const py::gil_scoped_release released;
  return get();
}

py::arg exact(const char* name) {
  py::arg argument(name);
  return argument.noconvert();
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of brc_fast; brc_fast.replay is its typed face.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  module.def("philox4x32", &brc::philox4x32, "counter"_a, "key"_a);
  module.def("crc32c", [](const py::bytes& data) {
    const std::string_view view(data);
    return brc::crc32c(0, reinterpret_cast<const std::byte*>(view.data()), view.size());
  });

  module.def(
      "return_extremes",
      [](const Array<double>& rewards, double discount, const Array<std::int64_t>& slots,
         const Array<std::int64_t>& lengths, const Array<double>& bootstraps,
         const Array<double>& mean_weights) {
        const brc::Episodes episodes = {in(rewards), static_cast<std::size_t>(rewards.shape(1)), discount};
        Array<double> low(slots.size()), high(slots.size());
        brc::return_extremes(episodes, in(slots), in(lengths), in(bootstraps), in(mean_weights), out(low),
                             out(high));
        return std::pair(low, high);
      },
      exact("rewards"), "discount"_a, exact("slots"), exact("lengths"), exact("bootstraps"),
      exact("mean_weights"));

  py::enum_<brc::Kind>(module, "Kind")
      .value("integer", brc::Kind::integer)
      .value("float16", brc::Kind::float16)
      .value("bfloat16", brc::Kind::bfloat16)
      .value("float32", brc::Kind::float32);
  py::class_<brc::Field>(module, "Field")
      .def(py::init<std::string, std::size_t, std::size_t, brc::Kind>(), "name"_a, "nbytes"_a, "item"_a,
           "kind"_a);
  py::class_<brc::Layout>(module, "Layout")
      .def(py::init([](const std::vector<std::pair<brc::Field, std::size_t>>& parts,
                       std::vector<brc::Field> fields) {
             std::vector<brc::Part> known;
             for (const auto& [field, stack] : parts) known.push_back({field, stack});
             return brc::Layout(std::move(known), std::move(fields));
           }),
           "parts"_a, "fields"_a)
      .def_property_readonly("parts",
                             [](const brc::Layout& layout) {
                               std::vector<std::size_t> offsets;
                               for (const brc::Part& part : layout.parts) offsets.push_back(part.offset);
                               return offsets;
                             })
      .def_property_readonly("observation",
                             [](const brc::Layout& layout) { return layout.observation.bytes; })
      .def_readonly("stack", &brc::Layout::stack)
      .def_readonly("offsets", &brc::Layout::offsets)
      .def_readonly("reward", &brc::Layout::reward)
      .def_readonly("used", &brc::Layout::used)
      .def_readonly("stride", &brc::Layout::stride);
  py::class_<Request>(module, "Request")
      .def(py::init<std::int64_t, double, std::vector<std::int64_t>, std::vector<double>,
                    std::optional<double>>(),
           "n_step"_a, "discount"_a, "tasks"_a, "weights"_a, "beta"_a = py::none())
      .def_readonly("powers", &Request::powers);
  py::class_<brc::Ahead>(module, "Ahead").def(py::init<>());
  py::class_<Slot, std::shared_ptr<Slot>>(module, "Slot")
      .def(py::init<py::array>())
      .def_property_readonly("used", [](const Slot& slot) { return slot.used.load(); });
  py::class_<brc::View>(module, "View")
      .def(py::init([](const py::dtype& dtype, std::uint8_t code, std::vector<std::int64_t> shape,
                       std::size_t offset) {
             std::vector<std::int64_t> strides(shape.size());
             std::int64_t count = 1;
             for (std::size_t d = shape.size(); d-- > 0; count *= shape[d]) strides[d] = count;
             const auto item = static_cast<std::size_t>(dtype.itemsize());
             const std::size_t bytes = static_cast<std::size_t>(count) * item;
             return brc::View{dtype,
                              {code, static_cast<std::uint8_t>(8 * item), 1},
                              std::move(shape),
                              std::move(strides),
                              offset,
                              bytes};
           }),
           "dtype"_a, "code"_a, "shape"_a, "offset"_a);
  py::class_<Views>(module, "Views")
      .def(py::init<std::vector<brc::View>>())
      .def("tensors", &Views::tensors)
      .def("arrays", &Views::arrays);

  module.def("read_tensors", &brc::read_tensors);
  py::class_<Expected>(module, "Expected")
      .def(py::init([](int type, std::uint8_t code, std::uint8_t bits, std::vector<py::ssize_t> shape) {
             return Expected{type, {code, bits, 1}, std::move(shape)};
           }),
           "type"_a, "code"_a, "bits"_a, "shape"_a);
  py::class_<BoundStore>(module, "ReplayStore")
      .def(py::init([](const brc::Layout& layout, const std::vector<std::int64_t>& capacities,
                       const std::vector<std::int64_t>& task_ids, std::uint64_t seed, bool allow_not_finite,
                       std::optional<double> alpha, const Expected& observation, const Expected& action) {
             return std::make_unique<BoundStore>(layout, capacities, task_ids, seed, allow_not_finite, alpha,
                                                 observation, action);
           }),
           "layout"_a, "capacities"_a, "task_ids"_a, "seed"_a, "allow_not_finite"_a, "alpha"_a,
           "observation"_a, "action"_a)
      .def("try_add", &BoundStore::try_add)
      .def("add", &BoundStore::add, exact("streams"), "observations"_a, "fields"_a, exact("rewards"),
           exact("terminated"), exact("truncated"), "successors"_a)
      .def("sample", &sample)
      .def("gather_ahead", &gather_ahead)
      .def("settle", &settle)
      .def("read", &read_transitions)
      .def("extend", &BoundStore::extend, "stream"_a, "observations"_a, "fields"_a, exact("rewards"),
           exact("terminated"), exact("truncated"), "successors"_a, exact("starts") = py::none())
      .def(
          "clear", [](BoundStore& self) { self.store.clear(); }, py::call_guard<py::gil_scoped_release>())
      .def("clear_streams",
           [](BoundStore& self, const Array<std::int64_t>& streams) {
             const auto ids = in(streams);
             const py::gil_scoped_release released;
             self.store.clear(ids);
           })
      .def(
          "discard_episode",
          [](BoundStore& self, std::int64_t stream) { return self.store.discard_episode(stream); },
          py::call_guard<py::gil_scoped_release>())
      .def("reset",
           [](BoundStore& self, const Array<std::int64_t>& streams) {
             const auto ids = in(streams);
             const py::gil_scoped_release released;
             self.store.reset(ids);
           })
      // With the GIL: another thread could fork meanwhile. Whoever has the lock does not need the GIL to free
      // it.
      .def("before_fork", [](BoundStore& self) { self.store.before_fork(); })
      .def("after_fork",
           [](BoundStore& self, std::optional<std::uint64_t> child) {
             if (child.has_value()) {
               self.store.after_fork_in_child(*child);
             } else {
               self.store.after_fork();
             }
           })
      .def("indices",
           [](const BoundStore& self) { return to_array(unlocked([&] { return self.store.indices(); })); })
      .def("begins",
           [](const BoundStore& self, const Array<std::int64_t>& indices) {
             const auto names = in(indices);
             return to_array(unlocked([&] { return self.store.begins(names); }));
           })
      .def("sequences",
           [](BoundStore& self, std::size_t batch_size, std::size_t length) {
             const auto [names, starts] = unlocked([&] { return self.store.sequences(batch_size, length); });
             return std::pair(to_array(names), to_array(starts));
           })
      .def("set_priorities", &set_priorities<BoundStore>, exact("indices"), exact("priorities"))
      .def("write_segment", &write_segment, "file"_a, "start"_a)
      .def("load", &load, "content"_a, "segments"_a, "seed"_a)
      .def("adopt",
           [](BoundStore& self, const DeviceIndex& index) { self.store.adopt(index.index(), index.draws()); })
      .def("rows", [](py::object self, std::size_t first,
                      std::size_t count) { return rows_view(self.cast<BoundStore&>(), self, first, count); })
      .def("put_slots", &put_slots, exact("slots"))
      .def("get_slots", &get_slots, "count"_a)
      .def("sizes",
           [](const BoundStore& self) { return to_array(unlocked([&] { return self.store.sizes(); })); })
      .def("capacities",
           [](const BoundStore& self) { return to_array(unlocked([&] { return self.store.capacities(); })); })
      .def_property_readonly("size", property(&ReplayStore::size))
      .def_property_readonly("side_size", property(&ReplayStore::side_size))
      .def_property_readonly("slots", property(&ReplayStore::slots))
      .def_property_readonly("nbytes", property(&ReplayStore::nbytes))
      .def_property_readonly("seed", property(&ReplayStore::seed))
      .def_property_readonly("jumps",
                             [](const BoundStore& self) {
                               const auto [count, of] = unlocked([&] { return self.store.jumps(); });
                               return std::pair(count, of);
                             })
      .def_property_readonly("draws", [](const BoundStore& self) { return self.store.draws(); });

  py::class_<DeviceIndex>(module, "DeviceIndex")
      .def(py::init([](const std::vector<std::int64_t>& capacities, const std::vector<std::int64_t>& task_ids,
                       std::int64_t stack, std::uint64_t seed, std::optional<double> alpha) {
             return std::make_unique<DeviceIndex>(capacities, task_ids, stack, seed, alpha);
           }),
           "capacities"_a, "task_ids"_a, "stack"_a, "seed"_a, "alpha"_a = py::none())
      .def(
          "heads",
          [](DeviceIndex& index, const Array<std::int64_t>& streams, Array<std::int64_t> rows) {
            index.heads(in(streams), out(rows));
          },
          exact("streams"), exact("rows"))
      .def("add", &index_add, exact("streams"), exact("departs"), exact("terminated"), exact("truncated"),
           exact("rows"), exact("moved"), exact("successors"))
      .def("plan", &plan)
      .def("plan_named", &plan_named)
      .def("set_priorities", &set_priorities<DeviceIndex>, exact("indices"), exact("priorities"))
      .def("clear", &DeviceIndex::clear)
      .def("discard_episode", &DeviceIndex::discard_episode)
      .def("reset", [](DeviceIndex& index, const Array<std::int64_t>& streams,
                       Array<std::int64_t> moved) { index.reset(in(streams), out(moved)); })
      .def("indices", [](const DeviceIndex& index) { return to_array(index.indices()); })
      .def("sequences",
           [](DeviceIndex& index, std::size_t batch_size, std::size_t length) {
             const auto [names, starts] = index.sequences(batch_size, length);
             return std::pair(to_array(names), to_array(starts));
           })
      .def("adopt", &index_adopt)
      .def("sizes", [](const DeviceIndex& index) { return of_streams(index, &brc::Stream::size); })
      .def("capacities", [](const DeviceIndex& index) { return of_streams(index, &brc::Stream::capacity); })
      .def_property_readonly("rows", [](const DeviceIndex& index) { return index.index().rows(); })
      .def_property_readonly("size", [](const DeviceIndex& index) { return index.index().size(); })
      .def_property_readonly("slots", [](const DeviceIndex& index) { return index.index().slots(); })
      .def_property_readonly("side_size", [](const DeviceIndex& index) { return index.index().used_slots(); })
      .def_property_readonly("jumps",
                             [](const DeviceIndex& index) {
                               const auto [count, of] = index.jumps();
                               return std::pair(count, of);
                             })
      .def_property_readonly("seed", [](const DeviceIndex& index) { return index.index().seed; })
      .def_property_readonly("draws", [](const DeviceIndex& index) { return index.draws(); });
}

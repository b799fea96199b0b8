// A random life of a replay store beside those of a list, of a twin and of a device index.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>

#include "device_index.hpp"
#include "replay_oracle.hpp"

namespace brc::test {

/// A device index, and what a GPU would keep for it.
class Device {
 public:
  Device(const Layout& layout, const Ids& capacities, const Ids& task_ids, std::uint64_t seed,
         std::optional<double> alpha = std::nullopt)
      : index(capacities, task_ids, static_cast<std::int64_t>(layout.stack), seed, alpha),
        layout_(layout),
        rows_(index.index().rows(), Values(layout.link)) {}

  void add(const Ids& ids, const Rows& rows) {
    const std::size_t frame = layout_.observation.bytes;
    Ids heads(ids.size()), to(ids.size()), moved(ids.size()), successors(ids.size());
    std::vector<unsigned char> departs(ids.size());
    index.heads(ids, heads);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      departs[i] = heads[i] < 0 || std::memcmp(place(heads[i]), &rows.observations[i * frame], frame) != 0;
    }
    index.add(ids, departs, rows.terminated, rows.truncated, to, moved, successors);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      std::byte* row = place(to[i]);
      if (moved[i] >= 0) std::memcpy(place(-1 - moved[i]), row, frame);
      std::memcpy(row, &rows.observations[i * frame], frame);
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = layout_.fields[f].bytes;
        std::memcpy(row + layout_.offsets[f], &rows.fields[f][i * bytes], bytes);
      }
      std::memcpy(row + layout_.reward, &rows.rewards[i], sizeof(float));
      std::memcpy(place(successors[i]), &rows.successors[i * frame], frame);
    }
  }

  void sample(const Request& request, std::size_t num_batches, std::size_t batch_size, Batch& out) {
    const std::size_t total = num_batches * batch_size;
    const std::size_t n_step = request.powers.size();
    const std::size_t frame = layout_.observation.bytes;
    Ids steps(total * n_step), observations(total * layout_.stack), successors(total * layout_.stack);
    index.plan(request, num_batches, batch_size,
               {steps, observations, successors, out.masks, out.task_ids, out.terminated, out.truncated,
                out.steps, out.indices, out.weights});
    for (std::size_t i = 0; i < observations.size(); ++i) {
      std::memcpy(&out.observations[i * frame], place(observations[i]), frame);
      std::memcpy(&out.next_observations[i * frame], place(successors[i]), frame);
    }
    for (std::size_t i = 0; i < total; ++i) {
      const std::byte* row = place(steps[i * n_step]);
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = layout_.fields[f].bytes;
        std::memcpy(&out.fields[f][i * bytes], row + layout_.offsets[f], bytes);
      }
      out.rewards[i] = 0.0f;
      for (std::size_t step = 0; step < n_step && steps[i * n_step + step] >= 0; ++step) {
        float reward;
        std::memcpy(&reward, place(steps[i * n_step + step]) + layout_.reward, sizeof(reward));
        out.rewards[i] = step == 0 ? reward : out.rewards[i] + request.powers[step] * reward;
      }
    }
  }

  /// Takes over the content of a store, and the other way round.
  void take(ReplayStore& store) {
    std::vector<std::uint32_t> links(rows_.size());
    for (std::size_t row = 0; row < links.size(); ++row) links[row] = store.link(row);
    index.adopt(store.index(), store.draws(), links);
    store.write_heads();
    copy(store, [](std::byte* own, std::byte* its, std::size_t bytes) { std::memcpy(own, its, bytes); });
  }
  void give(ReplayStore& store) {
    copy(store, [](std::byte* own, std::byte* its, std::size_t bytes) { std::memcpy(its, own, bytes); });
    store.adopt(index.index(), index.draws());
  }

  DeviceIndex index;

 private:
  std::byte* place(std::int64_t place) {
    if (place >= 0) return rows_[static_cast<std::size_t>(place)].data();
    const auto slot = static_cast<std::size_t>(-1 - place);
    if (slot >= slots_.size()) slots_.resize(slot + 1, Values(layout_.observation.bytes));
    return slots_[slot].data();
  }
  template <class Copy>
  void copy(ReplayStore& store, const Copy& bytes) {
    for (std::size_t row = 0; row < rows_.size(); ++row)
      bytes(rows_[row].data(), store.row(row), layout_.link);
    for (std::size_t slot = 0; slot < index.index().slots(); ++slot) {
      bytes(place(-1 - static_cast<std::int64_t>(slot)), store.slot(slot), layout_.observation.bytes);
    }
  }

  Layout layout_;
  std::vector<Values> rows_;
  std::vector<Values> slots_;
};

/// The same random life of a list, two stores and a device index, which must agree at every step.
class Walk {
 public:
  explicit Walk(std::uint64_t seed_) : random(seed_), seed(seed_), layout(random.layout()) {
    const std::uint32_t tasks = 1 + random.below(3);
    for (std::uint32_t task = 0; task < tasks; ++task) {
      for (std::uint32_t count = 1 + random.below(3); count > 0; --count) {
        task_ids.insert(task_ids.begin() + random.below(1 + static_cast<std::uint32_t>(task_ids.size())),
                        task);
      }
    }
    late_task = 1 + random.below(3);
    constexpr double alphas[] = {0.0, 0.6, 1.0, 2.5};
    if (random.one_in(2)) alpha = alphas[random.below(4)];
    resize();
    list.emplace(layout, capacities, task_ids);
    list->alpha = alpha.value_or(0.0);
    twin = make();
    device = std::make_unique<Device>(layout, capacities, task_ids, seed, alpha);
  }

  void step() {
    Request request = random.request(capacities.size());
    constexpr double betas[] = {0.0, 0.4, 1.0};
    if (alpha && !random.one_in(3)) request = {1 + random.below(5), 0.9, {}, {}, betas[random.below(3)]};
    const std::size_t num_batches = 1 + random.below(2), batch_size = 1 + random.below(13);
    Batch batch(layout, num_batches * batch_size, request.beta.has_value());
    Ahead ahead;
    if (list->serves(request, batch_size)) {
      store->gather_ahead(request, store->draws(), num_batches, batch_size, batch.columns(), ahead);
    }
    for (std::uint32_t times = random.below(3); times > 0; --times) add();
    if (alpha && random.one_in(2)) prioritize();
    if (random.one_in(5)) save();
    if (random.one_in(8) && reload()) ahead = {};
    if (random.one_in(8)) exchange();
    check_transitions(*store);
    check_draws(request, num_batches, batch_size, batch, ahead);
  }

  void add() {
    ++adds;
    Ids ids;
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      const bool late = task_ids[s] == late_task && adds < 15;
      if (!late && !random.one_in(3)) {
        ids.insert(ids.begin() + random.below(1 + static_cast<std::uint32_t>(ids.size())),
                   static_cast<std::int64_t>(s));
      }
    }
    Rows rows(layout, ids.size());
    std::vector<Transition> transitions;
    const auto draw = [&] {
      transitions.clear();
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const Transition& transition = transitions.emplace_back(any(static_cast<std::size_t>(ids[i])));
        put(rows.observations, i, transition.observation);
        for (std::size_t f = 0; f < rows.fields.size(); ++f) put(rows.fields[f], i, transition.fields[f]);
        rows.rewards[i] = transition.reward;
        rows.terminated[i] = transition.terminated ? 2 : 0;
        rows.truncated[i] = transition.truncated ? 1 : 0;
        put(rows.successors, i, transition.successor);
      }
    };
    if (!ids.empty() && random.one_in(3)) {  // one is refused, and with it all; the next ones must not notice
      draw();
      rows.rewards[random.below(static_cast<std::uint32_t>(ids.size()))] = NAN;
      check_refuses([&] { store->add(ids, rows.columns()); }, "rewards of stream");
    }
    draw();
    for (std::size_t i = 0; i < ids.size(); ++i) {
      list->add(static_cast<std::size_t>(ids[i]), std::move(transitions[i]));
    }
    store->add(ids, rows.columns());
    twin->add(ids, rows.columns());
    device->add(ids, rows);
  }

  /// Sets some priorities, of transitions that may be stored no more; now and then all of them to zero.
  void prioritize() {
    Ids indices;
    std::vector<float> priorities;
    const auto count = static_cast<std::int64_t>(task_ids.size());
    const bool all = random.one_in(10);
    for (std::int64_t s = 0; s < count; ++s) {
      const auto added = static_cast<std::uint32_t>(list->streams[static_cast<std::size_t>(s)].all.size());
      for (std::uint32_t t = 0; t < added; ++t) {
        if (!all && !random.one_in(3)) continue;
        const std::uint32_t place = random.below(1 + static_cast<std::uint32_t>(indices.size()));
        indices.insert(indices.begin() + place, t * count + s);
        const float small = static_cast<float>(random.below(1000)) / 999.0f;
        priorities.insert(priorities.begin() + place,
                          all || random.one_in(5) ? 0.0f : std::exp(4.0f * small));
      }
    }
    for (std::uint32_t times = random.below(3); times > 0 && !indices.empty(); --times) {
      indices.push_back(indices.front());  // the last of several holds
      priorities.push_back(static_cast<float>(times) / 3.0f);
    }
    std::size_t stored = 0;
    for (std::size_t i = 0; i < indices.size(); ++i) stored += list->prioritize(indices[i], priorities[i]);
    check(store->set_priorities(indices, priorities) == stored, "what is not stored any more is left out");
    twin->set_priorities(indices, priorities);
    device->index.set_priorities(indices, priorities);
  }

  /// Every transition, over one and over several steps; sizes and the successors kept aside.
  void check_transitions(const ReplayStore& of) {
    const Request requests[] = {{1, 1.0, {}, {}}, {1 + random.below(5), 0.9, {}, {}}};
    Batch got(layout, 1), expected(layout, 1);
    std::size_t total = 0;
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      const List::Stream& stream = list->streams[s];
      total += stream.size;
      check(of.sizes()[s] == static_cast<std::int64_t>(stream.size), "the newest transitions can be sampled");
      check(of.capacities()[s] == static_cast<std::int64_t>(stream.capacity),
            "streams share a task's capacity");
      for (std::size_t age = 0; age < 2 * stream.size; ++age) {
        const Request& request = requests[age % 2];
        const std::int64_t name = list->index_of(s, stream.all.size() - stream.size + age / 2);
        of.read({&name, 1}, request, got.columns());
        list->put(s, stream.all.size() - stream.size + age / 2, request, 0, expected);
        check(got == expected, "a stored transition never changes");
      }
    }
    check(of.size() == total, "the size is that of all streams");
    check(of.side_size() == list->aside(), "a slot is used exactly while its row is kept");
    check_links(of.index());
  }

  void check_links(const ReplayIndex& index) const {
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      const Stream& stream = index.streams()[s];
      const auto& all = list->streams[s].all;
      check(stream.kept == list->streams[s].kept, "older rows are kept for their frames alone");
      for (std::uint32_t back = 0; back < stream.kept; ++back) {
        const Transition& transition = all[all.size() - 1 - back];
        const std::uint32_t word = index.link(stream.first_row + stream.position(back));
        check(((word & kTerminated) != 0) == transition.terminated, "a row knows that it was terminated");
        check(((word & kTruncated) != 0) == transition.truncated, "a row knows that it was truncated");
      }
    }
  }

  void check_draws(const Request& request, std::size_t num_batches, std::size_t batch_size, Batch& batch,
                   Ahead& ahead) {
    Batch other(layout, num_batches * batch_size, request.beta.has_value()), expected = other;
    if (!list->serves(request, batch_size)) {
      const char* words = batch_size <= store->size() && request.beta ? "every priority is zero" : "stored";
      check_refuses([&] { store->sample(request, num_batches, batch_size, batch.columns()); }, words);
      check_refuses([&] { device->sample(request, num_batches, batch_size, other); }, words);
      return;
    }
    for (std::size_t u = 0; u < num_batches; ++u) {
      list->sample(request, store->seed(), store->draws() + u, u * batch_size, batch_size, expected);
    }
    const std::size_t changed = store->settle(request, num_batches, batch_size, batch.columns(), ahead);
    check(changed <= num_batches * batch_size, "only elements of the batch are gathered anew");
    for (std::size_t i = 0; i < expected.weights.size(); ++i) {
      check(std::abs(batch.weights[i] - expected.weights[i]) <= 1e-6f * expected.weights[i],
            "importance weights follow from the shares");
    }
    expected.weights = batch.weights;
    check(batch == expected, "a batch is drawn as documented, ahead or not");
    twin->sample(request, num_batches, batch_size, other.columns());
    check(other == expected, "what is gathered ahead and settled is what would be sampled");
    device->sample(request, num_batches, batch_size, other);
    check(other == expected, "a plan leads to what a store samples");
    const std::uint64_t draw = store->draws() - num_batches;
    store->gather_ahead(request, draw, num_batches, batch_size, other.columns(), ahead);
    check(other == expected, "gathering ahead is sampling without counting");
    store->set_draws(draw);
    check(store->settle(request, num_batches, batch_size, other.columns(), ahead) == 0,
          "nothing has changed");
    check(other == expected && store->draws() == twin->draws() && store->draws() == device->index.draws(),
          "each batch counts once");
  }

  void save() {
    saves.write(*store, random.one_in(4));
    saved = *list;
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      const List::Stream& stream = list->streams[s];
      check(saves.content.count[s] == stream.all.size() && saves.content.kept[s] == stream.kept,
            "a snapshot counts what was added and is kept");
    }
  }
  /// Loads the last save, of now or of before, into this store or one of other capacities, which it tells.
  bool reload() {
    if (!saved || random.one_in(2)) save();
    const bool replaced = random.one_in(2);
    if (replaced) resize();
    saves.load(*store, ++seed);
    list = saved;
    list->recapacitate(capacities);
    check(store->draws() == saves.content.draws && store->seed() == seed, "draws go on after a load");
    device = std::make_unique<Device>(layout, capacities, task_ids, 0, alpha);
    device->take(*store);
    twin = make();
    device->give(*twin);
    check_transitions(*twin);
    return replaced;
  }
  /// The content moves to the device and back; a store that was adopted must go on like any other.
  void exchange() {
    device->take(*store);
    device->give(*store);
  }

  /// The walk's store must be as it was.
  void check_unchanged(const std::string& words, const std::function<void()>& refused) {
    const std::uint64_t draws = store->draws(), own_seed = store->seed();
    check_refuses(refused, words);
    check_transitions(*store);
    check(store->draws() == draws && store->seed() == own_seed, "a refusal changes nothing");
  }

  /// A transition that a stream may get next.
  [[nodiscard]] Transition any(std::size_t s) {
    const auto& all = list->streams[s].all;
    const bool goes_on = !all.empty() && !random.one_in(7);
    Transition transition{goes_on ? all.back().successor : random.values(layout.observation),
                          {},
                          0.0f,
                          random.one_in(9),
                          random.one_in(9),
                          random.values(layout.observation)};
    for (const Field& field : layout.fields) transition.fields.push_back(random.values(field));
    constexpr float scales[] = {1e-3f, 1.0f, 300.0f};  // so that the order of a sum matters
    transition.reward = (static_cast<float>(random.below(2001)) - 1000.0f) / 7.0f * scales[random.below(3)];
    return transition;
  }

  [[nodiscard]] std::unique_ptr<ReplayStore> make() const {
    return std::make_unique<ReplayStore>(layout, capacities, task_ids, seed, false, alpha);
  }

  Random random;
  std::uint64_t seed;
  Layout layout;
  Ids task_ids, capacities;
  std::optional<double> alpha;
  std::int64_t late_task;  // no transitions at first, if there is such a task
  int adds = 0;
  std::unique_ptr<ReplayStore> store, twin;
  std::unique_ptr<Device> device;
  std::optional<List> list, saved;
  Saves saves;

 private:
  void resize() {
    const auto tasks = static_cast<std::size_t>(*std::ranges::max_element(task_ids) + 1);
    if (capacities.empty() || !random.one_in(4)) {
      capacities.clear();
      while (capacities.size() < tasks) capacities.push_back(random.of({1, 2, 3, 5, 8, 13, 21}));
    }
    store = make();
  }
};

}  // namespace brc::test

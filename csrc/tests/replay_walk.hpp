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
      departs[i] =
          heads[i] < 0 || std::memcmp(place(heads[i]), joined(rows.observations, i).data(), frame) != 0;
    }
    index.add(ids, departs, rows.terminated, rows.truncated, to, moved, successors);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      std::byte* row = place(to[i]);
      if (moved[i] >= 0) std::memcpy(place(-1 - moved[i]), row, frame);
      std::memcpy(row, joined(rows.observations, i).data(), frame);
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = layout_.fields[f].bytes;
        std::memcpy(row + layout_.offsets[f], &rows.fields[f][i * bytes], bytes);
      }
      std::memcpy(row + layout_.reward, &rows.rewards[i], sizeof(float));
      std::memcpy(place(successors[i]), joined(rows.successors, i).data(), frame);
    }
  }
  void reset(const Ids& ids) {
    Ids heads(ids.size()), moved(ids.size());
    index.heads(ids, heads);
    index.reset(ids, moved);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      check((moved[i] >= 0) == (heads[i] >= 0), "a head that is there is moved");
      if (moved[i] >= 0) std::memcpy(place(-1 - moved[i]), place(heads[i]), layout_.observation.bytes);
    }
  }

  void sample(const Request& request, std::size_t num_batches, std::size_t batch_size, Batch& out) {
    Plan plan(layout_, request, num_batches * batch_size);
    index.plan(request, num_batches, batch_size, plan.columns(out));
    gather(request, plan, out);
  }
  void read(const Ids& names, const Request& request, Batch& out) {
    Plan plan(layout_, request, names.size());
    index.plan_named(request, names, plan.columns(out));
    gather(request, plan, out);
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
  /// The places that a plan names.
  struct Plan {
    Plan(const Layout& layout, const Request& request, std::size_t total)
        : steps(total * request.powers.size()),
          observations(total * layout.stack),
          successors(total * layout.stack) {}
    [[nodiscard]] PlanColumns columns(Batch& out) {
      return {steps,          observations,  successors, out.masks,   out.task_ids,
              out.terminated, out.truncated, out.steps,  out.indices, out.weights};
    }
    Ids steps, observations, successors;
  };
  void gather(const Request& request, const Plan& plan, Batch& out) {
    const std::size_t n_step = request.powers.size();
    const std::size_t most = layout_.stack;
    for (std::size_t i = 0; i < out.rewards.size(); ++i) {
      for (std::size_t p = 0; p < layout_.parts.size(); ++p) {
        const auto& [field, stack, offset] = layout_.parts[p];
        for (std::size_t f = 0; f < stack; ++f) {
          const std::size_t from = (i + 1) * most - stack + f;
          const std::size_t to = (i * stack + f) * field.bytes;
          std::memcpy(&out.observations[p][to], place(plan.observations[from]) + offset, field.bytes);
          std::memcpy(&out.next_observations[p][to], place(plan.successors[from]) + offset, field.bytes);
        }
      }
      const std::byte* row = place(plan.steps[i * n_step]);
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = layout_.fields[f].bytes;
        std::memcpy(&out.fields[f][i * bytes], row + layout_.offsets[f], bytes);
      }
      out.rewards[i] = 0.0f;
      for (std::size_t step = 0; step < n_step && plan.steps[i * n_step + step] >= 0; ++step) {
        float reward;
        std::memcpy(&reward, place(plan.steps[i * n_step + step]) + layout_.reward, sizeof(reward));
        out.rewards[i] = step == 0 ? reward : out.rewards[i] + request.powers[step] * reward;
      }
    }
  }
  /// The parts of observation `i` as a row holds them.
  [[nodiscard]] Values joined(const Parts& columns, std::size_t i) const {
    Values frame(layout_.observation.bytes);
    for (std::size_t p = 0; p < columns.size(); ++p) {
      const auto& [field, stack, offset] = layout_.parts[p];
      std::memcpy(&frame[offset], &columns[p][i * field.bytes], field.bytes);
    }
    return frame;
  }
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
    const Request request = any_request();
    const std::size_t num_batches = 1 + random.below(2), batch_size = 1 + random.below(13);
    Batch batch(layout, num_batches * batch_size, request.beta.has_value());
    Ahead ahead;
    if (list->serves(request, batch_size)) {
      store->gather_ahead(request, store->draws(), num_batches, batch_size, batch.columns(), ahead);
    }
    for (std::uint32_t times = random.below(3); times > 0; --times) add();
    if (random.one_in(3)) extend();
    if (random.one_in(6)) reset();
    if (random.one_in(8)) discard_episode();
    if (random.one_in(30)) clear();
    if (alpha && random.one_in(2)) prioritize();
    if (random.one_in(5)) save();
    if (random.one_in(8) && reload()) ahead = {};
    if (random.one_in(8)) exchange();
    check_transitions(*store);
    check_names();
    check_sequences();
    check_draws(request, num_batches, batch_size, batch, ahead);
  }

  void add() {
    ++adds;
    Ids ids = some_streams();
    std::erase_if(ids, [&](std::int64_t s) { return waits(static_cast<std::size_t>(s)); });
    Rows rows(layout, ids.size());
    std::vector<Transition> transitions;
    const auto draw = [&] {
      transitions.clear();
      for (std::size_t i = 0; i < ids.size(); ++i) {
        rows.set(i, transitions.emplace_back(any(static_cast<std::size_t>(ids[i]))));
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

  /// Any number of transitions, also more than a stream can hold; the twin gets them one by one.
  void extend() {
    const std::size_t s = any_stream();
    if (waits(s)) return;
    const std::uint32_t ring = store->index().streams()[s].ring;
    const std::uint32_t count = random.one_in(2) ? random.below(5) : random.below(2 * std::min(ring, 40u));
    Rows rows(layout, count);
    std::vector<unsigned char> starts(random.one_in(2) ? count : 0);
    const Ids id{static_cast<std::int64_t>(s)};
    for (std::uint32_t i = 0; i < count; ++i) {
      Transition transition = any(s);
      rows.set(i, transition);
      if (!starts.empty() && (starts[i] = random.one_in(5))) list->reset(id);
      list->add(s, std::move(transition));
    }
    TransitionColumns columns = rows.columns();
    columns.starts = starts;
    if (count > 0 && random.one_in(3)) {
      const std::uint32_t bad = random.below(count);
      const float right = std::exchange(rows.rewards[bad], INFINITY);
      check_refuses([&] { store->extend(id[0], columns); }, "rewards in row " + to_string(bad));
      rows.rewards[bad] = right;
    }
    check(store->extend(id[0], columns) == count, "an extend counts what it stored");
    for (std::uint32_t i = 0; i < count; ++i) {
      Rows one(layout, 1);
      one.set(0, list->streams[s].all[list->streams[s].all.size() - count + i]);
      if (!starts.empty() && starts[i] != 0) {
        twin->reset(id);
        device->reset(id);
      }
      twin->add(id, one.columns());
      device->add(id, one);
    }
  }

  void reset() {
    const Ids ids = some_streams();
    list->reset(ids);
    store->reset(ids);
    twin->reset(ids);
    device->reset(ids);
  }

  void discard_episode() {
    const std::size_t s = any_stream();
    const auto id = static_cast<std::int64_t>(s);
    const std::size_t taken = list->discard_episode(s);
    check(store->discard_episode(id) == taken, "an episode is taken back");
    check(twin->discard_episode(id) == taken && device->index.discard_episode(id) == taken,
          "all take the same episode back");
    taken_back = true;
  }

  /// All streams, or some of them, which a device takes over.
  void clear() {
    taken_back = true;
    if (random.one_in(2)) {
      const Ids ids = some_streams();
      list->clear(ids);
      store->clear(ids);
      twin->clear(ids);
      device->take(*twin);
      return;
    }
    list->clear();
    store->clear();
    twin->clear();
    device->index.clear();
  }

  /// Sets some priorities, of transitions that may be stored no more; now and then all of them to zero.
  void prioritize() {
    Ids names;
    std::vector<float> priorities;
    const bool all = random.one_in(10);
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      for (std::size_t t = 0; t < list->streams[s].all.size(); ++t) {
        if (!all && !random.one_in(3)) continue;
        const std::uint32_t place = random.below(1 + static_cast<std::uint32_t>(names.size()));
        names.insert(names.begin() + place, list->name(s, t));
        const float small = static_cast<float>(random.below(1000)) / 999.0f;
        priorities.insert(priorities.begin() + place,
                          all || random.one_in(5) ? 0.0f : std::exp(4.0f * small));
      }
    }
    for (std::uint32_t times = random.below(3); times > 0 && !names.empty(); --times) {
      names.push_back(names.front());  // the last of several holds
      priorities.push_back(static_cast<float>(times) / 3.0f);
    }
    std::size_t stored = 0;
    for (std::size_t i = 0; i < names.size(); ++i) stored += list->prioritize(names[i], priorities[i]);
    check(store->set_priorities(names, priorities) == stored, "what is not stored any more is left out");
    check(twin->set_priorities(names, priorities) == stored &&
              device->index.set_priorities(names, priorities) == stored,
          "all set the same priorities");
  }

  /// Every transition, over one and over several steps; sizes and the successors kept aside.
  void check_transitions(const ReplayStore& of) {
    const Ids names = list->names();
    check(of.indices() == names, "transitions have their names in order");
    for (const Request& request : {Request{1, 1.0, {}, {}}, Request{1 + random.below(5), 0.9, {}, {}}}) {
      Batch got(layout, names.size()), expected = got;
      for (std::size_t i = 0; i < names.size(); ++i) list->read(names[i], request, i, expected);
      of.read(names, request, got.columns());
      check(got == expected, "a stored transition never changes");
    }
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      const List::Stream& stream = list->streams[s];
      check(of.sizes()[s] == static_cast<std::int64_t>(stream.size), "the newest transitions can be sampled");
      check(of.capacities()[s] == static_cast<std::int64_t>(stream.capacity),
            "streams share a task's capacity");
    }
    check(of.size() == names.size(), "the size is that of all streams");
    check(of.side_size() == list->aside(), "a slot is used exactly while its row is kept");
    check_links(of.index());
  }

  /// Transitions by their names, in any order, and names of none.
  void check_names() {
    const Request request{1 + random.below(5), 0.9, {}, {}};
    const Ids stored = list->names();
    check(device->index.indices() == stored, "a device names the same transitions");
    Ids names(stored.empty() ? 0 : random.below(9));
    for (std::int64_t& name : names) name = stored[random.below(static_cast<std::uint32_t>(stored.size()))];
    Batch got(layout, names.size()), expected = got, planned = got;
    for (std::size_t i = 0; i < names.size(); ++i) list->read(names[i], request, i, expected);
    store->read(names, request, got.columns());
    device->read(names, request, planned);
    check(got == expected && planned == expected, "a transition is found by its name");

    const std::size_t s = any_stream();
    const List::Stream& stream = list->streams[s];
    std::pair<std::int64_t, const char*> refused[] = {
        {-1 - random.below(3), "no transition that was added"},
        {INT64_MIN, "no transition that was added"},
        {INT64_MAX, "no transition that was added"},
        {list->name(s, stream.all.size() + random.below(3)), "no transition that was added"},
        {list->name(s, stream.all.size()), "no transition that was added"}};
    if (stream.oldest() > 0) {
      refused[4] = {list->name(s, stream.oldest() - 1), "has been replaced since"};
      const auto older = random.below(static_cast<std::uint32_t>(stream.oldest()));
      refused[3] = {list->name(s, older), "has been replaced since"};
    }
    for (const auto& [name, words] : refused) {
      Ids with = names;
      with.insert(with.begin() + random.below(1 + static_cast<std::uint32_t>(names.size())), name);
      Batch none(layout, with.size());
      check_refuses<std::out_of_range>([&] { store->read(with, request, none.columns()); }, words);
      check_refuses<std::out_of_range>([&] { device->read(with, request, none); }, words);
    }
  }

  void check_sequences() {
    const std::size_t batch_size = 1 + random.below(9), length = random.below(7);
    if (length == 0 || !list->serves_sequences(length)) {
      for (const auto& refused : std::initializer_list<std::function<void()>>{
               [&] { (void)store->sequences(batch_size, length); },
               [&] { (void)device->index.sequences(batch_size, length); }}) {
        check_refuses(refused, "length must lie in 1..");
      }
      return;
    }
    const Sequences expected = list->sequences(store->seed(), store->draws(), batch_size, length);
    for (const Sequences& got : {store->sequences(batch_size, length), twin->sequences(batch_size, length),
                                 device->index.sequences(batch_size, length)}) {
      check(got.indices == expected.indices, "all sequences are equally likely");
      check(got.starts == expected.starts, "a sequence tells where episodes begin");
    }
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
    check_drawn(batch, expected);
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

  /// Weights need not be those of the list to the last bit; they are taken over from the batch.
  static void check_drawn(const Batch& batch, Batch& expected) {
    for (std::size_t i = 0; i < expected.weights.size(); ++i) {
      check(std::abs(batch.weights[i] - expected.weights[i]) <= 1e-6f * expected.weights[i],
            "importance weights follow from the shares");
    }
    expected.weights = batch.weights;
    check(batch == expected, "a batch is drawn as documented, ahead or not");
  }

  void save() {
    saves.write(*store, std::exchange(taken_back, false) || random.one_in(4));
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
    taken_back = false;
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
  template <class Exception = std::invalid_argument>
  void check_unchanged(const std::string& words, const std::function<void()>& refused) {
    const std::uint64_t draws = store->draws(), own_seed = store->seed();
    check_refuses<Exception>(refused, words);
    check_transitions(*store);
    check(store->draws() == draws && store->seed() == own_seed, "a refusal changes nothing");
  }

  /// A transition that a stream may get next: it goes on, in all parts or in all but one, or does not.
  [[nodiscard]] Transition any(std::size_t s) {
    const auto& all = list->streams[s].all;
    const bool goes_on = !all.empty() && !random.one_in(7);
    Transition transition{goes_on ? all.back().successor : random.values(layout.parts),
                          {},
                          0.0f,
                          random.one_in(9),
                          random.one_in(9),
                          random.values(layout.parts)};
    if (random.one_in(9)) {
      const std::uint32_t p = random.below(static_cast<std::uint32_t>(layout.parts.size()));
      transition.observation[p] = random.values(layout.parts[p].field);
    }
    for (const Field& field : layout.fields) transition.fields.push_back(random.values(field));
    constexpr float scales[] = {1e-3f, 1.0f, 300.0f};  // so that the order of a sum matters
    transition.reward = (static_cast<float>(random.below(2001)) - 1000.0f) / 7.0f * scales[random.below(3)];
    return transition;
  }
  /// Where there are priorities, mostly by these.
  [[nodiscard]] Request any_request() {
    if (!alpha || random.one_in(3)) return random.request(capacities.size());
    constexpr double betas[] = {0.0, 0.4, 1.0};
    return {1 + random.below(5), 0.9, {}, {}, betas[random.below(3)]};
  }
  [[nodiscard]] std::size_t any_stream() { return random.below(static_cast<std::uint32_t>(task_ids.size())); }
  /// In any order.
  [[nodiscard]] Ids some_streams() {
    Ids ids;
    for (std::size_t s = 0; s < task_ids.size(); ++s) {
      if (random.one_in(3)) continue;
      ids.insert(ids.begin() + random.below(1 + static_cast<std::uint32_t>(ids.size())),
                 static_cast<std::int64_t>(s));
    }
    return ids;
  }
  [[nodiscard]] bool waits(std::size_t s) const { return task_ids[s] == late_task && adds < 15; }

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
  bool taken_back = false;  // since the last save, which nothing can go on from then
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

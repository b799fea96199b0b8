// Segments of a ReplayStore in files.
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <numeric>
#include <system_error>
#include <utility>

#include "checksum.hpp"
#include "finite.hpp"
#include "replay_store.hpp"

namespace brc {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{4} << 20;
constexpr std::size_t kSliceBytes = std::size_t{1} << 19;  // copied for a save while others wait
constexpr std::uint64_t kMostCounted = 1ull << 62;  // transitions or draws: far from where they would wrap
constexpr std::uint32_t kAside = 1;  // in a file, a link holds the two flags and whether there is a slot

/// Writes blocks with their checksums; what is put is copied.
class BlockWriter {
 public:
  BlockWriter(int file, SegmentTable& table) : file_(file), table_(table) { buffer_.reserve(kBlockBytes); }
  void put(const std::byte* data, std::size_t bytes) {
    while (bytes > 0) {
      const std::size_t part = std::min(bytes, kBlockBytes - buffer_.size());
      buffer_.insert(buffer_.end(), data, data + part);
      data += part;
      bytes -= part;
      if (buffer_.size() == kBlockBytes) flush();
    }
  }
  void flush() {
    if (buffer_.empty()) return;
    table_.checksums.push_back(crc32c(0, buffer_.data(), buffer_.size()));
    table_.bytes += buffer_.size();
    for (std::size_t done = 0; done < buffer_.size();) {
      const ssize_t wrote = ::write(file_, buffer_.data() + done, buffer_.size() - done);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote < 0) throw std::system_error(errno, std::generic_category(), "cannot write replay rows");
      done += static_cast<std::size_t>(wrote);
    }
    buffer_.clear();
  }

 private:
  int file_;
  SegmentTable& table_;
  std::vector<std::byte> buffer_;
};

/// Reads blocks, each checked before a byte of it is given out.
class BlockReader {
 public:
  explicit BlockReader(const SegmentFile& segment)
      : segment_(segment),
        buffer_(static_cast<std::size_t>(std::min<std::uint64_t>(kBlockBytes, segment.table.bytes))) {}
  void get(std::byte* to, std::size_t bytes) {
    while (bytes > 0) {
      if (at_ == end_) refill();
      const std::size_t part = std::min(bytes, end_ - at_);
      std::memcpy(to, buffer_.data() + at_, part);
      at_ += part;
      to += part;
      bytes -= part;
    }
  }
  [[nodiscard]] bool at_end() const noexcept { return at_ == end_ && left() == 0; }

 private:
  [[nodiscard]] std::uint64_t left() const noexcept { return segment_.table.bytes - given_; }
  void refill() {
    const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(kBlockBytes, left()));
    std::size_t done = 0;
    while (done < wanted) {
      const auto offset = static_cast<off_t>(given_ + done);
      const ssize_t got = ::pread(segment_.file, buffer_.data() + done, wanted - done, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw std::system_error(errno, std::generic_category(), "cannot read " + segment_.name);
      if (got == 0) break;
      done += static_cast<std::size_t>(got);
    }
    if (wanted == 0 || done < wanted) {
      refuse(segment_.name + " is truncated: it ends after " + to_string(given_ + done) + " of " +
             to_string(segment_.table.bytes) + " bytes");
    }
    const std::size_t block = static_cast<std::size_t>(given_ / kBlockBytes);
    if (block >= segment_.table.checksums.size() ||
        crc32c(0, buffer_.data(), done) != segment_.table.checksums[block]) {
      refuse(segment_.name + " is damaged: the checksum of block " + to_string(block) + " differs");
    }
    given_ += done;
    at_ = 0;
    end_ = done;
  }

  const SegmentFile& segment_;
  std::vector<std::byte> buffer_;
  std::size_t at_ = 0;
  std::size_t end_ = 0;
  std::uint64_t given_ = 0;  // bytes read from the file
};

template <class Vector>
void require_streams(const Vector& values, const char* name, std::size_t streams) {
  require_length(name, values.size(), streams, "values");
}

/// Bytes that are put at the end and taken from the front.
class Queue {
 public:
  /// Lets the next `bytes` be put without an allocation. Throws std::bad_alloc.
  void reserve(std::size_t bytes) {
    if (data_.capacity() - data_.size() < bytes)
      data_.reserve(std::max(2 * data_.capacity(), data_.size() + bytes));
  }
  std::byte* put(std::size_t bytes) noexcept {
    data_.resize(data_.size() + bytes);
    return data_.data() + data_.size() - bytes;
  }
  const std::byte* take(std::size_t bytes) noexcept {
    return data_.data() + std::exchange(taken_, taken_ + bytes);
  }

 private:
  std::vector<std::byte> data_;
  std::size_t taken_ = 0;
};

/// Of one stream in a save. Rows are named by their sequence number.
struct SavedStream {
  std::uint64_t first = 0;      // row of the segment
  std::uint64_t next = 0;       // row to write
  std::uint64_t following = 0;  // row whose successor is to be written, if that is kept aside
  std::uint64_t end = 0;        // after the last row of the segment
  bool head = false;            // the successor of the last row lay in the head when the save began
  bool over = false;            // all of it is written
  Queue images;                 // of rows replaced before they were written, in order
  Queue successors;  // kept aside, of rows replaced before those were written, in order; the head comes last
};

}  // namespace

class Saved {
 public:
  explicit Saved(std::size_t streams) : streams_(streams) {}
  [[nodiscard]] SavedStream& operator[](std::size_t s) noexcept { return streams_[s]; }

 private:
  std::vector<SavedStream> streams_;
};

void ReplayStore::put_image(std::size_t at, bool newest, std::byte* image) const noexcept {
  const std::byte* const row = rows_.row(at);
  const std::uint32_t word = newest ? 0 : index_.link(at);  // a later jump may have moved its successor
  const std::uint32_t flags = (word & ~kSlot) | ((word & kSlot) != 0 ? kAside : 0);
  std::memcpy(image, row, layout_.observation.bytes);  // part by part: the gaps between them stay zero
  for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
    std::memcpy(image + layout_.offsets[f], row + layout_.offsets[f], layout_.fields[f].bytes);
  }
  std::memcpy(image + layout_.reward, row + layout_.reward, sizeof(float));
  std::memcpy(image + layout_.link, &flags, sizeof(flags));
}

void ReplayStore::reserve_saved(std::span<const std::int64_t> ids, std::size_t each) {
  if (save_ == nullptr) return;
  for (const std::int64_t id : ids) {
    const Stream& stream = index_.streams()[static_cast<std::size_t>(id)];
    SavedStream& saved = (*save_)[static_cast<std::size_t>(id)];
    if (saved.over || stream.kept + each < stream.ring) continue;
    saved.images.reserve(each * layout_.used);
    saved.successors.reserve(each * layout_.observation.bytes);
  }
}

void ReplayStore::keep_for_save(std::size_t s, const std::byte* head) noexcept {
  const Stream& stream = index_.streams()[s];
  SavedStream& saved = (*save_)[s];
  const std::uint64_t oldest = stream.count - stream.kept;
  if (saved.over || stream.kept + 1 < stream.ring || oldest < saved.first || oldest >= saved.end) return;
  const std::size_t frame = layout_.observation.bytes;
  const std::size_t row = stream.first_row + stream.position(stream.kept - 1);
  const bool newest = saved.head && oldest + 1 == saved.end;
  if (oldest >= saved.next) put_image(row, newest, saved.images.put(layout_.used));
  if (oldest < saved.following || (!newest && (index_.link(row) & kSlot) == 0)) return;
  const Window window = index_.window({static_cast<std::uint32_t>(s), 0, oldest, row}, 1);
  const bool in_head = window.successor == static_cast<std::int64_t>(index_.head_row(s));
  std::memcpy(saved.successors.put(frame), in_head ? head : successor(s, window), frame);
}

Snapshot ReplayStore::write_segment(int file, std::span<const std::uint64_t> from) const {
  const std::lock_guard alone(saving_);
  require_streams(from, "from", num_streams());
  Snapshot snapshot;
  SegmentTable& table = snapshot.table;
  Saved save(num_streams());
  const bool prioritized = index_.priorities() != nullptr;
  float largest = 0.0f;
  std::vector<float> priorities(prioritized ? index_.priorities()->values().size() : 0);
  {
    const std::unique_lock lock(mutex_);
    for (std::size_t s = 0; s < num_streams(); ++s) {
      const Stream& stream = index_.streams()[s];
      Content& content = snapshot.content;
      content.count.push_back(stream.count);
      content.size.push_back(stream.size);
      content.kept.push_back(stream.kept);
      content.phase.push_back(stream.phase);
      content.capacity.push_back(stream.capacity);
      SavedStream& saved = save[s];
      saved.first = saved.next = std::clamp(from[s], stream.count - stream.kept, stream.count);
      saved.end = stream.count;
      saved.head = stream.head_valid && saved.first < saved.end;
    }
    if (prioritized) {
      largest = index_.priorities()->largest();
      std::ranges::copy(index_.priorities()->values(), priorities.begin());
    }
    snapshot.content.draws = draws_;
    save_ = &save;
  }
  struct End {
    const ReplayStore& store;
    ~End() {
      const std::unique_lock lock(store.mutex_);
      store.save_ = nullptr;
    }
  } const end{*this};

  BlockWriter writer(file, table);
  const std::size_t frame = layout_.observation.bytes;
  std::vector<std::byte> slice;
  std::vector<std::uint64_t> aside;  // rows whose successors are kept aside
  const auto in_slices = [&](std::uint64_t count, std::size_t bytes, const auto& put) {
    const std::uint64_t most = std::max<std::uint64_t>(1, kSliceBytes / bytes);
    for (std::uint64_t done = 0; done < count;) {
      const std::uint64_t part = std::min(most, count - done);
      slice.assign(static_cast<std::size_t>(part) * bytes, std::byte{});
      {
        const std::shared_lock lock(mutex_);
        for (std::byte* to = slice.data(); to != slice.data() + slice.size(); to += bytes) put(done++, to);
      }
      writer.put(slice.data(), slice.size());
    }
  };
  for (std::size_t s = 0; s < num_streams(); ++s) {
    const Stream& stream = index_.streams()[s];
    SavedStream& saved = save[s];
    const auto kept = [&](std::uint64_t sequence) { return sequence >= stream.count - stream.kept; };
    const auto pick = [&](std::uint64_t sequence) {
      const std::uint32_t position = stream.position(stream.back(sequence));
      return Pick{static_cast<std::uint32_t>(s), 0, sequence, stream.first_row + position};
    };
    aside.clear();
    in_slices(saved.end - saved.first, layout_.used, [&](std::uint64_t, std::byte* image) {
      const std::uint64_t sequence = saved.next++;
      if (kept(sequence)) {
        put_image(pick(sequence).row, saved.head && sequence + 1 == saved.end, image);
      } else {
        std::memcpy(image, saved.images.take(layout_.used), layout_.used);
      }
      std::uint32_t flags;
      std::memcpy(&flags, image + layout_.link, sizeof(flags));
      if ((flags & kAside) != 0) aside.push_back(sequence);
    });
    table.first.push_back(saved.first);
    table.rows.push_back(static_cast<std::uint32_t>(saved.end - saved.first));
    table.side.push_back(static_cast<std::uint32_t>(aside.size()));
    table.head.push_back(saved.head);
    if (saved.head) aside.push_back(saved.end - 1);
    in_slices(aside.size(), frame, [&](std::uint64_t i, std::byte* to) {
      const std::uint64_t sequence = aside[static_cast<std::size_t>(i)];
      const std::byte* const from_there =
          kept(sequence) ? successor(s, index_.window(pick(sequence), 1)) : saved.successors.take(frame);
      std::memcpy(to, from_there, frame);
      saved.following = sequence + 1;
    });
    const std::unique_lock lock(mutex_);
    saved = {};
    saved.over = true;
  }
  if (!priorities.empty()) {
    const auto put = [&](float priority) {
      writer.put(reinterpret_cast<const std::byte*>(&priority), sizeof(priority));
      ++table.priorities;
    };
    put(largest);
    const float* cells = priorities.data();
    for (std::size_t s = 0; s < num_streams(); ++s) {
      const auto capacity = static_cast<std::size_t>(snapshot.content.capacity[s]);
      const std::size_t oldest = snapshot.content.phase[s] + capacity - snapshot.content.size[s];
      for (std::size_t age = 0; age < snapshot.content.size[s]; ++age) put(cells[(oldest + age) % capacity]);
      cells += capacity;
    }
  }
  writer.flush();
  return snapshot;
}

/// Refuses, before a row is read, a segment whose file has fewer bytes than its table says.
void ReplayStore::require_bytes(const SegmentFile& segment) const {
  struct stat status{};
  if (::fstat(segment.file, &status) != 0) {
    throw std::system_error(errno, std::generic_category(), "cannot read " + segment.name);
  }
  const auto there = static_cast<std::uint64_t>(status.st_size);
  if (there < segment.table.bytes) {
    refuse(segment.name + " is truncated: it ends after " + to_string(there) + " of " +
           to_string(segment.table.bytes) + " bytes");
  }
}

/// Refuses counters that no store has, or that could not be saved again.
void ReplayStore::check_content(const Content& content) const {
  require_streams(content.count, "count", num_streams());
  require_streams(content.size, "size", num_streams());
  require_streams(content.kept, "kept", num_streams());
  require_streams(content.phase, "phase", num_streams());
  require_streams(content.capacity, "capacity", num_streams());
  for (std::size_t s = 0; s < num_streams(); ++s) {
    const std::string which = "stream " + to_string(s) + " of the saved replay ";
    if (content.size[s] > content.kept[s] || content.kept[s] > content.count[s]) {
      refuse(which + "has more transitions than rows");
    }
    if (content.count[s] > kMostCounted / num_streams())
      refuse(which + "has more transitions than can be counted");
    const std::int64_t capacity = content.capacity[s];
    if (capacity < 1 || content.size[s] > capacity || content.phase[s] >= capacity ||
        (content.size[s] < capacity && content.phase[s] != content.size[s])) {
      refuse(which + "has a size, phase and capacity that contradict each other");
    }
  }
  if (content.draws > kMostCounted) refuse("the saved replay has more draws than can be counted");
}

std::vector<float> ReplayStore::check_segment(const Content& content, const SegmentFile& segment) const {
  const SegmentTable& table = segment.table;
  require_streams(table.first, "first", num_streams());
  require_streams(table.rows, "rows", num_streams());
  require_streams(table.side, "side", num_streams());
  require_streams(table.head, "head", num_streams());
  require_bytes(segment);
  BlockReader reader(segment);
  std::vector<std::byte> row(layout_.used);
  const auto contradicts = [&](std::size_t s, const std::string& what) {
    refuse(segment.name + " contradicts itself: stream " + to_string(s) + " " + what);
  };
  const auto require_values = [&](std::size_t s, const char* name, const Field& field,
                                  const std::byte* data) {
    if (allow_not_finite_ || field.kind == Kind::integer) return;
    if (first_not_finite({data, field.bytes}, field.kind) == field.bytes / field.item) return;
    refuse(segment.name + " holds " + name + " of stream " + to_string(s) +
           " that are not finite, and this store refuses them");
  };
  const auto require_frame = [&](std::size_t s, const char* name, const std::byte* data) {
    for (const Part& part : layout_.parts) {
      require_values(s, layout_.parts.size() == 1 ? name : part.field.name.c_str(), part.field,
                     data + part.offset);
    }
  };
  for (std::size_t s = 0; s < num_streams(); ++s) {
    if (table.first[s] > content.count[s] || table.rows[s] > content.count[s] - table.first[s]) {
      contradicts(s, "has rows after its last");
    }
    std::uint32_t aside = 0;
    std::uint32_t flags = 0;
    for (std::uint32_t i = 0; i < table.rows[s]; ++i) {
      reader.get(row.data(), row.size());
      std::memcpy(&flags, row.data() + layout_.link, sizeof(flags));
      const bool ended = (flags & (kTerminated | kTruncated)) != 0;
      if ((flags & ~(kTerminated | kTruncated | kAside)) != 0) contradicts(s, "has unknown flags");
      if (ended && (flags & kAside) == 0) contradicts(s, "has an end without its successor");
      if ((flags & kAside) == 0 && i + 1 == table.rows[s] && table.head[s] == 0) {
        contradicts(s, "lacks its head");
      }
      aside += flags & kAside;
      require_frame(s, "observations", row.data());
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        require_values(s, layout_.fields[f].name.c_str(), layout_.fields[f], row.data() + layout_.offsets[f]);
      }
      require_values(s, "rewards", {"rewards", 4, 4, Kind::float32}, row.data() + layout_.reward);
    }
    if (aside != table.side[s]) contradicts(s, "has another number of successors than its rows say");
    if (table.head[s] != 0 && table.rows[s] > 0 && (flags & kAside) != 0)
      contradicts(s, "has a head too many");
    if (table.head[s] != 0 && table.rows[s] == 0) contradicts(s, "has a head and no row");
    for (std::uint32_t i = 0; i < aside + (table.head[s] != 0 ? 1u : 0u); ++i) {
      reader.get(row.data(), layout_.observation.bytes);
      require_frame(s, "successors", row.data());
    }
  }
  std::vector<float> priorities;
  for (std::uint64_t i = 0; i < table.priorities; ++i) {
    float priority;
    reader.get(reinterpret_cast<std::byte*>(&priority), sizeof(priority));
    priorities.push_back(priority);
  }
  if (!reader.at_end()) refuse(segment.name + " is longer than its streams");
  return priorities;
}

/// Refuses priorities that this store cannot have, or that are not those of the content.
void ReplayStore::check_priorities(const Content& content, const SegmentFile& segment,
                                   std::span<const float> priorities) const {
  if (priorities.empty()) return;
  const std::uint64_t wanted = std::accumulate(content.size.begin(), content.size.end(), std::uint64_t{1});
  if (priorities.size() != wanted) {
    refuse(segment.name + " contradicts itself: it has " + to_string(priorities.size()) + " priorities for " +
           to_string(wanted - 1) + " transitions and the largest so far");
  }
  for (const float priority : priorities) {
    try {
      index_.priorities()->require(priority);
    } catch (const std::invalid_argument& error) {
      refuse(segment.name + " does not fit: " + error.what());
    }
  }
}

void ReplayStore::load(const Content& content, std::span<const SegmentFile> segments, std::uint64_t seed) {
  const auto locks = alone();
  check_content(content);
  std::vector<std::uint64_t> end(num_streams());  // sequence number after the rows read so far
  std::vector<std::uint64_t> begin(num_streams());
  std::vector<float> priorities;  // of the newest segment
  for (const SegmentFile& segment : segments) {
    priorities = check_segment(content, segment);
    for (std::size_t s = 0; s < num_streams(); ++s) {
      // Rows that a later segment does not continue are too old to be wanted.
      const std::uint64_t first = segment.table.first[s];
      const std::uint64_t kept = std::min<std::uint64_t>(content.kept[s], content.count[s]);
      if (end[s] > 0 && first > content.count[s] - kept && first + 1 != end[s]) {
        refuse(segment.name + " contradicts itself: stream " + to_string(s) +
               " does not go on from the segment before");
      }
      if (first > end[s] || first < begin[s]) begin[s] = first;
      end[s] = first + segment.table.rows[s];
    }
  }
  for (std::size_t s = 0; s < num_streams(); ++s) {
    if (content.kept[s] > 0 &&
        (end[s] != content.count[s] || content.count[s] - begin[s] < content.kept[s])) {
      refuse("stream " + to_string(s) + " of the saved replay lacks rows in its files");
    }
    if (content.kept[s] > static_cast<std::uint64_t>(content.capacity[s]) + layout_.stack) {
      refuse("stream " + to_string(s) + " of the saved replay has more rows than its capacity allows");
    }
  }
  if (index_.priorities() != nullptr && !segments.empty()) {
    check_priorities(content, segments.back(), priorities);
  }

  ++life_;
  index_.clear();
  try {
    for (const SegmentFile& segment : segments) apply_segment(content, segment);
  } catch (...) {
    index_.clear();
    throw;
  }
  for (std::size_t s = 0; s < num_streams(); ++s) {
    const Stream& stream = index_.streams()[s];
    const std::uint32_t size = std::min({content.size[s], stream.capacity, stream.kept});
    const bool same = stream.capacity == content.capacity[s];
    index_.adopt(s, content.count[s], size, same ? content.phase[s] : size % stream.capacity);
  }
  if (index_.priorities() != nullptr) index_.restore_priorities(content.size, priorities);
  index_.count_jumps_anew();
  index_.refresh();
  index_.seed = seed;
  draws_ = content.draws;
}

void ReplayStore::apply_segment(const Content& content, const SegmentFile& segment) {
  const SegmentTable& table = segment.table;
  BlockReader reader(segment);
  std::vector<std::byte> buffer(layout_.used);
  const std::size_t frame = layout_.observation.bytes;
  for (std::size_t s = 0; s < num_streams(); ++s) {
    const Stream& stream = index_.streams()[s];
    const std::uint64_t wanted = content.count[s] - content.kept[s];  // the first sequence number to keep
    const std::uint64_t first = table.first[s];
    index_.rewind(s, first);
    if (stream.count != first) {  // the rows kept end before the first one here: they are of no use
      index_.rewind(s, 0);
      index_.adopt(s, first, 0, 0);
    }
    reserve_slots(table.side[s]);
    std::vector<std::int64_t> aside;  // slots of the successors to come; -1 for rows that are not kept
    for (std::uint32_t i = 0; i < table.rows[s]; ++i) {
      reader.get(buffer.data(), buffer.size());
      std::uint32_t flags;
      std::memcpy(&flags, buffer.data() + layout_.link, sizeof(flags));
      if (first + i < wanted) {
        if ((flags & kAside) != 0) aside.push_back(-1);
        index_.adopt(s, first + i + 1, 0, 0);  // no row is kept yet
        continue;
      }
      const bool jump = (flags & kAside) != 0 && (flags & (kTerminated | kTruncated)) == 0;
      const Placement to =
          index_.append(s, false, (flags & kTerminated) != 0, jump || (flags & kTruncated) != 0);
      std::memcpy(rows_.row(to.row), buffer.data(), layout_.link);
      index_.set_link(to.row, jump ? to.link & ~kTruncated : to.link);  // of a jump only the place is needed
      if (to.successor < 0) aside.push_back(-1 - to.successor);
    }
    for (const std::int64_t slot : aside) {
      reader.get(buffer.data(), frame);
      // A row may have been replaced by later ones meanwhile, and its slot with it: the last writer is right.
      if (slot >= 0) std::memcpy(side_.at(static_cast<std::size_t>(slot)), buffer.data(), frame);
    }
    if (table.head[s] != 0) {
      reader.get(buffer.data(), frame);
      std::memcpy(heads_.row(s), buffer.data(), frame);
    }
  }
}

}  // namespace brc

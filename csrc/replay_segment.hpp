// What the files of a replay store hold: segments of rows, and the numbers that belong to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace brc {

/// The counters of the streams when a segment was written.
struct Content {
  std::vector<std::uint64_t> count;    // [N] transitions ever added
  std::vector<std::uint32_t> size;     // [N] that can be sampled
  std::vector<std::uint32_t> kept;     // [N] rows kept: size and the frames before
  std::vector<std::uint32_t> phase;    // [N] cell of the next transition
  std::vector<std::int64_t> capacity;  // [N]
  std::uint64_t draws = 0;
};

/// One segment: stream after stream, `rows` [N] row images from sequence number `first` [N] on (each the used
/// bytes of a row, its link replaced by flags), then the `side` [N] successors that are kept aside, in the
/// order of their rows, then the head if `head` [N] is set. After the streams there are `priorities` floats:
/// none, or the largest priority so far and those of all transitions of the content, stream after stream and
/// oldest first. The newest segment's are right.
struct SegmentTable {
  std::vector<std::uint64_t> first;
  std::vector<std::uint32_t> rows;
  std::vector<std::uint32_t> side;
  std::vector<unsigned char> head;
  std::uint64_t priorities = 0;
  std::uint64_t bytes = 0;
  std::vector<std::uint32_t> checksums;  // CRC-32C of every kBlockBytes
};

struct Snapshot {
  Content content;
  SegmentTable table;
};

struct SegmentFile {
  int file;  // open for reading, at its beginning
  SegmentTable table;
  std::string name;  // for messages
};

}  // namespace brc

// CRC-32C, the checksum of the replay's files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace brc {

/// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of `bytes` at `data`, going on from `before`. O(bytes).
[[nodiscard]] std::uint32_t crc32c(std::uint32_t before, const std::byte* data, std::size_t bytes) noexcept;

/// The same for processors without an instruction for it; apart, so that a test reaches it on every
/// processor.
[[nodiscard]] std::uint32_t crc32c_by_tables(std::uint32_t before, const std::byte* data,
                                             std::size_t bytes) noexcept;

}  // namespace brc

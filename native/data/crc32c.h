// CRC-32C (Castagnoli), and the mask that TFRecord files put over it.
#ifndef LAUNCHER_DATA_CRC32C_H
#define LAUNCHER_DATA_CRC32C_H

#include <cstddef>
#include <cstdint>
#include <span>

namespace launcher::data {

// With the processor's instruction where it has one.
std::uint32_t crc32c(std::span<const std::byte> bytes) noexcept;
// With tables: the same number on any processor.
std::uint32_t crc32c_plain(std::span<const std::byte> bytes) noexcept;

// So that the sum of data that hold sums is no special case. Source: TensorFlow, tsl/lib/hash/crc32c.h.
constexpr std::uint32_t mask_crc(std::uint32_t crc) noexcept { return ((crc >> 15) | (crc << 17)) + 0xa282ead8u; }

}  // namespace launcher::data

#endif

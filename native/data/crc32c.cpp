#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace launcher::data {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78;  // 0x1edc6f41 with its bits reversed; RFC 3720, appendix B.4
constexpr std::size_t kWord = sizeof(std::uint64_t);
// Three sums at the same time, of neighbouring blocks of this size: the instruction takes 3 cycles, and one can begin
// in each.
constexpr std::size_t kBlock = 256;

using Table = std::array<std::uint32_t, 256>;

constexpr std::uint32_t shift_bits(std::uint32_t crc, int bits) {
  for (int bit = 0; bit < bits; ++bit) {
    crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
  }
  return crc;
}

// table[k][b]: what byte b does to the sum when k bytes follow it.
constexpr std::array<Table, kWord> make_tables() {
  std::array<Table, kWord> tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    tables[0][byte] = shift_bits(byte, 8);
  }
  for (std::size_t k = 1; k < kWord; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  }
  return tables;
}

// shift[i][b]: what byte i of a sum, b, becomes when `kBlock` zeros follow it.
constexpr std::array<Table, 4> make_shift() {
  std::array<std::uint32_t, 32> of_bit{};
  for (std::size_t bit = 0; bit < 32; ++bit) {
    of_bit[bit] = shift_bits(std::uint32_t{1} << bit, 8 * static_cast<int>(kBlock));
  }
  std::array<Table, 4> tables{};
  for (std::size_t i = 0; i < 4; ++i) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      for (std::size_t bit = 0; bit < 8; ++bit) {
        tables[i][byte] ^= (byte >> bit & 1) != 0 ? of_bit[8 * i + bit] : 0;
      }
    }
  }
  return tables;
}

constexpr std::array<Table, kWord> kTables = make_tables();

std::uint32_t sum_plain(std::uint32_t crc, const std::byte* at, std::size_t bytes) noexcept {
  for (; bytes >= kWord; at += kWord, bytes -= kWord) {
    std::uint64_t word;
    std::memcpy(&word, at, kWord);
    word ^= crc;
    crc = 0;
    for (std::size_t i = 0; i < kWord; ++i) {
      crc ^= kTables[kWord - 1 - i][word >> (8 * i) & 255];
    }
  }
  for (; bytes != 0; ++at, --bytes) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ static_cast<std::uint32_t>(*at)) & 255];
  }
  return crc;
}

#if defined(__x86_64__)
constexpr std::array<Table, 4> kShift = make_shift();

std::uint64_t shifted(std::uint64_t crc) noexcept {
  return kShift[0][crc & 255] ^ kShift[1][crc >> 8 & 255] ^ kShift[2][crc >> 16 & 255] ^ kShift[3][crc >> 24 & 255];
}

std::uint64_t load(const std::byte* from) noexcept {
  std::uint64_t word;
  std::memcpy(&word, from, kWord);
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t sum_sse42(std::uint32_t start, const std::byte* at,
                                                          std::size_t bytes) noexcept {
  std::uint64_t crc = start;
  for (; bytes >= 3 * kBlock; at += 3 * kBlock, bytes -= 3 * kBlock) {
    std::uint64_t second = 0, third = 0;
    for (std::size_t i = 0; i < kBlock; i += kWord) {
      crc = _mm_crc32_u64(crc, load(at + i));
      second = _mm_crc32_u64(second, load(at + kBlock + i));
      third = _mm_crc32_u64(third, load(at + 2 * kBlock + i));
    }
    crc = shifted(shifted(crc) ^ second) ^ third;
  }
  for (; bytes >= kWord; at += kWord, bytes -= kWord) {
    crc = _mm_crc32_u64(crc, load(at));
  }
  auto rest = static_cast<std::uint32_t>(crc);
  for (; bytes != 0; ++at, --bytes) {
    rest = _mm_crc32_u8(rest, static_cast<unsigned char>(*at));
  }
  return rest;
}
#endif

}  // namespace

std::uint32_t crc32c_plain(std::span<const std::byte> bytes) noexcept {
  return ~sum_plain(~std::uint32_t{0}, bytes.data(), bytes.size());
}

std::uint32_t crc32c(std::span<const std::byte> bytes) noexcept {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (has_instruction) {
    return ~sum_sse42(~std::uint32_t{0}, bytes.data(), bytes.size());
  }
#endif
  return crc32c_plain(bytes);
}

}  // namespace launcher::data

// An index in a sidecar: whatever its table and its arrays say, its records are inside the file that it is of, or it is
// refused. The sums are made right, or nothing would come past them.
//   bytes 0   how the arrays are kept (its low bits), and whether the table is put in as it is (0x80)
//   1, 2, 3   records, end of the last one, where the arrays begin (in 8 bytes, from the header on)
//   4, 5      bytes of the file, bytes that are the table's own
#include "sidecar.h"

#include <cstring>

#include "../fuzz.h"
#include "checksum.h"

using namespace launcher;
using fuzz::require;

namespace {

constexpr std::size_t kHead = 6, kHeader = 64;
const std::string kKey = "key", kName = "file";

std::string number(std::uint64_t value) {
  std::string text(sizeof value, '\0');
  std::memcpy(text.data(), &value, sizeof value);
  return text;
}

std::uint64_t sum_of(const std::string& bytes) { return data::checksum(std::as_bytes(std::span(bytes))); }

std::string header(const std::string& arrays, const std::string& table) {
  const std::string version = {'\1', '\0', '\0', '\0'}, order = {'\4', '\3', '\2', '\1'};
  const std::uint64_t offset = kHeader + arrays.size();
  const std::string text = "LDINDEX\n" + version + order + number(offset + table.size()) + number(offset) +
                           number(table.size()) + number(sum_of(table)) + number(0);
  return text + number(sum_of(text));
}

// What the arrays of a form have, as sidecar.cpp sums them up; 0 where they are not there.
std::uint64_t sum_of_arrays(const std::string& arrays, unsigned form, std::uint64_t records, std::size_t at) {
  const std::uint64_t blocks = (records + 63) / 64;
  std::vector<std::uint64_t> sizes = {16 * records};
  if (form < 2) {
    sizes = {8 * blocks, 4 * records};
    sizes.resize(form == 1 ? 3 : 2, 4 * records);
  }
  std::uint64_t sum = 0;
  for (const std::uint64_t size : sizes) {
    if (at > arrays.size() || size > arrays.size() - at) {
      return 0;
    }
    sum = sum * 3 + sum_of(arrays.substr(at, size));
    at += (size + 7) / 8 * 8;
  }
  return sum;
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  // Two records: offsets 0 and 3 of a base 0; their lengths; both in 64 bits.
  const std::string contiguous = number(0) + number(std::uint64_t{3} << 32);
  const std::string apart = contiguous + number(2 | std::uint64_t{4} << 32);
  const std::string wide = number(0) + number(2) + number(3) + number(4);
  // No records, and one damage.
  const std::string table = number(kKey.size()) + kKey + number(1) + number(kName.size()) + kName + number(9) +
                            number(0) + number(0) + number(0) + number(0) + number(kHeader) +
                            number(sum_of_arrays("", 0, 0, 0)) + number(0) + number(1) + number(0) + number(1) +
                            number(1) + "x";
  return {std::string("\0\2\7\0\7\0", 6) + contiguous, std::string("\1\2\7\0\7\0", 6) + apart,
          std::string("\2\2\7\0\7\0", 6) + wide,
          std::string("\x80\0\0\0\x09", 5) + static_cast<char>(table.size()) + table};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size < kHead) {
    return 0;
  }
  const std::string rest(reinterpret_cast<const char*>(bytes) + kHead, size - kHead);
  const std::uint64_t file_bytes = bytes[4];
  std::string table, arrays;
  if ((bytes[0] & 0x80) != 0) {
    const std::size_t own = std::min<std::size_t>(bytes[5], rest.size());
    table = rest.substr(0, own);
    arrays = rest.substr(own);
  } else {
    const unsigned form = bytes[0] % 4;
    arrays = rest;
    const std::size_t at = std::size_t{bytes[3]} * 8;
    table = number(kKey.size()) + kKey + number(1) + number(kName.size()) + kName + number(file_bytes) + number(0) +
            number(bytes[1]) + number(bytes[2]) + number(form) + number(kHeader + at) +
            number(sum_of_arrays(arrays, form, bytes[1], at)) + number(0) + number(0);
  }
  const std::string whole = header(arrays, table) + arrays + table;
  const fuzz::MemoryFile memory(reinterpret_cast<const std::uint8_t*>(whole.data()), whole.size());
  try {
    const auto parts = data::load_index(memory.path(), kKey, {{kName, file_bytes, 0}});
    require(parts.size() == 1, "a part for each file");
    for (std::uint64_t i = 0; parts[0] && i < parts[0]->records(); ++i) {
      const auto [offset, length] = parts[0]->at(i);
      require(offset <= file_bytes && length <= file_bytes - offset, "records are inside the file");
    }
  } catch (const data::DataError& error) {
    require(error.problem() == data::Problem::malformed, "the sidecar is refused, to be made again");
  }
  return 0;
}

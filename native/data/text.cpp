#include "text.h"

#include <cstddef>

namespace launcher::data {

std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 40;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string all = "'";
  for (const char c : text.substr(0, kLongest)) {
    if (c >= ' ' && c <= '~') {
      all += c;
    } else {
      const auto byte = static_cast<unsigned char>(c);
      all += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return all + (text.size() > kLongest ? "...'" : "'");
}

const char* name_of(DType dtype) noexcept {
  constexpr const char* names[collectives::kDTypes] = {"float32", "float64", "float16", "bfloat16", "int8",
                                                       "uint8",   "int16",   "int32",   "int64",    "bool",
                                                       "uint16",  "uint32",  "uint64"};
  return names[static_cast<std::size_t>(dtype)];
}

std::string_view trimmed(std::string_view text) noexcept {
  const auto is_blank = [](char c) { return c == ' ' || c == '\t'; };
  while (!text.empty() && is_blank(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && is_blank(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

}  // namespace launcher::data

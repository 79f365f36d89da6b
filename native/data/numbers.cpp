#include "numbers.h"

#include <charconv>
#include <limits>
#include <system_error>

namespace launcher::data {
namespace {

bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }

// Equal but for the case of letters; `word` is in lower case.
bool is_word(std::string_view text, std::string_view word) noexcept {
  if (text.size() != word.size()) {
    return false;
  }
  for (std::size_t i = 0; i < word.size(); ++i) {
    if ((text[i] | 0x20) != word[i]) {
      return false;
    }
  }
  return true;
}

// Whether a number that is out of range is so because it is too large: by the power of ten of its first digit that is
// not 0. `text` is digits [. digits] [e digits], as std::from_chars() has found.
bool is_huge(std::string_view text) noexcept {
  constexpr std::int64_t kFar = 1'000'000'000'000;  // more digits than a file has
  std::int64_t power = 0;
  bool seen = false;
  bool fraction = false;
  std::size_t at = 0;
  for (; at < text.size() && (is_digit(text[at]) || text[at] == '.'); ++at) {
    if (text[at] == '.') {
      fraction = true;
      continue;
    }
    seen = seen || text[at] != '0';
    if (seen && !fraction) {
      ++power;
    } else if (!seen && fraction) {
      --power;
    }
  }
  std::int64_t exponent = 0;
  if (at < text.size()) {  // at the e
    ++at;
    const bool negative = at < text.size() && text[at] == '-';
    at += at < text.size() && (text[at] == '-' || text[at] == '+');
    for (; at < text.size() && exponent < kFar; ++at) {
      exponent = exponent * 10 + (text[at] - '0');
    }
    exponent = negative ? -exponent : exponent;
  }
  return power + exponent > 0;
}

}  // namespace

bool is_text_number(DType dtype) noexcept {
  return dtype == DType::float32 || dtype == DType::float64 || dtype == DType::int32 || dtype == DType::int64;
}

template <typename T>
std::optional<T> parse_number(std::string_view text) noexcept {
  T value = 0;
  if constexpr (std::is_integral_v<T>) {
    if (text.starts_with('+')) {
      text.remove_prefix(1);
      if (text.starts_with('-')) {
        return std::nullopt;
      }
    }
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
      return std::nullopt;
    }
    return value;
  } else {
    const bool negative = text.starts_with('-');
    if (negative || text.starts_with('+')) {
      text.remove_prefix(1);
    }
    const auto with_sign = [negative](T magnitude) { return negative ? -magnitude : magnitude; };
    if (text.empty()) {
      return std::nullopt;
    }
    if (!is_digit(text[0]) && text[0] != '.') {  // of words from_chars() takes more than ours
      if (is_word(text, "inf") || is_word(text, "infinity")) {
        return with_sign(std::numeric_limits<T>::infinity());
      }
      return is_word(text, "nan") ? std::optional(std::numeric_limits<T>::quiet_NaN()) : std::nullopt;
    }
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end != text.data() + text.size()) {
      return std::nullopt;
    }
    if (error == std::errc::result_out_of_range) {
      return with_sign(is_huge(text) ? std::numeric_limits<T>::infinity() : T{0});
    }
    return error == std::errc() ? std::optional(with_sign(value)) : std::nullopt;
  }
}

template std::optional<float> parse_number(std::string_view) noexcept;
template std::optional<double> parse_number(std::string_view) noexcept;
template std::optional<std::int32_t> parse_number(std::string_view) noexcept;
template std::optional<std::int64_t> parse_number(std::string_view) noexcept;

}  // namespace launcher::data

// Decimal text to numbers: always the nearest one (ties to even), whatever the number of digits.
#ifndef LAUNCHER_DATA_NUMBERS_H
#define LAUNCHER_DATA_NUMBERS_H

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string_view>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "batch.h"

namespace launcher::data {

// The numbers that text can become: float32, float64, int32, int64.
bool is_text_number(DType dtype) noexcept;

// All of `text` as one number: [+-] digits [. digits] [e [+-] digits], for a floating T also inf, infinity and nan in
// any case. What is too large for a floating T becomes infinity, what is too small becomes 0, as IEEE 754 rounds.
// Empty: not a number, or none that fits an integer T.
template <typename T>
std::optional<T> parse_number(std::string_view text) noexcept;

// How many bytes from the first one of a number quick_number() may read, whatever its length.
inline constexpr std::size_t kQuickReach = 24;

namespace quick {

// 10 to the power of 0 .. 16: exact in a double, as the numbers that they divide are.
inline constexpr double kTens[] = {1e0, 1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7, 1e8,
                                   1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16};
inline constexpr std::uint64_t kWholeTens[] = {1, 10, 100, 1'000, 10'000, 100'000, 1'000'000, 10'000'000, 100'000'000};

// The eight characters at `text`, the first in the lowest byte.
inline std::uint64_t load(const char* text) noexcept {
  std::uint64_t word = 0;
  std::memcpy(&word, text, sizeof(word));
  if constexpr (std::endian::native == std::endian::big) {
    word = __builtin_bswap64(word);
  }
  return word;
}

// How many of the eight characters, from the first, are digits. A carry can only spoil bytes above one that is none.
inline std::size_t digits(std::uint64_t word) noexcept {
  const std::uint64_t distance = word ^ 0x3030303030303030U;
  const std::uint64_t others = ((distance + 0x7676767676767676U) | distance) & 0x8080808080808080U;
  return static_cast<std::size_t>(std::countr_zero(others)) / 8;
}

// The first `count` characters (1 .. 8) moved to the end of the eight.
inline std::uint64_t keep(std::uint64_t word, std::size_t count) noexcept { return word << (64 - 8 * count); }

// The number that the digits at the end of the eight characters are; zero bytes before them count as 0. Neighbours are
// joined three times: digits to pairs, pairs to fours, fours to eight.
inline std::uint64_t value(std::uint64_t word) noexcept {
  word = (word & 0x0F0F0F0F0F0F0F0FU) * (10 * 0x100 + 1) >> 8;
  word = (word & 0x00FF00FF00FF00FFU) * (100 * 0x10000ULL + 1) >> 16;
  return (word & 0x0000FFFF0000FFFFU) * (10'000 * 0x100000000ULL + 1) >> 32;
}

// mantissa / 10^places, rounded to T. False: rounding wants more care. places: 0 .. 16.
template <typename T>
inline bool divide(std::uint64_t mantissa, std::size_t places, bool negative, T& out) noexcept {
  if (mantissa >> 53 != 0) {
    return false;
  }
  // Both are exact, so that the one rounding is the division's.
  const double magnitude = static_cast<double>(static_cast<std::int64_t>(mantissa)) / kTens[places];
  const std::uint64_t bits = std::bit_cast<std::uint64_t>(magnitude) | static_cast<std::uint64_t>(negative) << 63;
  if constexpr (std::is_same_v<T, float>) {
    // Half way between two floats, as a double: the number itself may be to either side of it.
    if ((bits & 0x1FFFFFFFU) == 0x10000000U) {
      return false;
    }
  }
  out = static_cast<T>(std::bit_cast<double>(bits));
  return true;
}

}  // namespace quick

// Numbers of the most frequent forms: [-] digits with at most 8 of them before the point and 8 after it. False: another
// form, or one where rounding wants more care; then parse_number() decides. Reads text[0 .. kQuickReach), and takes
// notice of the first `bytes` only.
template <typename T>
inline bool quick_number(const char* text, std::size_t bytes, T& out) noexcept {
  const bool negative = *text == '-';
  text += negative;
  bytes -= negative;
  const std::uint64_t first = quick::load(text);
  const std::size_t whole = quick::digits(first);
  if constexpr (std::is_integral_v<T>) {
    if (bytes - 1 >= 8 || whole < bytes) {
      return false;
    }
    const auto magnitude = static_cast<T>(quick::value(quick::keep(first, bytes)));
    out = negative ? -magnitude : magnitude;
    return true;
  } else {
    std::uint64_t mantissa;
    std::size_t places = 0;
    if (bytes - 1 < 8 && whole >= bytes) {
      mantissa = quick::value(quick::keep(first, bytes));
    } else {
      places = bytes - whole - 1;
      // A number of no digits before or after the point, of too many, or a point that is not there.
      if (whole - 1 >= 8 || bytes < whole + 2 || places > 8 || text[whole] != '.') {
        return false;
      }
      const std::uint64_t second = quick::load(text + whole + 1);
      if (quick::digits(second) < places) {
        return false;
      }
      const std::uint64_t left = quick::keep(first, whole);
      const std::uint64_t right = quick::keep(second, places);
      mantissa = whole + places <= 8 ? quick::value(left >> (8 * places) | right)
                                     : quick::value(left) * quick::kWholeTens[places] + quick::value(right);
    }
    return quick::divide(mantissa, places, negative, out);
  }
}

#ifdef __x86_64__
// The same for a floating T, with at most 16 characters after the sign in whatever places; wants SSE 4.1. All of them
// are taken at once: where the point is makes no difference to what is done, which no branch would foresee.
template <typename T>
[[gnu::target("sse4.1"), gnu::always_inline]] inline bool wide_number(const char* text, std::size_t bytes,
                                                                      T& out) noexcept {
  constexpr std::size_t kMost = 16;
  const bool negative = *text == '-';
  text += negative;
  bytes -= negative;
  if (bytes - 1 >= kMost) {
    return false;
  }
  const __m128i values = _mm_sub_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(text)), _mm_set1_epi8('0'));
  const __m128i are_digits = _mm_cmpeq_epi8(_mm_min_epu8(values, _mm_set1_epi8(9)), values);
  const std::uint32_t others = ~static_cast<std::uint32_t>(_mm_movemask_epi8(are_digits)) & ((1U << bytes) - 1);
  const bool pointed = others != 0;
  const std::size_t point = pointed ? static_cast<std::size_t>(std::countr_zero(others)) : bytes;
  if ((others & (others - 1)) != 0 || point == 0 || (pointed && (text[point] != '.' || point + 1 == bytes))) {
    return false;
  }
  // The digits without the point, at the end of 16: the place j takes digit j - (16 - digits), or 0.
  const std::size_t digits = bytes - pointed;
  const __m128i places = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i numbers = _mm_add_epi8(places, _mm_set1_epi8(static_cast<char>(digits - kMost)));
  const __m128i after = _mm_cmpgt_epi8(numbers, _mm_set1_epi8(static_cast<char>(point - 1)));
  const __m128i moved = _mm_shuffle_epi8(values, _mm_sub_epi8(numbers, after));
  // Neighbours are joined: digits to pairs, pairs to fours, fours to eight.
  const __m128i pairs = _mm_maddubs_epi16(moved, _mm_setr_epi8(10, 1, 10, 1, 10, 1, 10, 1, 10, 1, 10, 1, 10, 1, 10, 1));
  const __m128i fours = _mm_madd_epi16(pairs, _mm_setr_epi16(100, 1, 100, 1, 100, 1, 100, 1));
  const __m128i packed = _mm_packus_epi32(fours, fours);
  const __m128i eights = _mm_madd_epi16(packed, _mm_setr_epi16(10'000, 1, 10'000, 1, 10'000, 1, 10'000, 1));
  const auto halves = static_cast<std::uint64_t>(_mm_cvtsi128_si64(eights));
  const std::uint64_t mantissa = (halves & 0xFFFFFFFFU) * 100'000'000 + (halves >> 32);
  return quick::divide(mantissa, bytes - point - pointed, negative, out);
}
#endif

// A text whose numbers quick_number() may read, up to the last one: its end is copied to where more can be read.
class QuickText {
 public:
  explicit QuickText(std::string_view text) noexcept
      : text_(text.data()), copied_(text.size() < kQuickReach ? 0 : text.size() - kQuickReach) {
    std::memcpy(tail_, text_ + copied_, text.size() - copied_);
  }
  const char* at(std::size_t place) const noexcept {
    return place < copied_ ? text_ + place : tail_ + (place - copied_);
  }

 private:
  const char* text_;
  std::size_t copied_;  // where the copy begins
  char tail_[2 * kQuickReach] = {};
};

}  // namespace launcher::data

#endif

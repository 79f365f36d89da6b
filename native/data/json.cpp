#include "json.h"

#include <cstring>

#include "text.h"

namespace launcher::data {
namespace {

bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }

void append_utf8(unsigned code, std::string& out) {
  const auto tail = [code](unsigned shift) { return static_cast<char>(0x80 | (code >> shift & 0x3F)); };
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += {static_cast<char>(0xC0 | code >> 6), tail(0)};
  } else if (code < 0x10000) {
    out += {static_cast<char>(0xE0 | code >> 12), tail(6), tail(0)};
  } else {
    out += {static_cast<char>(0xF0 | code >> 18), tail(12), tail(6), tail(0)};
  }
}

}  // namespace

void JsonCursor::fail(const std::string& wanted) const {
  if (at_ >= text_.size()) {
    throw JsonError("the text ends; expected " + wanted, text_.size(), true);
  }
  throw JsonError("found " + shown(text_.substr(at_)) + "; expected " + wanted, at_, true);
}

void JsonCursor::skip_blanks() noexcept {
  while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
    ++at_;
  }
}

bool JsonCursor::take(char c) noexcept {
  const bool there = at_ < text_.size() && text_[at_] == c;
  at_ += there;
  return there;
}

void JsonCursor::take_word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) {
    fail("a value");
  }
  at_ += word.size();
}

JsonKind JsonCursor::kind() {
  skip_blanks();
  switch (at_ < text_.size() ? text_[at_] : '\0') {
    case '{':
      return JsonKind::object;
    case '[':
      return JsonKind::array;
    case '"':
      return JsonKind::string;
    case 't':
    case 'f':
      return JsonKind::boolean;
    case 'n':
      return JsonKind::null;
    default:
      if (at_ < text_.size() && (is_digit(text_[at_]) || text_[at_] == '-')) {
        return JsonKind::number;
      }
      fail("a value");
  }
}

bool JsonCursor::begin(char open, char close, const char* wanted) {
  skip_blanks();
  if (!take(open)) {
    fail(wanted);
  }
  skip_blanks();
  return !take(close);
}

bool JsonCursor::next(char close, const char* wanted) {
  skip_blanks();
  if (take(',')) {
    skip_blanks();
    return true;
  }
  if (!take(close)) {
    fail(wanted);
  }
  return false;
}

bool JsonCursor::enter_object() { return begin('{', '}', "an object"); }
bool JsonCursor::next_member() { return next('}', "',' or '}'"); }
bool JsonCursor::enter_array() { return begin('[', ']', "an array"); }
bool JsonCursor::next_element() { return next(']', "',' or ']'"); }

std::string_view JsonCursor::key() {
  const std::string_view name = string();
  skip_blanks();
  if (!take(':')) {
    fail("':'");
  }
  return name;
}

std::string_view JsonCursor::string() {
  skip_blanks();
  if (!take('"')) {
    fail("a string");
  }
  const std::size_t begin = at_;
  for (; at_ < text_.size(); ++at_) {
    const char c = text_[at_];
    if (c == '"') {
      return text_.substr(begin, at_++ - begin);
    }
    if (c == '\\') {
      return unescape(begin);
    }
    if (static_cast<unsigned char>(c) < ' ') {
      fail("no control character in a string");
    }
  }
  fail("'\"' after a string");
}

// From the first escape of a string that begins at `begin` to its end.
std::string_view JsonCursor::unescape(std::size_t begin) {
  unescaped_.assign(text_.substr(begin, at_ - begin));
  while (at_ < text_.size()) {
    const char c = text_[at_];
    if (c == '"') {
      ++at_;
      return unescaped_;
    }
    if (static_cast<unsigned char>(c) < ' ') {
      fail("no control character in a string");
    }
    if (c != '\\') {
      unescaped_ += c;
      ++at_;
      continue;
    }
    constexpr std::string_view kLetters = "\"\\/bfnrt";
    constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const char letter = at_ + 1 < text_.size() ? text_[at_ + 1] : '\0';
    if (const std::size_t which = kLetters.find(letter); which != std::string_view::npos) {
      unescaped_ += kMeanings[which];
      at_ += 2;
      continue;
    }
    if (letter != 'u') {
      fail("an escape");
    }
    const std::size_t escape = at_;
    unsigned code = code_unit();
    if (code >= 0xD800 && code < 0xE000) {  // half of a character
      const unsigned low = code < 0xDC00 && text_.substr(at_, 2) == "\\u" ? code_unit() : 0;
      if (low < 0xDC00 || low >= 0xE000) {
        at_ = escape;
        fail("both halves of a surrogate pair");
      }
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(code, unescaped_);
  }
  fail("'\"' after a string");
}

// The number of the escape \uXXXX that is next.
unsigned JsonCursor::code_unit() {
  unsigned code = 0;
  for (std::size_t i = at_ + 2; i < at_ + 6; ++i) {
    const char c = i < text_.size() ? text_[i] : '\0';
    const auto lower = static_cast<char>(c | 0x20);
    if (!is_digit(c) && (lower < 'a' || lower > 'f')) {
      fail("four hexadecimal digits after \\u");
    }
    code = code << 4 | static_cast<unsigned>(is_digit(c) ? c - '0' : lower - 'a' + 10);
  }
  at_ += 6;
  return code;
}

std::string_view JsonCursor::number() {
  skip_blanks();
  const std::size_t begin = at_;
  const auto digits = [this] {
    const std::size_t first = at_;
    while (at_ < text_.size() && is_digit(text_[at_])) {
      ++at_;
    }
    return at_ != first;
  };
  take('-');
  if (!take('0') && !digits()) {
    fail("a number");
  }
  if (take('.') && !digits()) {
    fail("a digit after the point");
  }
  if (at_ < text_.size() && (text_[at_] | 0x20) == 'e') {
    ++at_;
    if (!take('-')) {
      take('+');
    }
    if (!digits()) {
      fail("a digit of the exponent");
    }
  }
  return text_.substr(begin, at_ - begin);
}

bool JsonCursor::boolean() {
  skip_blanks();
  const bool yes = at_ < text_.size() && text_[at_] == 't';
  take_word(yes ? "true" : "false");
  return yes;
}

void JsonCursor::null() {
  skip_blanks();
  take_word("null");
}

std::string_view JsonCursor::skip() {
  skip_blanks();
  const std::size_t start = at_;
  bool objects[kDeepest];  // what is entered: an object, or an array
  std::size_t depth = 0;
  while (true) {
    const JsonKind what = kind();
    if (what == JsonKind::object || what == JsonKind::array) {
      const bool object = what == JsonKind::object;
      if (object ? enter_object() : enter_array()) {
        if (depth == kDeepest) {
          throw JsonError("arrays and objects are nested more than " + std::to_string(kDeepest) + " deep", at_, true);
        }
        objects[depth++] = object;
        if (object) {
          key();
        }
        continue;
      }
    } else if (what == JsonKind::string) {
      string();
    } else if (what == JsonKind::number) {
      number();
    } else if (what == JsonKind::boolean) {
      boolean();
    } else {
      null();
    }
    while (depth != 0 && !(objects[depth - 1] ? next_member() : next_element())) {
      --depth;
    }
    if (depth == 0) {
      return text_.substr(start, at_ - start);
    }
    if (objects[depth - 1]) {
      key();
    }
  }
}

void JsonCursor::finish() {
  skip_blanks();
  if (at_ != text_.size()) {
    fail("the end of the text");
  }
}

}  // namespace launcher::data

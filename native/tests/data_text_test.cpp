// Text to records: numbers against the C library, lines against a slow reference, and no byte read past a record.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "csv.h"
#include "json.h"
#include "libsvm.h"
#include "lines.h"
#include "numbers.h"
#include "seeded_random.h"

namespace {

using namespace launcher::data;
using Lines = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

std::string folder;

std::shared_ptr<const File> file_of(const std::string& content, Access access = Access::mapped) {
  const std::string path = folder + "/data_text_test.txt";
  const int descriptor = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
  CHECK(write(descriptor, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
  close(descriptor);
  return std::make_shared<const File>(path, access);
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// Text whose end is the end of what may be read.
class Guarded {
 public:
  Guarded() : memory_(static_cast<char*>(map())) { mprotect(memory_ + kSize, kSize, PROT_NONE); }
  ~Guarded() { munmap(memory_, 2 * kSize); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  std::string_view put(std::string_view text) {
    char* begin = memory_ + kSize - text.size();
    std::memcpy(begin, text.data(), text.size());
    return {begin, text.size()};
  }

 private:
  static constexpr std::size_t kSize = 65536;
  static void* map() { return mmap(nullptr, 2 * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
  char* memory_;
};

std::string digits(Random& random, std::size_t most) {
  std::string text(1 + random.below(most), '0');
  for (char& c : text) {
    c = static_cast<char>('0' + random.below(10));
  }
  return text;
}

std::string number(Random& random) {
  std::string text = random.one_in(2) ? "-" : "";
  switch (random.below(4)) {
    case 0:
      return text + digits(random, 3) + "." + digits(random, 7);
    case 1:
      return text + digits(random, 20) + (random.one_in(2) ? "." + digits(random, 20) : "");
    case 2:
      return text + digits(random, 9) + "e" + (random.one_in(2) ? "-" : "") + digits(random, 2);
    default: {  // half way between two floats, or a little beside
      const auto low = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()) & 0x7F7FFFFFU);
      const double middle = (static_cast<double>(low) + std::nextafter(low, INFINITY)) / 2;
      char exact[200];
      std::snprintf(exact, sizeof(exact), "%.*e", static_cast<int>(random.below(60)), middle);
      return text + exact;
    }
  }
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

#ifdef __x86_64__
template <typename T>
[[gnu::target("sse4.1")]] bool wide(std::string_view text, T& out) {
  const QuickText readable(text);
  return __builtin_cpu_supports("sse4.1") != 0 && wide_number(readable.at(0), text.size(), out);
}
bool has_wide() { return __builtin_cpu_supports("sse4.1") != 0; }
#else
template <typename T>
bool wide(std::string_view, T&) {
  return false;
}
bool has_wide() { return false; }
#endif

void numbers_are_the_nearest() {
  Random random(1);
  Guarded guarded;
  std::size_t quick = 0;
  std::size_t taken_wide = 0;
  for (int i = 0; i < 100'000; ++i) {
    const std::string text = number(random);
    const float wanted = std::strtof(text.c_str(), nullptr);
    const double wanted_double = std::strtod(text.c_str(), nullptr);
    const std::string_view there = guarded.put(text);
    const auto exact = parse_number<float>(there);
    const auto exact_double = parse_number<double>(there);
    CHECK(exact && same(*exact, wanted));
    CHECK(exact_double && same(*exact_double, wanted_double));
    const QuickText readable(there);
    float fast = 0;
    double fast_double = 0;
    if (quick_number(readable.at(0), text.size(), fast)) {
      CHECK(same(fast, wanted));
      ++quick;
    }
    if (quick_number(readable.at(0), text.size(), fast_double)) {
      CHECK(same(fast_double, wanted_double));
    }
    if (wide(there, fast)) {
      CHECK(same(fast, wanted));
      ++taken_wide;
    }
    if (wide(there, fast_double)) {
      CHECK(same(fast_double, wanted_double));
    }
  }
  CHECK(quick > 25'000);  // otherwise it would be tested for nothing
  CHECK(!has_wide() || taken_wide > 25'000);
}

void whole_numbers() {
  Random random(2);
  for (int i = 0; i < 20'000; ++i) {
    const auto value = static_cast<std::int64_t>(random.bits()) >> random.below(64);
    const std::string text = std::to_string(value);
    CHECK(parse_number<std::int64_t>(text) == value);
    std::int64_t fast = 0;
    CHECK(!quick_number(QuickText(text).at(0), text.size(), fast) || fast == value);
    const bool fits = value == static_cast<std::int32_t>(value);
    CHECK(parse_number<std::int32_t>(text) == (fits ? std::optional(static_cast<std::int32_t>(value)) : std::nullopt));
  }
  for (const char* text : {"", "-", "+", "+-1", "1.0", "1e3", " 1", "1 ", "9223372036854775808", "0x1"}) {
    CHECK(!parse_number<std::int64_t>(text));
  }
  for (const char* text : {"", "-", "+", ".", "-.", "e1", "1e", "1e+", "--1", "0x1", "1 ", "1,", "nanx", "in", "i"}) {
    CHECK(!parse_number<float>(text));
    float fast = 0;
    CHECK(!quick_number(QuickText(text).at(0), std::strlen(text), fast));
    CHECK(!wide(text, fast));
  }
  CHECK(parse_number<float>("1e99999999999999999999") == std::numeric_limits<float>::infinity());
  CHECK(same(*parse_number<float>("-1e-99999999999999999999"), -0.0F));
  CHECK(same(*parse_number<double>("0." + std::string(400, '0') + "1e500"), 1e99));
  CHECK(parse_number<double>(std::string(400, '9')) == std::numeric_limits<double>::infinity());
  CHECK(same(*parse_number<double>("0e999"), 0.0));
}

// What is a record, one character after the other.
Lines reference(const std::string& text, const LineRules& rules, bool& open) {
  Lines lines;
  std::size_t begin = 0;
  bool quoted = false, field = true;  // field: one begins here
  const auto end_line = [&](std::size_t end) {
    bool content = rules.keep_blank;
    for (std::size_t i = begin; i < end && !content; ++i) {
      if (text[i] == rules.comment && rules.comment != '\0') {
        break;
      }
      content = (std::strchr(" \t\r\n", text[i]) == nullptr || text[i] == '\0') || text[i] == rules.delimiter;
    }
    if (content) {
      lines.emplace_back(begin, end);
    }
    begin = end;
  };
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (quoted) {
      if (text[i] == rules.quote) {
        if (i + 1 < text.size() && text[i + 1] == rules.quote) {
          ++i;
        } else {
          quoted = false;
        }
      }
    } else if (text[i] == '\n') {
      end_line(i + 1);
      field = true;
      continue;
    } else if (rules.quote != '\0' && text[i] == rules.quote && field) {
      quoted = true;
    }
    field = !quoted && text[i] == rules.delimiter && rules.delimiter != '\0';
  }
  open = quoted;
  if (!quoted && begin < text.size()) {
    end_line(text.size());
  }
  return lines;
}

void lines_are_found_in_any_pieces() {
  Random random(3);
  const LineRules kRules[] = {
      {.keep_blank = true}, {}, {.quote = '"', .delimiter = ','}, {.quote = '\'', .delimiter = '\t'}, {.comment = '#'}};
  for (int i = 0; i < 3000; ++i) {
    const LineRules rules = random.of(kRules);
    std::string text;
    const std::string_view letters = random.one_in(2) ? "\n\n\r \t,\"'#a" : "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n,,,\"";
    const std::size_t size = random.below(300);
    for (std::size_t k = 0; k < size; ++k) {
      text += letters[random.below(letters.size())];
    }
    bool open = false;
    const Lines wanted = reference(text, rules, open);
    Lines found;
    const auto add = [&](std::uint64_t begin, std::uint64_t end) { found.emplace_back(begin, end); };
    LineFramer framer(rules);
    const std::size_t most = random.of({std::size_t{1}, std::size_t{5}, std::size_t{70}, std::size_t{300}});
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t piece = std::min(1 + random.below(most), text.size() - at);
      framer.feed(std::string(text, at, piece), add);
      at += piece;
    }
    CHECK(framer.finish(add) == !open);
    CHECK(found == wanted);
  }
}

// Decodes `text`, alone at the end of memory: whether it is a record.
template <typename Codec>
bool decodes(const Codec& codec, std::string_view text, const File& file, Batch& batch, typename Codec::State& state) {
  try {
    codec.decode(bytes_of(text), {0, 0, text.size(), 0}, file, batch.rows, batch, state);
  } catch (const DataError& error) {
    CHECK(error.offset() <= text.size());
    return false;
  }
  return true;
}

// Records with bytes changed, left out and put in: none reads past its end, and all that is no record is an error.
template <typename Codec>
void mutate(const Codec& codec, const std::vector<std::string>& seeds, std::string_view letters, std::uint64_t seed) {
  Random random(seed);
  Guarded guarded;
  const auto file = file_of("a\n");
  Batch batch(codec.fields(), 2);
  typename Codec::State state;
  std::size_t good = 0, bad = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = seeds[random.below(seeds.size())];
    for (std::size_t changes = random.below(4); changes != 0; --changes) {
      const std::size_t at = random.below(text.size() + 1);
      const std::size_t length = random.below(3);
      text.replace(at, std::min(length, text.size() - at), random.below(3), letters[random.below(letters.size())]);
    }
    text.resize(random.one_in(4) ? random.below(text.size() + 1) : text.size());
    ++(decodes(codec, guarded.put(text), *file, batch, state) ? good : bad);
  }
  CHECK(good > 100 && bad > 100);
}

void csv_stays_in_the_record() {
  const auto fixed = [](const char* name, DType dtype, std::uint64_t count) {
    return Field{name, Kind::fixed, dtype, {count}};
  };
  const CsvCodec codec({}, 6,
                       {{{"text", Kind::ragged, DType::uint8, {}}, 5, 1},
                        {fixed("a", DType::float32, 2), 0, 2},
                        {fixed("b", DType::float64, 2), 1, 2},
                        {fixed("c", DType::int64, 1), 3, 1},
                        {fixed("d", DType::int32, 1), 4, 1}});
  mutate(codec, {"1.25,-3,7.5e3,123456789,-1,text\n", "\"1\",\" 2\",NA,\"4\",5,\"a\"\"b\"\r\n", ",,,0,0,"},
         "0123.,-+e\"\n x", 4);
}

void libsvm_stays_in_the_record() {
  const LibsvmCodec codec({.features = 1000, .queries = true});
  mutate(codec, {"1 qid:1 1:0.5 20:-3e5 1000:7 # c\n", "-1.5 qid:-3", "0.25 qid:7 5:1 6:2 7:3 8:4 9:5\r\n"},
         "0123 :.-#q\t", 5);
}

void json_stays_in_the_record() {
  const JsonCodec codec({{"s", Kind::ragged, DType::uint8, {}},
                         {"v", Kind::fixed, DType::float32, {2}},
                         {"w", Kind::ragged, DType::int64, {}},
                         {"b", Kind::fixed, DType::boolean, {}}});
  mutate(codec,
         {R"({"s":"a\u00e9\ud83d\ude00\n","v":[1.5,-2],"w":[],"b":true})",
          R"({"b": false, "x": {"y": [1, {"z": "]}"}]}, "w": [1,2,3], "v": [null, 0.1], "s": ""})"},
         "\"\\{}[],:0123.eun ", 6);
}

void failed_rows_change_nothing() {
  const auto file = file_of("x\n");
  const LibsvmCodec codec({.features = 9});
  Batch batch(codec.fields(), 2);
  LibsvmCodec::State state;
  CHECK(decodes(codec, "1 1:1 2:2\n", *file, batch, state));
  ++batch.rows;
  CHECK(!decodes(codec, "1 1:1 2:2 2:2\n", *file, batch, state));
  CHECK(decodes(codec, "1 3:3\n", *file, batch, state));
  const Column& column = batch.columns[1];
  const auto* keys = reinterpret_cast<const std::uint64_t*>(column.keys.data());
  CHECK((column.offsets == std::vector<std::int64_t>{0, 2, 3}));
  CHECK(keys[0] == 0 && keys[1] == 1 && keys[2] == 2);
}

void scans_are_the_same_mapped_and_read() {
  Random random(7);
  std::string content = "\xEF\xBB\xBFname,\"other\n\"\n";
  while (content.size() < (std::size_t{9} << 20)) {  // more than two pieces
    content += random.one_in(2) ? "\"" + std::string(random.below(3000), '\n') + "\"\"\",1\n"
                                : std::string(random.below(3000), 'x') + ",2\r\n\n";
  }
  const LineScan scan{.rules = {.quote = '"', .delimiter = ','}, .header = true};
  const FileIndex mapped = scan_lines(*file_of(content), scan);
  std::vector<std::string> seen;
  const auto file = file_of(content, Access::read);
  const FileIndex pieces = scan_lines(*file, scan, [&seen](std::string_view line) { seen.emplace_back(line); });
  CHECK(mapped.note() == "name,\"other\n\"" && pieces.note() == mapped.note());
  CHECK(mapped.records() == pieces.records() && mapped.records() == seen.size());
  for (std::uint64_t i = 0; i < mapped.records(); ++i) {
    const auto [offset, bytes] = mapped.at(i);
    CHECK(mapped.at(i) == pieces.at(i));
    const std::string_view line(content.data() + offset, bytes);
    CHECK(without_line_end(line) == seen[i]);
  }
}

}  // namespace

int main(int, char** arguments) {
  folder = arguments[1];
  check::run("numbers are the nearest", numbers_are_the_nearest);
  check::run("whole numbers", whole_numbers);
  check::run("lines are found in any pieces", lines_are_found_in_any_pieces);
  check::run("csv stays in the record", csv_stays_in_the_record);
  check::run("libsvm stays in the record", libsvm_stays_in_the_record);
  check::run("json stays in the record", json_stays_in_the_record);
  check::run("failed rows change nothing", failed_rows_change_nothing);
  check::run("scans are the same mapped and read", scans_are_the_same_mapped_and_read);
  return check::failures == 0 ? 0 : 1;
}

// Archives and files: what Python's own writers do not make, threads on one source, decoded rows, images.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "decoded_source.h"
#include "files_source.h"
#include "jpeg.h"
#include "mds.h"
#include "tar.h"

using namespace launcher::data;

namespace {

std::string folder;

std::shared_ptr<const File> file_of(const std::string& name, const std::string& content,
                                    Access access = Access::mapped) {
  const std::string path = folder + "/data_archives_test." + name;
  std::remove(path.c_str());
  std::ofstream(path, std::ios::binary) << content;
  return std::make_shared<File>(path, access);
}

struct Header {
  std::string name;
  char type = '0';
  std::string size = "";         // the 12 bytes of the field; empty: octal of the content
  std::string magic = "ustar";   // none: of the time before POSIX
  bool signed_checksum = false;  // as some old writers summed
};

std::string member(const Header& header, const std::string& content) {
  std::string block(512, '\0');
  block.replace(0, header.name.size(), header.name);
  std::array<char, 13> octal{};
  std::snprintf(octal.data(), octal.size(), "%011zo", content.size());
  block.replace(124, 12, header.size.empty() ? std::string(octal.data(), 12) : header.size);
  block.replace(148, 8, 8, ' ');
  block[156] = header.type;
  block.replace(257, header.magic.size(), header.magic);
  int sum = 0;
  for (const char c : block) {
    sum += header.signed_checksum ? static_cast<signed char>(c) : static_cast<unsigned char>(c);
  }
  std::array<char, 8> digits{};
  std::snprintf(digits.data(), digits.size(), "%06o", static_cast<unsigned>(sum));
  block.replace(148, 7, std::string(digits.data(), 7));
  return block + content + std::string((512 - content.size() % 512) % 512, '\0');
}

const std::string kEnd(1024, '\0');

std::string text_of(const Batch& batch, std::size_t column, std::size_t row) {
  const Column& values = batch.columns[column];
  const auto begin = static_cast<std::size_t>(values.offsets[row]);
  return {reinterpret_cast<const char*>(values.values.data()) + begin,
          static_cast<std::size_t>(values.offsets[row + 1]) - begin};
}

// Field `column` of all records, however the archive is read.
std::vector<std::string> read_tar(const std::string& content, std::size_t column = 1) {
  std::vector<std::string> first;
  for (const Access access : {Access::mapped, Access::read}) {
    const auto file = file_of("tar", content, access);
    const Index index({file}, {scan_tar(*file, false)});
    const auto source = tar_source(index, {{"key"}, {"txt"}}, true);
    const auto scratch = source->make_scratch();
    std::vector<std::string> found;
    for (std::uint64_t record = 0; record < index.records(); ++record) {
      Batch batch(source->fields(), 1);
      source->fetch({&record, 1}, batch, *scratch);
      found.push_back(text_of(batch, column, 0));
    }
    CHECK(access == Access::mapped || found == first);
    first = found;
  }
  return first;
}

void old_and_odd_headers() {
  std::string binary(12, '\0');
  binary[0] = static_cast<char>(0x80);
  binary[11] = 5;
  const std::string spaced = "         5 " + std::string(1, '\0');
  const std::string archive = member({.name = "1.txt", .size = binary}, "first") +
                              member({.name = "2.txt", .size = spaced, .magic = ""}, "other") +
                              member({.name = "old/", .magic = ""}, "") +
                              member({.name = "old/\xc3\xa9.txt", .signed_checksum = true}, "signed") +
                              member({.name = "4.txt", .type = '7'}, "contiguous");
  CHECK(read_tar(archive + kEnd) == (std::vector<std::string>{"first", "other", "signed", "contiguous"}));
  CHECK(read_tar(archive + kEnd, 0) == (std::vector<std::string>{"1", "2", "old/\xc3\xa9", "4"}));
  // One block of zeros at the very end is accepted, as tar does.
  CHECK(read_tar(archive + std::string(512, '\0')).size() == 4);
}

void refused_headers() {
  const auto refused = [](const std::string& archive, Problem problem, std::uint64_t offset, const char* text) {
    for (const Access access : {Access::mapped, Access::read}) {
      CHECK_THROWS(DataError, scan_tar(*file_of("tar", archive, access), false), CHECK(error.problem() == problem);
                   CHECK(error.offset() == offset); CHECK(std::strstr(error.what(), text) != nullptr));
    }
  };
  std::string huge(12, '\xff');
  const std::string good = member({.name = "1.txt"}, "first");
  refused(good + member({.name = "2.txt", .size = huge}, "") + kEnd, Problem::malformed, 1024, "size is no number");
  huge[0] = static_cast<char>(0x80);
  refused(good + member({.name = "2.txt", .size = huge}, "") + kEnd, Problem::malformed, 1024, "size is no number");
  huge.replace(1, 3, 3, '\0');
  huge[4] = 0x7f;
  refused(good + member({.name = "2.txt", .size = huge}, "") + kEnd, Problem::truncated, 1024, "ends inside a member");
  refused(good + member({.name = "2.txt", .size = "00000000008 "}, "") + kEnd, Problem::malformed, 1024,
          "size is no number");
  refused(good + member({.name = "s", .type = 'S'}, "") + kEnd, Problem::malformed, 1024, "sparse");
  refused(member({.name = "g", .type = 'g'}, "12 path=abc\n") + good + kEnd, Problem::malformed, 0, "global pax");
  for (const char* pax : {"path=abc\n", "99 path=abc\n", "2 path=abc\n", "12 path=abcx", "11 pathabc\n", "-1 a=b\n"}) {
    refused(member({.name = "x", .type = 'x'}, pax) + good + kEnd, Problem::malformed, 512, "pax header");
  }
  refused(member({.name = "x", .type = 'x'}, "20 size=99999999999999999999\n") + good + kEnd, Problem::malformed, 512,
          "pax header");
  refused(member({.name = "x", .type = 'x'}, "29 size=99999999999999999999\n") + good + kEnd, Problem::malformed, 512,
          "a decimal number was expected");
  refused(good + member({.name = "L", .type = 'L'}, "long") + kEnd, Problem::malformed, 1024, "no member follows");
}

// The same rows, whichever thread fetches them.
void threads_share_a_source(const std::shared_ptr<const Source>& source) {
  std::vector<std::uint64_t> records;
  for (std::uint64_t i = 0; i < 64; ++i) {
    records.push_back(i * 7 % source->records());
  }
  const auto fetch = [&] {
    Batch batch(source->fields(), records.size());
    const auto scratch = source->make_scratch();
    source->fetch(records, batch, *scratch);
    CHECK(batch.rows == records.size());
    std::string bytes;
    for (std::size_t i = 0; i < source->fields().size(); ++i) {
      const Field& field = source->fields()[i];
      const auto values = field.kind == Kind::fixed ? batch.rows * field.values()
                                                    : static_cast<std::uint64_t>(batch.columns[i].offsets[batch.rows]);
      bytes.append(reinterpret_cast<const char*>(batch.columns[i].values.data()), values * size_of(field.dtype));
    }
    return bytes;
  };
  const std::string wanted = fetch();
  std::atomic<int> equal{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] { equal += fetch() == wanted ? 1 : 0; });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(equal == 3);
}

void threads_on_each_source() {
  std::string archive;
  std::vector<Entry> entries;
  for (int i = 0; i < 20; ++i) {
    const std::string name = "s" + std::to_string(i) + ".txt";
    archive += member({.name = name}, std::string(static_cast<std::size_t>(i) * 50, 'x'));
    const auto file = file_of(name, name);
    entries.push_back({"data_archives_test." + name, file->size(), file->modified_ns()});
  }
  for (const Access access : {Access::mapped, Access::read}) {
    const auto file = file_of("tar", archive + kEnd, access);
    threads_share_a_source(tar_source(Index({file}, {scan_tar(*file, false)}), {{"txt"}, {"key"}}, true));
  }
  threads_share_a_source(files_source(folder, entries, std::vector<std::int64_t>(20, 4)));
  CHECK_THROWS(std::invalid_argument, files_source(folder, entries, {1, 2}));
}

void decoded_rows() {
  // Rows of 24 bytes: an int16, padding, where the ragged values are; then the values.
  std::string rows(48, '\0'), values;
  const std::array<std::string, 2> texts = {"abc", ""};
  for (std::size_t i = 0; i < 2; ++i) {
    rows[i * 24] = static_cast<char>(i + 1);
    const std::uint64_t run[2] = {48 + values.size(), texts[i].size()};
    std::memcpy(rows.data() + i * 24 + 8, run, sizeof run);
    values += texts[i];
  }
  const std::vector<DecodedField> fields = {{{"n", Kind::fixed, DType::int16, {}}, 0},
                                            {{"t", Kind::ragged, DType::uint8, {}}, 8}};
  const auto source = decoded_source({file_of("rows", rows + values), 2, 24, fields, {{"a", 0}, {"b", 0}, {"c", 1}}});
  const auto scratch = source->make_scratch();
  Batch batch(source->fields(), 3);
  source->fetch(std::array<std::uint64_t, 3>{1, 0, 1}, batch, *scratch);
  CHECK(batch.rows == 3 && text_of(batch, 1, 0).empty() && text_of(batch, 1, 1) == "abc");
  CHECK(batch.columns[0].fixed_row<std::int16_t>(0, 1)[0] == 2);
  CHECK(source->describe(Problem::mismatch, 0, "x").file() == "b" &&
        source->describe(Problem::mismatch, 1, "x").record() == 0);

  const auto file = file_of("rows", rows);
  CHECK_THROWS(std::invalid_argument, decoded_source({file, 3, 24, fields, {{"a", 0}}}));
  CHECK_THROWS(std::invalid_argument, decoded_source({file, 2, 16, fields, {{"a", 0}}}));
  CHECK_THROWS(std::invalid_argument, decoded_source({file, 2, 24, fields, {}}));
  const auto cut = decoded_source({file, 2, 24, fields, {{"a", 0}}});  // whose values are not there
  Batch none(cut->fields(), 1);
  CHECK_THROWS(DataError, cut->fetch(std::array<std::uint64_t, 1>{0}, none, *scratch),
               CHECK(error.problem() == Problem::changed));
}

void resized_pixels() {
  std::vector<std::uint16_t> line;
  const Image image{2, 2, {0, 100, 200, 40}};
  std::array<std::uint8_t, 16> out{};
  resize(image, {0, 0, 2, 2}, 2, 2, 1, out.data(), line);
  CHECK(std::memcmp(out.data(), image.pixels.data(), 4) == 0);
  resize(image, {0, 0, 2, 2}, 1, 1, 1, out.data(), line);
  CHECK(out[0] == 85);
  resize(image, {0, 0, 2, 2}, 4, 4, 1, out.data(), line);
  CHECK(out[0] == 0 && out[1] == 25 && out[2] == 75 && out[3] == 100 && out[15] == 40);
  const Image colours{1, 1, {1, 2, 3}};
  resize(colours, {0, 0, 1, 1}, 2, 1, 3, out.data(), line);
  CHECK(out[3] == 1 && out[4] == 2 && out[5] == 3);
}

void libraries_that_are_none() {
  std::string why;
  CHECK(open_turbojpeg("/missing/libturbojpeg.so.0", why) == nullptr);
  CHECK(why == "/missing/libturbojpeg.so.0 is not there");
  why.clear();
  CHECK(open_turbojpeg("libc.so.6", why) == nullptr && why == "libc.so.6 lacks functions");
  CHECK(open_libjpeg("libc.so.6", why) == nullptr && why.find("; libc.so.6 ") != std::string::npos);
}

}  // namespace

int main(int, char** arguments) {
  folder = arguments[1];
  check::run("old_and_odd_headers", old_and_odd_headers);
  check::run("refused_headers", refused_headers);
  check::run("threads_on_each_source", threads_on_each_source);
  check::run("decoded_rows", decoded_rows);
  check::run("resized_pixels", resized_pixels);
  check::run("libraries_that_are_none", libraries_that_are_none);
  return check::failures == 0 ? 0 : 1;
}

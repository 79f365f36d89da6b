// A tar archive: both ways to read it must find the same samples, inside the file, and each can be taken apart again.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>

#include "../fuzz.h"
#include "tar.h"

using namespace launcher;
using fuzz::require;

namespace {

void set_checksum(char* block) {
  std::memset(block + 148, ' ', 8);
  unsigned sum = 0;
  for (std::size_t i = 0; i < 512; ++i) {
    sum += static_cast<unsigned char>(block[i]);
  }
  std::snprintf(block + 148, 8, "%06o", sum);
}

std::string header(const std::string& name, const std::string& content, char type) {
  std::string block(512, '\0');
  block.replace(0, name.size(), name);
  std::array<char, 13> size;
  std::snprintf(size.data(), size.size(), "%011zo", content.size());
  block.replace(124, 11, size.data());
  block[156] = type;
  block.replace(257, 8, std::string("ustar\00000", 8));
  set_checksum(block.data());
  return block + content + std::string((512 - content.size() % 512) % 512, '\0');
}

void check_records(const std::shared_ptr<const data::File>& file, const data::FileIndex& part) {
  const data::Index index({file}, {part});
  if (index.records() == 0) {
    return;
  }
  std::vector<data::TarField> fields = {{"key"}};
  for (const std::string& extension : data::tar_extensions(index)) {
    if (std::none_of(fields.begin(), fields.end(), [&](const auto& field) { return field.name == extension; })) {
      fields.push_back({extension, extension == "cls"});
    }
  }
  const auto source = data::tar_source(index, fields, false);
  const auto scratch = source->make_scratch();
  for (std::uint64_t record = 0; record < index.records(); ++record) {
    data::Batch batch(source->fields(), 1);
    try {
      source->fetch({&record, 1}, batch, *scratch);
      require(batch.rows == 1 && batch.columns[0].offsets[1] > 0, "a sample has a key");
    } catch (const data::DataError& error) {
      require(error.problem() == data::Problem::mismatch, "a sample that was found holds together");
    }
  }
}

void fuzz_archive(const std::uint8_t* bytes, std::size_t size) {
  const fuzz::MemoryFile memory(bytes, size);
  const auto mapped = memory.open(data::Access::mapped), read = memory.open(data::Access::read);
  data::FileIndex skipped;
  try {
    skipped = data::scan_tar(*mapped, true);
  } catch (const data::DataError& error) {
    require(error.offset() == 0, "only what is compressed is refused as a whole");
    return;
  }
  const data::FileIndex other = data::scan_tar(*read, true);
  require(skipped.records() == other.records(), "a file is the same mapped and read");
  std::uint64_t end = 0;
  for (std::uint64_t i = 0; i < skipped.records(); ++i) {
    const auto [offset, length] = skipped.at(i);
    require(skipped.at(i) == other.at(i), "a sample is at the same place");
    require(offset >= end && length >= 512 && offset <= size && length <= size - offset, "samples follow each other");
    end = offset + length;
  }
  for (const data::Damage& damage : skipped.damage()) {
    require(damage.offset <= size && damage.bytes <= size - damage.offset, "damage is inside the file");
  }
  try {
    const data::FileIndex strict = data::scan_tar(*mapped, false);
    require(strict.records() == skipped.records() && skipped.damage().empty(), "no error, so nothing to skip");
  } catch (const data::DataError& error) {
    require(!skipped.damage().empty() && error.offset() <= size, "an error is what would be skipped");
  }
  check_records(mapped, skipped);
  check_records(read, other);
}

}  // namespace

std::vector<std::string> fuzz::seeds() {
  const std::string end(1024, '\0');
  const std::string one = header("a/1.jpg", "picture", '0') + header("a/1.cls", "7", '0');
  const std::string two = header("a/2.jpg", std::string(600, 'x'), '0') + header("a/2.cls", "-12\n", '0');
  const std::string named = header("././@LongLink", "long/" + std::string(120, 'n') + ".jpg", 'L') +
                            header("long", "by GNU", '0') + header("link", "", '2');
  const std::string pax = header("x", "12 path=3.cls\n13 path=3.cls\n", 'x') + header("y", "5", '0') +
                          header("x", "10 size=4\n15 comment=none\n", 'x') + header("4.jpg", "four", '0');
  return {one + two + end, header("a/", "", '5') + one + named + two + end, pax + one + end,
          one + two + one + two + end};
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  fuzz_archive(bytes, size);
  // A checksum keeps nearly all changes of a header from being looked at: once more with checksums that hold.
  std::string mended(reinterpret_cast<const char*>(bytes), size);
  for (std::size_t at = 0; at + 512 <= size; at += 512) {
    if (mended.compare(at + 257, 5, "ustar") == 0) {
      set_checksum(mended.data() + at);
    }
  }
  fuzz_archive(reinterpret_cast<const std::uint8_t*>(mended.data()), size);
  return 0;
}

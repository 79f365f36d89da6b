// Files, what happens when they are cut while they are mapped, lists of them, indexes and their sidecars.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "catalogue.h"
#include "check.h"
#include "extents.h"
#include "file.h"
#include "index.h"
#include "sidecar.h"

namespace {

using namespace launcher::data;
using Records = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

std::string folder;
constexpr std::size_t kPage = 4096;

std::string write_file(const std::string& name, const std::string& content) {
  const std::string path = folder + "/" + name;
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string pattern(std::size_t bytes) {
  std::string text(bytes, '\0');
  for (std::size_t i = 0; i < bytes; ++i) {
    text[i] = static_cast<char>('a' + i * 7 % 23);
  }
  return text;
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

FileIndex index_of(const Records& records) {
  FileIndex index;
  for (const auto& [offset, bytes] : records) {
    index.add(offset, bytes);
  }
  return index;
}

bool same(const FileIndex& index, const Records& records) {
  bool good = index.records() == records.size();
  for (std::size_t i = 0; good && i < records.size(); ++i) {
    good = index.at(i) == records[i];
  }
  return good;
}

Records random_records(std::mt19937_64& random, std::size_t count, bool gaps, std::uint64_t longest) {
  Records records;
  std::uint64_t at = random() % 100;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t bytes = random() % (longest + 1);
    records.emplace_back(at, bytes);
    at += bytes + (gaps && random() % 5 == 0 ? random() % 1000 : 0);
  }
  return records;
}

void an_index_gives_back_what_was_added() {
  std::mt19937_64 random(1);
  for (const std::size_t count : {0u, 1u, 63u, 64u, 65u, 1000u}) {
    for (const std::uint64_t longest : {std::uint64_t{0}, std::uint64_t{50}, std::uint64_t{1} << 31}) {
      for (const bool gaps : {false, true}) {
        const Records records = random_records(random, count, gaps, longest);
        CHECK(same(index_of(records), records));
      }
    }
  }
  const std::uint64_t huge = std::uint64_t{5} << 32;  // records that 32 bits can not hold
  const Records wide = {{0, 10}, {10, huge}, {huge + 10, 3}, {3 * huge, 5}};
  CHECK(same(index_of(wide), wide));
  const Records far = {{0, 10}, {huge, 10}, {huge + 10, 10}};
  CHECK(same(index_of(far), far));
  FileIndex index = index_of({{10, 5}});
  CHECK_THROWS(std::invalid_argument, index.add(14, 1));
  CHECK_THROWS(std::invalid_argument, index.add(15, ~std::uint64_t{0}));
}

void places_count_over_all_files() {
  Files files;
  for (const char* name : {"one", "none", "two", "last"}) {
    files.push_back(std::make_shared<File>(write_file(name, std::string(100, 'x'))));
  }
  const Index index(files, {index_of({{0, 10}, {10, 20}}), FileIndex(), index_of({{5, 5}}), FileIndex()});
  CHECK(index.records() == 3);
  const Place place = index.place(2);
  CHECK(place.file == 2 && place.offset == 5 && place.bytes == 5 && place.number == 0);
  CHECK(index.place(1).file == 0 && index.place(1).number == 1);
  CHECK(index.bytes() == 35);
  const Index copy = index;
  CHECK(copy.place(2).offset == 5);
  CHECK_THROWS(std::invalid_argument, Index(files, std::vector<FileIndex>()));
  CHECK_THROWS(DataError, Index(files, {FileIndex(), FileIndex(), FileIndex(), index_of({{0, 101}})}),
               CHECK(error.problem() == Problem::changed));
}

void files_are_mapped_or_read() {
  const std::string content = pattern(3 * kPage + 100);
  const std::string path = write_file("file", content);
  std::vector<std::byte> memory(content.size());
  for (const Access access : {Access::automatic, Access::mapped, Access::read}) {
    const File file(path, access);
    CHECK(file.size() == content.size() && file.mapped() == (access != Access::read));
    CHECK(text_of(file.view(0, content.size(), memory.data())) == content);
    CHECK(text_of(file.view(5000, 77, memory.data())) == content.substr(5000, 77));
    CHECK(file.view(content.size(), 0, memory.data()).empty());
    CHECK_THROWS(DataError, file.view(content.size() - 1, 2, memory.data()));
    CHECK_THROWS(DataError, file.view(~std::uint64_t{0}, 2, memory.data()));
    file.check_faults();
    file.check_unchanged();
  }
  const File empty(write_file("empty", ""));
  CHECK(empty.mapped() && empty.contents().empty());
  CHECK_THROWS(DataError, File(folder + "/nothing"), CHECK(error.problem() == Problem::changed));
  CHECK_THROWS(DataError, File{folder}, CHECK(error.problem() == Problem::unreadable));
  const std::string fifo = folder + "/fifo";
  CHECK(mkfifo(fifo.c_str(), 0600) == 0);
  CHECK_THROWS(DataError, File{fifo}, CHECK(error.problem() == Problem::unreadable));
}

void a_file_that_changes_is_noticed() {
  const std::string path = write_file("changing", pattern(100));
  const File file(path);
  std::ofstream(path, std::ios::app) << "more";
  CHECK_THROWS(DataError, file.check_unchanged(), CHECK(error.problem() == Problem::changed));
  const File read(path, Access::read);
  CHECK(truncate(path.c_str(), 50) == 0);
  std::vector<std::byte> memory(100);
  CHECK_THROWS(DataError, read.view(40, 20, memory.data()),
               CHECK(error.problem() == Problem::changed && error.offset() == 50));
}

// F20: a file that is cut while it is mapped reads as zeros, and everybody who asks is told.
void a_mapped_file_that_is_cut_gives_an_error() {
  constexpr std::size_t kPages = 64;
  const std::string path = write_file("cut", pattern(kPages * kPage));
  const File file(path), other(write_file("whole", pattern(kPage)));
  const std::uint64_t before = file_faults();
  CHECK(truncate(path.c_str(), 2 * kPage + 10) == 0);
  std::vector<std::byte> memory(kPages * kPage);
  std::memcpy(memory.data(), file.contents().data(), 3 * kPage);
  CHECK(file_faults() == before);  // the rest of the last page is zeros: only a look at the size tells
  file.check_faults();
  CHECK_THROWS(DataError, file.check_unchanged());

  std::memcpy(memory.data(), file.contents().data() + 5 * kPage + 100, 10);
  CHECK(memory[0] == std::byte{0} && file_faults() == before + 1);
  file.check_faults(0, 5 * kPage);
  file.check_faults(6 * kPage, kPage);
  CHECK_THROWS(DataError, file.check_faults(5 * kPage + 200, 1),
               CHECK(error.problem() == Problem::changed && error.offset() == 5 * kPage + 200));
  CHECK_THROWS(DataError, file.check_faults(0, 6 * kPage), CHECK(error.offset() == 5 * kPage));
  CHECK_THROWS(DataError, file.check_faults(), CHECK(error.file() == path));

  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&file] {
      std::byte sum{0};
      for (std::size_t page = 3; page < kPages; ++page) {
        sum |= file.contents()[page * kPage];
      }
      CHECK(sum == std::byte{0});
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (std::size_t page = 3; page < kPages; ++page) {
    CHECK_THROWS(DataError, file.check_faults(page * kPage, kPage));
  }
  CHECK(file_faults() - before < 4 * kPages);
  other.check_faults();
}

// F20: what is no file of ours goes where it went before.
void other_bus_errors_go_to_the_handler_before() {
  const std::string path = write_file("foreign", pattern(2 * kPage));
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    struct sigaction theirs = {};
    theirs.sa_handler = [](int) { _exit(42); };
    sigaction(SIGBUS, &theirs, nullptr);
    const File watched(write_file("watched", pattern(kPage)));  // ours is installed over theirs
    const int descriptor = open(path.c_str(), O_RDONLY);
    const auto* memory =
        static_cast<const volatile char*>(mmap(nullptr, 2 * kPage, PROT_READ, MAP_SHARED, descriptor, 0));
    if (truncate(path.c_str(), 0) == 0) {
      static_cast<void>(memory[kPage]);
    }
    _exit(1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 42);
}

// F21: what is read of a file comes in pieces of 1 MiB, each once while there is room for it.
void extents_are_read_once() {
  Extents cache;
  const std::string content = pattern(3 * kExtentBytes + 1000);
  std::uint64_t fetched = 0, least = ~std::uint64_t{0};
  const auto read = [&](std::uint64_t offset, std::span<std::byte> memory) {
    std::memcpy(memory.data(), content.data() + offset, memory.size());
    fetched += memory.size();
    least = std::min<std::uint64_t>(least, memory.size());
  };
  std::mt19937_64 random(2);
  std::vector<std::byte> memory(5000);
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t offset = random() % (content.size() - memory.size());
    const std::size_t bytes = random() % memory.size();
    cache.copy(7, content.size(), offset, {memory.data(), bytes}, read);
    CHECK(std::memcmp(memory.data(), content.data() + offset, bytes) == 0);
  }
  cache.copy(7, content.size(), content.size() - memory.size(), memory, read);  // into the next extent
  CHECK(std::memcmp(memory.data(), content.data() + content.size() - memory.size(), memory.size()) == 0);
  CHECK(fetched == content.size() && least == 1000);
  cache.drop(7);
  cache.copy(7, content.size(), 0, {memory.data(), 1}, read);
  CHECK(fetched == content.size() + kExtentBytes);
  CHECK_THROWS(std::runtime_error, cache.copy(8, 10, 0, {memory.data(), 1}, [](std::uint64_t, std::span<std::byte>) {
    throw std::runtime_error("refused");
  }));
  cache.copy(8, 10, 0, {memory.data(), 1}, read);  // and tried again
}

void lists_are_sorted_by_bytes() {
  const std::string root = folder + "/list";
  std::filesystem::create_directories(root + "/b/deep");
  for (const char* name : {"b/deep/1", "b/2", "b.txt", "a", "Z", "_hidden", ".hidden", "b/_not", "\xc3\xa9"}) {
    std::ofstream(root + "/" + name) << name;
  }
  std::filesystem::create_symlink(root + "/a", root + "/link");
  std::filesystem::create_directory_symlink(root, folder + "/channel");
  const auto names = [](const std::vector<Entry>& entries) {
    std::string all;
    for (const Entry& entry : entries) {
      all += entry.path + " ";
    }
    return all;
  };
  CHECK(names(list_files(root, {})) == "Z a b.txt b/2 b/deep/1 \xc3\xa9 ");
  CHECK(names(list_files(folder + "/channel", {})) == "Z a b.txt b/2 b/deep/1 \xc3\xa9 ");
  CHECK(names(list_files(root, {true, true})) == ".hidden Z _hidden a b.txt b/2 b/_not b/deep/1 link \xc3\xa9 ");
  CHECK(names(list_files(root + "/a", {})) == "a ");
  std::filesystem::create_directory_symlink(root, root + "/b/up");
  CHECK_THROWS(DataError, list_files(root, {false, true}), CHECK(error.problem() == Problem::malformed));
  CHECK_THROWS(DataError, list_files(root + "/nothing", {}), CHECK(error.problem() == Problem::changed));
}

struct Saved {
  std::string path = folder + "/.sidecar";
  std::vector<Entry> files = {{"a", 1 << 20, 5}, {"b", 1 << 20, 6}, {"c", std::uint64_t{1} << 40, 7}, {"empty", 0, 8}};
  std::vector<Records> records;
  std::vector<std::shared_ptr<const FileIndex>> parts;

  Saved() {
    std::mt19937_64 random(3);
    records = {random_records(random, 200, false, 100), random_records(random, 150, true, 100),
               Records{{0, std::uint64_t{6} << 32}, {std::uint64_t{6} << 32, 1}}, Records{}};
    for (const Records& some : records) {
      FileIndex part = index_of(some);
      if (parts.size() == 1) {
        part.add_damage({17, 4, "bad magic"});
        part.set_note("{\"base\": 1}");
      }
      parts.push_back(std::make_shared<const FileIndex>(std::move(part)));
    }
    save_index(path, "format", files, parts);
  }
};

void a_sidecar_gives_back_what_was_saved() {
  const Saved saved;
  auto loaded = load_index(saved.path, "format", saved.files);
  for (std::size_t i = 0; i < saved.files.size(); ++i) {
    CHECK(loaded[i] && same(*loaded[i], saved.records[i]));
  }
  CHECK(loaded[1]->damage().size() == 1 && loaded[1]->damage()[0].text == "bad magic");
  CHECK(loaded[1]->note() == "{\"base\": 1}");
  CHECK_THROWS(std::invalid_argument, loaded[0]->add(~std::uint64_t{0} / 2, 1));
  std::vector<std::shared_ptr<const FileIndex>> again;
  for (const auto& part : loaded) {
    again.push_back(std::make_shared<const FileIndex>(*part));
  }
  save_index(saved.path + "2", "format", saved.files, again);
  CHECK(read_file(saved.path) == read_file(saved.path + "2"));

  auto others = saved.files;
  others[0].modified_ns = 6;
  others[1].size = 5;
  others[2].path = "d";
  loaded = load_index(saved.path, "format", others);
  CHECK(!loaded[0] && !loaded[1] && !loaded[2] && loaded[3]);
  CHECK(load_index(saved.path, "format", others, true)[0]);
  CHECK_THROWS(DataError, load_index(saved.path, "other", saved.files), CHECK(error.problem() == Problem::malformed));
  CHECK_THROWS(DataError, load_index(folder + "/no", "", {}), CHECK(error.problem() == Problem::changed));
  CHECK_THROWS(DataError, save_index(folder + "/no/sidecar", "", {}, {}),
               CHECK(error.problem() == Problem::unreadable));
}

// As native/data/sidecar.cpp has it: to give damaged tables a sum that holds.
std::uint64_t checksum(const std::string& bytes) {
  const auto mix = [](std::uint64_t sum, std::uint64_t word) {
    sum = (sum ^ word) * 0x9E3779B97F4A7C15;
    return sum ^ (sum >> 32);
  };
  std::array<std::uint64_t, 4> sums = {1, 2, 3, 4}, words{};
  std::size_t at = 0;
  for (; bytes.size() - at >= sizeof words; at += sizeof words) {
    std::memcpy(words.data(), bytes.data() + at, sizeof words);
    for (std::size_t i = 0; i < 4; ++i) {
      sums[i] = mix(sums[i], words[i]);
    }
  }
  words = {};
  std::memcpy(words.data(), bytes.data() + at, bytes.size() - at);
  std::uint64_t all = bytes.size();
  for (std::size_t i = 0; i < 4; ++i) {
    all = mix(all, mix(sums[i], words[i]));
  }
  return all;
}

// Whatever a sidecar says: an error, or an index that stays within its files.
void no_sidecar_is_trusted() {
  const Saved saved;
  const std::string good = read_file(saved.path), bad = saved.path + ".bad";
  int refused = 0;
  const auto try_it = [&](const std::string& content) {
    std::ofstream(bad, std::ios::binary) << content;
    try {
      const auto loaded = load_index(bad, "format", saved.files);
      for (std::size_t i = 0; i < loaded.size(); ++i) {
        for (std::uint64_t n = 0; loaded[i] && n < loaded[i]->records(); ++n) {
          const auto [offset, bytes] = loaded[i]->at(n);
          CHECK(offset <= saved.files[i].size && bytes <= saved.files[i].size - offset);
        }
      }
    } catch (const DataError& error) {
      refused += error.problem() == Problem::malformed ? 1 : 0;
    }
  };
  for (std::size_t size = 0; size < 200; ++size) {
    try_it(good.substr(0, size * good.size() / 200));
  }
  CHECK(refused == 200);
  std::uint64_t table = 0, bytes = 0;
  std::memcpy(&table, good.data() + 24, sizeof table);
  std::memcpy(&bytes, good.data() + 32, sizeof bytes);
  std::mt19937_64 random(4);
  refused = 0;
  for (std::uint64_t at = 0; at + 8 <= bytes; ++at) {
    const std::array<std::uint64_t, 4> values = {0, ~std::uint64_t{0}, random() % 5000, std::uint64_t{1} << 61};
    std::string content = good;
    std::memcpy(content.data() + table + at, &values[random() % 4], sizeof(std::uint64_t));
    const std::uint64_t sum = checksum(content.substr(table, bytes));
    std::memcpy(content.data() + 40, &sum, sizeof sum);
    const std::uint64_t head = checksum(content.substr(0, 56));
    std::memcpy(content.data() + 56, &head, sizeof head);
    try_it(content);
  }
  CHECK(refused > 100);
}

}  // namespace

int main(int count, char** arguments) {
  folder = std::string(count > 1 ? arguments[1] : "/tmp") + "/data_files_test.XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) {
    return 2;
  }
  check::run("an_index_gives_back_what_was_added", an_index_gives_back_what_was_added);
  check::run("places_count_over_all_files", places_count_over_all_files);
  check::run("files_are_mapped_or_read", files_are_mapped_or_read);
  check::run("a_file_that_changes_is_noticed", a_file_that_changes_is_noticed);
  check::run("other_bus_errors_go_to_the_handler_before", other_bus_errors_go_to_the_handler_before);
  check::run("a_mapped_file_that_is_cut_gives_an_error", a_mapped_file_that_is_cut_gives_an_error);
  check::run("extents_are_read_once", extents_are_read_once);
  check::run("lists_are_sorted_by_bytes", lists_are_sorted_by_bytes);
  check::run("a_sidecar_gives_back_what_was_saved", a_sidecar_gives_back_what_was_saved);
  check::run("no_sidecar_is_trusted", no_sidecar_is_trusted);
  std::filesystem::remove_all(folder);
  return check::failures == 0 ? 0 : 1;
}

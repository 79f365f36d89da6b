#include "launcher/status_page.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

using launcher::CollectivePhase;
using launcher::Phase;
using launcher::StatusLayout;
using launcher::StatusPage;
using launcher::StatusPageError;
using launcher::StatusPageIoError;
using launcher::StatusSnapshot;

namespace {

std::string folder;

// A path that nothing is at.
std::string fresh(const char* name) {
  std::string path = folder + "/" + name + ".page";
  ::unlink(path.c_str());
  return path;
}

bool contains(const char* text, const std::string& part) { return std::strstr(text, part.c_str()) != nullptr; }

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// Overwrites bytes of a file without mapping it.
void poke(const std::string& path, std::size_t offset, const void* bytes, std::size_t size) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  CHECK(::pwrite(fd, bytes, size, static_cast<off_t>(offset)) == static_cast<ssize_t>(size));
  ::close(fd);
}

void a_new_page_is_empty() {
  const std::string path = fresh("new");
  const StatusPage page = StatusPage::create(path, 7);
  struct stat info;
  CHECK(::stat(path.c_str(), &info) == 0 && info.st_size == 4096 && (info.st_mode & 0777) == 0600);
  CHECK(info.st_blocks * 512 >= 4096);  // allocated: a store into the mapping can not meet a full disk
  const StatusSnapshot copy = page.snapshot();
  CHECK(copy.rank == 7 && copy.pid == 0 && copy.phase == 0 && copy.step == 0 && copy.operation.empty());
  CHECK(copy.consistent && copy.stop_requested_ns == 0);
}

void what_a_rank_writes_the_supervisor_reads() {
  const std::string path = fresh("roundtrip");
  StatusPage supervisor = StatusPage::create(path, 3);
  StatusPage rank = StatusPage::open(path, StatusPage::Access::write);
  const std::uint64_t before = launcher::monotonic_ns();
  rank.attach();
  rank.set_phase(Phase::running);
  rank.step(41, 1312);
  CHECK(rank.enter_collective("allreduce", 1U << 20) == 1);
  StatusSnapshot copy = supervisor.snapshot();
  CHECK(copy.pid == static_cast<std::uint32_t>(::getpid()) && copy.phase == 2);
  CHECK(copy.started_ns >= before && copy.step_ns >= copy.started_ns && copy.heartbeat_ns >= copy.step_ns);
  CHECK(copy.step == 41 && copy.samples == 1312);
  CHECK(copy.operation == "allreduce" && copy.bytes == 1U << 20 && copy.collective_seq == 1);
  CHECK(copy.collective_enter_ns >= copy.step_ns);
  rank.leave_collective();
  CHECK(rank.enter_collective("a name of more than thirty-one bytes", 0) == 2);
  copy = supervisor.snapshot();
  CHECK(copy.operation == "a name of more than thirty-one ");
  rank.leave_collective();
  copy = supervisor.snapshot();
  CHECK(copy.collective_enter_ns == 0 && copy.collective_seq == 2);

  const launcher::OperationName broadcast = launcher::operation_name("broadcast");
  CHECK(rank.enter_collective(broadcast, 64, 1000, 812) == 3);
  copy = supervisor.snapshot();
  CHECK(copy.operation == "broadcast" && copy.collective_enter_ns == 1000 && copy.heartbeat_ns == 1000);
  CHECK(copy.group_sequence == 812 && copy.waiting_for == 0 && copy.collective_waits_ns == 0);
  CHECK(copy.collective_phase == static_cast<std::uint32_t>(CollectivePhase::entering));
  rank.set_collective_phase(CollectivePhase::waiting);
  rank.set_waiting_for(0);
  rank.add_collective_wait(70);
  rank.add_collective_wait(7);
  copy = supervisor.snapshot();
  CHECK(copy.collective_phase == 3 && copy.waiting_for == 1 && copy.collective_waits_ns == 77);
  rank.set_waiting_for(-1);
  CHECK(supervisor.snapshot().waiting_for == 0);
  rank.set_waiting_for(5);
  rank.leave_collective(2000);
  copy = supervisor.snapshot();
  CHECK(copy.collective_phase == 0 && copy.waiting_for == 0 && copy.collective_enter_ns == 0);
  CHECK(copy.collective_waits_ns == 77 && copy.heartbeat_ns == 2000 && copy.operation == "broadcast");

  CHECK(!rank.stop_requested());
  supervisor.request_stop(before + 5);
  CHECK(rank.stop_requested() && rank.snapshot().stop_deadline_ns == before + 5);
}

void fields_lie_where_the_contract_says() {
  const std::string path = fresh("offsets");
  StatusPage page = StatusPage::create(path, 0x01020304);
  page.step(0x1111, 0x2222);
  page.enter_collective(launcher::operation_name("broadcast"), 0x3333, 0x5555, 0x6666);
  page.set_collective_phase(CollectivePhase::between_hosts);
  page.set_waiting_for(8);
  page.add_collective_wait(0x7777);
  page.request_stop(0x4444);
  unsigned char raw[4096];
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(::pread(fd, raw, sizeof raw, 0) == 4096);
  ::close(fd);
  const auto word = [&](std::size_t offset) {
    std::uint64_t value;
    std::memcpy(&value, raw + offset, sizeof value);
    return value;
  };
  CHECK(std::memcmp(raw, "LNCHPAGE", 8) == 0);
  CHECK(word(8) == 0x0102030400000001U);
  CHECK(word(64) == 2 && word(72) == 0x1111 && word(80) == 0x2222);
  CHECK(word(128) == 2 && word(136) == 1 && word(144) == 0x3333);
  CHECK(std::memcmp(raw + 160, "broadcast\0", 10) == 0);
  CHECK(word(152) == 0x5555);
  CHECK(word(192) != 0 && word(200) == 0x4444);
  CHECK(word(256) == 0x0000000900000006U && word(264) == 0x7777 && word(272) == 0x6666);
}

void phase_may_be_written_without_a_mapping() {
  const std::string path = fresh("pwrite");
  const StatusPage page = StatusPage::create(path, 0);
  const std::uint32_t failed = 4;
  poke(path, 20, &failed, sizeof failed);
  CHECK(page.snapshot().phase == 4);
}

void errors_name_path_and_call() {
  const std::string path = fresh("errors");
  CHECK_THROWS(StatusPageIoError, StatusPage::open(path, StatusPage::Access::read),
               CHECK(error.code().value() == ENOENT && error.path() == path && contains(error.what(), path) &&
                     contains(error.what(), "open")));
  StatusPage page = StatusPage::create(path, 0);
  CHECK_THROWS(StatusPageIoError, StatusPage::create(path, 0), CHECK(error.code().value() == EEXIST));
  CHECK(exists(path));  // the failed create did not remove what it had not made

  StatusPage reader = StatusPage::open(path, StatusPage::Access::read);
  CHECK_THROWS(StatusPageError, reader.step(1, 1), CHECK(contains(error.what(), path)));
  CHECK_THROWS(StatusPageError, reader.request_stop(1));
  StatusPage moved = std::move(page);
  CHECK(page.closed() && !moved.closed());  // NOLINT(bugprone-use-after-move): that is what is tested
  moved.close();
  moved.close();
  CHECK_THROWS(StatusPageError, moved.snapshot(), CHECK(contains(error.what(), "closed")));

  const std::uint32_t version = 99;
  poke(path, 8, &version, sizeof version);
  CHECK_THROWS(StatusPageError, StatusPage::open(path, StatusPage::Access::read),
               CHECK(contains(error.what(), "version 99")));
  poke(path, 0, "X", 1);
  CHECK_THROWS(StatusPageError, StatusPage::open(path, StatusPage::Access::read),
               CHECK(contains(error.what(), "magic")));
  const std::string small = fresh("small");
  poke(small, 0, "LNCHPAGE", 8);
  CHECK_THROWS(StatusPageError, StatusPage::open(small, StatusPage::Access::read),
               CHECK(contains(error.what(), "8 bytes")));
  CHECK_THROWS(StatusPageError, StatusPage::open(folder, StatusPage::Access::read));
}

void no_room_is_an_error_at_creation() {
  const std::string path = fresh("full");
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit limit{1024, 1024};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::signal(SIGXFSZ, SIG_IGN);
    try {
      StatusPage::create(path, 0);
      ::_exit(1);
    } catch (const StatusPageIoError& error) {
      ::_exit(contains(error.what(), "pwrite") && !exists(path) ? 0 : 2);
    }
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// Whoever reads while another writes sees all fields of one moment: here they are all made from one number. False: the
// writer was descheduled inside its section, and the page rightly says that it can not vouch for this copy.
bool check_progress(const StatusSnapshot& copy) {
  if (!copy.consistent) {
    return false;
  }
  CHECK(copy.samples == copy.step * 3);
  CHECK(copy.bytes == copy.collective_seq * 5);
  CHECK(copy.group_sequence == copy.collective_seq * 7);
  CHECK(copy.operation == (copy.collective_seq == 0 ? "" : "op" + std::to_string(copy.collective_seq)));
  return true;
}

void write_rounds(StatusPage& page, std::uint64_t rounds) {
  for (std::uint64_t i = 1; i <= rounds; ++i) {
    page.step(i, i * 3);
    page.enter_collective(launcher::operation_name("op" + std::to_string(i)), i * 5, i, i * 7);
  }
}

void threads_read_consistent_snapshots() {
  StatusPage page = StatusPage::create(fresh("threads"), 0);
  std::atomic<bool> done{false};
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int reader = 0; reader < 2; ++reader) {
    threads.emplace_back([&page, &done, &good] {
      std::uint64_t last = 0;
      while (!done) {
        const StatusSnapshot copy = page.snapshot();
        good += check_progress(copy) ? 1 : 0;
        CHECK(copy.step >= last);
        last = copy.step;
      }
    });
  }
  std::thread communication([&page] {
    for (std::uint64_t i = 1; i <= 50'000; ++i) {
      page.enter_collective(launcher::operation_name("op" + std::to_string(i)), i * 5, i, i * 7);
    }
  });
  std::thread heart([&page] {
    for (int i = 0; i < 10'000; ++i) {
      page.heartbeat();
    }
  });
  for (std::uint64_t i = 1; i <= 50'000; ++i) {
    page.step(i, i * 3);
  }
  page.request_stop(1);
  communication.join();
  heart.join();
  done = true;
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(good > 0);
  CHECK(page.snapshot().step == 50'000 && page.snapshot().collective_seq == 50'000);
}

void processes_read_consistent_snapshots() {
  const std::string path = fresh("processes");
  const StatusPage page = StatusPage::create(path, 0);
  const pid_t child = ::fork();
  if (child == 0) {
    StatusPage writer = StatusPage::open(path, StatusPage::Access::write);
    writer.attach();
    write_rounds(writer, 100'000);
    ::_exit(0);
  }
  int status = 0;
  int good = 0;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    good += check_progress(page.snapshot()) ? 1 : 0;
  }
  CHECK(good > 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(page.snapshot().step == 100'000 && page.snapshot().pid == static_cast<std::uint32_t>(child));
}

void a_killed_writer_leaves_a_readable_page() {
  const std::string path = fresh("killed");
  const StatusPage page = StatusPage::create(path, 0);
  const pid_t child = ::fork();
  if (child == 0) {
    StatusPage writer = StatusPage::open(path, StatusPage::Access::write);
    write_rounds(writer, ~std::uint64_t{0} >> 8);
  }
  while (page.snapshot().step < 1000) {
    std::this_thread::yield();
  }
  ::kill(child, SIGKILL);
  CHECK(::waitpid(child, nullptr, 0) == child);
  CHECK(page.snapshot().step >= 1000);

  // The worst moment, made for certain: the counter is odd and stays so.
  const std::uint64_t odd = 12'345;
  poke(path, 64, &odd, sizeof odd);
  const StatusSnapshot torn = page.snapshot();
  CHECK(!torn.consistent && torn.step >= 1000);
  StatusPage next = StatusPage::open(path, StatusPage::Access::write);
  next.step(1, 3);
  CHECK(next.snapshot().step == 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FOLDER\n", argv[0]);
    return 2;
  }
  folder = argv[1];
  check::run("a new page is empty", a_new_page_is_empty);
  check::run("what a rank writes the supervisor reads", what_a_rank_writes_the_supervisor_reads);
  check::run("fields lie where the contract says", fields_lie_where_the_contract_says);
  check::run("phase may be written without a mapping", phase_may_be_written_without_a_mapping);
  check::run("errors name path and call", errors_name_path_and_call);
  check::run("no room is an error at creation", no_room_is_an_error_at_creation);
  check::run("threads read consistent snapshots", threads_read_consistent_snapshots);
  check::run("processes read consistent snapshots", processes_read_consistent_snapshots);
  check::run("a killed writer leaves a readable page", a_killed_writer_leaves_a_readable_page);
  return check::failures == 0 ? 0 : 1;
}

// Status page: what one rank is doing, in 4 KiB that the rank writes and its supervisor reads.
//
// The page is a file in the job's run directory, mapped shared by both sides (not /dev/shm: 64 MB, and not ours). It
// outlives the rank, so the last thing a killed rank did can still be read. The layout is part of the contract between
// processes of one job and does not change within one `kStatusPageVersion`: fixed offsets, little-endian.
//
//   offset  size  field                written by
//   ---------------------------------- line 0: identity -------------------------------------------------------------
//        0     8  magic "LNCHPAGE"     creator, once
//        8     4  version              creator, once
//       12     4  rank                 creator, once
//       16     4  pid                  rank, once (0: the rank has not attached)
//       20     4  phase                rank; see Phase
//       24     8  started_ns           rank, once
//   ---------------------------------- line 1: progress, the rank's training loop -----------------------------------
//       64     8  progress_lock        even: at rest, odd: being written
//       72     8  step                 number of the last step reported
//       80     8  samples              samples done by this rank in all
//       88     8  step_ns              when that step was reported
//       96     8  heartbeat_ns         last sign of life; not under the lock, any thread of the rank
//   ---------------------------------- line 2: collectives, the rank's communication thread -------------------------
//      128     8  collective_lock      as progress_lock
//      136     8  collective_seq       collectives entered so far (the first is #1)
//      144     8  bytes                payload of the collective that `operation` names
//      152     8  collective_enter_ns  when it was entered; 0 when the rank is outside of any
//      160    32  operation            name of the last collective, NUL-padded (31 bytes at most)
//   ---------------------------------- line 3: stop, the supervisor -------------------------------------------------
//      192     8  stop_requested_ns    0: not requested
//      200     8  stop_deadline_ns     after this the rank is killed
//   ---------------------------------- line 4: inside a collective, the rank's communication thread -----------------
//      256     4  collective_phase     what the rank does there; see CollectivePhase
//      260     4  waiting_for          the job's number of the rank it waits for, plus 1; 0: none, or not known
//      264     8  collective_waits_ns  time spent waiting for other ranks, in all
//      272     8  group_sequence       number of the collective in its group; 0: not told; under collective_lock
//      320  3776  reserved, zero (208..255 and 280..319 too)
//
// All times are CLOCK_MONOTONIC in nanoseconds. A writer of a build before line 4 leaves it zero, which claims nothing:
// it needed no new version.
//
// One writer per cache line, so no writer ever waits: lines 1 and 2 are seqlocks, everything else is a single atomic.
// `phase` may also be written with pwrite(fd, value, 4, 20) by a process that does not map the file; the value is below
// 256, so only one byte of it ever changes and a reader can not see half of it.
#ifndef LAUNCHER_STATUS_PAGE_H
#define LAUNCHER_STATUS_PAGE_H

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace launcher {

inline constexpr std::size_t kStatusPageSize = 4096;
inline constexpr std::uint32_t kStatusPageVersion = 1;
inline constexpr char kStatusPageMagic[] = {'L', 'N', 'C', 'H', 'P', 'A', 'G', 'E'};
inline constexpr std::size_t kOperationSize = 32;

enum class Phase : std::uint32_t { created = 0, booting = 1, running = 2, finished = 3, failed = 4 };

enum class CollectivePhase : std::uint32_t {
  outside = 0,
  entering = 1,
  copying_in = 2,
  waiting = 3,  // for other ranks
  reducing = 4,
  copying_out = 5,
  between_hosts = 6,
};

// A collective's name as the page holds it, NUL-padded. Made once and passed to each enter_collective().
using OperationName = std::array<std::uint64_t, kOperationSize / sizeof(std::uint64_t)>;
OperationName operation_name(std::string_view text) noexcept;  // cut after 31 bytes

struct StatusLayout {
  char magic[8];
  std::uint32_t version;
  std::uint32_t rank;
  std::uint32_t pid;
  std::uint32_t phase;
  std::uint64_t started_ns;
  std::uint64_t reserved_identity[4];

  std::uint64_t progress_lock;
  std::uint64_t step;
  std::uint64_t samples;
  std::uint64_t step_ns;
  std::uint64_t heartbeat_ns;
  std::uint64_t reserved_progress[3];

  std::uint64_t collective_lock;
  std::uint64_t collective_seq;
  std::uint64_t bytes;
  std::uint64_t collective_enter_ns;
  std::uint64_t operation[kOperationSize / sizeof(std::uint64_t)];

  std::uint64_t stop_requested_ns;
  std::uint64_t stop_deadline_ns;
  std::uint64_t reserved_stop[6];

  std::uint32_t collective_phase;
  std::uint32_t waiting_for;
  std::uint64_t collective_waits_ns;
  std::uint64_t group_sequence;
  std::uint64_t reserved[477];
};

static_assert(std::endian::native == std::endian::little, "the page is little-endian and is mapped, not converted");
static_assert(sizeof(StatusLayout) == kStatusPageSize);
static_assert(offsetof(StatusLayout, magic) == 0);
static_assert(offsetof(StatusLayout, version) == 8);
static_assert(offsetof(StatusLayout, rank) == 12);
static_assert(offsetof(StatusLayout, pid) == 16);
static_assert(offsetof(StatusLayout, phase) == 20);
static_assert(offsetof(StatusLayout, started_ns) == 24);
static_assert(offsetof(StatusLayout, progress_lock) == 64);
static_assert(offsetof(StatusLayout, step) == 72);
static_assert(offsetof(StatusLayout, samples) == 80);
static_assert(offsetof(StatusLayout, step_ns) == 88);
static_assert(offsetof(StatusLayout, heartbeat_ns) == 96);
static_assert(offsetof(StatusLayout, collective_lock) == 128);
static_assert(offsetof(StatusLayout, collective_seq) == 136);
static_assert(offsetof(StatusLayout, bytes) == 144);
static_assert(offsetof(StatusLayout, collective_enter_ns) == 152);
static_assert(offsetof(StatusLayout, operation) == 160);
static_assert(offsetof(StatusLayout, stop_requested_ns) == 192);
static_assert(offsetof(StatusLayout, stop_deadline_ns) == 200);
static_assert(offsetof(StatusLayout, collective_phase) == 256);
static_assert(offsetof(StatusLayout, waiting_for) == 260);
static_assert(offsetof(StatusLayout, collective_waits_ns) == 264);
static_assert(offsetof(StatusLayout, group_sequence) == 272);

// A copy of the page at one moment. `consistent` is false when the fields of a seqlock could not be read together: the
// rank died (or was stopped) in the middle of writing them. The values are then the newest there are, possibly of two
// neighbouring steps.
struct StatusSnapshot {
  std::uint32_t rank = 0;
  std::uint32_t pid = 0;
  std::uint32_t phase = 0;  // not the enum: pwrite by a foreign process may have put any number there
  std::uint64_t started_ns = 0;
  std::uint64_t step = 0;
  std::uint64_t samples = 0;
  std::uint64_t step_ns = 0;
  std::uint64_t heartbeat_ns = 0;
  std::uint64_t collective_seq = 0;
  std::uint64_t bytes = 0;
  std::uint64_t collective_enter_ns = 0;
  std::string operation;
  std::uint64_t stop_requested_ns = 0;
  std::uint64_t stop_deadline_ns = 0;
  std::uint32_t collective_phase = 0;  // not the enum, as `phase`
  std::uint32_t waiting_for = 0;       // rank + 1
  std::uint64_t collective_waits_ns = 0;
  std::uint64_t group_sequence = 0;
  bool consistent = true;
};

// A system call on the page's file failed. what() reads "status page PATH: CALL: reason".
class StatusPageIoError : public std::system_error {
 public:
  StatusPageIoError(int error, const char* call, const std::string& path);
  const std::string& path() const noexcept { return path_; }
  const char* call() const noexcept { return call_; }

 private:
  std::string path_;
  const char* call_;
};

// The file is not a status page of this version, or the page was used against its state (read-only, closed).
class StatusPageError : public std::runtime_error {
 public:
  StatusPageError(const std::string& path, const std::string& problem);
};

// A mapped page. Movable, not copyable. Reading is safe from any thread and process at any time. Writing follows the
// table above: step() from one thread of the rank, the collective functions from one thread, request_stop() from one
// thread of the supervisor; heartbeat(), set_phase() from any thread of the rank.
class StatusPage {
 public:
  enum class Access { read, write };

  // Makes the file (it must not exist) with every byte of it allocated, so that a full disk is an error here and not
  // a SIGBUS in the middle of a training step.
  static StatusPage create(const std::string& path, std::uint32_t rank);
  static StatusPage open(const std::string& path, Access access);

  StatusPage(StatusPage&& other) noexcept;
  StatusPage& operator=(StatusPage&& other) noexcept;
  StatusPage(const StatusPage&) = delete;
  StatusPage& operator=(const StatusPage&) = delete;
  ~StatusPage();

  // Unmaps; a second call does nothing. Every other call after it throws StatusPageError.
  void close() noexcept;

  const std::string& path() const noexcept { return path_; }
  bool writable() const noexcept { return access_ == Access::write; }
  bool closed() const noexcept { return page_ == nullptr; }

  // The rank.
  void attach();  // pid of the calling process, started_ns now
  void set_phase(Phase phase);
  void step(std::uint64_t number, std::uint64_t samples);
  void heartbeat();
  // Both return the number of the collective on this page. The second one reads no clock and copies no text: with one
  // clock reading at each end, which the caller may use for its own deadlines, it adds less than 10 ns to a message.
  std::uint64_t enter_collective(std::string_view operation, std::uint64_t bytes);
  std::uint64_t enter_collective(const OperationName& operation, std::uint64_t bytes, std::uint64_t now_ns,
                                 std::uint64_t group_sequence = 0);
  void leave_collective();  // puts phase and waiting_for back to 0
  void leave_collective(std::uint64_t now_ns);
  void set_collective_phase(CollectivePhase phase);  // entering a collective sets `entering`
  void set_waiting_for(int rank);                    // the job's number of it; -1: none
  void add_collective_wait(std::uint64_t ns);
  bool stop_requested() const;

  // The supervisor.
  void request_stop(std::uint64_t deadline_ns);
  StatusSnapshot snapshot() const;

 private:
  StatusPage(std::string path, StatusLayout* page, Access access) noexcept;
  StatusLayout& readable() const;
  StatusLayout& writeable();

  std::string path_;
  StatusLayout* page_;
  Access access_;
};

std::uint64_t monotonic_ns() noexcept;

}  // namespace launcher

#endif

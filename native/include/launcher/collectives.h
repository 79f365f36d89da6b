// Collectives between the ranks of one host, over shared memory.
//
// A Group is one rank's end of it. All ranks of a group call the same operations in the same order; a call returns when
// this rank's part of the result is in place and its buffers may be used again. Results are the same bits on every
// rank, whatever the timing, the path taken and the number of chunks: each element is folded in rank order, 16-bit
// floating point in float32 with one rounding at the end (kernels.h).
//
// Nobody waits for a rank that is gone. Every wait spins briefly, then sleeps in a futex, and looks every few
// milliseconds at the peers' processes, at the deadline and at the group's abort word. A rank that is killed, leaves,
// calls another operation than the others or is not seen by the deadline makes the call throw GroupError on every other
// rank, with the culprit's rank, host, operation and number; the group is unusable from then on.
//
// One thread at a time calls a group. After fork() the child must not use it.
#ifndef LAUNCHER_COLLECTIVES_H
#define LAUNCHER_COLLECTIVES_H

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "launcher/elements.h"
#include "launcher/status_page.h"

namespace launcher::collectives {

enum class Operation : std::uint8_t {
  barrier,
  allreduce,
  reduce_scatter,
  all_gather,
  broadcast,
  reduce,
  all_to_all,
};
const char* name(Operation operation) noexcept;

// How a call moved its data.
enum class Path : std::uint8_t {
  automatic,  // only as a setting: chosen by size, registration and what was measured on this machine
  small,      // one message in a slot, one flag
  pipelined,  // chunks through a ring in shared memory
  shared,     // registered buffers, read and written in place
  pulled,     // read from the peer's memory by the kernel (process_vm_readv)
};

enum class Failure : std::uint8_t {
  lost,         // a rank's process ended
  left,         // a rank closed its end of the group
  timeout,      // a rank was not seen in time
  mismatch,     // a rank called something else
  interrupted,  // this rank's own caller asked to stop waiting (a signal, say)
  closed,       // the call came after the end of the group
  system,       // the operating system refused something the group needs
};

class GroupError : public std::runtime_error {
 public:
  GroupError(Failure failure, int rank, std::string host, std::string operation, std::uint64_t sequence,
             const std::string& message)
      : std::runtime_error(message),
        failure_(failure),
        rank_(rank),
        host_(std::move(host)),
        operation_(std::move(operation)),
        sequence_(sequence) {}
  Failure failure() const noexcept { return failure_; }
  int rank() const noexcept { return rank_; }  // the culprit's, as the job numbers it; -1: not known
  const std::string& host() const noexcept { return host_; }
  const std::string& operation() const noexcept { return operation_; }
  std::uint64_t sequence() const noexcept { return sequence_; }  // number of the call in this group, from 1

 private:
  Failure failure_;
  int rank_;
  std::string host_;
  std::string operation_;
  std::uint64_t sequence_;
};

struct Options {
  std::string directory;  // where the ranks meet: a folder that only this user may enter
  std::string name;       // of the group: file name of its socket in `directory`, while it is being made
  int rank = 0;           // in the group
  int size = 1;
  std::vector<int> ranks;  // the members' numbers in the job, for messages; empty: as in the group
  std::string host;        // for messages
  std::chrono::nanoseconds timeout = std::chrono::minutes(30);
  // Called about every 50 ms of waiting, on the calling thread; true: stop waiting (Failure::interrupted).
  std::function<bool()> interrupted;
  StatusPage* page = nullptr;  // of this rank, for what it does to be seen; outlives the group
  std::size_t slot_bytes = 0;  // size of a ring slot; 0: chosen
  int spin = -1;               // polls of a flag before sleeping; -1: by ranks and cores
};

// One contiguous part of a message.
struct Piece {
  const void* source;
  void* target;  // may be `source`
  std::size_t count;
};

// Calls and bytes by path, and what was measured when the group was made.
struct Statistics {
  std::uint64_t calls[5] = {};  // by Path
  std::uint64_t bytes[5] = {};
  std::uint64_t waited_ns = 0;  // asleep or polling for others
  double ping_ns = 0;           // one-way time of a flag to the slowest peer
  std::size_t chunk_bytes = 0;
  bool can_pull = false;
  int spin = 0;
};

// `pre` multiplies this rank's input, `post` the folded result, both in the type of accumulation. Integers and bool
// take neither (std::invalid_argument); ReduceOp::average divides integers by the number of ranks, towards zero.
struct Scale {
  double pre = 1.0;
  double post = 1.0;
};

class Group {
 public:
  // Blocks until all ranks of the group have called it. Throws GroupError (a rank did not come in time, or died),
  // std::system_error, std::invalid_argument.
  static std::unique_ptr<Group> join(Options options);
  // All ranks of a group in this process, on one mapping: for tests under ThreadSanitizer, one thread a rank.
  static std::vector<std::unique_ptr<Group>> join_threads(int size, const Options& common);
  virtual ~Group() = default;
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  virtual int rank() const noexcept = 0;
  virtual int size() const noexcept = 0;

  // Counts are in elements, pointers may be unaligned, `source` and `target` are the same or do not overlap, except
  // where a line says otherwise.
  virtual void allreduce(std::span<const Piece> pieces, DType dtype, ReduceOp op, Scale scale = {}) = 0;
  // source: sum(counts); target: counts[rank], may be this rank's part of source.
  virtual void reduce_scatter(const void* source, void* target, std::span<const std::size_t> counts, DType dtype,
                              ReduceOp op, Scale scale = {}) = 0;
  // source: counts[rank], may be this rank's part of target; target: sum(counts).
  virtual void all_gather(const void* source, void* target, std::span<const std::size_t> counts, DType dtype) = 0;
  virtual void broadcast(void* buffer, std::size_t count, DType dtype, int root) = 0;
  // target is touched on `root` only.
  virtual void reduce(const void* source, void* target, std::size_t count, DType dtype, ReduceOp op, int root,
                      Scale scale = {}) = 0;
  // What goes to rank j follows what goes to j-1, in source and in target alike. source != target.
  virtual void all_to_all(const void* source, void* target, std::span<const std::size_t> send_counts,
                          std::span<const std::size_t> receive_counts, DType dtype) = 0;
  virtual void barrier() = 0;

  // Memory that all ranks of the group map, for the shared path: taken whenever on every rank the whole message lies in
  // registered memory. Neither call waits for other ranks.
  virtual void* allocate(std::size_t bytes) = 0;  // zeroed, page-aligned; throws std::system_error
  virtual void release(void* allocated) = 0;
  // `address` is where all of `descriptor`, `bytes` long, is mapped MAP_SHARED. The descriptor is duplicated.
  virtual void register_memory(void* address, std::size_t bytes, int descriptor) = 0;
  virtual void unregister_memory(void* address) = 0;

  virtual void set_timeout(std::chrono::nanoseconds timeout) = 0;
  virtual void set_path(Path path) = 0;  // for tests and benchmarks; the same on every rank
  virtual Statistics statistics() const = 0;
  virtual std::uint64_t sequence() const noexcept = 0;
  // Makes every other rank's call fail at once, naming this rank and `reason`.
  virtual void abort(const std::string& reason) noexcept = 0;
  // Leaves the group; calls of others that need this rank fail. A second call does nothing.
  virtual void close() noexcept = 0;

 protected:
  Group() = default;
};

}  // namespace launcher::collectives

#endif

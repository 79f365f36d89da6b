// One rank of a group on one host: what group.cpp makes, and allreduce.cpp and operations.cpp carry out.
#ifndef LAUNCHER_COLLECTIVES_LOCAL_GROUP_H
#define LAUNCHER_COLLECTIVES_LOCAL_GROUP_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "launcher/collectives.h"
#include "member.h"
#include "message.h"
#include "pipeline.h"
#include "registry.h"
#include "tuner.h"

namespace launcher::collectives {

inline constexpr std::size_t kUnit = 64;             // shares of a message begin on a line
inline constexpr std::size_t kSharedBytes = 2048;    // below, the second meeting costs more than the copy
inline constexpr std::size_t kPullBytes = 64 << 10;  // read from a peer at a time: stays in this core's cache

inline const std::byte* bytes_at(const void* address, std::size_t offset) noexcept {
  return static_cast<const std::byte*>(address) + offset;
}
inline std::byte* bytes_at(void* address, std::size_t offset) noexcept {
  return static_cast<std::byte*>(address) + offset;
}

// Empty parts may have no address at all, which memcpy does not take.
inline void copy_bytes(void* target, const void* source, std::size_t bytes) noexcept {
  if (bytes != 0) {
    std::memcpy(target, source, bytes);
  }
}

inline void move(void* target, const void* source, std::size_t bytes) noexcept {
  if (bytes != 0 && target != source) {
    std::memmove(target, source, bytes);
  }
}

// An operation on elements, with what is done to its result.
struct Fold {
  ReduceFunction function = nullptr;
  Finish finish;
};

// Throws std::invalid_argument where the operation is not defined for the type, or takes no scale.
Fold fold_of(DType dtype, ReduceOp op, Scale scale, int size);
void check_root(int root, int size);
// Ways to try for private memory.
std::vector<Choice> choices(int size, std::size_t slot_bytes, bool can_pull);

class LocalGroup final : public Group {
 public:
  LocalGroup(Options options, std::shared_ptr<Segment> segment, std::vector<Process> processes, Descriptor inbox,
             std::vector<Descriptor> outboxes, bool in_process)
      : member_(std::move(options), std::move(segment), std::move(processes)),
        registry_(member_, std::move(inbox), std::move(outboxes), in_process),
        can_pull_(find_out_about_pulling(in_process)),
        tuner_(choices(member_.size(), slot_bytes(), can_pull_)),
        sources_(ranks()),
        targets_(ranks()),
        scales_(ranks(), 1.0) {
    measure_ping();
  }
  ~LocalGroup() override { close(); }

  int rank() const noexcept override { return member_.rank(); }
  int size() const noexcept override { return member_.size(); }
  void allreduce(std::span<const Piece> pieces, DType dtype, ReduceOp op, Scale scale) override;
  void reduce_scatter(const void* source, void* target, std::span<const std::size_t> counts, DType dtype, ReduceOp op,
                      Scale scale) override;
  void all_gather(const void* source, void* target, std::span<const std::size_t> counts, DType dtype) override;
  void broadcast(void* buffer, std::size_t count, DType dtype, int root) override;
  void reduce(const void* source, void* target, std::size_t count, DType dtype, ReduceOp op, int root,
              Scale scale) override;
  void all_to_all(const void* source, void* target, std::span<const std::size_t> send_counts,
                  std::span<const std::size_t> receive_counts, DType dtype) override;
  void barrier() override {
    const Member::Turn turn(member_, Operation::barrier, 0);
    member_.enter(describe(Operation::barrier, DType::uint8, 0));
    count(Path::small, 0);
  }

  void* allocate(std::size_t bytes) override { return registry_.allocate(bytes); }
  void release(void* allocated) override { registry_.release(allocated); }
  void register_memory(void* address, std::size_t bytes, int descriptor) override {
    registry_.add(address, bytes, descriptor);
  }
  void unregister_memory(void* address) override { registry_.remove(address); }

  void set_timeout(std::chrono::nanoseconds timeout) override { member_.set_timeout(timeout); }
  void set_path(Path path) override { forced_ = path; }
  Statistics statistics() const override {
    Statistics out = statistics_;
    out.waited_ns = member_.waited_ns();
    out.ping_ns = ping_ns_;
    out.chunk_bytes = slot_bytes();
    out.can_pull = can_pull_;
    out.spin = member_.spin();
    return out;
  }
  std::uint64_t sequence() const noexcept override { return member_.sequence(); }
  void abort(const std::string& reason) noexcept override {
    if (!member_.forked()) {
      member_.end_group_as(Failure::left, " gave up: ", reason);
    }
  }
  void close() noexcept override {
    if (!closed_) {
      closed_ = true;
      member_.leave();
    }
  }

 private:
  std::size_t ranks() const noexcept { return static_cast<std::size_t>(member_.size()); }
  std::size_t here() const noexcept { return static_cast<std::size_t>(member_.rank()); }
  std::size_t slot_bytes() const noexcept { return member_.segment().slot_bytes(); }
  std::byte* slot(int rank, std::size_t block) const noexcept {
    return member_.segment().slot(rank, slot_of(member_.sequence(), block));
  }
  std::byte* my_slot(std::size_t block) const noexcept { return slot(rank(), block); }
  void count(Path path, std::size_t bytes) noexcept {
    ++statistics_.calls[static_cast<std::size_t>(path)];
    statistics_.bytes[static_cast<std::size_t>(path)] += bytes;
  }

  bool find_out_about_pulling(bool in_process);
  void measure_ping();
  Call describe(Operation operation, DType dtype, std::size_t count) const noexcept;
  void enter(Call call);
  bool may_share(std::size_t bytes) const noexcept {
    return size() > 1 && (forced_ == Path::shared || (forced_ == Path::automatic && bytes >= kSharedBytes));
  }
  bool all_take(Path path, std::size_t choice = 0) const noexcept {
    for (int rank = 0; rank < size(); ++rank) {
      const Call& call = member_.call_of(rank);
      if (call.path != static_cast<std::uint8_t>(path) || call.choice != choice) {
        return false;
      }
    }
    return true;
  }
  // Folds the prescales that all ranks gave into what the kernels take; null when there are none.
  const double* prescales() noexcept {
    bool any = false;
    for (int rank = 0; rank < size(); ++rank) {
      scales_[static_cast<std::size_t>(rank)] = member_.call_of(rank).pre;
      any = any || member_.call_of(rank).pre != 1.0;
    }
    return any ? scales_.data() : nullptr;
  }
  void reduce_one(const Fold& fold, std::size_t count, const double* scales, void* target) {
    fold.function(&target, 1, sources_.data(), ranks(), count, scales, fold.finish);
  }
  void pull(int rank, std::uint64_t address, void* target, std::size_t bytes);

  void allreduce_alone(std::span<const Piece> pieces, const Fold& fold, Scale scale);
  void allreduce_shared(const Message& message, std::size_t element, const Fold& fold);
  void allreduce_pulled(const Piece& piece, std::size_t element, const Fold& fold);
  void allreduce_in_blocks(const Message& message, std::size_t element, const Fold& fold, const Choice& choice,
                           bool late);
  void prepare_slot(std::size_t bytes) noexcept;
  void copy_parts_in(const void* source, std::span<const std::size_t> counts, std::size_t block, std::size_t length,
                     std::size_t element) const noexcept;
  // Where not all could take the shared path: those that could put in their first block now.
  template <typename In>
  void take_slots(Path path, In in) {
    if (!all_take(Path::pipelined)) {
      if (path == Path::shared) {
        in(0);
      }
      member_.meet_again();
    }
  }
  void copy_in(const Message& message, std::size_t element, const Choice& choice, std::size_t block);

  Member member_;
  Registry registry_;
  bool can_pull_;
  Tuner tuner_;
  Path forced_ = Path::automatic;
  Statistics statistics_;
  double ping_ns_ = 0;
  bool closed_ = false;
  Call measured_;  // only its measured_* fields: what to tell with the next call
  std::vector<const void*> sources_;
  std::vector<void*> targets_;
  std::vector<double> scales_;
  std::vector<std::byte> scratch_;  // of the pulled path
};

}  // namespace launcher::collectives

#endif

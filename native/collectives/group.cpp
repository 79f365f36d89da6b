#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "kernels.h"
#include "launcher/collectives.h"
#include "meeting.h"
#include "member.h"
#include "message.h"
#include "pipeline.h"
#include "registry.h"
#include "tuner.h"

namespace launcher::collectives {
namespace {

constexpr std::size_t kSlotBytes = 256 << 10;
constexpr std::size_t kUnit = 64;              // shares of a message begin on a line
constexpr std::size_t kSmallBytes = 64 << 10;  // of the messages of all others together: read by each rank in one go
constexpr std::size_t kSharedBytes = 4096;     // below, the second meeting costs more than the copy
constexpr std::size_t kPullBytes = 64 << 10;   // read from a peer at a time: stays in this core's cache

const std::byte* bytes_at(const void* address, std::size_t offset) noexcept {
  return static_cast<const std::byte*>(address) + offset;
}
std::byte* bytes_at(void* address, std::size_t offset) noexcept { return static_cast<std::byte*>(address) + offset; }

void move(void* target, const void* source, std::size_t bytes) noexcept {
  if (bytes != 0 && target != source) {
    std::memmove(target, source, bytes);
  }
}

// FNV-1a over the counts: they must be the same on all ranks.
std::uint64_t digest(std::span<const std::size_t> counts) noexcept {
  std::uint64_t hash = 0xcbf2'9ce4'8422'2325U;
  for (const std::size_t count : counts) {
    hash = (hash ^ count) * 0x0000'0100'0000'01b3U;
  }
  return hash;
}

std::vector<Choice> choices(int size, std::size_t slot_bytes, bool can_pull) {
  std::vector<Choice> out;
  const auto add = [&](bool two_shot, std::size_t block) {
    block = std::min(block, slot_bytes);
    const bool known = std::any_of(out.begin(), out.end(), [&](const Choice& other) {
      return other.two_shot == two_shot && other.block == block;
    });
    if (!known) {
      out.push_back({false, two_shot, block});
    }
  };
  add(true, 128 << 10);
  add(true, 256 << 10);
  if (size <= 3) {
    add(false, 64 << 10);
    add(false, 256 << 10);
  }
  if (can_pull) {
    out.push_back({true, true, kPullBytes});
  }
  return out;
}

// An operation on elements, with what is done to its result.
struct Fold {
  ReduceFunction function = nullptr;
  Finish finish;
};

Fold fold_of(DType dtype, ReduceOp op, Scale scale, int size) {
  Fold out;
  out.function = reduce_function(dtype, op, isa());
  if (out.function == nullptr) {
    throw std::invalid_argument(
        "this operation is not defined for this type of element (bit operations take integers, "
        "average takes numbers)");
  }
  if (!is_floating(dtype) && (scale.pre != 1.0 || scale.post != 1.0)) {
    throw std::invalid_argument("integers and bool take no scale; scale after converting to floating point");
  }
  out.finish.scale = scale.post;
  if (op == ReduceOp::average) {
    if (is_floating(dtype)) {
      out.finish.scale = scale.post / size;
    } else {
      out.finish.divisor = static_cast<std::uint64_t>(size);
    }
  }
  return out;
}

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
      member_.end_group(Failure::left, rank(), place_of(member_.options(), rank()) + " gave up: " + reason);
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
  bool all_take(Path path) const noexcept {
    for (int rank = 0; rank < size(); ++rank) {
      if (member_.call_of(rank).path != static_cast<std::uint8_t>(path)) {
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

// The kernel may refuse (seccomp, Yama) or not have process_vm_readv: all ranks must be able to.
bool LocalGroup::find_out_about_pulling(bool in_process) {
  static const std::uint64_t probe = kSegmentMagic;
  Segment& segment = member_.segment();
  segment.place(rank()).probe_address.store(reinterpret_cast<std::uintptr_t>(&probe), std::memory_order_relaxed);
  member_.meet_again();
  bool works = !in_process && size() > 1;
  for (int other = 0; works && other < size(); ++other) {
    if (other == rank()) {
      continue;
    }
    std::uint64_t seen = 0;
    const iovec local{&seen, sizeof seen};
    const iovec remote{reinterpret_cast<void*>(segment.place(other).probe_address.load()), sizeof seen};
    works = ::process_vm_readv(member_.process(other).pid(), &local, 1, &remote, 1, 0) == sizeof seen && seen == probe;
  }
  segment.place(rank()).can_pull.store(works ? 1 : 0, std::memory_order_relaxed);
  member_.meet_again();
  for (int other = 0; other < size(); ++other) {
    works = works && segment.place(other).can_pull.load(std::memory_order_relaxed) != 0;
  }
  return works;
}

void LocalGroup::measure_ping() {
  constexpr int kRounds = 16;
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t from = monotonic_ns();
    member_.meet_again();
    const auto ns = static_cast<double>(monotonic_ns() - from);
    ping_ns_ = round == 0 ? ns : std::min(ping_ns_, ns);
  }
}

Call LocalGroup::describe(Operation operation, DType dtype, std::size_t count) const noexcept {
  Call call;
  call.operation = static_cast<std::uint8_t>(operation);
  call.dtype = static_cast<std::uint8_t>(dtype);
  call.count = count;
  return call;
}

void LocalGroup::enter(Call call) {
  call.measured_ns = measured_.measured_ns;
  call.measured_class = measured_.measured_class;
  call.measured_choice = measured_.measured_choice;
  measured_.measured_ns = 0;
  member_.enter(call);
  // The slowest rank's time counts; all see the same numbers.
  const Call& first = member_.call_of(0);
  if (first.measured_ns != 0) {
    std::uint32_t slowest = 0;
    for (int rank = 0; rank < size(); ++rank) {
      slowest = std::max(slowest, member_.call_of(rank).measured_ns);
    }
    tuner_.learn(first.measured_class, first.measured_choice, slowest);
  }
}

// ---- allreduce

void LocalGroup::allreduce(std::span<const Piece> pieces, DType dtype, ReduceOp op, Scale scale) {
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t element = size_of(dtype);
  const Message message(pieces, element);
  const std::size_t bytes = message.count() * element;
  registry_.serve();
  const Member::Turn turn(member_, Operation::allreduce, bytes);
  Call call = describe(Operation::allreduce, dtype, message.count());
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.pre = scale.pre;
  call.post = scale.post;

  const bool crowd = bytes * (ranks() - 1) > kSmallBytes || bytes > slot_bytes();
  const bool small = forced_ == Path::small ? bytes <= slot_bytes() : !crowd && forced_ != Path::pipelined;
  const std::size_t size_class = Tuner::class_of(bytes);
  const std::size_t index = small ? 0 : tuner_.next(size_class);
  Choice choice = small ? Choice{false, false, slot_bytes()} : tuner_.choice(index);
  const bool may_pull = can_pull_ && pieces.size() == 1;
  if (forced_ == Path::pulled && may_pull) {
    choice.pulled = true;
  } else if (forced_ != Path::automatic && choice.pulled) {
    choice = tuner_.choice(0);
  }

  Path path = small ? Path::small : Path::pipelined;
  if (pieces.size() == 1 && may_share(bytes)) {
    call.source = registry_.find(pieces[0].source, bytes);
    call.target = pieces[0].source == pieces[0].target ? call.source : registry_.find(pieces[0].target, bytes);
    if (call.source.id != 0 && call.target.id != 0) {
      path = Path::shared;
    }
  }
  if (path != Path::shared && choice.pulled && may_pull && bytes != 0) {
    path = Path::pulled;
    call.source_address = reinterpret_cast<std::uintptr_t>(pieces[0].source);
    call.target.offset = reinterpret_cast<std::uintptr_t>(pieces[0].target);
  }
  if (path == Path::small || path == Path::pipelined) {
    if (choice.pulled) {
      choice = tuner_.choice(0);  // this rank's message is in pieces; the others see it by its path
    }
    member_.phase(CollectivePhase::copying_in);
    copy_in(message, element, choice, 0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  if (size() == 1) {
    allreduce_alone(pieces, fold, scale);
    count(path, bytes);
    return;
  }
  const std::uint64_t began = path == Path::pipelined || path == Path::pulled ? monotonic_ns() : 0;
  const bool agreed = all_take(path);
  if (!agreed) {
    path = Path::pipelined;
    choice = tuner_.choice(0);
  }
  switch (path) {
    case Path::shared:
      allreduce_shared(message, element, fold);
      break;
    case Path::pulled:
      allreduce_pulled(pieces[0], element, fold);
      break;
    default:
      allreduce_in_blocks(message, element, fold, choice, !agreed);
  }
  count(path, bytes);
  if (began != 0 && agreed && forced_ == Path::automatic) {
    measured_.measured_ns =
        static_cast<std::uint32_t>(std::clamp<std::uint64_t>(monotonic_ns() - began, 1, UINT32_MAX));
    measured_.measured_class = static_cast<std::uint8_t>(size_class);
    measured_.measured_choice = static_cast<std::uint8_t>(index);
  }
}

void LocalGroup::allreduce_alone(std::span<const Piece> pieces, const Fold& fold, Scale scale) {
  const double* scales = scale.pre == 1.0 ? nullptr : &scale.pre;
  for (const Piece& piece : pieces) {
    sources_[0] = piece.source;
    reduce_one(fold, piece.count, scales, piece.target);
  }
}

// Elements of a block that are rank `share`'s to fold.
struct Share {
  std::size_t begin;
  std::size_t end;
};
Share share_of(std::size_t count, std::size_t element, std::size_t share, std::size_t size) noexcept {
  const std::size_t unit = std::max<std::size_t>(1, kUnit / element);
  const std::size_t each = ((count + size - 1) / size + unit - 1) / unit * unit;
  return {std::min(count, share * each), std::min(count, (share + 1) * each)};
}

void LocalGroup::copy_in(const Message& message, std::size_t element, const Choice& choice, std::size_t block) {
  const std::size_t length = choice.block / element;
  const std::size_t begin = std::min(message.count(), block * length);
  const std::size_t end = std::min(message.count(), begin + length);
  std::byte* out = my_slot(block);
  if (!choice.two_shot) {
    message.copy_in(begin, end, out);
    return;
  }
  const Share own = share_of(end - begin, element, here(), ranks());  // folded from where it is
  message.copy_in(begin, begin + own.begin, out);
  message.copy_in(begin + own.end, end, out + own.end * element);
}

void LocalGroup::allreduce_in_blocks(const Message& message, std::size_t element, const Fold& fold,
                                     const Choice& choice, bool late) {
  if (late) {
    copy_in(message, element, choice, 0);
    member_.meet_again();
  }
  const double* scales = prescales();
  const std::size_t length = choice.block / element;
  const std::size_t blocks = std::max<std::size_t>(1, (message.count() + length - 1) / length);
  const auto range = [&](std::size_t block) {
    const std::size_t begin = std::min(message.count(), block * length);
    return Share{begin, std::min(message.count(), begin + length)};
  };
  const auto in = [&](std::size_t block) { copy_in(message, element, choice, block); };
  const auto slots_at = [&](std::size_t block, std::size_t offset) {
    for (int rank = 0; rank < size(); ++rank) {
      sources_[static_cast<std::size_t>(rank)] = slot(rank, block) + offset;
    }
  };
  if (!choice.two_shot) {
    run_pipeline(member_, blocks, in, [&](std::size_t block) {
      const Share all = range(block);
      message.each(all.begin, all.end,
                   [&](const std::byte* source, std::byte* target, std::size_t at, std::size_t count) {
                     slots_at(block, at);
                     sources_[here()] = source;
                     reduce_one(fold, count, scales, target);
                   });
    });
    return;
  }
  run_pipeline(
      member_, blocks, in,
      [&](std::size_t block) {
        const Share all = range(block);
        const Share own = share_of(all.end - all.begin, element, here(), ranks());
        message.each(all.begin + own.begin, all.begin + own.end,
                     [&](const std::byte* source, std::byte* target, std::size_t at, std::size_t count) {
                       const std::size_t offset = own.begin * element + at;
                       slots_at(block, offset);
                       sources_[here()] = source;
                       const std::array<void*, 2> both{target, my_slot(block) + offset};
                       fold.function(both.data(), both.size(), sources_.data(), ranks(), count, scales, fold.finish);
                     });
      },
      [&](std::size_t block) {
        const Share all = range(block);
        for (int other = 0; other < size(); ++other) {
          if (other != rank()) {
            const Share theirs = share_of(all.end - all.begin, element, static_cast<std::size_t>(other), ranks());
            message.copy_out(all.begin + theirs.begin, all.begin + theirs.end,
                             slot(other, block) + theirs.begin * element);
          }
        }
      });
}

void LocalGroup::allreduce_shared(const Message& message, std::size_t element, const Fold& fold) {
  const double* scales = prescales();
  const Share own = share_of(message.count(), element, here(), ranks());
  if (own.end > own.begin) {
    for (int rank = 0; rank < size(); ++rank) {
      const Call& call = member_.call_of(rank);
      sources_[static_cast<std::size_t>(rank)] = registry_.at(rank, call.source) + own.begin * element;
      targets_[static_cast<std::size_t>(rank)] = registry_.at(rank, call.target) + own.begin * element;
    }
    member_.phase(CollectivePhase::reducing);
    fold.function(targets_.data(), ranks(), sources_.data(), ranks(), own.end - own.begin, scales, fold.finish);
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();
}

void LocalGroup::pull(int rank, std::uint64_t address, void* target, std::size_t bytes) {
  std::size_t done = 0;
  while (done < bytes) {
    const iovec local{bytes_at(target, done), bytes - done};
    const iovec remote{reinterpret_cast<void*>(address + done), bytes - done};
    const ssize_t count = ::process_vm_readv(member_.process(rank).pid(), &local, 1, &remote, 1, 0);
    if (count > 0) {
      done += static_cast<std::size_t>(count);
    } else if (errno != EINTR) {
      const int error = errno;
      if (error == ESRCH) {  // it is on its way out: its memory goes before its process is seen to have ended
        member_.lost(rank);
      }
      member_.fail(Failure::system, rank,
                   place_of(member_.options(), rank) + ": its memory could not be read: " + std::strerror(error));
    }
  }
}

void LocalGroup::allreduce_pulled(const Piece& piece, std::size_t element, const Fold& fold) {
  const double* scales = prescales();
  const Share own = share_of(piece.count, element, here(), ranks());
  const std::size_t length = kPullBytes / element;
  scratch_.resize(ranks() * kPullBytes);
  for (std::size_t at = own.begin; at < own.end; at += length) {
    const std::size_t count = std::min(length, own.end - at);
    member_.phase(CollectivePhase::copying_in);
    for (int other = 0; other < size(); ++other) {
      const auto index = static_cast<std::size_t>(other);
      if (other == rank()) {
        sources_[index] = bytes_at(piece.source, at * element);
        continue;
      }
      std::byte* out = scratch_.data() + index * kPullBytes;
      pull(other, member_.call_of(other).source_address + at * element, out, count * element);
      sources_[index] = out;
    }
    member_.phase(CollectivePhase::reducing);
    reduce_one(fold, count, scales, bytes_at(piece.target, at * element));
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();
  member_.phase(CollectivePhase::copying_out);
  for (int step = 1; step < size(); ++step) {
    const int other = (rank() + step) % size();  // not all from the same rank at once
    const Share theirs = share_of(piece.count, element, static_cast<std::size_t>(other), ranks());
    pull(other, member_.call_of(other).target.offset + theirs.begin * element,
         bytes_at(piece.target, theirs.begin * element), (theirs.end - theirs.begin) * element);
  }
  member_.phase(CollectivePhase::waiting);
  member_.meet_again();  // others read from this rank's buffer until here
}

// ---- the others

std::size_t check_counts(std::span<const std::size_t> counts, std::size_t size, const char* what) {
  if (counts.size() != size) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(counts.size()) + " counts for " +
                                std::to_string(size) + " ranks; expected one for each");
  }
  std::size_t total = 0;
  for (const std::size_t count : counts) {
    total += count;
  }
  return total;
}

std::size_t begin_of(std::span<const std::size_t> counts, std::size_t rank) noexcept {
  std::size_t sum = 0;
  for (std::size_t index = 0; index < rank; ++index) {
    sum += counts[index];
  }
  return sum;
}

std::size_t blocks_for(std::size_t count, std::size_t length) noexcept {
  return std::max<std::size_t>(1, (count + length - 1) / length);
}

// Elements of block `block` of a part that has `count`.
std::size_t in_block(std::size_t count, std::size_t block, std::size_t length) noexcept {
  return block * length >= count ? 0 : std::min(length, count - block * length);
}

void check_root(int root, int size) {
  if (root < 0 || root >= size) {
    throw std::invalid_argument("root is " + std::to_string(root) + "; expected a rank of the group, 0 to " +
                                std::to_string(size - 1));
  }
}

void LocalGroup::reduce_scatter(const void* source, void* target, std::span<const std::size_t> counts, DType dtype,
                                ReduceOp op, Scale scale) {
  const std::size_t total = check_counts(counts, ranks(), "reduce_scatter");
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t element = size_of(dtype);
  const std::size_t own = counts[here()];
  const std::size_t own_begin = begin_of(counts, here());
  registry_.serve();
  const Member::Turn turn(member_, Operation::reduce_scatter, total * element);
  Call call = describe(Operation::reduce_scatter, dtype, total);
  call.detail = digest(counts);
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.pre = scale.pre;
  call.post = scale.post;
  Path path = Path::pipelined;
  if (may_share(total * element)) {
    call.source = registry_.find(source, total * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  // A slot holds a part of the block for each rank.
  const std::size_t length = slot_bytes() / ranks() / kUnit * kUnit / element;
  const std::size_t blocks = blocks_for(*std::max_element(counts.begin(), counts.end()), length);
  const auto in = [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += counts[other++]) {
      if (other != here()) {
        std::memcpy(my_slot(block) + other * length * element, bytes_at(source, (begin + block * length) * element),
                    in_block(counts[other], block, length) * element);
      }
    }
  };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  const double* scales = prescales();
  if (all_take(Path::shared)) {
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] =
          registry_.at(other, member_.call_of(other).source) + own_begin * element;
    }
    member_.phase(CollectivePhase::reducing);
    if (own != 0) {
      reduce_one(fold, own, scales, target);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, total * element);
    return;
  }
  if (!all_take(Path::pipelined)) {
    if (path == Path::shared) {
      in(0);
    }
    member_.meet_again();
  }
  run_pipeline(member_, blocks, in, [&](std::size_t block) {
    const std::size_t many = in_block(own, block, length);
    if (many == 0) {
      return;
    }
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] = slot(other, block) + here() * length * element;
    }
    sources_[here()] = bytes_at(source, (own_begin + block * length) * element);
    reduce_one(fold, many, scales, bytes_at(target, block * length * element));
  });
  count(Path::pipelined, total * element);
}

void LocalGroup::all_gather(const void* source, void* target, std::span<const std::size_t> counts, DType dtype) {
  const std::size_t total = check_counts(counts, ranks(), "all_gather");
  const std::size_t element = size_of(dtype);
  const std::size_t own = counts[here()];
  registry_.serve();
  const Member::Turn turn(member_, Operation::all_gather, total * element);
  Call call = describe(Operation::all_gather, dtype, total);
  call.detail = digest(counts);
  Path path = Path::pipelined;
  if (may_share(total * element)) {
    call.source = registry_.find(source, own * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  const std::size_t length = slot_bytes() / element;
  const std::size_t blocks = blocks_for(*std::max_element(counts.begin(), counts.end()), length);
  const auto in = [&](std::size_t block) {
    std::memcpy(my_slot(block), bytes_at(source, block * length * element), in_block(own, block, length) * element);
  };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  move(bytes_at(target, begin_of(counts, here()) * element), source, own * element);
  if (all_take(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    for (std::size_t step = 1; step < ranks(); ++step) {
      const std::size_t other = (here() + step) % ranks();
      if (counts[other] != 0) {
        const int rank = static_cast<int>(other);
        std::memcpy(bytes_at(target, begin_of(counts, other) * element),
                    registry_.at(rank, member_.call_of(rank).source), counts[other] * element);
      }
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, total * element);
    return;
  }
  if (!all_take(Path::pipelined)) {
    if (path == Path::shared) {
      in(0);
    }
    member_.meet_again();
  }
  run_pipeline(member_, blocks, in, [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += counts[other++]) {
      if (other != here()) {
        std::memcpy(bytes_at(target, (begin + block * length) * element), slot(static_cast<int>(other), block),
                    in_block(counts[other], block, length) * element);
      }
    }
  });
  count(Path::pipelined, total * element);
}

void LocalGroup::broadcast(void* buffer, std::size_t elements, DType dtype, int root) {
  check_root(root, size());
  const std::size_t element = size_of(dtype);
  const std::size_t bytes = elements * element;
  registry_.serve();
  const Member::Turn turn(member_, Operation::broadcast, bytes);
  Call call = describe(Operation::broadcast, dtype, elements);
  call.root = root;
  const std::size_t length = slot_bytes();
  const auto in = [&](std::size_t block) {
    if (rank() == root) {
      std::memcpy(my_slot(block), bytes_at(buffer, block * length), in_block(bytes, block, length));
    }
  };
  Path path = Path::pipelined;
  if (rank() == root && may_share(bytes)) {
    call.source = registry_.find(buffer, bytes);
    path = call.source.id != 0 ? Path::shared : path;
  }
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  const Call& said = member_.call_of(root);
  if (said.path == static_cast<std::uint8_t>(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    if (rank() != root) {
      std::memcpy(buffer, registry_.at(root, said.source), bytes);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, bytes);
    return;
  }
  run_pipeline(member_, blocks_for(bytes, length), in, [&](std::size_t block) {
    if (rank() != root) {
      std::memcpy(bytes_at(buffer, block * length), slot(root, block), in_block(bytes, block, length));
    }
  });
  count(Path::pipelined, bytes);
}

void LocalGroup::reduce(const void* source, void* target, std::size_t elements, DType dtype, ReduceOp op, int root,
                        Scale scale) {
  check_root(root, size());
  const Fold fold = fold_of(dtype, op, scale, size());
  const std::size_t element = size_of(dtype);
  const std::size_t bytes = elements * element;
  registry_.serve();
  const Member::Turn turn(member_, Operation::reduce, bytes);
  Call call = describe(Operation::reduce, dtype, elements);
  call.reduce_op = static_cast<std::uint8_t>(op);
  call.root = root;
  call.pre = scale.pre;
  call.post = scale.post;
  const std::size_t length = slot_bytes() / element;
  const auto in = [&](std::size_t block) {
    if (rank() != root) {
      std::memcpy(my_slot(block), bytes_at(source, block * length * element),
                  in_block(elements, block, length) * element);
    }
  };
  in(0);
  call.path = static_cast<std::uint8_t>(Path::pipelined);
  enter(call);
  const double* scales = prescales();
  run_pipeline(member_, blocks_for(elements, length), in, [&](std::size_t block) {
    const std::size_t many = in_block(elements, block, length);
    if (rank() != root || many == 0) {
      return;
    }
    for (int other = 0; other < size(); ++other) {
      sources_[static_cast<std::size_t>(other)] = slot(other, block);
    }
    sources_[here()] = bytes_at(source, block * length * element);
    reduce_one(fold, many, scales, bytes_at(target, block * length * element));
  });
  count(Path::pipelined, bytes);
}

void LocalGroup::all_to_all(const void* source, void* target, std::span<const std::size_t> send_counts,
                            std::span<const std::size_t> receive_counts, DType dtype) {
  const std::size_t sent = check_counts(send_counts, ranks(), "all_to_all (to send)");
  check_counts(receive_counts, ranks(), "all_to_all (to receive)");
  const std::size_t element = size_of(dtype);
  registry_.serve();
  const Member::Turn turn(member_, Operation::all_to_all, sent * element);
  Call call = describe(Operation::all_to_all, dtype, sent);
  call.detail = *std::max_element(send_counts.begin(), send_counts.end());
  const std::size_t parity = member_.sequence() & 1U;
  Segment& segment = member_.segment();
  std::copy(send_counts.begin(), send_counts.end(), segment.counts(rank(), parity));
  Path path = Path::pipelined;
  if (may_share(sent * element)) {
    call.source = registry_.find(source, sent * element);
    path = call.source.id != 0 ? Path::shared : path;
  }
  const std::size_t length = slot_bytes() / ranks() / kUnit * kUnit / element;
  const auto in = [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += send_counts[other++]) {
      if (other != here()) {
        std::memcpy(my_slot(block) + other * length * element, bytes_at(source, (begin + block * length) * element),
                    in_block(send_counts[other], block, length) * element);
      }
    }
  };
  if (path == Path::pipelined) {
    in(0);
  }
  call.path = static_cast<std::uint8_t>(path);
  enter(call);
  std::size_t most = 0;
  for (std::size_t other = 0; other < ranks(); ++other) {
    const int rank = static_cast<int>(other);
    most = std::max<std::size_t>(most, member_.call_of(rank).detail);
    const std::uint64_t comes = segment.counts(rank, parity)[here()];
    if (comes != receive_counts[other]) {
      member_.fail(Failure::mismatch, rank,
                   place_of(member_.options(), rank) + " sends " + std::to_string(comes) + " elements to " +
                       place_of(member_.options(), this->rank()) + ", which expects " +
                       std::to_string(receive_counts[other]));
    }
  }
  move(bytes_at(target, begin_of(receive_counts, here()) * element),
       bytes_at(source, begin_of(send_counts, here()) * element), send_counts[here()] * element);
  if (all_take(Path::shared)) {
    member_.phase(CollectivePhase::copying_out);
    for (std::size_t step = 1; step < ranks(); ++step) {
      const std::size_t other = (here() + step) % ranks();
      const int rank = static_cast<int>(other);
      const std::uint64_t* theirs = segment.counts(rank, parity);
      std::size_t begin = 0;
      for (std::size_t before = 0; before < here(); ++before) {
        begin += theirs[before];
      }
      std::memcpy(bytes_at(target, begin_of(receive_counts, other) * element),
                  registry_.at(rank, member_.call_of(rank).source) + begin * element, receive_counts[other] * element);
    }
    member_.phase(CollectivePhase::waiting);
    member_.meet_again();
    count(Path::shared, sent * element);
    return;
  }
  if (!all_take(Path::pipelined)) {
    if (path == Path::shared) {
      in(0);
    }
    member_.meet_again();
  }
  run_pipeline(member_, blocks_for(most, length), in, [&](std::size_t block) {
    for (std::size_t other = 0, begin = 0; other < ranks(); begin += receive_counts[other++]) {
      if (other != here()) {
        std::memcpy(bytes_at(target, (begin + block * length) * element),
                    slot(static_cast<int>(other), block) + here() * length * element,
                    in_block(receive_counts[other], block, length) * element);
      }
    }
  });
  count(Path::pipelined, sent * element);
}

void check_options(const Options& options) {
  if (options.size < 1 || options.size > kMaxRanks) {
    throw std::invalid_argument("group size is " + std::to_string(options.size) + "; expected 1 to " +
                                std::to_string(kMaxRanks) + " ranks on a host");
  }
  check_root(options.rank, options.size);
  if (!options.ranks.empty() && options.ranks.size() != static_cast<std::size_t>(options.size)) {
    throw std::invalid_argument("ranks: " + std::to_string(options.ranks.size()) + " numbers for " +
                                std::to_string(options.size) + " ranks");
  }
}

std::size_t slot_bytes_of(const Options& options) {
  const auto size = static_cast<std::size_t>(options.size);
  const std::size_t least = size * kUnit;  // reduce_scatter and all_to_all: a line for each rank
  const std::size_t wanted = std::max(options.slot_bytes == 0 ? kSlotBytes : options.slot_bytes, least);
  return (wanted + kUnit - 1) / kUnit * kUnit;
}

}  // namespace

std::unique_ptr<Group> Group::join(Options options) {
  check_options(options);
  Meeting meeting = meet(options, slot_bytes_of(options));
  return std::make_unique<LocalGroup>(std::move(options), std::shared_ptr<Segment>(std::move(meeting.segment)),
                                      std::move(meeting.processes), std::move(meeting.inbox),
                                      std::move(meeting.outboxes), false);
}

std::vector<std::unique_ptr<Group>> Group::join_threads(int size, const Options& common) {
  Options options = common;
  options.size = size;
  check_options(options);
  const std::size_t slot_bytes = slot_bytes_of(options);
  const auto segment =
      std::make_shared<Segment>(Segment::create(size, slot_bytes), Segment::bytes_for(size, slot_bytes));
  const auto ranks = static_cast<std::size_t>(size);
  std::vector<std::vector<Descriptor>> outboxes(ranks);
  std::vector<Descriptor> inboxes;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    std::array<int, 2> pair{};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair.data()) != 0) {
      throw_system("socketpair");
    }
    inboxes.emplace_back(pair[0]);
    for (std::size_t sender = 0; sender < ranks; ++sender) {
      outboxes[sender].emplace_back(sender + 1 == ranks ? pair[1] : ::dup(pair[1]));
    }
  }
  // Making a group is a meeting of all its ranks: each in a thread of its own.
  std::vector<std::unique_ptr<Group>> groups(ranks);
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      Options own = options;
      own.rank = static_cast<int>(rank);
      groups[rank] = std::make_unique<LocalGroup>(std::move(own), segment, std::vector<Process>(ranks),
                                                  std::move(inboxes[rank]), std::move(outboxes[rank]), true);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return groups;
}

}  // namespace launcher::collectives

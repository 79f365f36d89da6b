// What both sides of a meeting have: the folder, the clock, the words they exchange, and letters to who comes too late.
#ifndef LAUNCHER_COLLECTIVES_JOIN_H
#define LAUNCHER_COLLECTIVES_JOIN_H

#include <sys/un.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include "launcher/collectives.h"
#include "segment.h"
#include "system.h"

namespace launcher::collectives {

using Clock = std::chrono::steady_clock;
using Text = std::array<char, 512>;

Text to_text(const std::string& words) noexcept;
std::string to_string(const Text& text);

// Why a meeting came to nothing.
struct End {
  std::uint32_t failure = 0;  // Failure + 1; 0: it did not
  std::int32_t culprit = -1;
  std::uint64_t at_ns = 0;
  Text reason{};
};

// Of a rank to the first one.
enum class Saying : std::uint32_t { here, ready, gives_up };
struct Word {
  std::uint32_t magic = kSegmentMagic;
  Saying saying = Saying::here;
  std::int32_t rank = 0;
  std::int32_t size = 0;
  std::uint32_t failure = 0;
  Text reason{};  // of a timeout: the rank's limit
};

// Of the first rank: all are there (with the descriptors), all have taken theirs (without), or it has come to nothing.
struct Answer {
  End end;
  std::uint64_t segment_bytes = 0;
  std::array<std::int32_t, kMaxRanks> pids{};
};

class Join {
 protected:
  explicit Join(const Options& options);  // throws std::system_error, std::invalid_argument

  std::string file() const;  // the socket's
  sockaddr_un address() const;
  [[noreturn]] void fail(Failure failure, int rank, const std::string& what) const;

  // A rank is given the whole of its time to come, and again to take what it gets.
  void start_clock();
  bool expired() const { return Clock::now() >= deadline_; }
  int tick_ms() const;
  std::string limit() const;
  bool interrupted() const { return options_.interrupted && options_.interrupted(); }

  std::string place(int rank) const;
  std::string own_place() const { return place(options_.rank); }
  // What the others are told of an error of this rank's own.
  std::string explain(const std::exception& error) const;
  // Rethrows the error that is being handled, in words that help.
  [[noreturn]] void rethrow(const std::exception& error) const;

  // Who comes to a meeting that has ended finds a letter in the folder. Its reader takes it away, and so does its
  // sender when it comes again; letters to ranks that never come go with the folder.
  void send_letter(int to, const End& end) const noexcept;
  void withdraw_letter(int to) const noexcept;
  std::optional<End> take_letter(int from) const noexcept;
  std::string too_late(const End& end) const;  // what a letter says, to its reader

  static End make_end(Failure failure, int culprit, const std::string& reason) noexcept;
  static Failure failure_of(const End& end) noexcept;
  int culprit_of(const End& end) const noexcept;

  const Options& options_;
  Clock::time_point deadline_;
  Descriptor folder_;

 private:
  std::string letter(int to, int from) const;
  std::string lack_of_descriptors() const;
};

}  // namespace launcher::collectives

#endif

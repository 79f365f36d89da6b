// Which way of moving private memory is the fastest here: tried on the calls themselves, by size of message. All ranks
// ask and feed it the same in the same order, so all choose the same (and say what, and take the first choice where
// they do not). No choice changes a bit of any result.
#ifndef LAUNCHER_COLLECTIVES_TUNER_H
#define LAUNCHER_COLLECTIVES_TUNER_H

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace launcher::collectives {

// How a message goes through the slots, or around them.
enum class Way : std::uint8_t {
  one_shot,   // each rank folds everything
  published,  // each rank folds its share, and takes the others' from their slots
  returned,   // each rank folds its share, and puts the result back where it came from, into the others' slots
  pulled,     // each rank folds its share, and reads the others' memory
};

struct Choice {
  Way way = Way::returned;
  std::size_t block = 0;  // bytes
};

class Tuner {
 public:
  explicit Tuner(std::vector<Choice> choices) : choices_(std::move(choices)) {}

  static std::size_t class_of(std::size_t bytes) noexcept { return static_cast<std::size_t>(std::bit_width(bytes)); }
  const Choice& choice(std::size_t index) const noexcept { return choices_[index]; }

  struct Pick {
    std::size_t index = 0;
    bool measured = false;  // how long it takes is to be told
  };

  // For the next call of this class; asked once for each call.
  Pick next(std::size_t size_class) noexcept {
    Class& seen = classes_[size_class];
    const std::size_t many = choices_.size();
    const std::size_t call = seen.calls++;
    if (seen.trials < kTrials * many) {
      return {seen.trials % many, true};
    }
    // Machines change their mind: two cores that shared a cache may not any more.
    const std::size_t phase = call % kAgain;
    return {phase == 0 ? call / kAgain % many : seen.best, phase < 2};
  }

  void learn(std::size_t size_class, std::size_t index, std::uint32_t ns) noexcept {
    if (size_class >= classes_.size() || index >= choices_.size() || index >= kMost) {
      return;
    }
    Class& seen = classes_[size_class];
    ++seen.trials;
    double& score = seen.scores[index];
    const double now = ns;
    // The first call pays for page faults; a single bad one, for something else on the machine.
    score = score == 0 || now < score ? now : score + (now < 3 * score ? now - score : 2 * score) / 8;
    seen.best = 0;
    for (std::size_t other = 1; other < choices_.size(); ++other) {
      if (seen.scores[other] != 0 && seen.scores[other] < seen.scores[seen.best]) {
        seen.best = other;
      }
    }
  }

 private:
  static constexpr std::size_t kMost = 8;
  static constexpr std::size_t kTrials = 4;
  static constexpr std::size_t kAgain = 128;
  struct Class {
    std::size_t calls = 0;
    std::size_t trials = 0;
    std::size_t best = 0;
    std::array<double, kMost> scores{};
  };

  std::vector<Choice> choices_;
  std::array<Class, 65> classes_;
};

}  // namespace launcher::collectives

#endif

// Every loop against a reference that works element by element, bit for bit, on each instruction set of this machine.
#include "kernels.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "long_memory.h"
#include "reference.h"
#include "seeded_random.h"

using namespace reference;

namespace {

std::vector<Isa> machine_isas() {
  std::vector<Isa> found;
  for (std::uint8_t number = 0; number <= static_cast<std::uint8_t>(isa()); ++number) {
    found.push_back(static_cast<Isa>(number));
  }
  return found;
}

// ---- the matrix

// Ordinary numbers, and all bit patterns: NaN of every kind, infinities, denormals, both zeros.
void fill(Random& random, DType dtype, bool any_bits, std::vector<char>& bytes) {
  for (char& byte : bytes) {
    byte = static_cast<char>(dtype == DType::boolean ? random.below(2) : random.bits());
  }
  if (any_bits || !is_floating(dtype)) {
    return;
  }
  const std::size_t size = size_of(dtype);
  for (std::size_t offset = 0; offset + size <= bytes.size(); offset += size) {
    const double number = random.unit() * 4.0;
    const auto single = static_cast<float>(number);
    const std::uint16_t small = encode(dtype == DType::float16 ? kHalf : kBFloat, number);
    const void* value = size == 8   ? static_cast<const void*>(&number)
                        : size == 4 ? static_cast<const void*>(&single)
                                    : &small;
    std::memcpy(&bytes[offset], value, size);
  }
}

enum class Targets { apart, first, first_and_last, all_and_apart };

constexpr std::size_t kGuard = 96;  // bytes before and after each buffer that nothing may touch

void check_one(Random& random, const Case& given, std::size_t source_count, Targets where, bool any_bits) {
  const std::size_t bytes = given.count * size_of(given.dtype);
  // Each buffer begins at any byte.
  std::vector<std::vector<char>> original(source_count);
  std::vector<std::size_t> starts(source_count + 1);
  std::vector<const char*> pointers(source_count);
  for (std::size_t& start : starts) {
    start = kGuard + random.below(2) * random.below(64);
  }
  for (std::size_t number = 0; number < source_count; ++number) {
    original[number].resize(bytes);
    fill(random, given.dtype, any_bits, original[number]);
    pointers[number] = original[number].data();
  }
  std::vector<char> expected(bytes);
  for (std::size_t element = 0; element < given.count; ++element) {
    element_of(given, pointers, element, expected.data() + element * size_of(given.dtype));
  }
  for (const Isa isa : machine_isas()) {
    std::vector<std::vector<char>> memory(source_count + 1);  // the sources, then the target apart from them
    std::vector<const void*> sources(source_count);
    for (std::size_t number = 0; number <= source_count; ++number) {
      memory[number].assign(starts[number] + bytes + kGuard, 'g');
      if (number < source_count) {
        std::copy(original[number].begin(), original[number].end(),
                  memory[number].begin() + static_cast<std::ptrdiff_t>(starts[number]));
        sources[number] = memory[number].data() + starts[number];
      }
    }
    std::vector<std::size_t> chosen;
    if (where == Targets::apart || where == Targets::all_and_apart) {
      chosen.push_back(source_count);
    }
    for (std::size_t number = 0; number < source_count; ++number) {
      if (where == Targets::all_and_apart || (number == 0 && where != Targets::apart) ||
          (number + 1 == source_count && number != 0 && where == Targets::first_and_last)) {
        chosen.push_back(number);
      }
    }
    std::vector<void*> targets;
    for (const std::size_t number : chosen) {
      targets.push_back(memory[number].data() + starts[number]);
    }
    reduce_function(given.dtype, given.op, isa)(targets.data(), targets.size(), sources.data(), source_count,
                                                given.count, given.prescale, given.finish);
    bool good = true;
    for (std::size_t number = 0; number <= source_count; ++number) {
      const char* buffer = memory[number].data();
      const char* middle = buffer + starts[number];
      const bool is_target = std::find(chosen.begin(), chosen.end(), number) != chosen.end();
      if (is_target || number < source_count) {
        const std::vector<char>& content = is_target ? expected : original[number];
        good = good && std::equal(content.begin(), content.end(), middle);
      }
      const auto untouched = [](char byte) { return byte == 'g'; };
      good = good && std::all_of(buffer, middle, untouched) &&
             std::all_of(middle + bytes, buffer + memory[number].size(), untouched);
    }
    if (!good) {
      std::fprintf(stderr, "%s: dtype %d op %d count %zu sources %zu targets %d any_bits %d prescale %d scale %g\n",
                   name(isa), static_cast<int>(given.dtype), static_cast<int>(given.op), given.count, source_count,
                   static_cast<int>(where), any_bits, given.prescale != nullptr, given.finish.scale);
    }
    CHECK(good);
  }
}

void matrix() {
  Random random(1);
  const std::array<double, 9> prescale{0.5, 1.0, -2.0, 0.1, 3.0, 1.0, 1e-3, 0.25, 7.0};
  for (int type = 0; type < kDTypes; ++type) {
    for (int op = 0; op < kReduceOps; ++op) {
      Case given{static_cast<DType>(type), static_cast<ReduceOp>(op), 0, nullptr, {}};
      if (reduce_function(given.dtype, given.op, Isa::plain) == nullptr) {
        continue;
      }
      for (std::size_t source_count = 1; source_count <= 9; ++source_count) {
        for (const std::size_t count : {0U, 1U, 7U, 64U, 131U, 517U}) {
          given.count = count;
          given.prescale = nullptr;
          given.finish = {};
          if (is_floating(given.dtype)) {
            given.prescale = random.below(3) == 0 ? prescale.data() : nullptr;
            given.finish.scale = random.below(3) == 0 ? 1.0 / 3.0 : 1.0;
          } else if (given.dtype != DType::boolean) {
            given.finish.divisor = random.below(3) == 0 ? source_count : 1;
          }
          check_one(random, given, source_count, static_cast<Targets>(random.below(4)), random.below(2) == 0);
        }
      }
      // The two sources of two ranks have loops of their own, with one target, with two, and with a scale.
      for (int variant = 0; variant < 12; ++variant) {
        given.count = 1 + random.below(300);
        given.prescale = nullptr;
        given.finish.scale = variant % 3 == 0 && is_floating(given.dtype) ? 0.5 : 1.0;
        given.finish.divisor = 1;
        check_one(random, given, 2, static_cast<Targets>(variant % 4), variant % 2 == 0);
      }
    }
  }
}

void defined_operations() {
  for (const Isa isa : machine_isas()) {
    for (int type = 0; type < kDTypes; ++type) {
      for (int op = 0; op < kReduceOps; ++op) {
        const auto dtype = static_cast<DType>(type);
        const bool bits = op >= static_cast<int>(ReduceOp::bit_and);
        const bool average = op == static_cast<int>(ReduceOp::average);
        const bool defined = !(bits && is_floating(dtype)) && !(average && dtype == DType::boolean);
        CHECK((reduce_function(dtype, static_cast<ReduceOp>(op), isa) != nullptr) == defined);
      }
    }
  }
}

// All 65,536 numbers of each 16-bit type survive, NaN in one form.
void round_trips() {
  std::vector<std::uint16_t> numbers(65536);
  for (std::size_t bits = 0; bits < numbers.size(); ++bits) {
    numbers[bits] = static_cast<std::uint16_t>(bits);
  }
  for (const Isa isa : machine_isas()) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      const Small format = dtype == DType::float16 ? kHalf : kBFloat;
      std::vector<std::uint16_t> result(numbers.size());
      std::vector<float> wide(numbers.size());
      void* target = result.data();
      const void* source = numbers.data();
      reduce_function(dtype, ReduceOp::sum, isa)(&target, 1, &source, 1, numbers.size(), nullptr, {});
      decompress(wide.data(), numbers.data(), numbers.size(), dtype, isa);
      bool good = true;
      for (std::size_t bits = 0; bits < numbers.size(); ++bits) {
        const double value = decode(format, numbers[bits]);
        good = good && result[bits] == encode(format, value) && std::isnan(wide[bits]) == std::isnan(value);
        good = good && (std::isnan(value) ||
                        (static_cast<double>(wide[bits]) == value && std::signbit(wide[bits]) == std::signbit(value)));
      }
      CHECK(good);
    }
  }
}

// ---- the wire

std::uint16_t reference_wire(DType wire, float value) {
  if (wire == DType::bfloat16) {
    return encode(kBFloat, static_cast<double>(value));
  }
  return encode(kHalf, std::isfinite(value) ? static_cast<double>(std::clamp(value, -65504.0F, 65504.0F))
                                            : static_cast<double>(value));
}

// Each number of the type, the middle to its neighbour, and the floats beside it; and any bits.
std::vector<float> hard_to_round(DType wire) {
  const Small format = wire == DType::float16 ? kHalf : kBFloat;
  std::vector<float> values;
  Random random(2);
  for (int bits = 0; bits < 65536; ++bits) {
    const auto number = static_cast<float>(decode(format, static_cast<std::uint16_t>(bits)));
    const auto next = static_cast<float>(decode(format, static_cast<std::uint16_t>(bits + 1)));
    const float middle = number + (next - number) / 2.0F;
    values.insert(values.end(), {number, middle, std::nextafterf(middle, number), std::nextafterf(middle, next)});
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(random.bits())));
  }
  return values;
}

void wire_rounds() {
  for (const DType wire : {DType::bfloat16, DType::float16}) {
    const std::vector<float> values = hard_to_round(wire);
    std::vector<std::uint16_t> expected;
    for (const float value : values) {
      expected.push_back(reference_wire(wire, value));
    }
    for (const Isa isa : machine_isas()) {
      std::vector<std::uint16_t> sent(values.size() + 1, 0x6767);
      compress(sent.data(), values.data(), nullptr, values.size(), wire, isa);
      CHECK(sent.back() == 0x6767);
      sent.pop_back();
      CHECK(sent == expected);
    }
  }
}

void wire_feeds_errors_back() {
  Random random(3);
  for (const DType wire : {DType::bfloat16, DType::float16}) {
    const Small format = wire == DType::float16 ? kHalf : kBFloat;
    for (const std::size_t count : {0U, 1U, 5U, 16U, 47U, 260U}) {
      std::vector<float> source(count);
      for (float& value : source) {
        value = static_cast<float>(random.unit() * 1e-3);
      }
      if (count > 40) {
        source[3] = std::numeric_limits<float>::infinity();
        source[17] = std::numeric_limits<float>::quiet_NaN();
        source[33] = 1e6F;  // out of the reach of float16
        source[34] = std::numeric_limits<float>::max();
      }
      for (const Isa isa : machine_isas()) {
        std::vector<float> error(count + 1, 0.0F);
        std::vector<float> kept(count, 0.0F);
        std::vector<double> total(count, 0.0);
        constexpr int kRounds = 200;
        bool good = true;
        for (int round = 0; round < kRounds; ++round) {
          error[count] = 77.0F;
          std::vector<std::uint16_t> sent(count);
          compress(sent.data(), source.data(), error.data(), count, wire, isa);
          for (std::size_t element = 0; element < count; ++element) {
            const float value = source[element] + kept[element];
            good = good && sent[element] == reference_wire(wire, value);
            const auto received = static_cast<float>(decode(format, sent[element]));
            kept[element] = std::isfinite(value - received) ? value - received : 0.0F;
            good = good && error[element] == kept[element];
            total[element] += static_cast<double>(received);
          }
          good = good && error[count] == 77.0F;
        }
        // What was rounded away in one call comes in a later one.
        for (std::size_t element = 0; element < count; ++element) {
          if (std::isfinite(source[element]) && std::fabs(source[element]) < 1.0F) {
            good = good && std::fabs(total[element] / kRounds - static_cast<double>(source[element])) < 1e-7;
          }
        }
        CHECK(good);
      }
    }
  }
}

// ---- copies, and messages that 32 bits do not count

void copies() {
  Random random(4);
  for (const Isa isa : machine_isas()) {
    for (const std::size_t bytes : {0U, 1U, 63U, 64U, 65U, 127U, 1000U, 4096U, 16384U, 16447U, 100001U}) {
      for (int variant = 0; variant < 8; ++variant) {
        const std::size_t to = kGuard + random.below(65);
        const std::size_t from = random.below(65);
        std::vector<char> source(from + bytes + 1);  // none of no bytes: those have no address
        fill(random, DType::uint8, true, source);
        std::vector<char> target(to + bytes + kGuard, 'g');
        copy_fresh(target.data() + to, source.data() + from, bytes, isa);
        const auto begin = target.begin() + static_cast<std::ptrdiff_t>(to);
        const auto end = begin + static_cast<std::ptrdiff_t>(bytes);
        const auto untouched = [](char byte) { return byte == 'g'; };
        CHECK(std::equal(begin, end, source.begin() + static_cast<std::ptrdiff_t>(from)));
        CHECK(std::all_of(target.begin(), begin, untouched) && std::all_of(end, target.end(), untouched));
      }
    }
  }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void more_than_four_gigabytes() {
  constexpr std::size_t kBytes = (std::size_t{4} << 30) + kLongPeriod;
  const LongMemory left(kBytes);
  const LongMemory right(kBytes);
  const LongMemory sum(kBytes);
  left.fill<std::uint8_t>(3, 13);
  right.fill<std::uint8_t>(4, 14);
  sum.fill<std::uint8_t>(0, 0);
  void* const targets[] = {sum.data()};
  const void* const sources[] = {left.data(), right.data()};
  reduce_function(DType::uint8, ReduceOp::sum, isa())(targets, 1, sources, 2, kBytes + kLongTail - 1, nullptr, {});
  CHECK(sum.data()[kBytes + kLongTail - 1] == 0);
  sum.data()[kBytes + kLongTail - 1] = 27;
  CHECK((sum.holds<std::uint8_t>(7, 27)));
}
#endif

// ---- the choice

// `isa()` decides once for a process: a fresh one for each wish. Before any other test calls it.
void asked_for(const char* wish, int at_most) {
  const pid_t child = fork();
  if (child == 0) {
    setenv("LAUNCHER_ISA", wish, 1);
    _exit(static_cast<int>(isa()));
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) <= at_most);
}

void choice() {
  asked_for("plain", 0);
  asked_for("avx2", 1);
  asked_for("avx512", 2);
  asked_for("sse9", 2);
  CHECK(std::string(name(Isa::plain)) == "plain" && std::string(name(Isa::avx512)) == "avx512");
}

}  // namespace

int main() {
  check::run("choice", choice);
  std::printf("up to %s\n", name(isa()));
  check::run("defined_operations", defined_operations);
  check::run("matrix", matrix);
  check::run("round_trips", round_trips);
  check::run("wire_rounds", wire_rounds);
  check::run("wire_feeds_errors_back", wire_feeds_errors_back);
  check::run("copies", copies);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  check::run("more_than_four_gigabytes", more_than_four_gigabytes);
#endif
  return check::failures == 0 ? 0 : 1;
}

// Runs a fuzz target over its seeds and over what comes of them by chance, the same each time.
//   fuzz_x_replay [cases]          with so many cases; 5000 if not said
//   fuzz_x_replay --seeds FOLDER   writes the seeds into files, for libFuzzer to begin with
//   fuzz_x_replay FILE...          runs inputs that libFuzzer has found
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fuzz.h"

namespace {

using Random = std::mt19937;

std::size_t below(Random& random, std::size_t limit) { return limit == 0 ? 0 : random() % limit; }

void mutate(std::string& input, const std::vector<std::string>& others, Random& random) {
  const std::size_t at = below(random, input.size() + 1);
  switch (random() % 6) {
    case 0:
      input.resize(at);
      break;
    case 1:
      if (at < input.size()) {
        input[at] = static_cast<char>(input[at] ^ (1 << random() % 8));
      }
      break;
    case 2:
      if (at < input.size()) {
        input[at] = static_cast<char>(random());
      }
      break;
    case 3:
      input.insert(at, 1 + random() % 5, static_cast<char>(random()));
      break;
    case 4:
      input.erase(at, 1 + random() % 5);
      break;
    default: {
      const std::string& other = others[below(random, others.size())];
      const std::size_t from = below(random, other.size() + 1);
      input.insert(at, other, from, 1 + random() % 64);
    }
  }
}

void run(const std::string& input) {
  // A copy of the exact size: what is read past it is found.
  const std::vector<std::uint8_t> bytes(input.begin(), input.end());
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> seeds = launcher::fuzz::seeds();
  if (count == 3 && std::string(arguments[1]) == "--seeds") {
    for (std::size_t i = 0; i < seeds.size(); ++i) {
      std::ofstream(std::string(arguments[2]) + "/seed" + std::to_string(i), std::ios::binary) << seeds[i];
    }
    return 0;
  }
  const long cases = count == 2 ? std::strtol(arguments[1], nullptr, 10) : 0;
  if (count > 1 && cases == 0) {
    for (int i = 1; i < count; ++i) {
      std::ifstream file(arguments[i], std::ios::binary);
      run({std::istreambuf_iterator<char>(file), {}});
    }
    return 0;
  }
  Random random(20261123);
  for (const std::string& seed : seeds) {
    run(seed);
  }
  for (long i = 0; i < (cases == 0 ? 5000 : cases); ++i) {
    std::string input = seeds[below(random, seeds.size())];
    for (std::size_t changes = 1 + random() % 4; changes != 0; --changes) {
      mutate(input, seeds, random);
    }
    run(input);
  }
  std::printf("%zu seeds, and %ld cases made of them\n", seeds.size(), cases == 0 ? 5000 : cases);
  return 0;
}

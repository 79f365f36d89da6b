// The bodies of the kernels that make batches of records on a GPU, run on the host thread by thread, against the order
// and the shares of the loader. What is left for a machine with a GPU is launching them.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../cuda/gather.h"
#include "check.h"
#include "order.h"
#include "seeded_random.h"
#include "share.h"

namespace {

namespace cuda = launcher::cuda;
namespace data = launcher::data;

LauncherCudaNetwork given_network(const data::Feistel& network) {
  LauncherCudaNetwork given = {network.n, network.low_bits, network.low_mask, network.high_mask, {}};
  static_assert(sizeof given.keys == sizeof network.keys);
  std::memcpy(given.keys, network.keys, sizeof given.keys);
  return given;
}

// The records of a step as the kernel has them: blocks of threads, more of them than rows.
std::vector<std::uint64_t> numbered(const data::Order& order, const data::Span& span) {
  const data::Permutation& records = order.records();
  cuda::Numbering job = {};
  job.records = order.parameters().records;
  job.order = kLauncherCudaInOrder;
  if (order.parameters().shuffle == data::Shuffle::full) {
    job.order = records.table().empty() ? kLauncherCudaByNetwork : kLauncherCudaByTable;
    job.table = records.table().data();
    job.network = cuda::network_of(given_network(records.network().numbers()));
  }
  job.begin = span.begin;
  job.padding = span.padding;
  job.rows = span.rows;
  job.valid = span.valid;
  std::vector<std::uint64_t> out(span.rows);
  job.numbers = out.data();
  for (std::uint64_t row = 0; row < span.rows + cuda::kGatherThreads; ++row) {
    cuda::number_row(job, row);
  }
  return out;
}

void records_are_the_loaders(data::Shuffle shuffle, std::uint64_t records, std::uint64_t base) {
  const data::Order order({shuffle, 3, 5, records, 1, 1, 1});
  for (const std::uint64_t batch : {std::uint64_t{1}, std::uint64_t{7}, std::uint64_t{256}}) {
    for (const std::uint64_t world : {std::uint64_t{1}, std::uint64_t{3}}) {
      for (const data::Tail tail : {data::Tail::drop, data::Tail::pad, data::Tail::short_one}) {
        data::ShareParameters share{records, base, world, 0, batch, 1, tail};
        const std::uint64_t steps = data::steps(share);
        share.agreed_steps = steps + 2;  // other hosts have more: steps of padding, or of no rows
        for (share.rank = 0; share.rank < world; ++share.rank) {
          const std::uint64_t some[] = {0, steps / 2, steps == 0 ? 0 : steps - 1, steps, steps + 1};
          for (const std::uint64_t step : some) {
            std::vector<std::uint64_t> wanted(batch);
            const data::Rows rows = data::rows_of(share, order, step, wanted.data());
            wanted.resize(rows.rows);
            const data::Span span = data::span_of(share, step);
            CHECK(span.rows == rows.rows && span.valid == rows.valid);
            CHECK(numbered(order, span) == wanted);
          }
        }
      }
    }
  }
}

void walks_are_the_networks() {
  for (const std::uint64_t n : {1ULL, 2ULL, 15ULL, 16ULL, 17ULL, 65537ULL, (1ULL << 33) + 1, 1ULL << 62}) {
    const data::Network network(n, 11);
    const data::Feistel again = cuda::network_of(given_network(network.numbers()));
    for (std::uint64_t number = 0; number < std::min<std::uint64_t>(n, 300); ++number) {
      const std::uint64_t index = n <= 300 ? number : number * (n / 300);
      const std::uint64_t place = data::walk(again, index);
      CHECK(place < n && place == network(index) && network.inverse(place) == index);
    }
  }
}

void division_is_exact() {
  Random random(2);
  for (int number = 0; number < 20000; ++number) {
    const auto divisor = static_cast<std::uint32_t>(1 + (random.bits() & ((1ULL << random.below(32)) - 1)));
    const std::uint32_t most = (1U << 31) - 1;
    const auto any = static_cast<std::uint32_t>(random.below(std::size_t{1} << 31));
    const std::uint32_t multiple = any / divisor * divisor;
    const cuda::Divider by(divisor);
    for (const std::uint32_t value : {0U, 1U, any, multiple, multiple == 0 ? 0 : multiple - 1, most, most - 1}) {
      CHECK(by.quotient(value) == value / divisor);
    }
  }
  CHECK(cuda::Divider(1U << 31).quotient((1U << 31) - 1) == 0);
}

// Memory of exactly so many bytes, `shift` of them behind a 16-byte boundary.
class Bytes {
 public:
  Bytes(std::size_t size, std::size_t shift) : shift_(shift), memory_(new unsigned char[size + shift]) {
    std::memset(memory_.get(), 0xa5, size + shift);
  }
  unsigned char* begin() const { return memory_.get() + shift_; }
  std::uint64_t address() const { return reinterpret_cast<std::uint64_t>(begin()); }

 private:
  std::size_t shift_;
  std::unique_ptr<unsigned char[]> memory_;
};

template <typename Unit>
void gather_as(const Bytes& source, const Bytes& target, const std::vector<std::uint64_t>& numbers,
               std::size_t row_bytes, std::uint32_t chunk) {
  constexpr std::uint32_t kThreads = 8;
  const auto units = static_cast<std::uint32_t>(row_bytes / sizeof(Unit));
  const std::uint64_t total = std::uint64_t{units} * numbers.size();
  const cuda::Gathering<Unit> job = {reinterpret_cast<const Unit*>(source.begin()),
                                     reinterpret_cast<Unit*>(target.begin()),
                                     numbers.data(),
                                     total,
                                     units,
                                     chunk,
                                     cuda::Divider(units)};
  for (std::uint32_t block = 0; block * std::uint64_t{chunk} < total; ++block) {
    for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
      cuda::gather<Unit>(job, block, thread, kThreads);
    }
  }
}

void rows_are_copied() {
  constexpr std::size_t kRecords = 97;
  Random random(4);
  int widths[17] = {};
  for (const std::size_t row_bytes : {1U, 2U, 3U, 4U, 8U, 12U, 16U, 20U, 48U, 250U, 784U, 1016U, 1024U}) {
    for (const std::size_t shift : {0U, 1U, 2U, 4U, 8U}) {
      const Bytes source(kRecords * row_bytes, shift);
      for (std::size_t index = 0; index < kRecords * row_bytes; ++index) {
        source.begin()[index] = static_cast<unsigned char>(random.bits());
      }
      for (const std::size_t rows : {1U, 5U, 64U}) {
        std::vector<std::uint64_t> numbers(rows);
        for (std::uint64_t& number : numbers) {
          number = random.below(kRecords);
        }
        const Bytes target(rows * row_bytes, random.one_in(2) ? shift : 0);
        const std::uint32_t width = cuda::access_bytes(source.address(), target.address(), row_bytes);
        ++widths[width];
        const std::uint32_t chunk = random.one_in(2) ? 8 : 8 * cuda::kGatherAhead;
        switch (width) {
          case 16:
            gather_as<cuda::Wide>(source, target, numbers, row_bytes, chunk);
            break;
          case 8:
            gather_as<cuda::Narrow>(source, target, numbers, row_bytes, chunk);
            break;
          case 4:
            gather_as<std::uint32_t>(source, target, numbers, row_bytes, chunk);
            break;
          case 2:
            gather_as<std::uint16_t>(source, target, numbers, row_bytes, chunk);
            break;
          default:
            gather_as<std::uint8_t>(source, target, numbers, row_bytes, chunk);
        }
        for (std::size_t row = 0; row < rows; ++row) {
          CHECK(std::memcmp(target.begin() + row * row_bytes, source.begin() + numbers[row] * row_bytes, row_bytes) ==
                0);
        }
      }
    }
  }
  for (const int width : {1, 2, 4, 8, 16}) {
    CHECK(widths[width] > 0);
  }
}

void grids() {
  CHECK(cuda::access_bytes(256, 512, 4096) == 16 && cuda::access_bytes(256, 520, 4096) == 8);
  CHECK(cuda::access_bytes(256, 512, 1016) == 8 && cuda::access_bytes(257, 512, 1024) == 1);
  CHECK(cuda::access_bytes(0, 0, 6) == 2 && cuda::access_bytes(0, 4, 0) == 4);
  CHECK(cuda::chunk_of(1) == cuda::kGatherThreads);
  CHECK(cuda::chunk_of(1U << 30) == cuda::kGatherThreads * cuda::kGatherAhead);
  CHECK(cuda::kMostUnits + cuda::chunk_of(~std::uint64_t{0}) <= 1U << 31);
}

}  // namespace

int main() {
  for (const std::uint64_t records : {1ULL, 5ULL, 1000ULL, 65536ULL, 65537ULL, 1ULL << 40}) {
    check::run("records of a step, shuffled", [&] { records_are_the_loaders(data::Shuffle::full, records, 0); });
    check::run("records of a step, resumed",
               [&] { records_are_the_loaders(data::Shuffle::full, records, records / 3); });
    check::run("records of a step, as they come",
               [&] { records_are_the_loaders(data::Shuffle::none, records, records / 2); });
  }
  check::run("walks are the network's", walks_are_the_networks);
  check::run("division is exact", division_is_exact);
  check::run("rows are copied", rows_are_copied);
  check::run("grids", grids);
  return check::failures == 0 ? 0 : 1;
}

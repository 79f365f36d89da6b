// The bodies of the CUDA kernels, run on the host thread by thread: indices, tables, arithmetic (against the CPU's own
// kernels) and the way ranks meet, with threads as ranks. What is left for a machine with a GPU is launching them.
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../collectives/kernels_table.h"
#include "../cuda/allreduce.h"
#include "../cuda/convert.h"
#include "check.h"

namespace {

namespace cuda = launcher::cuda;
using cuda::BFloat16;
using cuda::DType;
using cuda::Float16;
using cuda::Float32;
using cuda::Float64;
using cuda::Int32;
using cuda::Int64;
using cuda::ReduceOp;
using launcher::collectives::kPlainKernels;

std::mt19937_64 generator(7);

std::uint64_t below(std::uint64_t bound) { return generator() % bound; }

// Where 16-bit rounding is decided, what no number is, and anything else.
std::vector<float> floats(std::size_t count) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> special = {0.0F,
                                      -0.0F,
                                      65504.0F,
                                      65519.99F,
                                      65520.0F,
                                      -70000.0F,
                                      infinity,
                                      -infinity,
                                      0x1p-24F,
                                      0x1p-25F,
                                      0x1.8p-25F,
                                      0x1p-14F,
                                      3.4e38F,
                                      std::numeric_limits<float>::quiet_NaN(),
                                      1.0F + 0x1p-11F,
                                      0x1p-140F};
  std::vector<float> values(count);
  for (float& value : values) {
    const std::uint64_t kind = below(8);
    if (kind == 0) {
      value = special[below(special.size())];
    } else if (kind == 1) {
      value = cuda::bits<float>(static_cast<std::uint32_t>(generator()));
    } else {
      value = std::normal_distribution<float>(0.0F, 3.0F)(generator);
    }
  }
  return values;
}

template <typename T>
std::vector<typename T::Memory> elements(std::size_t count) {
  std::vector<typename T::Memory> out(count);
  const std::vector<float> values = floats(count);
  for (std::size_t index = 0; index < count; ++index) {
    if constexpr (std::is_integral_v<typename T::Scalar>) {
      out[index] = static_cast<typename T::Memory>(generator());
    } else {
      out[index] = T::write(static_cast<typename T::Scalar>(values[index]));
    }
  }
  return out;
}

// Memory that begins `shift` bytes behind a 16-byte boundary, and nothing behind its end.
class Bytes {
 public:
  Bytes(std::size_t size, std::size_t shift) : shift_(shift), memory_(new unsigned char[size + shift]) {
    std::memset(memory_.get(), 0xa5, size + shift);
  }
  template <typename Memory>
  Memory* as() const {
    return reinterpret_cast<Memory*>(memory_.get() + shift_);
  }

 private:
  std::size_t shift_;
  std::unique_ptr<unsigned char[]> memory_;
};

// ---- numbers

void sixteen_bits_are_the_cpus() {
  for (std::uint32_t word = 0; word < 0x10000U; ++word) {
    const auto value = static_cast<std::uint16_t>(word);
    float half = 0.0F;
    float brain = 0.0F;
    kPlainKernels.decompress[1](&half, &value, 1);
    kPlainKernels.decompress[0](&brain, &value, 1);
    const bool half_nan = half != half;
    const bool brain_nan = brain != brain;
    CHECK(half_nan ? cuda::from_float16(value) != cuda::from_float16(value)
                   : cuda::bits<std::uint32_t>(cuda::from_float16(value)) == cuda::bits<std::uint32_t>(half));
    CHECK(brain_nan ? cuda::from_bfloat16(value) != cuda::from_bfloat16(value)
                    : cuda::bits<std::uint32_t>(cuda::from_bfloat16(value)) == cuda::bits<std::uint32_t>(brain));
    CHECK(half_nan || cuda::to_float16(half) == value);
    CHECK(brain_nan || cuda::to_bfloat16(brain) == value);
  }
  CHECK(cuda::to_float16(65519.99F) == 0x7bff && cuda::to_float16(65520.0F) == 0x7c00);
  CHECK(cuda::to_float16(-std::numeric_limits<float>::quiet_NaN()) == 0x7e00);
}

// ---- compression

template <typename Wire>
void compress_is_the_cpus(int number) {
  const std::size_t sizes[] = {1, 3, 4, 5, 8191, 8192, 8193, 20000};
  for (const std::size_t count : sizes) {
    for (const std::size_t shift : {0U, 4U, 8U}) {
      for (const bool keep : {false, true}) {
        const Bytes source(count * 4, shift);
        const Bytes error(count * 4, 0);
        const Bytes target(count * 2, shift / 2);
        std::memset(error.as<char>(), 0, count * 4);
        std::vector<float> expected_error(count);
        std::vector<std::uint16_t> expected(count);
        for (int round = 0; round < 3; ++round) {
          const std::vector<float> values = floats(count);
          std::memcpy(source.as<float>(), values.data(), count * 4);
          kPlainKernels.compress[number](expected.data(), values.data(), keep ? expected_error.data() : nullptr, count);
          for (std::size_t begin = 0; begin < count; begin += cuda::kCompressChunk) {
            const auto part = static_cast<std::uint32_t>(std::min<std::size_t>(count - begin, cuda::kCompressChunk));
            for (std::uint32_t thread = 0; thread < 32; ++thread) {
              cuda::compress<Wire>(target.as<std::uint16_t>() + begin, source.as<float>() + begin,
                                   keep ? error.as<float>() + begin : nullptr, part, thread, 32);
            }
          }
          CHECK(std::memcmp(target.as<char>(), expected.data(), count * 2) == 0);
          CHECK(!keep || std::memcmp(error.as<char>(), expected_error.data(), count * 4) == 0);
        }
      }
    }
  }
}

// ---- many tensors and one bucket

template <typename From, typename To>
void pack_and_unpack() {
  using FromMemory = typename From::Memory;
  using ToMemory = typename To::Memory;
  constexpr std::uint32_t kChunk = 64;
  struct Source {
    std::vector<FromMemory> values;
    Bytes memory;
    std::uint64_t offset;
  };
  std::vector<Source> sources;
  std::vector<LauncherCudaTensor> tensors;
  std::uint64_t offset = 0;
  for (int number = 0; number < 60; ++number) {
    const std::uint64_t count = number % 7 == 3 ? 0 : 1 + below(number % 5 == 0 ? 400 : 70);
    offset = number % 2 == 0 ? cuda::round_up(offset, 8) : offset;
    sources.push_back(
        {elements<From>(count), Bytes(count * sizeof(FromMemory), below(4) * sizeof(FromMemory)), offset});
    if (count != 0) {
      std::memcpy(sources.back().memory.template as<char>(), sources.back().values.data(), count * sizeof(FromMemory));
    }
    tensors.push_back({reinterpret_cast<std::uint64_t>(sources.back().memory.template as<char>()), count, offset});
    offset += count;
  }
  const Bytes bucket(offset * sizeof(ToMemory), 0);
  auto* packed = bucket.template as<ToMemory>();
  std::vector<ToMemory> expected(offset);
  std::memset(packed, 0xa5, offset * sizeof(ToMemory));
  std::memset(expected.data(), 0xa5, offset * sizeof(ToMemory));
  for (const Source& source : sources) {
    for (std::size_t index = 0; index < source.values.size(); ++index) {
      expected[source.offset + index] = To::write(From::read(source.values[index]) * 0.25F);
    }
  }
  const auto table = std::make_unique<cuda::PackTable<16>>();
  table->chunk = kChunk;
  table->scale = 0.25F;
  table->bucket = reinterpret_cast<std::uint64_t>(packed);
  int launches = 0;
  for (table->unpack = 0; table->unpack < 2; ++table->unpack) {
    for (std::uint64_t next = 0; next < tensors.size(); ++launches) {
      next = cuda::fill(*table, tensors.data(), tensors.size(), next);
      for (std::uint32_t block = 0; block < table->first_chunks[table->tensor_count]; ++block) {
        for (std::uint32_t thread = 0; thread < 8; ++thread) {
          if (table->unpack != 0) {
            cuda::pack<To, From>(*table, block, thread, 8);
          } else {
            cuda::pack<From, To>(*table, block, thread, 8);
          }
        }
      }
    }
    CHECK(std::memcmp(packed, expected.data(), expected.size() * sizeof(ToMemory)) == 0);
  }
  CHECK(launches == 2 * 4);  // 60 tensors, 16 at a time, the empty ones not counted
  for (const Source& source : sources) {
    for (std::size_t index = 0; index < source.values.size(); ++index) {
      const FromMemory value = From::write(To::read(expected[source.offset + index]) * 0.25F);
      CHECK(std::memcmp(&value, source.memory.template as<FromMemory>() + index, sizeof value) == 0);
    }
  }
}

void chunks_belong_to_tensors() {
  const auto table = std::make_unique<cuda::LargeTable>();
  table->chunk = 8;
  std::vector<LauncherCudaTensor> tensors;
  for (std::uint64_t number = 0; number < 3000; ++number) {
    tensors.push_back({number, below(30), 0});
  }
  std::uint64_t seen = 0;
  for (std::uint64_t next = 0; next < tensors.size();) {
    const std::uint64_t begin = next;
    next = cuda::fill(*table, tensors.data(), tensors.size(), next);
    CHECK(next > begin);
    for (std::uint32_t chunk = 0; chunk < table->first_chunks[table->tensor_count]; ++chunk) {
      const std::uint32_t tensor = cuda::tensor_of(*table, chunk);
      CHECK(table->first_chunks[tensor] <= chunk && chunk < table->first_chunks[tensor + 1]);
      CHECK(static_cast<std::uint64_t>(chunk - table->first_chunks[tensor]) * 8 < table->counts[tensor]);
      seen += std::min<std::uint64_t>(8, table->counts[tensor] - (chunk - table->first_chunks[tensor]) * 8ULL);
    }
  }
  std::uint64_t all = 0;
  for (const LauncherCudaTensor& tensor : tensors) {
    all += tensor.count;
  }
  CHECK(seen == all);
  // A tensor that would take more blocks than a grid may have is not begun.
  const LauncherCudaTensor huge = {0, (std::uint64_t{cuda::kMaxBlocks} + 1) * 8, 0};
  CHECK(cuda::fill(*table, &huge, 1, 0) == 0 && table->first_chunks[table->tensor_count] == 0);
}

// ---- allreduce

// A block of few threads, one after another: what the GPU's threads do between two __syncthreads() is independent.
class HostBlock {
 public:
  HostBlock(std::uint32_t index, std::uint32_t count) : index_(index), count_(count) {}
  std::uint32_t index() const { return index_; }
  std::uint32_t count() const { return count_; }
  std::uint32_t threads() const { return kThreads; }
  void sync() {}
  template <typename Work>
  void each(Work work) {
    for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
      work(thread);
    }
  }
  template <typename Test>
  bool all(Test test) {
    bool good = true;
    for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
      good = test(thread) && good;
    }
    return good;
  }

 private:
  static constexpr std::uint32_t kThreads = 8;  // one for each rank at least
  std::uint32_t index_;
  std::uint32_t count_;
};

constexpr std::uint64_t kStaging = 16384;
constexpr std::uint64_t kShared = 16384;

// The segments of all ranks, and a host's page for each.
struct World {
  explicit World(std::uint32_t ranks) : size(ranks), pages(ranks) {
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      void* memory = std::aligned_alloc(256, cuda::kControlBytes + 2 * kStaging + kShared);
      segments.emplace_back(static_cast<unsigned char*>(memory), &std::free);
      std::memset(memory, 0, cuda::kControlBytes + 2 * kStaging + kShared);
    }
  }
  cuda::Control& control(std::uint32_t rank) { return *reinterpret_cast<cuda::Control*>(segments[rank].get()); }
  template <typename T>
  typename T::Memory* shared(std::uint32_t rank, std::uint64_t offset) {
    return reinterpret_cast<typename T::Memory*>(segments[rank].get() + cuda::kControlBytes + 2 * kStaging + offset);
  }
  cuda::Call call(std::uint32_t rank) {
    cuda::Call made{};
    for (std::uint32_t peer = 0; peer < size; ++peer) {
      made.segments[peer] = segments[peer].get();
    }
    made.host = &pages[rank];
    made.staging_offset = cuda::kControlBytes;
    made.staging_bytes = kStaging;
    made.shared_offset = cuda::kControlBytes + 2 * kStaging;
    made.timeout_ns = 60'000'000'000;
    made.scale = 1.0;
    made.rank = rank;
    made.size = size;
    made.steps = cuda::kAllSteps;
    return made;
  }
  std::uint32_t size;
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> segments;
  std::vector<cuda::HostPage> pages;
};

template <typename T>
void run_blocks(LauncherCudaAlgorithm algorithm, const cuda::Call& call, std::uint32_t blocks, bool together) {
  const auto run = [&](std::uint32_t index) {
    HostBlock block(index, blocks);
    if (algorithm == kLauncherCudaOneShot) {
      cuda::allreduce<T, kLauncherCudaOneShot>(block, call);
    } else if (algorithm == kLauncherCudaTwoShot) {
      cuda::allreduce<T, kLauncherCudaTwoShot>(block, call);
    } else {
      cuda::allreduce<T, kLauncherCudaInPlace>(block, call);
    }
  };
  if (!together) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      run(block);
    }
    return;
  }
  std::vector<std::jthread> threads;
  for (std::uint32_t block = 0; block < blocks; ++block) {
    threads.emplace_back(run, block);
  }
}

// What one rank gives and what all must get: the CPU's kernel decides.
template <typename T>
struct Message {
  Message(std::uint32_t ranks, std::uint64_t count, ReduceOp op, double scale) : result(count) {
    std::vector<const void*> sources;
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      inputs.push_back(elements<T>(count));
      sources.push_back(inputs.back().data());
    }
    void* target = result.data();
    kPlainKernels.reduce[static_cast<int>(T::kDType)][static_cast<int>(op)](&target, 1, sources.data(), ranks, count,
                                                                            nullptr, {scale, 1});
  }
  std::vector<std::vector<typename T::Memory>> inputs;
  std::vector<typename T::Memory> result;
};

struct Plan {
  std::uint64_t count;
  ReduceOp op;
  LauncherCudaAlgorithm algorithm;
  std::uint32_t blocks;
  std::size_t shift;  // elements that source and target are off a boundary
  bool same;          // source is target
};

// One rank's share of a plan. `meet`: null for flags, else the host orders the steps.
template <typename T>
void take_part(World& world, std::uint32_t rank, const Plan& plan, const Message<T>& message, double scale,
               std::uint32_t number, bool together, const std::function<void()>& meet) {
  using Memory = typename T::Memory;
  const std::uint64_t bytes = plan.count * sizeof(Memory);
  const std::uint64_t offset = plan.algorithm == kLauncherCudaInPlace ? 16 * (plan.shift + 1) : 0;
  Memory* place = world.shared<T>(rank, offset);
  const Bytes source(bytes, plan.shift * sizeof(Memory));
  const Bytes target(bytes, plan.shift * sizeof(Memory));
  std::memcpy(source.as<char>(), message.inputs[rank].data(), bytes);
  cuda::Call call = world.call(rank);
  call.source = source.as<char>();
  call.target = plan.same ? source.as<char>() : target.as<char>();
  call.count = plan.count;
  call.op = static_cast<std::uint32_t>(plan.op);
  call.scale = scale;
  call.shared_offset += offset;
  std::vector<unsigned char> behind(16, 0x5a);
  if (plan.algorithm == kLauncherCudaInPlace) {
    std::memcpy(place, message.inputs[rank].data(), bytes);
    std::memcpy(reinterpret_cast<char*>(place) + bytes, behind.data(), behind.size());
  }
  if (!meet) {
    run_blocks<T>(plan.algorithm, call, plan.blocks, together);
  } else {
    call.number = number;
    for (const std::uint32_t step : {cuda::kStage, cuda::kReduce, cuda::kGather}) {
      call.steps = step;
      run_blocks<T>(plan.algorithm, call, plan.blocks, together);
      meet();
    }
  }
  const void* got = plan.algorithm == kLauncherCudaInPlace ? static_cast<const void*>(place) : call.target;
  CHECK(std::memcmp(got, message.result.data(), bytes) == 0);
  CHECK(plan.algorithm != kLauncherCudaInPlace ||
        std::memcmp(reinterpret_cast<char*>(place) + bytes, behind.data(), behind.size()) == 0);
}

constexpr LauncherCudaAlgorithm kAlgorithms[] = {kLauncherCudaOneShot, kLauncherCudaTwoShot, kLauncherCudaInPlace};

template <typename T>
void allreduce_matrix(std::uint32_t ranks, bool flags, std::uint32_t first_number) {
  constexpr bool kScaled = !std::is_integral_v<typename T::Scalar>;
  const std::uint64_t most = kStaging / sizeof(typename T::Memory) / 2;
  std::vector<Plan> plans;
  for (const ReduceOp op : {ReduceOp::sum, ReduceOp::minimum, ReduceOp::maximum}) {
    for (const LauncherCudaAlgorithm algorithm : kAlgorithms) {
      for (const std::uint64_t count : {std::uint64_t{1}, std::uint64_t{7}, 1 + below(200), 1 + below(most)}) {
        const auto blocks = static_cast<std::uint32_t>(1 + below(3));
        plans.push_back({count, op, algorithm, blocks, below(2), below(2) == 0});
      }
    }
  }
  std::shuffle(plans.begin(), plans.end(), generator);
  std::vector<Message<T>> messages;
  for (const Plan& plan : plans) {
    messages.emplace_back(ranks, plan.count, plan.op, kScaled ? 0.75 : 1.0);
  }
  World world(ranks);
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    world.control(rank).calls = first_number;
    std::fill_n(&world.control(rank).flags[0][0][0], sizeof world.control(rank).flags / 4, first_number);
  }
  std::barrier gate(ranks);
  const std::function<void()> meet = [&] { gate.arrive_and_wait(); };
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        for (std::size_t number = 0; number < plans.size(); ++number) {
          take_part<T>(world, rank, plans[number], messages[number], kScaled ? 0.75 : 1.0,
                       static_cast<std::uint32_t>(number + 1), number % 4 == 0, flags ? nullptr : meet);
        }
      });
    }
  }
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    CHECK(world.pages[rank].state == kLauncherCudaGood);
    CHECK(!flags || world.control(rank).calls == static_cast<std::uint32_t>(first_number + plans.size()));
    CHECK(world.control(rank).blocks_done == 0);
  }
}

void ranks_give_up() {
  std::vector<float> values(100, 1.0F);
  for (const LauncherCudaAlgorithm algorithm : kAlgorithms) {
    World world(3);
    // Rank 2 never comes: rank 0 sees it by its deadline, and rank 1 hears it from rank 0.
    {
      std::vector<std::jthread> threads;
      for (const std::uint32_t rank : {0U, 1U}) {
        threads.emplace_back([&, rank] {
          std::vector<float> target(100, -1.0F);
          cuda::Call call = world.call(rank);
          call.source = values.data();
          call.target = target.data();
          call.count = target.size();
          call.timeout_ns = rank == 0 ? 20'000'000 : 60'000'000'000;
          run_blocks<Float32>(algorithm, call, 2, true);
          CHECK(target == std::vector<float>(100, -1.0F));
          run_blocks<Float32>(algorithm, call, 2, true);  // at once: the communicator is done with
        });
      }
    }
    CHECK(world.pages[0].state == kLauncherCudaTimedOut && world.pages[0].culprit == 2 && world.pages[0].call == 1);
    CHECK(world.pages[1].state == kLauncherCudaPeerGaveUp && world.pages[1].culprit == 0);
    CHECK(world.control(2).abort != 0);
  }
  World world(2);
  world.pages[0].abort = 1;
  cuda::Call call = world.call(0);
  call.source = values.data();
  call.target = values.data();
  call.count = values.size();
  run_blocks<Float32>(kLauncherCudaOneShot, call, 1, false);
  CHECK(world.pages[0].state == kLauncherCudaAborted && world.pages[0].culprit == 0);
}

void parts_and_blocks() {
  for (const std::uint64_t vectors : {0ULL, 1ULL, 5ULL, 7ULL, 8ULL, 1000ULL, 1ULL << 40}) {
    for (std::uint32_t size = 1; size <= cuda::kMaxRanks; ++size) {
      CHECK(cuda::part_begin(vectors, 0, size) == 0 && cuda::part_begin(vectors, size, size) == vectors);
      for (std::uint32_t part = 0; part < size; ++part) {
        CHECK(cuda::part_begin(vectors, part, size) <= cuda::part_begin(vectors, part + 1, size));
      }
    }
  }
  CHECK(cuda::meetings_of(0, 8) == 1 && cuda::meetings_of(513, 8) == 2 && cuda::meetings_of(1U << 30, 8) == 8);
  CHECK(cuda::meetings_of(1U << 30, 1000) == cuda::kMaxMeetings);
  CHECK(cuda::reached(5, 5) && cuda::reached(6, 5) && !cuda::reached(4, 5) && !cuda::reached(0, 5));
  CHECK(cuda::reached(0, 0xffffffffU) && !cuda::reached(0xfffffffeU, 0xffffffffU));
}

template <typename T>
void all_sizes() {
  for (const std::uint32_t ranks : {1U, 2U, 3U, 8U}) {
    allreduce_matrix<T>(ranks, true, ranks == 2 ? 0xfffffff0U : 0);
    allreduce_matrix<T>(ranks, false, 0);
  }
}

}  // namespace

int main() {
  check::run("16 bits are the CPU's", sixteen_bits_are_the_cpus);
  check::run("compression to bfloat16 is the CPU's", [] { compress_is_the_cpus<BFloat16>(0); });
  check::run("compression to float16 is the CPU's", [] { compress_is_the_cpus<Float16>(1); });
  check::run("pack float32, float32", pack_and_unpack<Float32, Float32>);
  check::run("pack float32, bfloat16", pack_and_unpack<Float32, BFloat16>);
  check::run("pack float32, float16", pack_and_unpack<Float32, Float16>);
  check::run("pack bfloat16, float32", pack_and_unpack<BFloat16, Float32>);
  check::run("pack bfloat16, bfloat16", pack_and_unpack<BFloat16, BFloat16>);
  check::run("pack float16, bfloat16", pack_and_unpack<Float16, BFloat16>);
  check::run("chunks belong to tensors", chunks_belong_to_tensors);
  check::run("parts and blocks", parts_and_blocks);
  check::run("allreduce float32", all_sizes<Float32>);
  check::run("allreduce float64", all_sizes<Float64>);
  check::run("allreduce float16", all_sizes<Float16>);
  check::run("allreduce bfloat16", all_sizes<BFloat16>);
  check::run("allreduce int32", all_sizes<Int32>);
  check::run("allreduce int64", all_sizes<Int64>);
  check::run("ranks give up", ranks_give_up);
  return check::failures == 0 ? 0 : 1;
}

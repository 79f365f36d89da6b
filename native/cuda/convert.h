// Many tensors into one bucket and back, and 16 bits for the wire: the work of one thread, and the table it finds it
// in.
#ifndef LAUNCHER_CUDA_CONVERT_H
#define LAUNCHER_CUDA_CONVERT_H

#include <cstdint>
#include <type_traits>

#include "numbers.h"
#include "table.h"

namespace launcher::cuda {

constexpr std::uint32_t kConvertThreads = 256;
constexpr std::uint32_t kDefaultChunk = 32768;  // elements that one block converts
constexpr std::uint32_t kChunkUnit = 8;         // a chunk begins as aligned as its tensor does: 8 elements are 16 bytes
constexpr std::uint32_t kCompressChunk = 8192;
constexpr std::uint32_t kMaxBlocks = 0x7fffffffU;  // of a grid in x

// ---- runs of elements

template <int kBytes>
using Access = std::conditional_t<kBytes == 16, Wide, Narrow>;

// target[i] = source[i] * scale, in float32 and rounded once, for i < count: the share of `thread` of `threads`.
//
// The wider of the two sides goes by 16 bytes, the other by as many elements, so that a warp's accesses are contiguous
// on both. Several loads are under way before the first store. Where one side is not aligned: element by element.
template <typename From, typename To>
LAUNCHER_DEVICE void convert(const typename From::Memory* source, typename To::Memory* target, std::uint32_t count,
                             float scale, std::uint32_t thread, std::uint32_t threads) {
  using FromMemory = typename From::Memory;
  using ToMemory = typename To::Memory;
  constexpr std::uint32_t kAhead = 4;
  constexpr std::uint32_t kGroup = kLanes<From> < kLanes<To> ? kLanes<From> : kLanes<To>;
  using Source = Access<kGroup * sizeof(FromMemory)>;
  using Target = Access<kGroup * sizeof(ToMemory)>;
  std::uint32_t done = 0;
  if (aligned(source, sizeof(Source)) && aligned(target, sizeof(Target))) {
    const auto* from = reinterpret_cast<const Source*>(source);
    auto* to = reinterpret_cast<Target*>(target);
    const std::uint32_t groups = count / kGroup;
    for (std::uint32_t first = thread; first < groups; first += kAhead * threads) {
      Source loaded[kAhead] = {};
      LAUNCHER_UNROLL
      for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        if (first + ahead * threads < groups) {
          loaded[ahead] = load_once(from + first + ahead * threads);
        }
      }
      LAUNCHER_UNROLL
      for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        if (first + ahead * threads < groups) {
          FromMemory in[kGroup];
          ToMemory out[kGroup];
          memcpy(in, &loaded[ahead], sizeof in);
          LAUNCHER_UNROLL
          for (std::uint32_t lane = 0; lane < kGroup; ++lane) {
            out[lane] = To::write(From::read(in[lane]) * scale);
          }
          Target stored;
          memcpy(&stored, out, sizeof stored);
          store(to + first + ahead * threads, stored);
        }
      }
    }
    done = groups * kGroup;
  }
  for (std::uint32_t first = done + thread; first < count; first += kAhead * threads) {
    FromMemory loaded[kAhead] = {};
    LAUNCHER_UNROLL
    for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      if (first + ahead * threads < count) {
        loaded[ahead] = source[first + ahead * threads];
      }
    }
    LAUNCHER_UNROLL
    for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
      if (first + ahead * threads < count) {
        target[first + ahead * threads] = To::write(From::read(loaded[ahead]) * scale);
      }
    }
  }
}

// ---- many tensors and one bucket

// Goes to the kernel as a parameter: no memory of its own, nothing to keep alive, and a CUDA graph holds a copy.
template <std::uint32_t kCapacity>
struct PackTable {
  std::uint64_t pointers[kCapacity];
  std::uint64_t counts[kCapacity];            // elements
  std::uint64_t offsets[kCapacity];           // in the bucket, elements
  std::uint32_t first_chunks[kCapacity + 1];  // number of each tensor's first chunk, and of all chunks
  std::uint32_t tensor_count;
  std::uint32_t chunk;   // elements
  std::uint32_t unpack;  // 1: from the bucket to the tensors
  float scale;
  std::uint64_t bucket;
};
// What a launch may have as parameters: 4 KiB are cheapest, 32,764 bytes the limit (since CUDA 12.1).
using SmallTable = PackTable<140>;
using LargeTable = PackTable<1160>;
static_assert(sizeof(SmallTable) <= 4096 && sizeof(LargeTable) <= 32764);

// Takes tensors from `next` on, as many as fit, and leaves the empty ones out. Returns the first that did not fit. The
// number of chunks, which is the number of blocks to start, is first_chunks[tensor_count].
template <typename Table>
std::uint64_t fill(Table& table, const LauncherCudaTensor* tensors, std::uint64_t count, std::uint64_t next) {
  constexpr std::uint32_t kCapacity = sizeof table.pointers / sizeof table.pointers[0];
  table.tensor_count = 0;
  table.first_chunks[0] = 0;
  for (; next < count; ++next) {
    const LauncherCudaTensor& tensor = tensors[next];
    if (tensor.count == 0) {
      continue;
    }
    const std::uint64_t chunks = (tensor.count - 1) / table.chunk + 1;
    const std::uint32_t number = table.tensor_count;
    if (number == kCapacity || chunks > kMaxBlocks - table.first_chunks[number]) {
      break;
    }
    table.pointers[number] = tensor.pointer;
    table.counts[number] = tensor.count;
    table.offsets[number] = tensor.offset;
    table.first_chunks[number + 1] = table.first_chunks[number] + static_cast<std::uint32_t>(chunks);
    table.tensor_count = number + 1;
  }
  return next;
}

// The tensor that a chunk belongs to.
template <typename Table>
LAUNCHER_HOST_DEVICE std::uint32_t tensor_of(const Table& table, std::uint32_t chunk) {
  std::uint32_t low = 0;
  std::uint32_t high = table.tensor_count;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    if (table.first_chunks[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Block `block` has the chunk of that number.
template <typename From, typename To, typename Table>
LAUNCHER_DEVICE void pack(const Table& table, std::uint32_t block, std::uint32_t thread, std::uint32_t threads) {
  using FromMemory = typename From::Memory;
  using ToMemory = typename To::Memory;
  const std::uint32_t tensor = tensor_of(table, block);
  const std::uint64_t begin = static_cast<std::uint64_t>(block - table.first_chunks[tensor]) * table.chunk;
  const std::uint64_t left = table.counts[tensor] - begin;
  const std::uint32_t count = left < table.chunk ? static_cast<std::uint32_t>(left) : table.chunk;
  const std::uint64_t in_bucket = table.offsets[tensor] + begin;
  const bool unpack = table.unpack != 0;
  const auto* source = reinterpret_cast<const FromMemory*>(unpack ? table.bucket : table.pointers[tensor]);
  auto* target = reinterpret_cast<ToMemory*>(unpack ? table.pointers[tensor] : table.bucket);
  convert<From, To>(source + (unpack ? in_bucket : begin), target + (unpack ? begin : in_bucket), count, table.scale,
                    thread, threads);
}

// ---- 16 bits for the wire

// float16 saturates where the value is finite; bfloat16 has the range of float32.
template <typename Wire>
LAUNCHER_HOST_DEVICE std::uint16_t rounded(float value) {
  const std::uint16_t nearest = Wire::write(value);
  if constexpr (Wire::kDType == DType::float16) {
    const bool finite = (bits<std::uint32_t>(value) & 0x7f800000U) != 0x7f800000U;
    if (finite && (nearest & 0x7fffU) > kHalfMost) {
      return static_cast<std::uint16_t>((nearest & 0x8000U) | kHalfMost);
    }
  }
  return nearest;
}

// An error that is no number would stay for good: what overflowed is not made up for.
template <typename Wire>
LAUNCHER_HOST_DEVICE float missed(float value, std::uint16_t sent) {
  const float error = value - Wire::read(sent);
  return (bits<std::uint32_t>(error) & 0x7f800000U) == 0x7f800000U ? 0.0F : error;
}

// v = source + error; target = rounded(v); error = v - target: the share of `thread` of the elements from 0 to count.
template <typename Wire>
LAUNCHER_DEVICE void compress(std::uint16_t* target, const float* source, float* error, std::uint32_t count,
                              std::uint32_t thread, std::uint32_t threads) {
  constexpr std::uint32_t kAhead = 2;
  constexpr std::uint32_t kGroup = 4;
  std::uint32_t done = 0;
  if (aligned(source, sizeof(Wide)) && aligned(error, sizeof(Wide)) && aligned(target, sizeof(Narrow))) {
    const auto* from = reinterpret_cast<const Wide*>(source);
    auto* kept = reinterpret_cast<Wide*>(error);
    auto* to = reinterpret_cast<Narrow*>(target);
    const std::uint32_t groups = count / kGroup;
    for (std::uint32_t first = thread; first < groups; first += kAhead * threads) {
      Wide loaded[kAhead] = {};
      Wide errors[kAhead] = {};
      LAUNCHER_UNROLL
      for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        const std::uint32_t group = first + ahead * threads;
        if (group < groups) {
          loaded[ahead] = load_once(from + group);
          if (error != nullptr) {
            errors[ahead] = load_once(kept + group);
          }
        }
      }
      LAUNCHER_UNROLL
      for (std::uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        const std::uint32_t group = first + ahead * threads;
        if (group < groups) {
          float in[kGroup];
          float rest[kGroup];
          std::uint16_t out[kGroup];
          memcpy(in, &loaded[ahead], sizeof in);
          memcpy(rest, &errors[ahead], sizeof rest);
          LAUNCHER_UNROLL
          for (std::uint32_t lane = 0; lane < kGroup; ++lane) {
            const float value = error != nullptr ? in[lane] + rest[lane] : in[lane];
            out[lane] = rounded<Wire>(value);
            rest[lane] = missed<Wire>(value, out[lane]);
          }
          Narrow stored;
          memcpy(&stored, out, sizeof stored);
          store(to + group, stored);
          if (error != nullptr) {
            Wide left;
            memcpy(&left, rest, sizeof left);
            store(kept + group, left);
          }
        }
      }
    }
    done = groups * kGroup;
  }
  for (std::uint32_t index = done + thread; index < count; index += threads) {
    const float value = error != nullptr ? source[index] + error[index] : source[index];
    const std::uint16_t out = rounded<Wire>(value);
    target[index] = out;
    if (error != nullptr) {
      error[index] = missed<Wire>(value, out);
    }
  }
}

}  // namespace launcher::cuda

#endif

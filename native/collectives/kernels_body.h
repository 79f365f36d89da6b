// The loops, for the vectors of kernels_vector.h. Included once by each instruction set's file, after its own
//   F32 from_half(Half16), Half16 to_half(F32)      IEEE 754 binary16, to nearest even
// Internal linkage throughout, no standard library: see kernels_vector.h.

namespace launcher::collectives {
namespace {

// ---- types: how elements lie in memory, and what they are folded in

// A NaN has one form in a result. Which of two NaNs an addition hands on depends on the order of its operands, which
// the compiler may swap in one of the loops below and not in another.
template <typename Vector, typename Lane>
inline Vector canonical(Vector value, Lane nan) {
  return value == value ? value : Vector{} + nan;
}

struct Float32 {
  using Scalar = float;
  using Part = F32;
  static constexpr bool kFloating = true;
  static constexpr std::size_t kParts = 1;
  static constexpr std::size_t kSize = 4;
  static void read(const char* source, Part (&parts)[kParts]) { parts[0] = load<F32>(source); }
  using Result = Part;
  static Result result(const Part (&parts)[kParts]) { return canonical(parts[0], __builtin_nanf("")); }
  static void put(char* target, Result result) { store(target, result); }
};

struct Float64 {
  using Scalar = double;
  using Part = F64;
  static constexpr bool kFloating = true;
  static constexpr std::size_t kParts = 1;
  static constexpr std::size_t kSize = 8;
  static void read(const char* source, Part (&parts)[kParts]) { parts[0] = load<F64>(source); }
  using Result = Part;
  static Result result(const Part (&parts)[kParts]) { return canonical(parts[0], __builtin_nan("")); }
  static void put(char* target, Result result) { store(target, result); }
};

struct Float16 {
  using Scalar = float;
  using Part = F32;
  static constexpr bool kFloating = true;
  static constexpr std::size_t kParts = 2;
  static constexpr std::size_t kSize = 2;
  static void read(const char* source, Part (&parts)[kParts]) {
    parts[0] = from_half(load<Half16>(source));
    parts[1] = from_half(load<Half16>(source + kWidth / 2));
  }
  struct Result {
    Half16 lower;
    Half16 upper;
  };
  static Result result(const Part (&parts)[kParts]) {
    return {to_half(canonical(parts[0], __builtin_nanf(""))), to_half(canonical(parts[1], __builtin_nanf("")))};
  }
  static void put(char* target, const Result& result) {
    store(target, result.lower);
    store(target + kWidth / 2, result.upper);
  }
};

// Part 0 holds the lower half of each 32-bit word, part 1 the upper: no shuffle on the way in or out.
struct BFloat16 {
  using Scalar = float;
  using Part = F32;
  static constexpr bool kFloating = true;
  static constexpr std::size_t kParts = 2;
  static constexpr std::size_t kSize = 2;
  static void read(const char* source, Part (&parts)[kParts]) {
    const U32 pairs = load<U32>(source);
    parts[0] = (F32)(pairs << 16);
    parts[1] = (F32)(pairs & 0xffff0000U);
  }
  using Result = U16;
  // To nearest even, by integers: the instruction for it (AVX512_BF16) takes denormals for zero. Both parts at once, as
  // 16-bit lanes of what is kept and what is cut off. A part's NaN shows in what is kept: it came from a bfloat16, or
  // from arithmetic, which makes it quiet.
  static Result result(const Part (&parts)[kParts]) {
    const U32 lower = (U32)parts[0];
    const U32 upper = (U32)parts[1];
    const U16 kept = (U16)(lower >> 16 | (upper & 0xffff0000U));
    const U16 cut = (U16)((lower & 0xffffU) | upper << 16);
    const U16 odd = kept & 1;
    const U16 rounded = kept - (U16)((cut | odd) > kTie);  // a true lane is -1
    return (kept & 0x7fff) > kInfinity ? U16{} + kNan : rounded;
  }
  static void put(char* target, Result result) { store(target, result); }
  static constexpr std::uint16_t kTie = 0x8000;
  static constexpr std::uint16_t kInfinity = 0x7f80;
  static constexpr std::uint16_t kNan = 0x7fc0;
};

// Sums and products are made of unsigned lanes, which wrap around; bits do not mind where a lane ends.
template <typename Lane>
struct Integer {
  using Part = typename VectorOf<Lane>::Type;
  static constexpr bool kFloating = false;
  static constexpr std::size_t kParts = 1;
  static constexpr std::size_t kSize = sizeof(Lane);
  static void read(const char* source, Part (&parts)[kParts]) { parts[0] = load<Part>(source); }
  using Result = Part;
  static Result result(const Part (&parts)[kParts]) { return parts[0]; }
  static void put(char* target, Result result) { store(target, result); }
};

// ---- operations

struct Sum {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    return folded + next;
  }
};

struct Product {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    return folded * next;
  }
};

struct Minimum {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    if constexpr (T::kFloating) {
      return ((next < folded) | (next != next)) ? next : folded;
    } else {
      return next < folded ? next : folded;
    }
  }
};

struct Maximum {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    if constexpr (T::kFloating) {
      return ((next > folded) | (next != next)) ? next : folded;
    } else {
      return next > folded ? next : folded;
    }
  }
};

struct And {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    return folded & next;
  }
};

struct Or {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    return folded | next;
  }
};

struct Xor {
  template <typename T, typename Part>
  static Part fold(Part folded, Part next) {
    return folded ^ next;
  }
};

// ---- the fold

enum class Scaling { none, after, both };

struct Job {
  void* const* targets;
  std::size_t target_count;
  const void* const* sources;
  std::size_t source_count;
  const double* prescale;
  double scale;
};

// The scale, lane by lane as the type of accumulation has it.
template <typename T>
inline void multiply(typename T::Part (&parts)[T::kParts], typename T::Scalar factor) {
  for (std::size_t part = 0; part < T::kParts; ++part) {
    parts[part] *= factor;
  }
}

template <typename T>
inline typename T::Scalar prescale(const Job& job, std::size_t source) {
  return static_cast<typename T::Scalar>(job.prescale == nullptr ? 1.0 : job.prescale[source]);
}

template <typename T, Scaling kScaling>
inline void finish(typename T::Part (&folded)[T::kParts], const Job& job) {
  if constexpr (T::kFloating && kScaling != Scaling::none) {
    multiply<T>(folded, static_cast<typename T::Scalar>(job.scale));
  }
}

// kCount vectors at `offset` of every source and target. All sources are read before any target is written: a target
// may be one of them.
template <typename T, typename Op, Scaling kScaling, std::size_t kSources, std::size_t kTargets, std::size_t kCount>
inline __attribute__((always_inline)) void fold_block(const Job& job, std::size_t offset) {
  typename T::Part folded[kCount][T::kParts];
  const char* first = static_cast<const char*>(job.sources[0]) + offset;
  for (std::size_t block = 0; block < kCount; ++block) {
    T::read(first + block * kWidth, folded[block]);
    if constexpr (kScaling == Scaling::both) {
      multiply<T>(folded[block], prescale<T>(job, 0));
    }
  }
  const std::size_t source_count = kSources != 0 ? kSources : job.source_count;
  for (std::size_t number = 1; number < source_count; ++number) {
    const char* source = static_cast<const char*>(job.sources[number]) + offset;
    for (std::size_t block = 0; block < kCount; ++block) {
      typename T::Part next[T::kParts];
      T::read(source + block * kWidth, next);
      if constexpr (kScaling == Scaling::both) {
        multiply<T>(next, prescale<T>(job, number));
      }
      for (std::size_t part = 0; part < T::kParts; ++part) {
        folded[block][part] = Op::template fold<T>(folded[block][part], next[part]);
      }
    }
  }
  for (std::size_t block = 0; block < kCount; ++block) {
    finish<T, kScaling>(folded[block], job);
  }
  typename T::Result results[kCount];
  for (std::size_t block = 0; block < kCount; ++block) {
    results[block] = T::result(folded[block]);
  }
  const std::size_t target_count = kTargets != 0 ? kTargets : job.target_count;
  for (std::size_t number = 0; number < target_count; ++number) {
    char* target = static_cast<char*>(job.targets[number]) + offset;
    for (std::size_t block = 0; block < kCount; ++block) {
      T::put(target + block * kWidth, results[block]);
    }
  }
}

// What is left of less than a vector, by way of vectors on the stack: the same instructions on the same elements, hence
// the same bits wherever a message is cut.
template <typename T, typename Op, Scaling kScaling>
__attribute__((noinline)) void fold_rest(const Job& job, std::size_t offset, std::size_t bytes) {
  typename T::Part folded[T::kParts] = {};
  for (std::size_t number = 0; number < job.source_count; ++number) {
    alignas(kWidth) char whole[kWidth] = {};
    __builtin_memcpy(whole, static_cast<const char*>(job.sources[number]) + offset, bytes);
    typename T::Part next[T::kParts];
    T::read(whole, next);
    if constexpr (kScaling == Scaling::both) {
      multiply<T>(next, prescale<T>(job, number));
    }
    for (std::size_t part = 0; part < T::kParts; ++part) {
      folded[part] = number == 0 ? next[part] : Op::template fold<T>(folded[part], next[part]);
    }
  }
  finish<T, kScaling>(folded, job);
  alignas(kWidth) char whole[kWidth];
  T::put(whole, T::result(folded));
  for (std::size_t number = 0; number < job.target_count; ++number) {
    __builtin_memcpy(static_cast<char*>(job.targets[number]) + offset, whole, bytes);
  }
}

// Vectors at a time: enough for the loads of several streams to be in flight, and for the registers. In software,
// binary16 takes some thirty instructions each way.
template <typename T>
constexpr std::size_t kBlock = kWidth == 16 && T::kSize == 2 && T::kFloating ? 1 : 4;

// Lines that another core has written come one by one, each after a wait; a prefetcher follows a stream to the end of
// its page, and there is one for each of several streams. So long ranges are walked in several places at a time, at
// distances that are no multiple of a page: places whose addresses differ in nothing but the page number share a set of
// the first cache.
constexpr std::size_t kPlaces = 4;
constexpr std::size_t kStretch = 64 << 10;  // bytes that are walked together
constexpr std::size_t kLeastStretch = 16 << 10;
constexpr std::size_t kStagger = 5 * 64;

// Calls step(offset) for each whole multiple of kStep bytes; returns how many bytes that was.
template <std::size_t kStep, typename Step>
inline __attribute__((always_inline)) std::size_t walk(std::size_t bytes, Step step) {
  std::size_t offset = 0;
  while (bytes - offset >= kLeastStretch) {
    const std::size_t rest = bytes - offset;
    const std::size_t stretch = rest < kStretch ? rest : kStretch;
    const std::size_t part = (stretch / kPlaces - kStagger) / kStep * kStep;
    for (std::size_t at = 0; at < part; at += kStep) {
      for (std::size_t place = 0; place < kPlaces; ++place) {
        step(offset + place * part + at);
      }
    }
    offset += kPlaces * part;
  }
  for (; bytes - offset >= kStep; offset += kStep) {
    step(offset);
  }
  return offset;
}

// kSources and kTargets: their numbers where they are known here, else 0.
template <typename T, typename Op, Scaling kScaling, std::size_t kSources, std::size_t kTargets>
__attribute__((noinline)) void fold_all(const Job& job, std::size_t bytes) {
  // Copies, which no store through a target can change.
  const void* sources[kSources != 0 ? kSources : 1];
  void* targets[kTargets != 0 ? kTargets : 1];
  Job local = job;
  if constexpr (kSources != 0) {
    for (std::size_t number = 0; number < kSources; ++number) {
      sources[number] = job.sources[number];
    }
    local.sources = sources;
  }
  if constexpr (kTargets != 0) {
    for (std::size_t number = 0; number < kTargets; ++number) {
      targets[number] = job.targets[number];
    }
    local.targets = targets;
  }
  std::size_t offset = walk<kBlock<T> * kWidth>(
      bytes, [&](std::size_t at) { fold_block<T, Op, kScaling, kSources, kTargets, kBlock<T>>(local, at); });
  for (; bytes - offset >= kWidth; offset += kWidth) {
    fold_block<T, Op, kScaling, kSources, kTargets, 1>(local, offset);
  }
  if (offset != bytes) {
    fold_rest<T, Op, kScaling>(job, offset, bytes - offset);
  }
}

template <typename T, typename Op, Scaling kScaling>
void fold_pair(const Job& job, std::size_t bytes) {
  if (job.target_count == 1) {
    fold_all<T, Op, kScaling, 2, 1>(job, bytes);
  } else {
    fold_all<T, Op, kScaling, 2, 2>(job, bytes);
  }
}

// kHot: with loops for two sources.
template <typename T, typename Op, bool kHot>
void reduce_floating(void* const* targets, std::size_t target_count, const void* const* sources,
                     std::size_t source_count, std::size_t count, const double* prescale, const Finish& finish) {
  const Job job{targets, target_count, sources, source_count, prescale, finish.scale};
  const std::size_t bytes = count * T::kSize;
  const bool scaled = finish.scale != 1.0;
  if (prescale != nullptr || (scaled && !kHot)) {
    return fold_all<T, Op, Scaling::both, 0, 0>(job, bytes);
  }
  if constexpr (kHot) {
    if (source_count == 2 && (target_count == 1 || target_count == 2)) {
      return scaled ? fold_pair<T, Op, Scaling::after>(job, bytes) : fold_pair<T, Op, Scaling::none>(job, bytes);
    }
    if (scaled) {
      return fold_all<T, Op, Scaling::after, 0, 0>(job, bytes);
    }
  }
  fold_all<T, Op, Scaling::none, 0, 0>(job, bytes);
}

// By magnitude: right for every divisor, also one that the type cannot hold. Averages of integers are rare: a pass of
// its own, without vectors.
template <typename Lane>
__attribute__((noinline)) void divide(char* values, std::size_t count, std::uint64_t divisor) {
  for (std::size_t element = 0; element < count; ++element) {
    Lane value;
    __builtin_memcpy(&value, values + element * sizeof value, sizeof value);
    const bool negative = value < 0;
    const std::uint64_t bits = static_cast<std::uint64_t>(value);
    const std::uint64_t quotient = (negative ? 0 - bits : bits) / divisor;
    value = static_cast<Lane>(negative ? 0 - quotient : quotient);
    __builtin_memcpy(values + element * sizeof value, &value, sizeof value);
  }
}

// The elements are Lane, folded as T.
template <typename Lane, typename T, typename Op>
void reduce_integer(void* const* targets, std::size_t target_count, const void* const* sources,
                    std::size_t source_count, std::size_t count, const double*, const Finish& finish) {
  const Job job{targets, target_count, sources, source_count, nullptr, 1.0};
  fold_all<T, Op, Scaling::none, 0, 0>(job, count * sizeof(Lane));
  if (finish.divisor != 1) {
    for (std::size_t number = 0; number < target_count; ++number) {
      divide<Lane>(static_cast<char*>(targets[number]), count, finish.divisor);
    }
  }
}

// ---- the 16-bit wire between hosts

// To nearest even. Not for NaN: the carry would turn one into another number.
inline U32 rounded_bfloat(F32 value) {
  const U32 bits = (U32)value;
  return bits + 0x7fffU + (bits >> 16 & 1U);
}

struct BFloatWire {
  static Half16 narrow(F32 value) {
    return __builtin_convertvector(rounded_bfloat(canonical(value, __builtin_nanf(""))) >> 16, Half16);
  }
  static F32 widen(Half16 bits) { return (F32)(__builtin_convertvector(bits, U32) << 16); }
};

struct HalfWire {
  static Half16 narrow(F32 value) {
    constexpr float kLargest = 65504.0F;
    const F32 magnitude = (F32)((U32)value & 0x7fffffffU);
    const F32 bound = (F32)(((U32)value & 0x80000000U) | (U32)(F32{} + kLargest));
    // false for infinities and NaN
    const F32 clamped = ((magnitude > kLargest) & (magnitude <= __FLT_MAX__)) ? bound : value;
    return to_half(canonical(clamped, __builtin_nanf("")));
  }
  static F32 widen(Half16 bits) { return from_half(bits); }
};

constexpr std::size_t kLanes = kWidth / sizeof(float);

template <typename Wire>
void compress_vector(char* target, const char* source, char* error) {
  F32 value = load<F32>(source);
  if (error != nullptr) {
    value += load<F32>(error);
  }
  const Half16 sent = Wire::narrow(value);
  store(target, sent);
  if (error != nullptr) {
    // An error that is no number would stay for good: what overflowed is not made up for.
    const F32 missed = value - Wire::widen(sent);
    const F32 magnitude = (F32)((U32)missed & 0x7fffffffU);
    store(error, magnitude <= __FLT_MAX__ ? missed : F32{});
  }
}

template <typename Wire>
void compress(std::uint16_t* target, const float* source, float* error, std::size_t count) {
  char* to = reinterpret_cast<char*>(target);
  const char* from = reinterpret_cast<const char*>(source);
  char* errors = reinterpret_cast<char*>(error);
  std::size_t done = 0;
  for (; count - done >= kLanes; done += kLanes) {
    compress_vector<Wire>(to + 2 * done, from + 4 * done, errors == nullptr ? nullptr : errors + 4 * done);
  }
  if (const std::size_t rest = count - done; rest != 0) {
    alignas(kWidth) char values[kWidth] = {};
    alignas(kWidth) char missed[kWidth] = {};
    alignas(kWidth) char sent[kWidth / 2];
    __builtin_memcpy(values, from + 4 * done, 4 * rest);
    if (errors != nullptr) {
      __builtin_memcpy(missed, errors + 4 * done, 4 * rest);
    }
    compress_vector<Wire>(sent, values, errors == nullptr ? nullptr : missed);
    __builtin_memcpy(to + 2 * done, sent, 2 * rest);
    if (errors != nullptr) {
      __builtin_memcpy(errors + 4 * done, missed, 4 * rest);
    }
  }
}

template <typename Wire>
void decompress(float* target, const std::uint16_t* source, std::size_t count) {
  char* to = reinterpret_cast<char*>(target);
  const char* from = reinterpret_cast<const char*>(source);
  std::size_t done = 0;
  for (; count - done >= kLanes; done += kLanes) {
    store(to + 4 * done, Wire::widen(load<Half16>(from + 2 * done)));
  }
  if (const std::size_t rest = count - done; rest != 0) {
    alignas(kWidth) char bits[kWidth / 2] = {};
    __builtin_memcpy(bits, from + 2 * done, 2 * rest);
    const F32 values = Wire::widen(load<Half16>(bits));
    __builtin_memcpy(to + 4 * done, &values, 4 * rest);
  }
}

// ---- copy

void copy_fresh(void* target, const void* source, std::size_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  const std::size_t done = walk<kWidth>(bytes, [&](std::size_t at) { store(to + at, load<U64>(from + at)); });
  __builtin_memcpy(to + done, from + done, bytes - done);
}

// ---- the table

template <typename T>
constexpr void fill_floating(ReduceFunction (&row)[kReduceOps]) {
  row[0] = row[1] = reduce_floating<T, Sum, true>;
  row[2] = reduce_floating<T, Minimum, false>;
  row[3] = reduce_floating<T, Maximum, false>;
  row[4] = reduce_floating<T, Product, false>;
}

using Bits = Integer<std::uint64_t>;

template <typename Lane, typename UnsignedLane>
constexpr void fill_integer(ReduceFunction (&row)[kReduceOps]) {
  row[0] = row[1] = reduce_integer<Lane, Integer<UnsignedLane>, Sum>;
  row[2] = reduce_integer<Lane, Integer<Lane>, Minimum>;
  row[3] = reduce_integer<Lane, Integer<Lane>, Maximum>;
  row[4] = reduce_integer<Lane, Integer<UnsignedLane>, Product>;
  row[5] = reduce_integer<Lane, Bits, And>;
  row[6] = reduce_integer<Lane, Bits, Or>;
  row[7] = reduce_integer<Lane, Bits, Xor>;
}

// Rows and columns as DType and ReduceOp number them.
constexpr KernelTable make_table() {
  KernelTable table{};
  fill_floating<Float32>(table.reduce[0]);
  fill_floating<Float64>(table.reduce[1]);
  fill_floating<Float16>(table.reduce[2]);
  fill_floating<BFloat16>(table.reduce[3]);
  fill_integer<std::int8_t, std::uint8_t>(table.reduce[4]);
  fill_integer<std::uint8_t, std::uint8_t>(table.reduce[5]);
  fill_integer<std::int16_t, std::uint16_t>(table.reduce[6]);
  fill_integer<std::int32_t, std::uint32_t>(table.reduce[7]);
  fill_integer<std::int64_t, std::uint64_t>(table.reduce[8]);
  ReduceFunction(&boolean)[kReduceOps] = table.reduce[9];
  boolean[0] = boolean[3] = boolean[6] = reduce_integer<std::uint8_t, Bits, Or>;
  boolean[2] = boolean[4] = boolean[5] = reduce_integer<std::uint8_t, Bits, And>;
  boolean[7] = reduce_integer<std::uint8_t, Bits, Xor>;
  fill_integer<std::uint16_t, std::uint16_t>(table.reduce[10]);
  fill_integer<std::uint32_t, std::uint32_t>(table.reduce[11]);
  fill_integer<std::uint64_t, std::uint64_t>(table.reduce[12]);
  table.copy_fresh = copy_fresh;
  table.compress[0] = compress<BFloatWire>;
  table.compress[1] = compress<HalfWire>;
  table.decompress[0] = decompress<BFloatWire>;
  table.decompress[1] = decompress<HalfWire>;
  return table;
}

}  // namespace
}  // namespace launcher::collectives

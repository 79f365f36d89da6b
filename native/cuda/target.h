// What lets one text be compiled by nvcc for the GPU and by any C++ compiler for the tests: the bodies of the kernels
// are functions of a thread's and a block's number, over the few primitives of this file. On the host, vectors are
// plain structures (the sanitizers see a wrong alignment or bound), and flags are the compiler's atomics.
#ifndef LAUNCHER_CUDA_TARGET_H
#define LAUNCHER_CUDA_TARGET_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LAUNCHER_HOST_DEVICE __host__ __device__ __forceinline__  // numbers only
#define LAUNCHER_DEVICE __device__ __forceinline__                // memory: the host's variant is for the tests
#define LAUNCHER_UNROLL _Pragma("unroll")
#else
#include <chrono>
#include <thread>
#define LAUNCHER_HOST_DEVICE inline
#define LAUNCHER_DEVICE inline
#define LAUNCHER_UNROLL
#endif

namespace launcher::cuda {

// One access of a thread. The widest that the hardware has is 16 bytes.
struct alignas(16) Wide {
  std::uint32_t words[4];
};
struct alignas(8) Narrow {
  std::uint32_t words[2];
};

// Reinterprets without breaking the aliasing rules; compiles to nothing.
template <typename To, typename From>
LAUNCHER_HOST_DEVICE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as long as each other");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

LAUNCHER_HOST_DEVICE bool aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

#ifdef __CUDACC__

// Read once: first to leave the caches.
LAUNCHER_DEVICE Wide load_once(const Wide* source) {
  return bits<Wide>(__ldcs(reinterpret_cast<const uint4*>(source)));
}
LAUNCHER_DEVICE Narrow load_once(const Narrow* source) {
  return bits<Narrow>(__ldcs(reinterpret_cast<const uint2*>(source)));
}
LAUNCHER_DEVICE std::uint32_t load_once(const std::uint32_t* source) { return __ldcs(source); }
LAUNCHER_DEVICE std::uint16_t load_once(const std::uint16_t* source) { return __ldcs(source); }
LAUNCHER_DEVICE std::uint8_t load_once(const std::uint8_t* source) { return __ldcs(source); }

LAUNCHER_DEVICE void store(Wide* target, const Wide& value) { *reinterpret_cast<uint4*>(target) = bits<uint4>(value); }
LAUNCHER_DEVICE void store(Narrow* target, const Narrow& value) {
  *reinterpret_cast<uint2*>(target) = bits<uint2>(value);
}
template <typename Word>
LAUNCHER_DEVICE void store(Word* target, Word value) {
  *target = value;
}

// Of memory that another GPU writes: around the first-level cache, and never through the read-only path.
LAUNCHER_DEVICE Wide load_shared(const Wide* source) {
  Wide value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]), "=r"(value.words[3])
               : "l"(source)
               : "memory");
  return value;
}

// Flags, in this GPU's memory, a peer's, or the host's. Release and acquire of one thread cover what the block's other
// threads did before and do after a __syncthreads(): causality order is transitive (PTX ISA, memory consistency model).
LAUNCHER_DEVICE std::uint32_t load_acquire(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
LAUNCHER_DEVICE std::uint32_t load_relaxed(const std::uint32_t* flag) {
  std::uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
LAUNCHER_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
LAUNCHER_DEVICE void store_relaxed(std::uint32_t* flag, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" : : "l"(flag), "r"(value) : "memory");
}
// The value before. Of this GPU's own memory only: not every link carries atomic operations.
LAUNCHER_DEVICE std::uint32_t fetch_add(std::uint32_t* counter, std::uint32_t value) {
  __threadfence();
  const std::uint32_t before = atomicAdd(counter, value);
  __threadfence();
  return before;
}
LAUNCHER_DEVICE std::uint32_t exchange(std::uint32_t* word, std::uint32_t value) { return atomicExch(word, value); }
LAUNCHER_DEVICE std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
LAUNCHER_DEVICE void between_looks() {}  // a look takes as long as the way to the memory and back

#else

template <typename Unit>
Unit load_once(const Unit* source) {
  return *source;
}
template <typename Unit>
void store(Unit* target, const Unit& value) {
  *target = value;
}
inline Wide load_shared(const Wide* source) { return *source; }
inline std::uint32_t load_acquire(const std::uint32_t* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline std::uint32_t load_relaxed(const std::uint32_t* flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED); }
inline void store_release(std::uint32_t* flag, std::uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline void store_relaxed(std::uint32_t* flag, std::uint32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELAXED); }
inline std::uint32_t fetch_add(std::uint32_t* counter, std::uint32_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
}
inline std::uint32_t exchange(std::uint32_t* word, std::uint32_t value) {
  return __atomic_exchange_n(word, value, __ATOMIC_RELAXED);
}
inline std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

inline void between_looks() { std::this_thread::yield(); }

#endif

}  // namespace launcher::cuda

#endif

// Vector types of kWidth bytes, which the including file has set. Included once by each instruction set's file.
//
// The compiler's vector extension: the same expressions for every width, with lanes that behave as the scalar type
// does, so that the bits of a result do not depend on the width. All of it has internal linkage: a function that two
// files compiled for different machines shared could come from the wrong one.

namespace launcher::collectives {
namespace {

template <typename Lane>
struct VectorOf {
  typedef Lane Type __attribute__((vector_size(kWidth)));
};
using F32 = VectorOf<float>::Type;
using F64 = VectorOf<double>::Type;
using U16 = VectorOf<std::uint16_t>::Type;
using U32 = VectorOf<std::uint32_t>::Type;
using U64 = VectorOf<std::uint64_t>::Type;
typedef std::uint16_t Half16 __attribute__((vector_size(kWidth / 2)));  // as many as an F32 has lanes

template <typename Vector>
inline Vector load(const void* source) {
  Vector value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

template <typename Vector>
inline void store(void* target, Vector value) {
  __builtin_memcpy(target, &value, sizeof value);
}

}  // namespace
}  // namespace launcher::collectives

// Records whose fields are changed on the way into the batch, a column at a time.
#ifndef LAUNCHER_DATA_TRANSFORM_H
#define LAUNCHER_DATA_TRANSFORM_H

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "source.h"

namespace launcher::data {

struct Change {
  enum class Kind : std::uint8_t {
    affine = 0,   // value * scale + shift, in float32 or float64, rounded once to `dtype`
    one_hot = 1,  // an integer becomes `classes` values, 1 at its place and 0 elsewhere
    cast = 2,     // as C++ converts it, but a floating-point value that an integer can not hold is an error
  };
  Kind kind = Kind::cast;
  std::string field;
  DType dtype = DType::float32;      // of the result; float16 and bfloat16 are not known here
  std::vector<double> scale, shift;  // affine: one for all values of a record, or one for each
  std::uint64_t classes = 0;         // one_hot
};

// `source` with one change of each field at most. A value that can not be changed is a DataError (mismatch) of its
// record. Throws std::invalid_argument: no such field, or not one that can be changed so.
std::shared_ptr<const Source> changed_source(std::shared_ptr<const Source> source, std::vector<Change> changes);

}  // namespace launcher::data

#endif

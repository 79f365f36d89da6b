// What the readers of text share.
#ifndef LAUNCHER_DATA_TEXT_H
#define LAUNCHER_DATA_TEXT_H

#include <string>
#include <string_view>

#include "batch.h"

namespace launcher::data {

// In quotes, for a message: what is not printable as \xNN, and not more than the beginning of a long one.
std::string shown(std::string_view text);
// As Python names it.
const char* name_of(DType dtype) noexcept;
// Without spaces and tabs at both ends.
std::string_view trimmed(std::string_view text) noexcept;

}  // namespace launcher::data

#endif

// Files that are a record each: a folder of images.
#ifndef LAUNCHER_DATA_FILES_SOURCE_H
#define LAUNCHER_DATA_FILES_SOURCE_H

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "catalogue.h"
#include "source.h"

namespace launcher::data {

// Record i is the whole of file i: field "data", ragged bytes; and "label", an int64, where `labels` has one for each
// file (else it is empty). Files are opened when they are read, and not kept: there may be millions. A file that is
// not there any more, or is not as its entry says, is DataError(changed).
// Throws std::invalid_argument: the numbers of labels and files differ.
std::shared_ptr<const Source> files_source(const std::string& root, const std::vector<Entry>& entries,
                                           std::vector<std::int64_t> labels);

}  // namespace launcher::data

#endif

// The files of a channel.
#ifndef LAUNCHER_DATA_CATALOGUE_H
#define LAUNCHER_DATA_CATALOGUE_H

#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

namespace launcher::data {

struct Entry {
  std::string path;  // relative to the folder; of a single file: its name
  std::uint64_t size = 0;
  std::int64_t modified_ns = 0;
};

struct ListOptions {
  bool hidden = false;  // names that begin with '.' or '_', too
  bool links = false;   // symbolic links are followed; else left out
};

// The regular files below `root`, at any depth, sorted by the bytes of their relative paths, as object stores list
// them; `root` may be one file, and a link itself. Throws DataError(changed, unreadable), and (malformed) for a link
// that leads back to a folder above it. `left_out`: set to the number of symbolic links that were.
std::vector<Entry> list_files(const std::string& root, const ListOptions& options, std::uint64_t* left_out = nullptr);

}  // namespace launcher::data

#endif

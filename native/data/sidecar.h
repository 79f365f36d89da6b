// An index in a file of its own, which the ranks of a host map: who comes next need not scan the data again.
#ifndef LAUNCHER_DATA_SIDECAR_H
#define LAUNCHER_DATA_SIDECAR_H

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "catalogue.h"
#include "index.h"

namespace launcher::data {

// A change of the layout, or of what any scanner finds, needs another number.
inline constexpr std::uint32_t kSidecarVersion = 1;

// Writes the index of `files` (by their names, sizes and times: entry i is of part i) to `path`, whole or not at all.
// `key` says what else the index depends on: the format and its options.
// Throws DataError(unreadable): it can not be written.
void save_index(const std::string& path, const std::string& key, const std::vector<Entry>& files,
                const std::vector<std::shared_ptr<const FileIndex>>& parts);

// What the sidecar has of `files`: nothing for those that it does not have with this size and time (`any_time`: this
// size).
// Throws DataError: changed (there is none), unreadable, malformed (damaged, of another version or for another key:
// to be made again). No length or offset in it is trusted.
std::vector<std::optional<FileIndex>> load_index(const std::string& path, const std::string& key,
                                                 const std::vector<Entry>& files, bool any_time = false);

}  // namespace launcher::data

#endif

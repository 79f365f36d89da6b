#include "catalogue.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <string_view>
#include <system_error>

#include "launcher/descriptor.h"

namespace launcher::data {
namespace {

[[noreturn]] void throw_refused(const std::string& path, int error) {
  if (error == ENOENT || error == ENOTDIR) {
    throw DataError(Problem::changed, path, kNowhere, kNowhere, "no such file or folder");
  }
  throw DataError(Problem::unreadable, path, kNowhere, kNowhere,
                  "can not be listed: " + std::generic_category().message(error));
}

struct CloseFolder {
  void operator()(DIR* folder) const noexcept { closedir(folder); }
};

bool hidden(std::string_view name) noexcept { return name[0] == '.' || name[0] == '_'; }

Entry entry(std::string path, const struct stat& status) {
  constexpr std::int64_t kPerSecond = 1'000'000'000;
  return {std::move(path), static_cast<std::uint64_t>(status.st_size),
          static_cast<std::int64_t>(status.st_mtim.tv_sec) * kPerSecond + status.st_mtim.tv_nsec};
}

class Listing {
 public:
  Listing(const std::string& root, const ListOptions& options) : root_(root), options_(options) {}

  // `prefix`: relative path of the folder, with a slash, or empty.
  void add(Descriptor folder, const std::string& prefix) {
    struct stat here{};
    if (fstat(folder.get(), &here) != 0) {
      throw_refused(root_ + "/" + prefix, errno);
    }
    for (const Identity& above : above_) {
      if (above.device == here.st_dev && above.inode == here.st_ino) {
        throw DataError(Problem::malformed, root_ + "/" + prefix, kNowhere, kNowhere,
                        "a symbolic link leads back to a folder above it; remove it, or list without links");
      }
    }
    above_.push_back({here.st_dev, here.st_ino});
    const std::unique_ptr<DIR, CloseFolder> stream(fdopendir(folder.get()));
    if (!stream) {
      throw_refused(root_ + "/" + prefix, errno);
    }
    const int descriptor = folder.release();  // the stream's now
    for (;;) {
      errno = 0;
      const dirent* item = readdir(stream.get());
      if (item == nullptr) {
        if (errno != 0) {
          throw_refused(root_ + "/" + prefix, errno);
        }
        break;
      }
      const std::string_view name = item->d_name;
      if (name == "." || name == ".." || (hidden(name) && !options_.hidden)) {
        continue;
      }
      add_item(descriptor, item->d_name, prefix + item->d_name);
    }
    above_.pop_back();
  }

  std::vector<Entry> take() {
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.path < b.path; });
    return std::move(entries_);
  }
  std::uint64_t left_out() const noexcept { return left_out_; }

 private:
  struct Identity {
    dev_t device;
    ino_t inode;
  };

  void add_item(int folder, const char* name, std::string path) {
    struct stat status{};
    if (fstatat(folder, name, &status, options_.links ? 0 : AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT && options_.links) {
        throw DataError(Problem::changed, root_ + "/" + path, kNowhere, kNowhere,
                        "a symbolic link to what is not there, or a file that was removed just now");
      }
      throw_refused(root_ + "/" + path, errno);
    }
    if (S_ISREG(status.st_mode)) {
      entries_.push_back(entry(std::move(path), status));
    } else if (S_ISDIR(status.st_mode)) {
      Descriptor inner(openat(folder, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (options_.links ? 0 : O_NOFOLLOW)));
      if (!inner) {
        throw_refused(root_ + "/" + path, errno);
      }
      add(std::move(inner), path + "/");
    } else if (S_ISLNK(status.st_mode)) {
      ++left_out_;
    }
  }

  const std::string& root_;
  const ListOptions& options_;
  std::vector<Identity> above_;
  std::vector<Entry> entries_;
  std::uint64_t left_out_ = 0;  // symbolic links
};

}  // namespace

std::vector<Entry> list_files(const std::string& root, const ListOptions& options, std::uint64_t* left_out) {
  struct stat status{};
  if (stat(root.c_str(), &status) != 0) {
    throw_refused(root, errno);
  }
  if (S_ISREG(status.st_mode)) {
    return {entry(root.substr(root.find_last_of('/') + 1), status)};
  }
  Descriptor folder(open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) {
    throw_refused(root, errno);
  }
  Listing listing(root, options);
  listing.add(std::move(folder), "");
  if (left_out != nullptr) {
    *left_out = listing.left_out();
  }
  return listing.take();
}

}  // namespace launcher::data

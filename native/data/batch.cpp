#include "batch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

namespace launcher::data {
namespace {

std::size_t whole_pages(std::size_t bytes) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (bytes > std::numeric_limits<std::ptrdiff_t>::max() - page) {
    throw std::bad_alloc();
  }
  return (bytes + page - 1) / page * page;
}

}  // namespace

std::uint64_t Field::values() const noexcept {
  std::uint64_t product = 1;
  for (const std::uint64_t size : shape) {
    product *= size;
  }
  return product;
}

// Anonymous mappings: page-aligned, zero until they are touched, and given back to the system when they go.
Buffer::Buffer(std::size_t bytes) : capacity_(whole_pages(bytes)) {
  if (capacity_ == 0) {
    return;
  }
  void* memory = mmap(nullptr, capacity_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::bad_alloc();
  }
  data_ = static_cast<std::byte*>(memory);
  constexpr std::size_t kHugePage = 2 << 20;
  if (capacity_ >= kHugePage) {
    madvise(memory, capacity_, MADV_HUGEPAGE);  // fewer page faults; where there are none, it is as without
  }
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) {
    munmap(data_, capacity_);
  }
}

void Buffer::reserve(std::size_t bytes, std::size_t kept) {
  if (bytes <= capacity_) {
    return;
  }
  Buffer larger(std::max(bytes, capacity_ + capacity_ / 2));
  if (kept != 0) {
    std::memcpy(larger.data_, data_, kept);
  }
  *this = std::move(larger);
}

Batch::Batch(const std::vector<Field>& fields, std::size_t rows_at_most) : capacity(rows_at_most) {
  columns.reserve(fields.size());
  for (const Field& field : fields) {
    Column& column = columns.emplace_back();
    if (field.kind == Kind::fixed) {
      column.values.reserve(rows_at_most * field.values() * size_of(field.dtype), 0);
    } else {
      column.offsets.assign(rows_at_most + 1, 0);
    }
  }
}

std::byte* append(Column& column, std::size_t row, std::size_t count, std::size_t bytes) {
  const std::size_t begin = static_cast<std::size_t>(column.offsets[row]) * bytes;
  column.values.reserve(begin + count * bytes, begin);
  return column.values.data() + begin;
}

std::uint64_t* append_keys(Column& column, std::size_t row, std::size_t count) {
  const std::size_t begin = static_cast<std::size_t>(column.offsets[row]);
  column.keys.reserve((begin + count) * sizeof(std::uint64_t), begin * sizeof(std::uint64_t));
  return reinterpret_cast<std::uint64_t*>(column.keys.data()) + begin;
}

}  // namespace launcher::data

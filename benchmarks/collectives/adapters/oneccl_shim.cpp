// oneCCL for ctypes. Built by install_peers.py.
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <oneapi/ccl.hpp>

namespace {
ccl::shared_ptr_class<ccl::kvs> store;
std::unique_ptr<ccl::communicator> world;
std::unique_ptr<ccl::stream> stream;

template <typename Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "oneCCL: %s\n", error.what());
    return 1;
  }
}
}  // namespace

extern "C" {
int shim_address_bytes() { return static_cast<int>(ccl::kvs::address_max_size); }

int shim_make_address(char* address) {
  return guarded([&] {
    ccl::init();
    store = ccl::create_main_kvs();
    const auto found = store->get_address();
    std::memcpy(address, found.data(), found.size());
  });
}

int shim_join(int size, int rank, const char* address) {
  return guarded([&] {
    ccl::init();
    if (!store) {
      ccl::kvs::address_type known;
      std::memcpy(known.data(), address, known.size());
      store = ccl::create_kvs(known);
    }
    world = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, store));
    stream = std::make_unique<ccl::stream>(ccl::default_stream);
  });
}

void shim_version(char* text, int size) {
  const auto version = ccl::get_library_version();
  std::snprintf(text, static_cast<std::size_t>(size), "%d.%d.%d", version.major, version.minor, version.update);
}

int shim_allreduce(void* buffer, std::size_t count, int half) {
  return guarded([&] {
    const auto type = half != 0 ? ccl::datatype::bfloat16 : ccl::datatype::float32;
    ccl::allreduce(buffer, buffer, count, type, ccl::reduction::sum, *world).wait();
  });
}
}

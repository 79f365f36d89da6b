// Work on a GPU. Arguments are checked by launcher/collectives/cuda.py, which knows the names of things; what the CUDA
// runtime refuses is a RuntimeError here.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_library.h"

namespace launcher::python {
namespace {

using Numbers = std::vector<std::uint64_t>;

const LauncherCudaTable& table() {
  const CudaLibrary& library = cuda_library();
  if (library.table == nullptr) {
    throw std::runtime_error(library.reason);
  }
  return *library.table;
}

void check(int status, const char* what) {
  if (status != 0) {
    throw std::runtime_error(cuda_failure(table(), what, status));
  }
}

// Many tensors and one bucket: what stays the same from step to step.
class CudaBucket {
 public:
  CudaBucket(const Numbers& counts, const Numbers& offsets, std::uint8_t tensor_dtype, std::uint8_t bucket_dtype,
             std::uint32_t chunk)
      : tensors_(counts.size()) {
    if (counts.size() != offsets.size()) {
      throw std::invalid_argument("counts and offsets: one of each for each tensor");
    }
    for (std::size_t number = 0; number < counts.size(); ++number) {
      tensors_[number] = {0, counts[number], offsets[number]};
    }
    job_.tensor_dtype = tensor_dtype;
    job_.bucket_dtype = bucket_dtype;
    job_.chunk = chunk;
  }

  void move(const Numbers& pointers, std::uint64_t bucket, double scale, int device, std::uint64_t stream,
            bool unpack) {
    if (pointers.size() != tensors_.size()) {
      throw std::invalid_argument("pointers: one for each tensor");
    }
    for (std::size_t number = 0; number < pointers.size(); ++number) {
      tensors_[number].pointer = pointers[number];
    }
    job_.tensors = tensors_.data();
    job_.tensor_count = tensors_.size();
    job_.bucket = bucket;
    job_.scale = scale;
    job_.device = device;
    job_.stream = stream;
    job_.unpack = unpack ? 1 : 0;
    check(table().pack(&job_), unpack ? "unpack" : "pack");
  }

 private:
  std::vector<LauncherCudaTensor> tensors_;
  LauncherCudaPack job_ = {};
};

void compress(std::uint64_t values, std::uint64_t wire, std::uint64_t error, std::uint64_t count,
              std::uint8_t wire_dtype, int device, std::uint64_t stream, bool decompress) {
  const LauncherCudaCompress job = {values, wire,   error,      count,
                                    stream, device, wire_dtype, static_cast<std::uint8_t>(decompress ? 1 : 0)};
  check(table().compress(&job), decompress ? "decompress" : "compress");
}

// Records that a GPU holds, a piece of memory for each field, and batches of them.
class CudaGather {
 public:
  CudaGather(std::uint64_t records, const Numbers& sources, Numbers row_bytes, int device)
      : sources_(sources), row_bytes_(std::move(row_bytes)), device_(device) {
    if (sources_.size() != row_bytes_.size()) {
      throw std::invalid_argument("sources and row_bytes: one of each for each field");
    }
    numbering_.records = records;
    numbering_.device = device;
  }

  // As launcher._data.Order says it: its network, or else its table, which is on the GPU; neither: as they come.
  void set_order(const Numbers& network, std::uint64_t table) {
    LauncherCudaNetwork& own = numbering_.network;
    constexpr std::size_t kRounds = sizeof own.keys / sizeof own.keys[0];
    constexpr std::size_t kBefore = 4;
    const auto whole_word = [](std::uint64_t number) { return number <= 0xffffffffU; };
    if (network.size() != kBefore + 2 * kRounds) {
      if (!network.empty()) {
        throw std::invalid_argument("network: expected as many numbers as a network of this build has");
      }
      numbering_.order = table == 0 ? kLauncherCudaInOrder : kLauncherCudaByTable;
      numbering_.table = table;
      return;
    }
    if (network[0] != numbering_.records || !std::all_of(network.begin() + 1, network.end(), whole_word)) {
      throw std::invalid_argument("network: expected one of an order of " + std::to_string(numbering_.records) +
                                  " records");
    }
    const auto word = [&network](std::size_t number) { return static_cast<std::uint32_t>(network[number]); };
    own.n = network[0];
    own.low_bits = word(1);
    own.low_mask = word(2);
    own.high_mask = word(3);
    for (std::size_t round = 0; round < kRounds; ++round) {
      own.keys[round][0] = word(kBefore + 2 * round);
      own.keys[round][1] = word(kBefore + 2 * round + 1);
    }
    numbering_.order = kLauncherCudaByNetwork;
  }

  void number(std::uint64_t numbers, std::uint64_t begin, std::uint64_t padding, std::uint64_t rows,
              std::uint64_t valid, std::uint64_t stream) const {
    LauncherCudaNumbering job = numbering_;
    if (valid > rows || (valid > 0 && (begin > job.records || valid > job.records - begin)) ||
        (rows > valid && padding >= job.records)) {
      throw std::invalid_argument("rows that are not in an order of " + std::to_string(job.records) + " records");
    }
    job.numbers = numbers;
    job.begin = begin;
    job.padding = padding;
    job.rows = rows;
    job.valid = valid;
    job.stream = stream;
    check(table().number_records(&job), "numbers of a batch's records");
  }

  void gather(const Numbers& targets, std::uint64_t numbers, std::uint64_t rows, std::uint64_t stream) const {
    if (targets.size() != sources_.size()) {
      throw std::invalid_argument("targets: one for each field");
    }
    for (std::size_t field = 0; field < targets.size(); ++field) {
      const LauncherCudaGather job = {sources_[field],   targets[field], numbers, rows,
                                      row_bytes_[field], stream,         device_};
      check(table().gather(&job), "rows of a batch");
    }
  }

 private:
  Numbers sources_, row_bytes_;
  LauncherCudaNumbering numbering_ = {};
  int device_;
};

class CudaEvent {
 public:
  explicit CudaEvent(int device) { check(table().event_create(device, &event_), "event"); }
  ~CudaEvent() { static_cast<void>(table().event_destroy(event_)); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(std::uint64_t stream) { check(table().event_record(event_, stream), "record of an event"); }
  bool done() const {
    int answer = 0;
    check(table().event_done(event_, &answer), "work on a stream");
    return answer != 0;
  }
  double milliseconds_to(const CudaEvent& later) const {
    float milliseconds = 0.0F;
    check(table().event_elapsed(event_, later.event_, &milliseconds), "work on a stream");
    return static_cast<double>(milliseconds);
  }

 private:
  std::uint64_t event_ = 0;
};

class CudaCommunicator {
 public:
  CudaCommunicator(int device, int rank, int size, std::uint64_t staging_bytes, std::uint64_t shared_bytes)
      : size_(size) {
    check(table().comm_create(device, rank, size, staging_bytes, shared_bytes, &comm_),
          "memory for allreduce between GPUs");
  }
  // Not destroyed without destroy(): a peer that still has this memory mapped would be left with nothing under it.
  ~CudaCommunicator() = default;
  CudaCommunicator(const CudaCommunicator&) = delete;
  CudaCommunicator& operator=(const CudaCommunicator&) = delete;

  nb::bytes describe() {
    LauncherCudaPeer own;
    check(table().comm_describe(open(), &own), "description of a GPU's memory");
    return nb::bytes(reinterpret_cast<const char*>(&own), sizeof own);
  }

  // (error, culprit, ranks per device, whether processes share one, blocks); error: "" when all is well
  nb::tuple connect(const nb::bytes& said) {
    if (said.size() != static_cast<std::size_t>(size_) * sizeof(LauncherCudaPeer)) {
      throw std::invalid_argument("descriptions: one of each rank, from the same build of the package");
    }
    std::vector<LauncherCudaPeer> peers(static_cast<std::size_t>(size_));
    std::memcpy(peers.data(), said.data(), said.size());
    LauncherCudaConnection found;
    int status = 0;
    {
      const nb::gil_scoped_release released;
      status = table().comm_connect(open(), peers.data(), &found);
    }
    const std::string error = status == 0 ? "" : cuda_failure(table(), "connection of GPUs", status);
    return nb::make_tuple(error, found.culprit, found.ranks_per_device, found.processes_share != 0, found.blocks);
  }

  void allreduce(std::uint64_t source, std::uint64_t target, std::uint64_t offset, std::uint64_t count,
                 std::uint8_t dtype, std::uint8_t op, std::uint8_t algorithm, double scale, std::uint64_t timeout_ns,
                 std::uint64_t stream, int part) {
    const LauncherCudaAllreduce job = {source, target, offset, count, stream,   timeout_ns,
                                       scale,  part,   dtype,  op,    algorithm};
    check(table().comm_allreduce(open(), &job), "allreduce");
  }

  std::uint64_t shared() const { return table().comm_shared(open()); }
  nb::tuple status() const {
    LauncherCudaStatus found;
    table().comm_status(open(), &found);
    return nb::make_tuple(found.state, found.culprit, found.call);
  }
  void abort() const { table().comm_abort(open()); }
  void disconnect() { check(table().comm_disconnect(open()), "end of a connection of GPUs"); }
  void destroy() {
    if (LauncherCudaComm* comm = std::exchange(comm_, nullptr); comm != nullptr) {
      check(table().comm_destroy(comm), "release of a GPU's memory");
    }
  }

 private:
  LauncherCudaComm* open() const {
    if (comm_ == nullptr) {
      throw std::invalid_argument("the communicator is closed");
    }
    return comm_;
  }
  LauncherCudaComm* comm_ = nullptr;
  int size_;
};

}  // namespace

void bind_cuda_work(nb::module_& module) {
  using Released = nb::call_guard<nb::gil_scoped_release>;
  module.attr("CUDA_MAX_RANKS") = static_cast<int>(kLauncherCudaMaxRanks);
  module.attr("CUDA_PEER_BYTES") = sizeof(LauncherCudaPeer);

  nb::class_<CudaBucket>(module, "CudaBucket", "Many tensors and one bucket (native/cuda/convert.h).")
      .def(nb::init<const Numbers&, const Numbers&, std::uint8_t, std::uint8_t, std::uint32_t>(), nb::arg("counts"),
           nb::arg("offsets"), nb::arg("tensor_dtype"), nb::arg("bucket_dtype"), nb::arg("chunk") = 0)
      .def("move", &CudaBucket::move, nb::arg("pointers"), nb::arg("bucket"), nb::arg("scale"), nb::arg("device"),
           nb::arg("stream"), nb::arg("unpack"), Released());
  module.def("cuda_compress", &compress, nb::arg("values"), nb::arg("wire"), nb::arg("error"), nb::arg("count"),
             nb::arg("wire_dtype"), nb::arg("device"), nb::arg("stream"), nb::arg("decompress"), Released(),
             "float32 to 16 bits with the error kept (0: not kept), or back.");
  nb::class_<CudaGather>(module, "CudaGather", "Batches of records that a GPU holds (native/cuda/gather.h).")
      .def(nb::init<std::uint64_t, const Numbers&, Numbers, int>(), nb::arg("records"), nb::arg("sources"),
           nb::arg("row_bytes"), nb::arg("device"))
      .def("set_order", &CudaGather::set_order, nb::arg("network"), nb::arg("table"))
      .def("number", &CudaGather::number, nb::arg("numbers"), nb::arg("begin"), nb::arg("padding"), nb::arg("rows"),
           nb::arg("valid"), nb::arg("stream"), Released())
      .def("gather", &CudaGather::gather, nb::arg("targets"), nb::arg("numbers"), nb::arg("rows"), nb::arg("stream"),
           Released());
  nb::class_<CudaEvent>(module, "CudaEvent", "A moment in a stream.")
      .def(nb::init<int>(), nb::arg("device"))
      .def("record", &CudaEvent::record, nb::arg("stream"), Released())
      .def("done", &CudaEvent::done, Released())
      .def("milliseconds_to", &CudaEvent::milliseconds_to, nb::arg("later"), Released());
  nb::class_<CudaCommunicator>(module, "CudaCommunicator", "Allreduce between GPUs (native/cuda/allreduce.h).")
      .def(nb::init<int, int, int, std::uint64_t, std::uint64_t>(), nb::arg("device"), nb::arg("rank"), nb::arg("size"),
           nb::arg("staging_bytes"), nb::arg("shared_bytes"), Released())
      .def("describe", &CudaCommunicator::describe)
      .def("connect", &CudaCommunicator::connect, nb::arg("descriptions"))
      .def("allreduce", &CudaCommunicator::allreduce, nb::arg("source"), nb::arg("target"), nb::arg("offset"),
           nb::arg("count"), nb::arg("dtype"), nb::arg("op"), nb::arg("algorithm"), nb::arg("scale"),
           nb::arg("timeout_ns"), nb::arg("stream"), nb::arg("part"), Released())
      .def_prop_ro("shared", &CudaCommunicator::shared)
      .def("status", &CudaCommunicator::status)
      .def("abort", &CudaCommunicator::abort)
      .def("disconnect", &CudaCommunicator::disconnect, Released())
      .def("destroy", &CudaCommunicator::destroy, Released());
}

}  // namespace launcher::python

// A stream of records: framing, the ring, the dealer and its receivers, through real FIFOs and sockets.
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "dealer.h"
#include "framing.h"
#include "receiver.h"
#include "stream_codecs.h"

namespace {

using launcher::Descriptor;
using namespace launcher::data;
using Bytes = std::vector<std::byte>;

std::string folder;

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string frame(const std::string& payload, std::uint32_t flag = 0) {
  const std::uint32_t words[2] = {kRecordMagic, flag << 29 | static_cast<std::uint32_t>(payload.size())};
  std::string out(reinterpret_cast<const char*>(words), sizeof words);
  return out + payload + std::string((4 - payload.size() % 4) % 4, '\0');
}

// The records that a framer finds when the bytes come `piece` at a time.
std::vector<std::string> framed(Framer& framer, const std::string& stream, std::size_t piece) {
  const std::string file = "stream";
  std::vector<std::string> out;
  std::size_t begin = 0, end = 0;
  while (true) {
    const bool last = end == stream.size();
    const Framed found = framer.next(bytes_of(stream).subspan(begin, end - begin), last, {file, begin, out.size()});
    if (found.end != 0) {
      out.push_back(stream.substr(begin + found.begin, found.end - found.begin));
      begin += found.end;
    } else if (last) {
      return out;
    } else {
      end = std::min(end + piece, stream.size());
    }
  }
}

void framers_find_the_same_in_any_pieces() {
  const std::vector<std::string> records = {frame(""), frame("abc"), frame("first", 1) + frame("", 2) + frame("end", 3),
                                            frame(std::string(300, 'x'))};
  const std::string stream = std::accumulate(records.begin(), records.end(), std::string());
  for (const std::size_t piece : {std::size_t{1}, std::size_t{7}, std::size_t{64}, stream.size()}) {
    CHECK(framed(*recordio_framer(), stream, piece) == records);
    CHECK(framed(*recordio_framer(2), stream, piece).size() == 2);
    const LineRules all{.keep_blank = true};
    CHECK(framed(*line_framer(all, false), "a,b\r\n\n\"c\nd\"\nlast", piece) ==
          std::vector<std::string>({"a,b\r\n", "\n", "\"c\n", "d\"\n", "last"}));
    const LineRules csv{.quote = '"', .delimiter = ','};
    CHECK(framed(*line_framer(csv, false),
                 "\xEF\xBB\xBF"
                 "a\n \n\"c\nd\"\"\n\",x\n\nlast",
                 piece) == std::vector<std::string>({"a\n", "\"c\nd\"\"\n\",x\n", "last"}));
    CHECK(framed(*line_framer(csv, true), "n,m\n1,2\r\nn,m\r\n3,4\n", piece) ==
          std::vector<std::string>({"1,2\r\n", "3,4\n"}));
    CHECK(framed(*line_framer(csv, false), "\n\n", piece).empty());
    CHECK(framed(*fixed_framer(3), "aaabbbccc", piece).size() == 3);
  }
  CHECK(framed(*line_framer({}, false), "", 1).empty());
}

void what_is_left_over_is_an_error() {
  const std::string good = frame("abcdef");
  for (std::size_t cut = 1; cut < good.size(); ++cut) {
    const bool whole = cut >= 14;  // the last pad may be missing
    if (whole) {
      CHECK(framed(*recordio_framer(), good + good.substr(0, cut), 5).size() == 2);
    } else {
      CHECK_THROWS(DataError, framed(*recordio_framer(), good + good.substr(0, cut), 5),
                   CHECK(error.problem() == Problem::truncated);
                   CHECK(error.offset() == good.size() && error.record() == 1));
    }
  }
  CHECK_THROWS(DataError, framed(*recordio_framer(2), good + good + good, 5),
               CHECK(std::string(error.what()).find("after 1 of its 2") != std::string::npos));
  CHECK_THROWS(DataError, framed(*recordio_framer(), good + "garbage that is long", 5),
               CHECK(error.problem() == Problem::malformed && error.offset() == good.size()));
  CHECK_THROWS(DataError, framed(*recordio_framer(), frame("a", 2), 5), CHECK(error.record() == 0));
  CHECK_THROWS(DataError, framed(*recordio_framer(), frame("a", 1) + frame("b", 0), 5), CHECK(error.record() == 0));
  CHECK_THROWS(DataError, framed(*recordio_framer(), frame("a", 1), 5), CHECK(error.record() == 0));
  CHECK_THROWS(DataError, framed(*recordio_framer(), frame("a", 5), 5), CHECK(error.record() == 0));
  CHECK_THROWS(DataError, framed(*fixed_framer(4), "aaaabbb", 5), CHECK(error.offset() == 4));
  CHECK_THROWS(DataError, framed(*tfrecord_framer(), std::string(11, 'x'), 5), CHECK(error.offset() == 0));
  CHECK_THROWS(DataError, framed(*tfrecord_framer(), std::string(64, '\xff'), 5),
               CHECK(error.problem() == Problem::malformed));
  CHECK_THROWS(DataError, framed(*line_framer({.quote = '"', .delimiter = ','}, false), "a\n\"b\n", 5),
               CHECK(error.offset() == 2));
}

// A dealer of `ranks` and a receiver for each, joined as processes of a host would be.
struct Host {
  Host(DealerOptions options, std::size_t ranks, std::size_t ring_bytes = 65536, OnBad on_bad = OnBad::raise,
       const std::function<std::shared_ptr<StreamDecoder>()>& decoder = {}) {
    std::vector<Dealer::Outlet> outlets;
    for (std::size_t i = 0; i < ranks; ++i) {
      std::array<int, 2> pair;
      CHECK(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair.data()) == 0);
      Descriptor memory = Ring::create(ring_bytes);
      receivers.push_back(std::make_unique<Receiver>(ReceiverOptions{options.batch, "rank 0", on_bad, 0}, memory.get(),
                                                     Descriptor(pair[1])));
      receivers.back()->set_decoder(decoder ? decoder() : data_decoder());
      outlets.push_back({std::move(memory), Descriptor(pair[0])});
    }
    if (!options.make_framer) {
      options.make_framer = [] { return recordio_framer(); };
    }
    dealer = std::make_unique<Dealer>(std::move(options), std::move(outlets));
  }

  static std::shared_ptr<StreamDecoder> data_decoder() {
    return stream_decoder(AttributesCodec({Field{"data", Kind::ragged, DType::uint8, {}}}, Dialect::automatic));
  }

  void start(const std::string& path, std::uint64_t epoch = 0, std::uint64_t skip = 0,
             std::chrono::nanoseconds timeout = std::chrono::seconds(20)) {
    dealer->start(std::make_unique<Pipe>(PipeOptions{path, "train", epoch, timeout}), path, epoch, skip);
  }

  std::vector<std::unique_ptr<Receiver>> receivers;
  std::unique_ptr<Dealer> dealer;
};

const auto never = [] { return false; };

std::string row_of(const Filled& filled, std::size_t row) {
  const Column& column = filled.batch.columns[0];
  const auto* values = reinterpret_cast<const char*>(column.values.data());
  return {values + column.offsets[row], values + column.offsets[row + 1]};
}

struct Taken {
  std::vector<std::string> rows;
  std::vector<int> masks;
  std::size_t steps = 0;
};

// What a rank gets in an epoch.
Taken take_all(Receiver& receiver, std::uint64_t epoch = 0) {
  Taken out;
  CHECK(receiver.begin(epoch, "stream", never).has_value());
  while (const Lease lease = receiver.next(never)) {
    CHECK(lease->step == out.steps);
    ++out.steps;
    for (std::size_t row = 0; row < lease->batch.rows; ++row) {
      out.rows.push_back(row_of(*lease, row));
      out.masks.push_back(lease->mask[row]);
    }
  }
  CHECK(receiver.ended());
  return out;
}

std::vector<Taken> take_all(Host& host, std::uint64_t epoch = 0) {
  std::vector<Taken> out(host.receivers.size());
  std::vector<std::thread> ranks;
  for (std::size_t i = 0; i < out.size(); ++i) {
    ranks.emplace_back([&, i] { out[i] = take_all(*host.receivers[i], epoch); });
  }
  for (std::thread& rank : ranks) {
    rank.join();
  }
  return out;
}

std::string payload_of_record(std::size_t number) {
  // Some are larger than a message may be in the small ring of these tests.
  return std::to_string(number) + ":" + std::string(number % 50 == 7 ? 40000 : number * 37 % 900, 'r');
}

std::string write_file(const std::string& name, std::size_t records) {
  const std::string path = folder + "/" + name;
  std::string all;
  for (std::size_t i = 0; i < records; ++i) {
    all += frame(payload_of_record(i));
  }
  const Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
  CHECK(::write(file.get(), all.data(), all.size()) == static_cast<ssize_t>(all.size()));
  return path;
}

DealerOptions options_of(std::size_t ranks, std::size_t batch, Tail tail) {
  DealerOptions options;
  options.batch = batch;
  options.world = ranks;
  options.tail = tail;
  return options;
}

void each_rank_gets_its_rows_of_each_step() {
  for (const Tail tail : {Tail::drop, Tail::pad, Tail::short_one}) {
    for (const std::size_t ranks : {1U, 2U, 3U}) {
      constexpr std::size_t batch = 8, records = 203;
      const std::string path = write_file("steps", records);
      Host host(options_of(ranks, batch, tail), ranks);
      host.start(path);
      const std::vector<Taken> taken = take_all(host);
      const std::size_t group = ranks * batch;
      const std::size_t steps = tail == Tail::drop ? records / group : (records + group - 1) / group;
      for (std::size_t rank = 0; rank < ranks; ++rank) {
        CHECK(taken[rank].steps == steps);
        std::vector<std::string> wanted;
        std::vector<int> masks;
        for (std::size_t step = 0; step < steps; ++step) {
          for (std::size_t row = 0; row < batch; ++row) {
            const std::size_t number = step * group + rank * batch + row;
            if (number < records || tail == Tail::pad) {
              wanted.push_back(payload_of_record(number < records ? number : 0));
              masks.push_back(number < records ? 1 : 0);
            }
          }
        }
        CHECK(taken[rank].rows == wanted && taken[rank].masks == masks);
      }
    }
  }
}

void shuffled_and_skipped_it_is_the_same_order() {
  constexpr std::size_t records = 500;
  const std::string path = write_file("shuffled", records);
  const auto read = [&](std::uint64_t skip, std::size_t ranks, std::uint64_t seed) {
    DealerOptions options = options_of(ranks, 4, Tail::short_one);
    options.window = 64;
    options.seed = seed;
    Host host(std::move(options), ranks);
    host.start(path, 0, skip);
    std::vector<Taken> taken = take_all(host);
    std::vector<std::string> out;
    std::vector<std::size_t> at(ranks, 0);
    while (at[0] < taken[0].rows.size()) {
      for (std::size_t rank = 0; rank < ranks; ++rank) {
        for (std::size_t i = 0; i < 4 && at[rank] < taken[rank].rows.size(); ++i) {
          out.push_back(taken[rank].rows[at[rank]++]);
        }
      }
    }
    return out;
  };
  const std::vector<std::string> all = read(0, 1, 5);
  CHECK(all.size() == records);
  CHECK(std::set<std::string>(all.begin(), all.end()).size() == records);
  CHECK(all[0] != payload_of_record(0) || all[1] != payload_of_record(1));
  CHECK(read(0, 3, 5) == all);
  CHECK(read(0, 1, 6) != all);
  CHECK(read(120, 2, 5) == std::vector<std::string>(all.begin() + 120, all.end()));
}

void a_host_takes_its_part_of_a_replicated_stream() {
  const std::string path = write_file("replicated", 40);
  DealerOptions options = options_of(4, 2, Tail::drop);
  options.first = 2;  // ranks 2 and 3 of 4
  Host host(std::move(options), 2);
  host.start(path);
  const std::vector<Taken> taken = take_all(host);
  CHECK(taken[0].steps == 5 && taken[1].steps == 5);
  CHECK(taken[0].rows[0] == payload_of_record(4) && taken[1].rows[3] == payload_of_record(15));
}

void hosts_agree_on_each_step() {
  const std::string path = write_file("agreed", 20);
  std::vector<std::pair<std::uint64_t, bool>> asked;
  DealerOptions options = options_of(1, 4, Tail::drop);
  options.agree = [&](std::uint64_t step, bool ready) {
    asked.emplace_back(step, ready);
    return step < 3;  // another host has no more
  };
  Host fewer(std::move(options), 1);
  fewer.start(path);
  CHECK(take_all(fewer)[0].steps == 3);
  fewer.dealer->stop();
  CHECK(asked.size() == 4 && asked.back().second);

  options = options_of(1, 16, Tail::pad);
  options.agree = [&](std::uint64_t step, bool) { return step < 4; };  // another host has more
  Host more(std::move(options), 1);
  more.start(path);
  const Taken taken = take_all(more)[0];
  CHECK(taken.steps == 4 && taken.rows.size() == 64);
  CHECK(std::count(taken.masks.begin(), taken.masks.end(), 1) == 20);
}

void read_on(Receiver& receiver) {
  while (receiver.next(never)) {
  }
}

void an_epoch_may_be_left_before_its_end() {
  const std::string path = write_file("left", 3000);
  Host host(options_of(2, 4, Tail::drop), 2);
  for (std::uint64_t epoch = 0; epoch < 3; ++epoch) {
    host.start(path, epoch);
    std::vector<std::thread> ranks;  // at the same time: the rings are full of what was not read
    for (std::size_t rank = 0; rank < 2; ++rank) {
      ranks.emplace_back([&, rank] {
        CHECK(host.receivers[rank]->begin(epoch, path, never).has_value());
        const Lease lease = host.receivers[rank]->next(never);
        CHECK(row_of(*lease, 0) == payload_of_record(rank * 4));
      });
    }
    for (std::thread& rank : ranks) {
      rank.join();
    }
  }
  // One that stays behind is told, as soon as it has taken what is its own.
  host.start(path, 3);
  CHECK(host.receivers[0]->begin(3, path, never).has_value());
  CHECK_THROWS(std::runtime_error, read_on(*host.receivers[1]),
               CHECK(std::string(error.what()).find("left this epoch") != std::string::npos));
  host.dealer->close();
  CHECK_THROWS(std::runtime_error, read_on(*host.receivers[0]),
               CHECK(std::string(error.what()).find("rank 0") != std::string::npos));
}

void errors_reach_every_rank_after_the_steps_before_them() {
  const std::string path = write_file("bad", 20);
  const Descriptor file(::open(path.c_str(), O_WRONLY | O_APPEND));
  CHECK(::write(file.get(), "garbage!", 8) == 8);
  Host host(options_of(2, 4, Tail::drop), 2);
  host.start(path);
  for (const auto& receiver : host.receivers) {
    CHECK(receiver->begin(0, path, never).has_value());
    CHECK(receiver->next(never) != nullptr);
    CHECK(receiver->next(never) != nullptr);
    for (int again = 0; again < 2; ++again) {
      CHECK_THROWS(DataError, receiver->next(never), CHECK(error.problem() == Problem::malformed);
                   CHECK(error.record() == 20 && error.file() == path);
                   CHECK(std::string(error.what()).find("record 20: ") != std::string::npos));
    }
  }
  Host absent(options_of(1, 4, Tail::drop), 1);
  absent.start(folder + "/absent_3", 3, 0, std::chrono::milliseconds(20));
  CHECK_THROWS(DataError, absent.receivers[0]->begin(3, "absent", never),
               CHECK(std::string(error.what()).find("channel train, epoch 3") != std::string::npos);
               CHECK(std::string(error.what()).find("0.02 s") != std::string::npos));
}

void bad_records_are_substituted_by_the_last_good_one() {
  const std::string path = folder + "/numbers";
  std::string all;
  for (const char* text : {"1", "2.5", "x", "-4e3", "", "6"}) {
    all += frame(text);
  }
  const Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
  CHECK(::write(file.get(), all.data(), all.size()) == static_cast<ssize_t>(all.size()));
  const auto decoder = [] {
    return stream_decoder(AttributesCodec({Field{"label", Kind::fixed, DType::float64, {}}}, Dialect::automatic));
  };
  Host host(options_of(1, 6, Tail::drop), 1, 65536, OnBad::substitute, decoder);
  host.start(path);
  CHECK(host.receivers[0]->begin(0, path, never).has_value());
  const Lease lease = host.receivers[0]->next(never);
  std::array<double, 6> values;
  std::memcpy(values.data(), lease->batch.columns[0].values.data(), sizeof values);
  CHECK(values == (std::array<double, 6>{1, 2.5, 2.5, -4000, -4000, 6}));
  CHECK(lease->mask == (std::vector<std::uint8_t>{1, 1, 0, 1, 0, 1}));
  CHECK(host.receivers[0]->statistics().substituted == 2);

  Host strict(options_of(1, 6, Tail::drop), 1, 65536, OnBad::raise, decoder);
  strict.start(path);
  CHECK(strict.receivers[0]->begin(0, path, never).has_value());
  CHECK_THROWS(DataError, strict.receivers[0]->next(never), CHECK(error.problem() == Problem::mismatch);
               CHECK(error.record() == 2 && error.offset() == 24));
}

// A FIFO that is there later, filled in pieces by another process.
void a_fifo_is_waited_for() {
  const std::string path = folder + "/late_0";
  ::unlink(path.c_str());
  std::array<int, 2> go;
  CHECK(::pipe(go.data()) == 0);
  std::fflush(stdout);
  const pid_t writer = ::fork();  // before there are threads
  if (writer == 0) {
    char byte;
    bool good = ::read(go[0], &byte, 1) == 1 && ::mkfifo(path.c_str(), 0600) == 0;
    const int fifo = ::open(path.c_str(), O_WRONLY);
    for (std::size_t i = 0; i < 50 && good; ++i) {
      const std::string one = frame(payload_of_record(i));
      for (std::size_t at = 0; at < one.size() && good; at += 1000) {
        const std::size_t count = std::min<std::size_t>(1000, one.size() - at);
        good = ::write(fifo, one.data() + at, count) == static_cast<ssize_t>(count);
      }
    }
    ::_exit(good ? 0 : 1);
  }
  Host host(options_of(1, 10, Tail::drop), 1);
  host.start(path);
  CHECK(::write(go[1], "", 1) == 1);
  const Taken taken = take_all(host)[0];
  CHECK(taken.steps == 5);
  for (std::size_t i = 0; i < taken.rows.size(); ++i) {
    CHECK(taken.rows[i] == payload_of_record(i));
  }
  int status = -1;
  CHECK(::waitpid(writer, &status, 0) == writer && status == 0);
  ::close(go[0]);
  ::close(go[1]);
}

void a_dealer_that_is_gone_ends_the_wait() {
  const std::string path = folder + "/silent_0";
  ::unlink(path.c_str());
  CHECK(::mkfifo(path.c_str(), 0600) == 0);
  Host host(options_of(1, 10, Tail::drop), 1);
  host.start(path);
  std::thread closer([&] { host.dealer->close(); });
  CHECK_THROWS(std::runtime_error, host.receivers[0]->begin(0, path, never),
               CHECK(std::string(error.what()).find("rank 0") != std::string::npos));
  closer.join();
}

void batches_that_are_kept_are_not_overwritten() {
  const std::string path = write_file("kept", 100);
  Host host(options_of(1, 4, Tail::drop), 1);
  host.start(path);
  CHECK(host.receivers[0]->begin(0, path, never).has_value());
  std::vector<Lease> kept;
  while (Lease lease = host.receivers[0]->next(never)) {
    kept.push_back(std::move(lease));
  }
  host.receivers.clear();
  CHECK(kept.size() == 25);
  for (std::size_t i = 0; i < 100; ++i) {
    CHECK(row_of(*kept[i / 4], i % 4) == payload_of_record(i));
  }
}

}  // namespace

int main(int, char** arguments) {
  folder = std::string(arguments[1]) + "/data_pipe_test." + std::to_string(::getpid());
  CHECK(::mkdir(folder.c_str(), 0700) == 0);
  check::run("framers_find_the_same_in_any_pieces", framers_find_the_same_in_any_pieces);
  check::run("what_is_left_over_is_an_error", what_is_left_over_is_an_error);
  check::run("each_rank_gets_its_rows_of_each_step", each_rank_gets_its_rows_of_each_step);
  check::run("shuffled_and_skipped_it_is_the_same_order", shuffled_and_skipped_it_is_the_same_order);
  check::run("a_host_takes_its_part_of_a_replicated_stream", a_host_takes_its_part_of_a_replicated_stream);
  check::run("hosts_agree_on_each_step", hosts_agree_on_each_step);
  check::run("an_epoch_may_be_left_before_its_end", an_epoch_may_be_left_before_its_end);
  check::run("errors_reach_every_rank_after_the_steps_before_them",
             errors_reach_every_rank_after_the_steps_before_them);
  check::run("bad_records_are_substituted_by_the_last_good_one", bad_records_are_substituted_by_the_last_good_one);
  check::run("a_fifo_is_waited_for", a_fifo_is_waited_for);
  check::run("a_dealer_that_is_gone_ends_the_wait", a_dealer_that_is_gone_ends_the_wait);
  check::run("batches_that_are_kept_are_not_overwritten", batches_that_are_kept_are_not_overwritten);
  return check::failures == 0 ? 0 : 1;
}

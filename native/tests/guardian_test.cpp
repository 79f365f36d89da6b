// The parts of the guardian, one by one: frames, lines, log files, the console, the pump, processes.
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "check.h"
#include "console.h"
#include "lines.h"
#include "logfile.h"
#include "process.h"
#include "pump.h"
#include "wire.h"

using namespace launcher::guardian;
using namespace std::chrono_literals;

namespace {

std::string folder;
const std::atomic<bool> patient{false};

struct Pipe {
  Pipe() { CHECK(::pipe2(ends.data(), O_CLOEXEC) == 0); }
  std::array<int, 2> ends{};
  void put(std::string_view text) const {
    CHECK(::write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  }
};

// Reads until `wanted` has been seen or the deadline is over; returns what was read.
std::string read_until(int fd, const std::string& wanted) {
  std::string text;
  const auto deadline = std::chrono::steady_clock::now() + 10s;
  while (text.find(wanted) == std::string::npos && std::chrono::steady_clock::now() < deadline) {
    pollfd wait{fd, POLLIN, 0};
    if (::poll(&wait, 1, 100) != 1) continue;
    std::array<char, 65536> buffer{};
    const ssize_t got = ::read(fd, buffer.data(), buffer.size());
    if (got <= 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(got));
  }
  return text;
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void frames_survive_any_cut() {
  std::string bytes;
  append_frame(bytes, {"spawn", "", "a b", std::string(100000, 'x')});
  append_frame(bytes, {"quit"});
  for (const std::size_t step : {std::size_t{1}, std::size_t{3}, std::size_t{4096}, bytes.size()}) {
    FrameReader reader;
    std::vector<Fields> frames;
    for (std::size_t at = 0; at < bytes.size(); at += step) {
      reader.feed(std::string_view(bytes).substr(at, step));
      while (auto fields = reader.next()) frames.push_back(*fields);
    }
    CHECK(frames.size() == 2 && frames[0].size() == 4 && frames[0][1].empty() && frames[0][3].size() == 100000);
    CHECK(frames.size() == 2 && frames[1] == Fields{"quit"});
  }
}

void a_frame_above_the_limit_is_refused() {
  FrameReader reader;
  reader.feed("\xff\xff\xff\x7f");
  CHECK_THROWS(std::length_error, reader.next());
}

void bad_commands_name_their_field() {
  const Fields fields{"spawn", "x", "9", "a"};
  FieldCursor cursor(fields);
  CHECK(cursor.text("verb") == "spawn");
  CHECK_THROWS(std::invalid_argument, cursor.number("slot"),
               CHECK(std::string_view(error.what()).find("'slot'") != std::string_view::npos));
  CHECK_THROWS(std::invalid_argument, cursor.list("argv"));
  CHECK(cursor.text("last") == "a");
  CHECK_THROWS(std::invalid_argument, cursor.text("beyond"));
}

void lines_are_whole_and_prefixed() {
  LineAssembler lines("[r0] ");
  const auto now = LineAssembler::Clock::now();
  std::string out;
  CHECK(lines.feed("one\ntw", now, out) == 1 && out == "[r0] one\n");
  CHECK(lines.has_partial());
  CHECK(lines.feed("o\n\n", now, out) == 2 && out == "[r0] one\n[r0] two\n[r0] \n");
  out.clear();
  CHECK(lines.feed("prompt? ", now, out) == 0 && lines.flush_idle(now, out) == 0);
  CHECK(lines.flush_idle(now + LineAssembler::kIdleFlush, out) == 1 && out == "[r0] prompt? \n");
  out.clear();
  lines.feed("end", now, out);
  CHECK(lines.finish(out) == 1 && out == "[r0] end\n" && !lines.has_partial());
}

void bars_show_their_last_state() {
  LineAssembler lines("");
  const auto start = LineAssembler::Clock::now();
  std::string out;
  lines.feed("\r10%\r20%", start, out);
  CHECK(out == "20%\n");  // the first look at a bar shows it
  out.clear();
  lines.feed("\r30%\r40%", start + 1s, out);
  CHECK(out.empty());
  lines.feed("\r50%", start + 3s, out);
  CHECK(out == "50%\n");
  out.clear();
  lines.feed("\r100%\n", start + 3s, out);
  CHECK(out == "100%\n");
  CHECK(last_segment("a\rb\r\r") == "b" && last_segment("crlf\r") == "crlf");
}

void long_lines_are_cut_between_characters() {
  LineAssembler lines("");
  const auto now = LineAssembler::Clock::now();
  std::string out;
  std::string euros;
  for (int i = 0; i < 50000; ++i) euros += "\xe2\x82\xac";  // 150,000 bytes of three-byte characters
  lines.feed(euros, now, out);
  lines.finish(out);
  std::string joined;
  std::istringstream stream(out);
  for (std::string line; std::getline(stream, line); joined += line) {
    CHECK(line.size() <= kMaxLineBytes && line.size() % 3 == 0);
  }
  CHECK(joined == euros);
  CHECK(utf8_cut("abc", 8) == 3);
  std::string invalid(100, '\x80');
  CHECK(utf8_cut(invalid, 50) >= 47);  // never stuck, whatever the bytes
}

void a_file_keeps_its_newest_part() {
  const std::string path = folder + "/capped.log";
  ::unlink(path.c_str());
  CappedFile file(path, 1000);
  for (int i = 0; i < 100; ++i) file.write(std::string(99, static_cast<char>('a' + i % 26)) + "\n");
  CHECK(file.take_error().empty());
  const std::string kept = content(path + ".1") + content(path);
  CHECK(kept.size() <= 1200 && kept.size() >= 500);
  CHECK(kept.substr(kept.size() - 100) == std::string(99, static_cast<char>('a' + 99 % 26)) + "\n");
}

void a_file_that_cannot_be_written_says_so_once() {
  CappedFile file("/nowhere/at/all.log", 0);
  file.write("text");
  CHECK(file.take_error().find("/nowhere/at/all.log") != std::string::npos);
  file.write("text");
  CHECK(file.take_error().empty());
}

void a_blocked_reader_stops_nobody() {
  Pipe pipe;
  ::fcntl(pipe.ends[1], F_SETPIPE_SZ, 4096);
  Console console(pipe.ends[1], [](std::string) {});
  const std::string block(64 * 1024, 'x');
  for (int i = 0; i < 64; ++i) console.push(0, block + "\n", 1, patient);  // 4 MiB that nobody reads
  console.push(1, "the other rank\n", 1, patient);
  CHECK(console.dropped_lines() > 0);
  CHECK(!console.flush(10ms));
  std::thread reader([&] {
    const std::string text = read_until(pipe.ends[0], "the other rank\n");
    CHECK(text.find("local rank 0: ") != std::string::npos && text.find("were not shown") != std::string::npos);
  });
  console.push(0, "again\n", 1, patient);
  CHECK(console.flush(10s));
  reader.join();
  ::close(pipe.ends[0]);
}

void a_closed_reader_is_survived() {
  Pipe pipe;
  Console console(pipe.ends[1], [](std::string) {});
  ::close(pipe.ends[0]);
  for (int i = 0; i < 10; ++i) console.push(0, "text\n", 1, patient);
  CHECK(console.flush(10s));
}

void the_pump_tells_what_came_last() {
  Pipe out;
  Pipe err;
  Pipe shown;
  Console console(shown.ends[1], [](std::string) {});
  const std::string path = folder + "/pump.log";
  ::unlink(path.c_str());
  {
    RankPump pump(3, "[r3] ", false, 0, {out.ends[0], path, &console}, {err.ends[0], "", nullptr}, [](std::string) {});
    out.put("hello\nhalf");
    err.put("Traceback\nValueError: bad\n");
    const auto tails = pump.drain(5s);
    CHECK(tails.out == "hello\nhalf" && tails.err == "Traceback\nValueError: bad\n");
    CHECK(pump.bytes() == 10 + 26);
    CHECK(read_until(shown.ends[0], "half\n") == "[r3] hello\n[r3] half\n");
    out.put(" more\n");  // from a grandchild that kept the pipe
    pump.drain(5s);
    CHECK(content(path) == "hello\nhalf more\n");
    ::close(out.ends[1]);
    ::close(err.ends[1]);
  }
}

void raw_output_is_passed_at_once() {
  Pipe out;
  Pipe err;
  Pipe shown;
  Console console(shown.ends[1], [](std::string) {});
  RankPump pump(0, "", true, 0, {out.ends[0], "", &console}, {err.ends[0], "", nullptr}, [](std::string) {});
  out.put("name? ");
  CHECK(read_until(shown.ends[0], "name? ") == "name? ");
}

SpawnRequest shell(const std::string& script, const Pipe& output) {
  SpawnRequest request;
  request.argv = {"/bin/sh", "-c", script};
  request.environment = {"PATH=/usr/bin:/bin", "COLOUR=green"};
  request.out_fd = request.err_fd = output.ends[1];
  return request;
}

void a_child_has_its_own_session_and_clean_signals() {
  Pipe output;
  SpawnRequest request = shell("echo $COLOUR $PWD; grep -E 'SigBlk|SigIgn' /proc/self/status; exit 5", output);
  request.directory = "/usr";
  const SpawnResult child = spawn(request);
  CHECK(child.pid > 0 && ::getsid(child.pid) == child.pid);
  int status = 0;
  CHECK(::waitpid(child.pid, &status, 0) == child.pid && WIFEXITED(status) && WEXITSTATUS(status) == 5);
  const std::string text = read_until(output.ends[0], "SigIgn:\t0000000000000000");
  CHECK(text.find("green /usr\n") == 0 && text.find("SigBlk:\t0000000000000000") != std::string::npos);
}

void a_start_that_fails_names_the_step() {
  Pipe output;
  SpawnRequest request = shell("true", output);
  request.argv[0] = "/no/such/program";
  SpawnResult result = spawn(request);
  CHECK(result.pid == -1 && result.error == ENOENT && std::string_view(result.step) == "execve");
  request = shell("true", output);
  request.directory = "/no/such/folder";
  result = spawn(request);
  CHECK(result.pid == -1 && result.error == ENOENT && std::string_view(result.step) == "chdir");
  request = shell("true", output);
  request.cpus = {1023};
  result = spawn(request);
  CHECK(result.pid == -1 && std::string_view(result.step) == "sched_setaffinity");
}

void orphans_are_found_and_killed() {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  Pipe output;
  // The shell ends at once and leaves a grandchild in a session of its own.
  const SpawnResult child = spawn(shell("setsid sh -c 'echo ready; exec sleep 600' & exit 0", output));
  CHECK(child.pid > 0 && ::waitpid(child.pid, nullptr, 0) == child.pid);
  read_until(output.ends[0], "ready\n");
  CHECK(!has_no_children(0));
  auto left = descendants(::getpid(), 0);
  CHECK(!left.empty());
  for (auto& info : left) {
    ProcessInfo other = info;
    other.start_ticks += 1;  // the same pid, but not the same process
    CHECK(!send_signal(other, SIGKILL));
    CHECK(send_signal(info, SIGKILL));
  }
  while (::waitpid(-1, nullptr, 0) > 0) {
  }
  CHECK(has_no_children(0) && descendants(::getpid(), 0).empty());
  CHECK(process_state(::getpid()) == 'R');
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 64;
  folder = argv[1];
  ::signal(SIGPIPE, SIG_IGN);
  check::run("frames_survive_any_cut", frames_survive_any_cut);
  check::run("a_frame_above_the_limit_is_refused", a_frame_above_the_limit_is_refused);
  check::run("bad_commands_name_their_field", bad_commands_name_their_field);
  check::run("lines_are_whole_and_prefixed", lines_are_whole_and_prefixed);
  check::run("bars_show_their_last_state", bars_show_their_last_state);
  check::run("long_lines_are_cut_between_characters", long_lines_are_cut_between_characters);
  check::run("a_file_keeps_its_newest_part", a_file_keeps_its_newest_part);
  check::run("a_file_that_cannot_be_written_says_so_once", a_file_that_cannot_be_written_says_so_once);
  check::run("a_blocked_reader_stops_nobody", a_blocked_reader_stops_nobody);
  check::run("a_closed_reader_is_survived", a_closed_reader_is_survived);
  check::run("the_pump_tells_what_came_last", the_pump_tells_what_came_last);
  check::run("raw_output_is_passed_at_once", raw_output_is_passed_at_once);
  check::run("a_child_has_its_own_session_and_clean_signals", a_child_has_its_own_session_and_clean_signals);
  check::run("a_start_that_fails_names_the_step", a_start_that_fails_names_the_step);
  check::run("orphans_are_found_and_killed", orphans_are_found_and_killed);
  return check::failures == 0 ? 0 : 1;
}

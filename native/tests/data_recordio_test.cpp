// RecordIO, Record messages, TFRecord: scanning, damage, dialects, and what one record is taken apart into.
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "crc32c.h"
#include "encode.h"
#include "indexed_source.h"
#include "record_proto_codec.h"
#include "recordio_codec.h"
#include "tfrecord.h"

using namespace launcher::data;

namespace {

std::string folder;
const std::string kMagic = "\x0a\x23\xd7\xce";

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

std::string word(std::uint32_t value) {
  std::string text(4, '\0');
  std::memcpy(text.data(), &value, 4);
  return text;
}

std::string frame(std::uint32_t flag, const std::string& payload) {
  return kMagic + word(flag << 29 | static_cast<std::uint32_t>(payload.size())) + payload +
         std::string((4 - payload.size() % 4) % 4, '\0');
}

std::shared_ptr<const File> file_of(const std::string& content, Access access = Access::mapped) {
  const std::string path = folder + "/data_recordio_test.file";
  std::remove(path.c_str());
  std::ofstream(path, std::ios::binary) << content;
  return std::make_shared<File>(path, access);
}

using Records = std::vector<std::pair<std::uint64_t, std::uint64_t>>;

Records records_of(const FileIndex& index) {
  Records records;
  for (std::uint64_t i = 0; i < index.records(); ++i) {
    records.push_back(index.at(i));
  }
  return records;
}

// The index of a file, which must be the same however the file is read.
FileIndex scan(const std::string& content, bool skip = false, Dialect dialect = Dialect::automatic) {
  FileIndex mapped = scan_recordio(*file_of(content), dialect, skip);
  const FileIndex read = scan_recordio(*file_of(content, Access::read), dialect, skip);
  CHECK(records_of(mapped) == records_of(read));
  CHECK(mapped.damage().size() == read.damage().size());
  return mapped;
}

void expect_error(const std::string& content, Problem problem, std::uint64_t offset, std::uint64_t record,
                  const std::string& words) {
  for (const Access access : {Access::mapped, Access::read}) {
    CHECK_THROWS(DataError, scan_recordio(*file_of(content, access), Dialect::automatic, false),
                 CHECK(error.problem() == problem), CHECK(error.offset() == offset), CHECK(error.record() == record),
                 CHECK(std::string(error.what()).find(words) != std::string::npos));
  }
}

// All payloads of a file, through a source.
std::vector<std::string> payloads(const std::string& content, Dialect dialect, bool skip = false) {
  auto file = file_of(content);
  FileIndex part = scan_recordio(*file, dialect, skip);
  Index index({file}, {std::move(part)});
  const IndexedSource<RecordCodec> source(index, RecordCodec(Dialects(dialect, 1)));
  Batch batch(source.fields(), static_cast<std::size_t>(source.records()));
  std::vector<std::uint64_t> numbers(static_cast<std::size_t>(source.records()));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = i;
  }
  auto scratch = source.make_scratch();
  source.fetch(numbers, batch, *scratch);
  std::vector<std::string> out;
  const Column& column = batch.columns[0];
  for (std::size_t i = 0; i < batch.rows; ++i) {
    out.emplace_back(reinterpret_cast<const char*>(column.values.data()) + column.offsets[i],
                     static_cast<std::size_t>(column.offsets[i + 1] - column.offsets[i]));
  }
  return out;
}

void test_whole_records() {
  CHECK(scan("").records() == 0);  // F10
  const std::string content = frame(0, "abcde") + frame(0, "") + frame(0, "x");
  CHECK((records_of(scan(content)) == Records{{0, 16}, {16, 8}, {24, 12}}));
  CHECK((payloads(content, Dialect::automatic) == std::vector<std::string>{"abcde", "", "x"}));
  // Without the pad of the last frame, which nothing follows.
  CHECK((records_of(scan(content.substr(0, content.size() - 3))) == Records{{0, 16}, {16, 8}, {24, 9}}));
  CHECK(payloads(content.substr(0, content.size() - 1), Dialect::automatic)[2] == "x");
}

void test_truncated() {  // F1, F2
  const std::string good = frame(0, "first record") + frame(0, "second");
  for (std::size_t stray = 1; stray < 8; ++stray) {
    expect_error(good + frame(0, "x").substr(0, stray), Problem::truncated, good.size(), 2, "truncated header");
    const FileIndex index = scan(good + std::string(stray, '\0'), true);
    CHECK(index.records() == 2 && index.damage().size() == 1);
    CHECK(index.damage()[0].offset == good.size() && index.damage()[0].bytes == stray);
  }
  const std::string cut = good + frame(0, std::string(100, 'x')).substr(0, 50);
  expect_error(cut, Problem::truncated, good.size(), 2, "tells of 100 bytes, found 42");
  const FileIndex index = scan(cut, true);
  CHECK(index.records() == 2 && index.damage().size() == 1 && index.damage()[0].bytes == 50);
}

void test_bad_magic() {  // F3
  const std::string good = frame(0, "first record") + frame(0, "second");
  const std::string bad = good + "0123456789" + good + frame(0, "x");
  expect_error(bad, Problem::malformed, good.size(), 2, "0x33323130");
  FileIndex index = scan(bad, true);
  CHECK(index.records() == 5 && index.damage().size() == 1);
  CHECK(index.damage()[0].offset == good.size() && index.damage()[0].bytes == 10);
  // A header in the rubbish whose records do not follow each other is none.
  index = scan(good + "0123" + frame(0, "false") + "4567" + good + good, true);
  CHECK(index.records() == 6 && index.damage().size() == 1);
  CHECK(index.damage()[0].bytes == 4 + frame(0, "false").size() + 4);
  // The length of a record is wrong: then it is that record that is left out, not those which it would swallow.
  std::string swallowed = frame(0, "first") + frame(0, "second") + good + good;
  swallowed[frame(0, "first").size() + 4] = 40;
  index = scan(swallowed, true);
  CHECK(index.records() == 5 && index.damage().size() == 1);
  CHECK(index.damage()[0].offset == frame(0, "first").size());
  CHECK(index.damage()[0].bytes == frame(0, "second").size());
  // Nothing to go on with.
  index = scan(good + "0123456789", true);
  CHECK(index.records() == 2 && index.damage()[0].bytes == 10);
}

void test_parts_out_of_order() {  // F6
  const std::string good = frame(0, "good");
  const std::uint64_t at = good.size();
  expect_error(good + frame(2, "x"), Problem::malformed, at, 1, "found flag 2 (a middle part), wanted 0");
  expect_error(good + frame(3, "x"), Problem::malformed, at, 1, "found flag 3 (a last part), wanted 0");
  expect_error(good + frame(1, "x") + good, Problem::malformed, at + 12, 1, "found flag 0 (a whole record), wanted 2");
  expect_error(good + frame(1, "x") + frame(1, "y"), Problem::malformed, at + 12, 1,
               "a part of this record is missing");
  expect_error(good + frame(1, "x"), Problem::truncated, at + 12, 1, "after part 1 of a record");
  expect_error(good + frame(1, "x") + frame(2, "y").substr(0, 5), Problem::truncated, at + 12, 1, "truncated header");
  for (std::uint32_t flag = 4; flag < 8; ++flag) {
    expect_error(good + frame(flag, "x"), Problem::malformed, at, 1, "flag " + std::to_string(flag));
  }
  const FileIndex index = scan(good + frame(1, "x") + good + good, true);
  CHECK(index.records() == 3 && index.damage().size() == 1 && index.damage()[0].bytes == 12);
}

void test_dmlc_dialect() {  // F4, F7
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> originals;
    std::string escaped, plain;
    for (int i = 0; i < 4; ++i) {
      std::string payload(random() % 64, '\0');
      for (char& one : payload) {
        one = static_cast<char>(random());
      }
      for (std::size_t at = random() % 5; at + 4 <= payload.size(); at += 4 + random() % 9) {  // at every alignment
        payload.replace(at, 4, kMagic);
      }
      append_recordio(escaped, bytes_of(payload), true);
      append_recordio(plain, bytes_of(payload), false);
      originals.push_back(std::move(payload));
    }
    CHECK(payloads(escaped, Dialect::automatic) == originals);
    CHECK(payloads(escaped, Dialect::dmlc) == originals);
    CHECK(payloads(plain, Dialect::automatic) == originals);  // frames are read as long as they say
  }
  std::string split;
  append_recordio(split, bytes_of(kMagic + kMagic + "12" + kMagic), true);
  CHECK(split == frame(1, "") + frame(2, "") + frame(3, "12" + kMagic));
}

void test_plain_dialect() {  // F5
  // As in ml-io's split_records.pr: parts of 8, 10, 1 and 29 bytes of a record of 48.
  const std::string whole = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKL";
  const std::string proof = frame(1, whole.substr(0, 8)) + frame(2, whole.substr(8, 10)) +
                            frame(2, whole.substr(18, 1)) + frame(3, whole.substr(19));
  CHECK(payloads(proof, Dialect::automatic)[0] == whole);
  CHECK(payloads(proof, Dialect::plain)[0] == whole);
  CHECK_THROWS(DataError, payloads(proof, Dialect::dmlc), CHECK(error.offset() == 0),
               CHECK(std::string(error.what()).find("dialect") != std::string::npos));
  // A record that proves nothing: the option says it, or another record of the file that does.
  const std::string open = frame(1, "abcd") + frame(3, "xyz");
  CHECK(payloads(open, Dialect::automatic)[0] == "abcd" + kMagic + "xyz");
  CHECK(payloads(open, Dialect::dmlc)[0] == "abcd" + kMagic + "xyz");
  CHECK(payloads(open, Dialect::plain)[0] == "abcdxyz");
  CHECK(payloads(open + proof, Dialect::automatic)[0] == "abcdxyz");
  CHECK(payloads(frame(1, "") + frame(3, ""), Dialect::plain)[0].empty());  // of nothing but empty parts
}

void test_stream_frames() {
  const std::string record = frame(1, "abcd") + frame(3, "xyz");
  for (std::size_t size = 0; size < record.size(); ++size) {
    const Frames frames = read_frames(bytes_of(record).first(size), false);
    CHECK(frames.more && frames.fault == FrameFault::none);
    CHECK(frames.bytes > size && frames.bytes <= record.size());
  }
  const Frames frames = read_frames(bytes_of(record + "more"), false);
  CHECK(frames.whole() && frames.bytes == record.size() && frames.parts == 2 && frames.payload == 7);
}

// --- Record messages ---

std::string varint(std::uint64_t value) {
  std::string text;
  for (; value >= 0x80; value >>= 7) {
    text.push_back(static_cast<char>(value | 0x80));
  }
  return text + static_cast<char>(value);
}

std::string field(std::uint32_t number, const std::string& body) {
  return varint(number << 3 | 2) + varint(body.size()) + body;
}

std::string entry(std::uint32_t map, const std::string& key, std::uint32_t type, const std::string& tensor) {
  return field(map, field(1, key) + field(2, field(type, tensor)));
}

std::string floats(const std::vector<float>& values) {
  std::string text(values.size() * 4, '\0');
  if (!values.empty()) {
    std::memcpy(text.data(), values.data(), text.size());
  }
  return text;
}

struct Decoded {
  explicit Decoded(RecordSchema schema, std::size_t rows = 8)
      : codec(schema, all(schema.fields.size()), Dialects(Dialect::automatic, 1)), batch(codec.fields(), rows) {}
  static std::vector<std::size_t> all(std::size_t count) {
    std::vector<std::size_t> numbers;
    for (std::size_t i = 0; i < count; ++i) {
      numbers.push_back(i);
    }
    return numbers;
  }
  void add(const std::string& payload) {
    const std::string name = "file";
    codec.decode_payload(bytes_of(payload), {name, 100, 7, 108}, batch.rows, batch, state);
    ++batch.rows;
  }
  std::vector<float> row(std::size_t column, std::size_t number) {
    const std::size_t count = static_cast<std::size_t>(codec.fields()[column].values());
    const float* begin = batch.columns[column].fixed_row<float>(number, count);
    return {begin, begin + count};
  }

  RecordProtoCodec codec;
  Batch batch;
  RecordProtoCodec::State state;
};

RecordSchema schema_of(const std::string& payload) {
  return {MessageForm::record, infer_fields(MessageForm::record, bytes_of(payload)), true};
}

std::string dense(const std::vector<float>& values, float label) {
  return entry(1, "values", 2, field(1, floats(values))) + entry(2, "values", 2, field(1, floats({label})));
}

void test_dense_messages() {
  const std::string first = dense({1, 2, 3}, 9);
  Decoded decoded(schema_of(first));
  CHECK(decoded.codec.fields()[0] == (Field{"values", Kind::fixed, DType::float32, {3}}));
  CHECK(decoded.codec.fields()[1] == (Field{"label_values", Kind::fixed, DType::float32, {1}}));
  decoded.add(first);
  decoded.add(dense({4, 5, 6}, 8));  // as the one before, but for its values
  // F8: label first, not packed, in two chunks, with an unknown field.
  const std::string value = floats({7});
  decoded.add(entry(2, "values", 2, "\x0d" + value) +
              entry(1, "values", 2, field(1, floats({1})) + field(1, floats({2, 3}))) + field(77, "unknown"));
  decoded.add(dense({10, 11, 12}, 13));
  CHECK((decoded.row(0, 0) == std::vector<float>{1, 2, 3} && decoded.row(1, 0) == std::vector<float>{9}));
  CHECK((decoded.row(0, 1) == std::vector<float>{4, 5, 6} && decoded.row(1, 1) == std::vector<float>{8}));
  CHECK((decoded.row(0, 2) == std::vector<float>{1, 2, 3} && decoded.row(1, 2) == std::vector<float>{7}));
  CHECK((decoded.row(0, 3) == std::vector<float>{10, 11, 12} && decoded.row(1, 3) == std::vector<float>{13}));
}

void test_int32_messages() {
  const auto record = [](const std::vector<std::int64_t>& values) {
    std::string packed;
    for (const std::int64_t value : values) {
      packed += varint(static_cast<std::uint64_t>(value));
    }
    return entry(1, "values", 7, field(1, packed));
  };
  Decoded decoded(schema_of(record({1, 300})));
  const std::vector<std::vector<std::int64_t>> rows{{1, 300}, {300, 1}, {-1, 0}, {0, -1}, {5, 6}, {2147483647, 2}};
  for (const auto& row : rows) {
    decoded.add(record(row));
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int32_t* row = decoded.batch.columns[0].fixed_row<std::int32_t>(i, 2);
    CHECK(row[0] == rows[i][0] && row[1] == rows[i][1]);
  }
  // As long as {1, 300}, but of one and of three numbers.
  CHECK_THROWS(DataError, decoded.add(record({1, 2, 3})), CHECK(error.problem() == Problem::mismatch));
  CHECK_THROWS(DataError, decoded.add(record({70000})), CHECK(error.problem() == Problem::mismatch));
}

// What is refused does not hang on which fields are given, nor on the records before.
void test_fields_that_are_not_given() {
  const auto record = [](const std::string& packed) {
    return entry(1, "values", 2, field(1, floats({1, 2}))) + entry(2, "values", 7, field(1, packed));
  };
  const std::string good = record(varint(300) + varint(1));
  const RecordProtoCodec codec(schema_of(good), {0}, Dialects(Dialect::automatic, 1));
  CHECK(codec.fields().size() == 1);
  Batch batch(codec.fields(), 1);
  RecordProtoCodec::State state;
  const std::string name = "file";
  const auto decode = [&](const std::string& payload) {
    codec.decode_payload(bytes_of(payload), {name, 100, 7, 108}, 0, batch, state);
  };
  decode(good);
  decode(record(varint(1) + varint(300)));
  for (const std::string& bad : {record(varint(1) + varint(2) + varint(3)), record(varint(70000))}) {
    CHECK(bad.size() == good.size());
    CHECK_THROWS(DataError, decode(bad), CHECK(error.problem() == Problem::mismatch));
  }
}

void test_sparse_messages() {
  const auto record = [](const std::vector<float>& values, const std::string& keys, const std::string& shape) {
    return entry(1, "values", 2, (values.empty() ? "" : field(1, floats(values))) + field(2, keys) + shape);
  };
  const std::string shape = field(3, varint(1000));
  const std::string first = record({1, 2}, varint(3) + varint(999), shape);
  Decoded decoded(schema_of(first));
  CHECK(decoded.codec.fields()[0] == (Field{"values", Kind::sparse, DType::float32, {1000}}));
  decoded.add(first);
  decoded.add(record({}, "", shape));
  const auto refuse = [&](const std::string& bad) {
    CHECK_THROWS(DataError, decoded.add(bad), CHECK(error.problem() == Problem::mismatch), CHECK(error.record() == 7),
                 CHECK(error.offset() == 100));
  };
  refuse(record({1}, varint(1000), shape));                // F9: a key outside of the shape
  refuse(record({1, 2}, varint(3), shape));                // not a key for each value
  refuse(record({1}, varint(3), field(3, varint(1001))));  // another shape
  refuse(record({1}, varint(3), ""));                      // none
  refuse(record({1}, "", shape));                          // dense
  decoded.add(record({5}, varint(7), shape));
  CHECK((decoded.batch.columns[0].offsets[3] == 3 && decoded.batch.rows == 3));
  const auto* keys = reinterpret_cast<const std::uint64_t*>(decoded.batch.columns[0].keys.data());
  CHECK(keys[0] == 3 && keys[1] == 999 && keys[2] == 7);
}

void test_mismatches() {  // F9
  Decoded decoded(schema_of(dense({1, 2, 3}, 9)));
  const auto refuse = [&](const std::string& bad, const std::string& words) {
    CHECK_THROWS(DataError, decoded.add(bad), CHECK(error.problem() == Problem::mismatch),
                 CHECK(std::string(error.what()).find(words) != std::string::npos));
  };
  const std::string label = entry(2, "values", 2, field(1, floats({9})));
  refuse(dense({1, 2}, 9), "found 2 values, wanted 3");
  refuse(label, "'values': found no such key");  // F8: absent
  refuse(entry(1, "values", 2, field(1, floats({1, 2, 3}))), "'label_values': found no such key");
  refuse(entry(1, "values", 3, field(1, floats({1, 2, 3, 4, 5, 6}))) + label, "found Float64Tensor, wanted Float32");
  refuse(entry(1, "values", 2, field(1, floats({1, 2, 3})) + field(2, varint(0))) + label, "found a sparse tensor");
  refuse(entry(1, "values", 2, field(1, floats({1, 2, 3})) + field(3, varint(1) + varint(3))) + label, "(1, 3)");
  refuse(dense({1, 2, 3}, 9) + entry(1, "more", 2, ""), "found the key 'more'");
  refuse(field(1, field(1, "values")) + label, "found no value");
  decoded.add(dense({1, 2, 3}, 9));
  CHECK(decoded.batch.rows == 1);
}

void test_malformed_messages() {
  const std::string good = dense({1, 2, 3}, 9);
  Decoded decoded(schema_of(good));
  decoded.add(good);
  for (std::size_t size = 1; size < good.size(); ++size) {
    CHECK_THROWS(DataError, decoded.add(good.substr(0, size)), CHECK(error.offset() >= 100));
  }
  CHECK_THROWS(DataError, decoded.add(entry(1, "values", 2, field(1, "12345"))),
               CHECK(error.problem() == Problem::malformed), CHECK(error.offset() == 108 + 16));
  CHECK_THROWS(DataError, decoded.add(good + std::string(11, '\xff')), CHECK(error.offset() == 108 + good.size()));
}

void test_ragged_messages() {
  const auto image = [](const std::string& inner) { return entry(1, "image", 9, inner); };
  const std::string first = image(field(1, "abc") + field(2, "image/png"));
  Decoded decoded(schema_of(first));
  CHECK(decoded.codec.fields()[0] == (Field{"image", Kind::ragged, DType::uint8, {}}));
  decoded.add(first);
  decoded.add(image(""));
  CHECK_THROWS(DataError, decoded.add(image(field(1, "a") + field(1, "b"))),
               CHECK(error.problem() == Problem::mismatch));
  CHECK(decoded.batch.columns[0].offsets[2] == 3);
  // Dense tensors of any length, if they are declared so; other keys are left out then.
  Decoded lengths({MessageForm::record,
                   declare_fields(MessageForm::record, {{"values", Kind::ragged, DType::float32, {}}}), false});
  lengths.add(dense({1, 2, 3}, 9));
  lengths.add(dense({}, 9));
  lengths.add(dense({4}, 9));
  CHECK(lengths.batch.columns[0].offsets[1] == 3 && lengths.batch.columns[0].offsets[3] == 4);
}

// A message in parts of an unknown dialect: that in which it is a message.
void test_messages_in_parts() {
  std::vector<float> values(16, 1.0f);
  std::memcpy(&values[5], kMagic.data(), 4);
  const std::string aligned = std::string("\x1a\x02xx") + dense(values, 9);  // the magic at a multiple of 4
  CHECK(aligned.find(kMagic) % 4 == 0);
  std::string escaped;
  append_recordio(escaped, bytes_of(aligned), true);
  CHECK(escaped.size() > aligned.size() + 11);
  const std::string plain =
      frame(1, aligned.substr(0, 8)) + frame(2, aligned.substr(8, 12)) + frame(3, aligned.substr(20));
  for (const std::string& content : {escaped, plain}) {
    auto file = file_of(content);
    Index index({file}, {scan_recordio(*file, Dialect::automatic, false)});
    const IndexedSource<RecordProtoCodec> source(
        index, RecordProtoCodec(infer_schema(index, Dialect::automatic), {0, 1}, Dialects(Dialect::automatic, 1)));
    Batch batch(source.fields(), 1);
    auto scratch = source.make_scratch();
    source.fetch(std::array<std::uint64_t, 1>{0}, batch, *scratch);
    CHECK(std::memcmp(batch.columns[0].values.data(), values.data(), 64) == 0);
  }
}

void test_written_messages() {
  const std::vector<float> values{1, 2, 3, 4};
  const std::vector<std::int32_t> labels{-5, 6};
  auto fields = declare_fields(MessageForm::record, {{"values", Kind::fixed, DType::float32, {2}},
                                                     {"label_values", Kind::fixed, DType::int32, {}}});
  std::string out;
  append_records(
      out, {{fields[0], std::as_bytes(std::span(values)).data()}, {fields[1], std::as_bytes(std::span(labels)).data()}},
      0, 2, false);
  auto file = file_of(out);
  Index index({file}, {scan_recordio(*file, Dialect::automatic, false)});
  CHECK(index.records() == 2);
  const IndexedSource<RecordProtoCodec> source(
      index, RecordProtoCodec(infer_schema(index, Dialect::automatic), {1, 0}, Dialects(Dialect::automatic, 1)));
  Batch batch(source.fields(), 2);
  auto scratch = source.make_scratch();
  source.fetch(std::array<std::uint64_t, 2>{1, 0}, batch, *scratch);
  CHECK(batch.columns[0].fixed_row<std::int32_t>(0, 1)[0] == 6 &&
        batch.columns[0].fixed_row<std::int32_t>(1, 1)[0] == -5);
  CHECK(batch.columns[1].fixed_row<float>(0, 2)[1] == 4 && batch.columns[1].fixed_row<float>(1, 2)[0] == 1);
}

// --- TFRecord ---

std::string tfrecord(const std::string& data) {
  std::string out;
  append_tfrecord(out, bytes_of(data));
  return out;
}

void test_crc32c() {
  CHECK(crc32c(bytes_of("123456789")) == 0xe3069283);            // the check value of the catalogue of CRCs
  CHECK(crc32c(bytes_of(std::string(32, '\0'))) == 0x8a9136aa);  // RFC 3720, appendix B.4
  CHECK(crc32c(bytes_of(std::string(32, '\xff'))) == 0x62a8ab43);
  std::mt19937 random(3);
  for (const std::size_t size : {0, 1, 7, 8, 255, 767, 768, 769, 1536, 5000}) {
    std::string text(size, '\0');
    for (char& one : text) {
      one = static_cast<char>(random());
    }
    CHECK(crc32c(bytes_of(text)) == crc32c_plain(bytes_of(text)));
  }
}

void test_tfrecord() {
  const std::string good = tfrecord("first") + tfrecord("") + tfrecord("third record");
  for (const Access access : {Access::mapped, Access::read}) {
    const FileIndex index = scan_tfrecord(*file_of(good, access), false);
    CHECK((records_of(index) == Records{{0, 21}, {21, 16}, {37, 28}}));
    const std::uint64_t end = good.size();
    CHECK_THROWS(DataError, scan_tfrecord(*file_of(good + "1234567", access), false), CHECK(error.offset() == end),
                 CHECK(error.problem() == Problem::truncated));
    CHECK_THROWS(DataError, scan_tfrecord(*file_of(good + tfrecord("cut").substr(0, 18), access), false),
                 CHECK(error.offset() == end), CHECK(error.problem() == Problem::truncated));
    CHECK_THROWS(DataError, scan_tfrecord(*file_of(good + std::string(40, 'x'), access), false),
                 CHECK(error.offset() == end), CHECK(error.problem() == Problem::malformed));
    const FileIndex skipped = scan_tfrecord(*file_of(good + "0123456789" + good, access), true);
    CHECK(skipped.records() == 6 && skipped.damage().size() == 1 && skipped.damage()[0].bytes == 10);
  }
}

void test_tfrecord_sums() {
  std::string damaged = tfrecord("first") + tfrecord("second");
  damaged[21 + 12] = 'S';
  auto file = file_of(damaged);
  const Index index({file}, {scan_tfrecord(*file, false)});
  for (const bool check : {true, false}) {
    const IndexedSource<TfRecordCodec> source(index, TfRecordCodec(check));
    Batch batch(source.fields(), 2);
    auto scratch = source.make_scratch();
    if (check) {
      CHECK_THROWS(DataError, source.fetch(std::array<std::uint64_t, 2>{0, 1}, batch, *scratch),
                   CHECK(error.problem() == Problem::malformed), CHECK(error.record() == 1));
      CHECK(batch.rows == 1);
    } else {
      source.fetch(std::array<std::uint64_t, 2>{0, 1}, batch, *scratch);
      CHECK(batch.rows == 2 && std::memcmp(batch.columns[0].values.data(), "firstSecond", 11) == 0);
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  folder = arguments[1];
  check::run("whole records", test_whole_records);
  check::run("truncated", test_truncated);
  check::run("bad magic", test_bad_magic);
  check::run("parts out of order", test_parts_out_of_order);
  check::run("dmlc dialect", test_dmlc_dialect);
  check::run("plain dialect", test_plain_dialect);
  check::run("stream frames", test_stream_frames);
  check::run("dense messages", test_dense_messages);
  check::run("int32 messages", test_int32_messages);
  check::run("fields that are not given", test_fields_that_are_not_given);
  check::run("sparse messages", test_sparse_messages);
  check::run("mismatches", test_mismatches);
  check::run("malformed messages", test_malformed_messages);
  check::run("ragged messages", test_ragged_messages);
  check::run("messages in parts", test_messages_in_parts);
  check::run("written messages", test_written_messages);
  check::run("crc32c", test_crc32c);
  check::run("tfrecord", test_tfrecord);
  check::run("tfrecord sums", test_tfrecord_sums);
  return check::failures == 0 ? 0 : 1;
}

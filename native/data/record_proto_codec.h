// Takes `Record` messages in RecordIO frames, and `Example` messages, apart into columns.
#ifndef LAUNCHER_DATA_RECORD_PROTO_CODEC_H
#define LAUNCHER_DATA_RECORD_PROTO_CODEC_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "record_proto.h"
#include "recordio.h"

namespace launcher::data {

struct RecordSchema {
  MessageForm form = MessageForm::record;
  std::vector<TensorField> fields;
  // A record with a key that is none of these is refused; else (the user has named the fields) it is left out.
  bool complete = true;
};

class RecordProtoCodec {
 public:
  // All bytes of a record that are not values, and where the values are. Most records are like one before in that: then
  // copying is all there is to do.
  struct Skeleton {
    struct Piece {
      std::size_t offset, bytes;
    };
    struct Copy {
      Piece from;
      std::size_t field, column;  // the column may be none
      std::size_t row_bytes;      // of the column; 0: they are to be decoded
    };
    std::size_t bytes = 0;  // of the record
    std::vector<Piece> pieces;
    std::vector<std::byte> expected;  // what the pieces have, one after the other
    std::vector<Copy> copies;
  };
  struct State {
    std::array<Skeleton, 4> skeletons;  // by the record's length: records of a few lengths may take turns
    std::vector<Tensor> tensors;        // one for each field of the schema
    WalkMemory walk;
    Buffer joined;
  };

  // `columns`: the fields of the schema to give, in this order. The others are checked as well.
  RecordProtoCodec(RecordSchema schema, const std::vector<std::size_t>& columns, Dialects dialects);

  const std::vector<Field>& fields() const noexcept { return given_; }
  void decode(std::span<const std::byte> record, const Place& place, const File& file, std::size_t row, Batch& batch,
              State& state) const;

  // Where a payload is, for messages.
  struct Origin {
    const std::string& file;
    std::uint64_t record_offset, number;
    std::uint64_t payload_offset;  // kNowhere: it was joined of parts
  };
  // The same for a record without its frames. Throws DataError.
  void decode_payload(Chunk payload, const Origin& origin, std::size_t row, Batch& batch, State& state) const;

 private:
  bool predicted(Chunk payload, std::size_t row, Batch& batch, const Skeleton& skeleton) const;
  void walk(Chunk payload, const Origin& origin, std::size_t row, Batch& batch, State& state) const;
  void store(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
             std::size_t row) const;
  void store_fixed(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
                   std::size_t row) const;
  void store_sparse(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
                    std::size_t row) const;
  void store_ragged(const TensorField& field, const Tensor& tensor, Column* column, const Origin& origin,
                    std::size_t row) const;
  void remember(Chunk payload, const std::vector<Tensor>& tensors, Skeleton& skeleton) const;

  RecordSchema schema_;
  std::vector<Field> given_;
  std::vector<std::size_t> column_of_;  // of each field of the schema; kNoColumn
  bool predictable_ = true;             // all fields are fixed
  Dialects dialects_;
};

// The schema that a message has. Throws DataError.
RecordSchema infer_schema(MessageForm form, Chunk payload, const RecordProtoCodec::Origin& origin);
// The schema of the first Record of all, in RecordIO frames. Throws DataError, also when there is no record.
RecordSchema infer_schema(const Index& index, Dialect dialect);
// The first record of all, with its frame; `memory` holds it where the file is not mapped. Throws DataError, also when
// there is no record.
std::span<const std::byte> first_record(const Index& index, Buffer& memory);

}  // namespace launcher::data

#endif

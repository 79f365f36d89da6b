// The record of a stream that is looked at, as a source of one record: so that what changes a source's fields
// (transform.h) changes a stream's as well.
#ifndef LAUNCHER_DATA_STREAM_CURSOR_H
#define LAUNCHER_DATA_STREAM_CURSOR_H

#include <memory>

#include "source.h"
#include "stream_decoder.h"

namespace launcher::data {

std::shared_ptr<const Source> stream_cursor(std::shared_ptr<StreamDecoder> decoder);

// Gives each record to `cursor`, and takes its fields from `source`, which is made of it. Throws std::invalid_argument:
// `cursor` is no cursor.
std::shared_ptr<StreamDecoder> cursor_decoder(std::shared_ptr<const Source> cursor,
                                              std::shared_ptr<const Source> source);

}  // namespace launcher::data

#endif

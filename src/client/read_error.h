// Errors of reading, with where the bytes are bad. A value; pure.
#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <utility>

#include "base/status.h"

namespace sp {

struct ReadError {
  ReadError(Status status) : status(std::move(status)) {}  // NOLINT: every Status is a ReadError.
  ReadError(Status status, uint32_t rank, std::optional<uint64_t> block, bool state_modified)
      : status(std::move(status)), rank(rank), block(block), state_modified(state_modified) {}

  Status status;
  // With kCorrupt: whose shard, and its first bad block; no block: the checksum list itself.
  std::optional<uint32_t> rank;
  std::optional<uint64_t> block;
  bool state_modified = false;  // Some target was written to already.
};

template <typename T>
using ReadResult = std::expected<T, ReadError>;

}  // namespace sp

// Reading back: whether an object is what was sealed (I-23). Thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"
#include "durable/object_store.h"

namespace sp {

// OK when the object has `size_bytes` and each of its blocks of kBlockBytes the checksum in `block_crcs`. kCorrupt, naming the object and the first
// block that differs, when not; kInvalidArgument when there are not as many checksums as blocks; kNoSpace when there is no memory for the window
// of 8 MiB through which it is read; otherwise what the store said. `limits.progress` gets the bytes that were compared, on the calling thread.
Status VerifyObject(ObjectStore& store, const std::string& key, uint64_t size_bytes, std::span<const uint32_t> block_crcs, const CallLimits& limits);

}  // namespace sp

// The bytes of a lease, read through the extents' descriptors. Never through a mapping: whatever a client does to the memory that it
// shares with us, a read fails or gives other bytes, but nothing faults (I-26).
#pragma once

#include <memory>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "os/fd.h"

namespace sp {

// Shared by the worker's table and the jobs that use the extent: the last one closes the descriptor.
using SharedFd = std::shared_ptr<const Fd>;

// Extents in order, each `extent_bytes` long; byte i of the lease is byte i % extent_bytes of extent i / extent_bytes. Thread-safe.
class ExtentSet {
 public:
  ExtentSet(std::vector<SharedFd> extents, uint64_t extent_bytes) : extents_(std::move(extents)), extent_bytes_(extent_bytes) {}

  uint64_t size_bytes() const { return extents_.size() * extent_bytes_; }
  // kProtocol when the range is not within the extents.
  Status Read(uint64_t offset, MutableByteSpan out) const;

 private:
  std::vector<SharedFd> extents_;
  uint64_t extent_bytes_;
};

}  // namespace sp

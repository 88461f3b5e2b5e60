// The extents that the keeper holds: sealed, pre-faulted memfds by id. Owned by the keeper's loop.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "os/fd.h"
#include "os/mapping.h"

namespace sp {

enum class LockMemory {
  kOff,
  kBestEffort,  // Warns once when the system does not allow it.
  kRequired,    // An extent that cannot be locked is not made.
};

// A memfd with all its pages, size-sealed. kNoSpace, before anything is touched, when the system has less than
// `size_bytes` and a reserve to give: running into the limit could end in an out-of-memory kill instead of an error.
Result<Fd> MakeKeptMemory(const char* name, uint64_t size_bytes);

class KeeperExtents {
 public:
  // Consecutive ids, at most kMaxFdsPerMessage. The descriptors stay the holder's.
  struct Run {
    uint32_t first_id;
    std::vector<int> fds;
  };

  KeeperExtents(uint64_t extent_bytes, LockMemory lock) : extent_bytes_(extent_bytes), lock_(lock) {}

  // Takes as long as faulting in one extent takes. kNoSpace; kDenied or kNoSpace when locking is required and refused.
  // The id is new.
  Status Create(uint32_t id);
  bool Drop(uint32_t id);  // False: there is no such extent.

  bool Has(uint32_t id) const { return extents_.contains(id); }
  bool HasAnyIn(uint64_t first_id, uint64_t end_id) const;
  size_t size() const { return extents_.size(); }
  int fd(uint32_t id) const { return extents_.at(id).fd.get(); }
  std::vector<Run> Runs() const;

 private:
  struct Extent {
    Fd fd;
    Mapping locked;  // Invalid unless memory is locked: only mapped pages can be.
  };

  uint64_t extent_bytes_;
  LockMemory lock_;
  bool warned_ = false;
  std::map<uint32_t, Extent> extents_;
};

}  // namespace sp

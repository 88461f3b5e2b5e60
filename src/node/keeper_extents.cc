#include "node/keeper_extents.h"

#include "base/check.h"
#include "node/keeper_log.h"
#include "os/memfd.h"
#include "os/system.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

// Left to the worker and everybody else in the same memory limit.
constexpr uint64_t kReserveBytes = 64ULL << 20;

}  // namespace

Result<Fd> MakeKeptMemory(const char* name, uint64_t size_bytes) {
  SP_ASSIGN_OR_RETURN(const uint64_t available, AvailableMemoryBytes());
  if (available < kReserveBytes || available - kReserveBytes < size_bytes) {
    return Error(StatusCode::kNoSpace, std::to_string(available) + " bytes of memory are available, " +
                                           std::to_string(size_bytes) + " and a reserve of " +
                                           std::to_string(kReserveBytes) + " are needed");
  }
  SP_ASSIGN_OR_RETURN(Fd fd, CreateMemfd(name, size_bytes));
  SP_RETURN_IF_ERROR(Prefault(fd.get(), size_bytes));
  SP_RETURN_IF_ERROR(SealSize(fd.get()));
  return fd;
}

Status KeeperExtents::Create(uint32_t id) {
  SP_CHECK(!Has(id));
  Extent extent;
  SP_ASSIGN_OR_RETURN(extent.fd, MakeKeptMemory("safepoint-extent", extent_bytes_));
  if (lock_ != LockMemory::kOff) {
    SP_ASSIGN_OR_RETURN(Mapping mapping, Mapping::MapShared(extent.fd.get(), extent_bytes_, MapMode::kReadOnly, true));
    const Status locked = mapping.Lock();
    if (locked.ok()) {
      extent.locked = std::move(mapping);
    } else if (lock_ == LockMemory::kRequired) {
      return locked;
    } else if (!warned_) {
      warned_ = true;
      KeeperLog("warn", "memory_not_locked", {{"cause", locked}, {"first_id", id}});
    }
  }
  extents_.emplace(id, std::move(extent));
  return {};
}

bool KeeperExtents::Drop(uint32_t id) { return extents_.erase(id) == 1; }

bool KeeperExtents::HasAnyIn(uint64_t first_id, uint64_t end_id) const {
  const auto found = extents_.lower_bound(static_cast<uint32_t>(first_id));
  return found != extents_.end() && found->first < end_id;
}

std::vector<KeeperExtents::Run> KeeperExtents::Runs() const {
  std::vector<Run> runs;
  for (const auto& [id, extent] : extents_) {
    if (runs.empty() || runs.back().fds.size() == kMaxFdsPerMessage ||
        runs.back().first_id + runs.back().fds.size() != id) {
      runs.push_back({.first_id = id, .fds = {}});
    }
    runs.back().fds.push_back(extent.fd.get());
  }
  return runs;
}

}  // namespace sp

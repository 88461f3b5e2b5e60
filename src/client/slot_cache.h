// Mapped slots of this process: mapped once, used save after save. Thread-safe.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "client/fork_guard.h"
#include "client/session.h"
#include "os/mapping.h"

namespace sp {

// A slot of this session, writable. In a forked child the range does not exist; the object then leaves the address range alone.
class MappedSlot {
 public:
  MappedSlot(uint64_t slot, SlotMapping mapping) : slot_(slot), number_(NextNumber()), mapping_(std::make_unique<SlotMapping>(std::move(mapping))) {}
  MappedSlot(const MappedSlot&) = delete;
  MappedSlot& operator=(const MappedSlot&) = delete;
  ~MappedSlot() {
    if (!guard_.in_owner()) static_cast<void>(mapping_.release());
  }

  uint64_t slot() const { return slot_; }
  // Of this mapping, never used twice in a process: a later one at the same address has another.
  uint64_t number() const { return number_; }
  MutableByteSpan bytes() const { return mapping_->mutable_bytes(); }

 private:
  static uint64_t NextNumber();

  uint64_t slot_;
  uint64_t number_;
  ForkGuard guard_;
  std::unique_ptr<SlotMapping> mapping_;
};

class SlotCache {
 public:
  // Owners of a slot: this cache, and the leases and transfers that use it; the last one unmaps it.
  using Handle = std::shared_ptr<MappedSlot>;

  // The slot, mapped now unless it is already. `origin`: where the slot's id is from; slots of another boot are dropped.
  Result<Handle> Get(Session& session, const Origin& origin, uint64_t slot, uint32_t extents, Nanos deadline);
  void Forget(std::span<const uint64_t> slots);
  void Clear();
  size_t size() const;
  std::vector<uint64_t> mappings() const;

 private:
  mutable std::mutex mutex_;  // Guards what follows. Held while mapping, so that two threads do not map one slot twice.
  Id128 boot_;
  std::map<uint64_t, Handle> slots_;
};

}  // namespace sp

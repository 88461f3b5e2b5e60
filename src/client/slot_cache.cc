#include "client/slot_cache.h"

#include <atomic>

#include "client/extents.h"

namespace sp {

uint64_t MappedSlot::NextNumber() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

Result<SlotCache::Handle> SlotCache::Get(Session& session, const Origin& origin, uint64_t slot, uint32_t extents, Nanos deadline) {
  std::lock_guard lock(mutex_);
  if (boot_ != origin.boot) {
    slots_.clear();
    boot_ = origin.boot;
  }
  if (const auto found = slots_.find(slot); found != slots_.end()) {
    if (found->second->bytes().size() == extents * origin.extent_bytes) return found->second;
    return Error(StatusCode::kProtocol, "slot " + std::to_string(slot) + " has changed its size to " + std::to_string(extents) + " extents");
  }
  FetchExtentsRequest request;
  request.slot = slot;
  SP_ASSIGN_OR_RETURN(const std::vector<Fd> fds, FetchExtents(session, request, extents, origin, deadline));
  std::vector<int> numbers;
  for (const Fd& fd : fds) numbers.push_back(fd.get());
  SP_ASSIGN_OR_RETURN(SlotMapping mapping, SlotMapping::Map(numbers, origin.extent_bytes, MapMode::kReadWrite));
  const Handle mapped = std::make_shared<MappedSlot>(slot, std::move(mapping));
  slots_.emplace(slot, mapped);
  return mapped;
}

void SlotCache::Forget(std::span<const uint64_t> slots) {
  std::lock_guard lock(mutex_);
  for (uint64_t slot : slots) slots_.erase(slot);
}

void SlotCache::Clear() {
  std::lock_guard lock(mutex_);
  slots_.clear();
}

std::vector<uint64_t> SlotCache::mappings() const {
  std::lock_guard lock(mutex_);
  std::vector<uint64_t> numbers;
  for (const auto& [slot, mapped] : slots_) numbers.push_back(mapped->number());
  return numbers;
}

size_t SlotCache::size() const {
  std::lock_guard lock(mutex_);
  return slots_.size();
}

}  // namespace sp

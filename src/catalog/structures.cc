#include "catalog/structures.h"

#include "base/sha256.h"

namespace sp {

Status Structures::Add(const Hash256& hash, const std::shared_ptr<PackedIndex>& index, uint64_t budget) {
  if (auto it = known_.find(hash); it != known_.end() && it->second.index) return {};
  ShareNames(*index);
  if (!MakeRoom(*index, budget)) {
    return Status(StatusCode::kLimit, "the structures of this user's open steps take " + std::to_string(cost_) + " of " + std::to_string(budget) +
                                          " bytes of the daemon's memory, and one more needs " + std::to_string(index->cost() + CostOfNames(*index)) +
                                          ": save fewer tensors in fewer steps at once, or have the daemon's setting header_max raised");
  }
  Known& known = known_[hash];
  known.data_bytes = index->data_bytes;
  known.checked = false;
  known.used = ++uses_;
  Keep(known, index);
  return {};
}

std::optional<uint64_t> Structures::DataBytes(const Hash256& hash) const {
  const auto it = known_.find(hash);
  return it == known_.end() ? std::nullopt : std::optional(it->second.data_bytes);
}

bool Structures::IsKept(const Hash256& hash) const {
  const auto it = known_.find(hash);
  return it != known_.end() && it->second.index;
}

std::optional<Status> Structures::Coverage(const std::vector<Hash256>& ranks) {
  std::string hashes;
  std::vector<const PackedIndex*> indexes;
  for (const Hash256& hash : ranks) {
    hashes.append(AsText(hash.span()));
    if (auto it = known_.find(hash); it != known_.end() && it->second.index) indexes.push_back(it->second.index.get());
  }
  const Hash256 set = Sha256(AsBytes(hashes));
  auto result = coverage_.find(set);
  if (result == coverage_.end()) {
    if (indexes.size() < ranks.size()) return std::nullopt;
    if (coverage_.size() >= 64) coverage_.clear();  // What is still needed is checked again.
    result = coverage_.emplace(set, CheckCoverage(indexes)).first;
  }
  for (const Hash256& hash : ranks) {
    const auto it = known_.find(hash);
    if (it == known_.end()) continue;
    it->second.checked = true;
    it->second.used = ++uses_;
  }
  return result->second;
}

void Structures::Trim(const std::set<Hash256>& live, const std::set<Hash256>& open) {
  for (auto it = known_.begin(); it != known_.end();) {
    it->second.checked = it->second.checked || !open.contains(it->first);
    if (live.contains(it->first)) {
      ++it;
      continue;
    }
    Drop(it->second);
    it = known_.erase(it);
  }
}

void Structures::ShareNames(PackedIndex& index) {
  for (const auto& [hash, known] : known_) {
    if (!known.index || known.index->expected == index.expected || *known.index->expected != *index.expected) continue;
    index.expected = known.index->expected;
    return;
  }
}

uint64_t Structures::CostOfNames(const PackedIndex& index) const { return names_.contains(index.expected.get()) ? 0 : index.expected->cost(); }

void Structures::Keep(Known& known, const std::shared_ptr<PackedIndex>& index) {
  cost_ += index->cost() + CostOfNames(*index);
  ++names_[index->expected.get()];
  known.index = index;
}

void Structures::Drop(Known& known) {
  if (!known.index) return;
  if (const auto names = names_.find(known.index->expected.get()); --names->second == 0) names_.erase(names);
  cost_ -= known.index->cost() + CostOfNames(*known.index);
  known.index = nullptr;
}

bool Structures::MakeRoom(const PackedIndex& index, uint64_t budget) {
  while (cost_ + index.cost() + CostOfNames(index) > budget) {
    Known* oldest = nullptr;
    for (auto& [hash, known] : known_) {
      if (known.index && known.checked && (!oldest || known.used < oldest->used)) oldest = &known;
    }
    if (!oldest) return false;
    Drop(*oldest);
  }
  return true;
}

}  // namespace sp

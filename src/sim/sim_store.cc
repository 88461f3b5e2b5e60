#include "sim/sim_store.h"

#include <algorithm>
#include <tuple>

#include "format/manifest.h"
#include "sim/model.h"

namespace sp::sim {
namespace {

constexpr size_t kStepsListed = 16;  // As node/drainer.cc says.
constexpr size_t kFaultsMax = 16;

Status Down() { return Status(StatusCode::kUnavailable, "503"); }

std::string MarkOf(const StepName& step) { return step.Prefix() + std::string(kDeletingName); }

}  // namespace

void SimStore::SpoilNext(StoreFault fault, size_t requests) {
  for (size_t i = 0; i < requests && faults_.size() < kFaultsMax; ++i) faults_.push_back(fault);
}

std::optional<StoreFault> SimStore::Take() {
  if (health_ != StoreHealth::kUp) return StoreFault::kFails;
  if (faults_.empty()) return std::nullopt;
  const StoreFault fault = faults_.front();
  faults_.pop_front();
  return fault;
}

Result<bool> SimStore::Write(const std::string& key, Object object) {
  const std::optional<StoreFault> fault = Take();
  if (fault == StoreFault::kFails) return std::unexpected(Down());
  if (fault == StoreFault::kArrivesLate) {
    WriteLate(key, std::move(object));
    return Error(StatusCode::kDeadline, "no answer in time");
  }
  const bool flips = fault == StoreFault::kFlipsStored && key.ends_with(".safetensors") && !objects_.contains(key);
  if (flips && verifies_) return Error(StatusCode::kCorrupt, "the store got other bytes than were sent");
  const bool made = Keep(key, std::move(object), flips);
  if (fault == StoreFault::kAnswerLost) return std::unexpected(Down());
  return made;
}

Result<SimStore::Object> SimStore::Read(const std::string& key) {
  const std::optional<StoreFault> fault = Take();
  if (fault && fault != StoreFault::kFlipsRead && fault != StoreFault::kFlipsStored) return std::unexpected(Down());
  const auto it = objects_.find(key);
  if (it == objects_.end()) return Error(StatusCode::kNotFound, key);
  Object object = it->second.object;
  const bool flipped = it->second.flipped || (fault && !object.words.empty());
  if (flipped) object.words.back() ^= 1;
  return object;
}

Result<std::vector<StoredStep>> SimStore::List(const NamespaceKey& ns) {
  const std::optional<StoreFault> fault = Take();
  if (fault && fault != StoreFault::kFlipsRead && fault != StoreFault::kFlipsStored) return std::unexpected(Down());
  return Steps(ns);
}

Result<SimStore::Listing> SimStore::ListAll(const NamespaceKey& ns) {
  const std::optional<StoreFault> fault = Take();
  if (fault && fault != StoreFault::kFlipsRead && fault != StoreFault::kFlipsStored) return std::unexpected(Down());
  Listing listing{AllSteps(ns), {}};
  for (const auto& [key, kept] : objects_) {
    const auto object = ParseStepObjectKey(key);
    if (!object || object->step.ns != ns.ns || object->file != kDeletingName || IsWhole(object->step.attempt)) continue;
    listing.remains.push_back(object->step);
  }
  return listing;
}

Result<std::vector<std::string>> SimStore::ListKeys(const StepName& step) {
  const std::optional<StoreFault> fault = Take();
  if (fault && fault != StoreFault::kFlipsRead && fault != StoreFault::kFlipsStored) return std::unexpected(Down());
  std::vector<std::string> keys;
  for (auto it = objects_.lower_bound(step.Prefix()); it != objects_.end() && it->first.starts_with(step.Prefix()); ++it) keys.push_back(it->first);
  return keys;
}

Status SimStore::Delete(const std::string& key) {
  const std::optional<StoreFault> fault = Take();
  if (fault == StoreFault::kFails) return Down();
  if (fault == StoreFault::kArrivesLate) {
    DeleteLate(key);
    return Status(StatusCode::kDeadline, "no answer in time");
  }
  LetGo(key);
  return fault == StoreFault::kAnswerLost ? Down() : Status();
}

void SimStore::Name(const StepName& step) {
  named_.insert(step);
  std::erase_if(late_, [&](auto& late) {
    const bool written = late.second && late.first.starts_with(step.Prefix());
    if (written) Keep(late.first, std::move(*late.second), false);
    return written;
  });
}

// docs/formats/store.md, "Deleting".
void SimStore::LetGo(const std::string& key) {
  if (!objects_.contains(key)) return;
  const auto object = ParseStepObjectKey(key);
  Require(object && named_.contains(object->step), "I-24: something was deleted that no order named");
  const StepName& step = object->step;
  if (object->file == kDeletingName) {
    const auto next = objects_.lower_bound(step.Prefix());
    Require(next->first == key && (std::next(next) == objects_.end() || !std::next(next)->first.starts_with(step.Prefix())),
            "I-24: the mark of a deletion went before the step did");
  } else if (const auto whole = steps_.find(step.attempt); whole != steps_.end()) {
    Require(objects_.contains(MarkOf(step)), "I-24: a deletion has left no mark");
    Require(ParseManifestKey(key).has_value(), "I-23: an object of a step went before its manifest");
    const AttemptKey& of = whole->second.records.front().key;
    Require(AllSteps({of.uid, of.ns}).front() != whole->second, "I-14: the newest step of the store was deleted");
    steps_.erase(whole);
  }
  objects_.erase(key);
}

bool SimStore::Keep(const std::string& key, Object object, bool flipped) {
  const auto there = objects_.find(key);
  if (there != objects_.end()) {
    // Of a lineage the first writer's counts: a restarted daemon may know more of it.
    Require(key.ends_with("/lineage.json") || there->second.object == object, "I-24: one key was to have two contents");
    return false;
  }
  if (const auto name = ParseManifestKey(key)) {
    Require(!objects_.contains(MarkOf(*name)), "I-24: a manifest was made of a step that is being deleted");
    AddStep(*name, object.text);
  }
  objects_[key] = Kept{std::move(object), flipped};
  return true;
}

void SimStore::AddStep(const StepName& name, const std::string& manifest) {
  StoredStep step;
  const auto records = ParseManifest(manifest);
  Require(records.has_value() && StepPrefix(records->front().key) == name.Prefix(), "I-3: a manifest that is not that of its key");
  step.records = *records;
  for (const SealRecord& record : step.records) Require(HasShard(record), "I-23: a manifest was made before all its shards were in the store");
  const auto lineage = objects_.find(name.Prefix() + "lineage.json");
  Require(lineage != objects_.end(), "I-23: a manifest was made before its lineage");
  const auto generations = ParseLineage(lineage->second.object.text);
  Require(generations.has_value() && generations->front().generation == step.records.front().key.generation, "I-6: a step with another's lineage");
  step.lineage = *generations;
  steps_.emplace(name.attempt, std::move(step));
}

void SimStore::DeliverLate() {
  for (auto& [key, object] : std::exchange(late_, {})) {
    if (object) Keep(key, std::move(*object), false);
    else LetGo(key);
  }
}

void SimStore::Heal() {
  health_ = StoreHealth::kUp;
  faults_.clear();
  DeliverLate();
}

bool SimStore::HasShard(const SealRecord& record) const {
  const auto shard = objects_.find(ShardObjectKey(record)), checksums = objects_.find(ChecksumsObjectKey(record));
  return shard != objects_.end() && checksums != objects_.end() && !shard->second.flipped && BlockRoot(shard->second.object.words) == record.block_root &&
         checksums->second.object == shard->second.object;
}

std::vector<StoredStep> SimStore::Steps(const NamespaceKey& ns) const {
  std::vector<StoredStep> steps = AllSteps(ns);
  if (steps.size() > kStepsListed) steps.resize(kStepsListed);
  return steps;
}

std::vector<StoredStep> SimStore::AllSteps(const NamespaceKey& ns) const {
  std::vector<StoredStep> steps;
  for (const auto& [attempt, step] : steps_) {
    const AttemptKey& key = step.records.front().key;
    if (key.uid == ns.uid && key.ns == ns.ns) steps.push_back(step);
  }
  std::ranges::sort(steps, std::ranges::greater(), [](const StoredStep& s) {
    const AttemptKey& key = s.records.front().key;
    return std::tuple(key.generation, key.step, key.try_number);
  });
  return steps;
}

}  // namespace sp::sim

#include "sim/sim_drainer.h"

#include <algorithm>

#include "format/manifest.h"
#include "sim/model.h"

namespace sp::sim {
namespace {

// As node/drainer.cc and node/node_core_durable.cc say.
constexpr Nanos kPutWithin = 60 * kNanosPerSecond;
constexpr Nanos kListWithin = 300 * kNanosPerSecond;
constexpr Nanos kStalled = 30 * kNanosPerSecond;
constexpr Nanos kListingHolds = kNanosPerSecond;
constexpr Nanos kAnswerWithin = 20 * kNanosPerSecond;

Status Corrupt(const char* what) { return Status(StatusCode::kCorrupt, what); }

}  // namespace

const Id128* SimDrainer::Job::Attempt() const {
  if (const auto* shard = std::get_if<action::StoreShard>(&order)) return &shard->record.attempt;
  if (const auto* manifest = std::get_if<action::StoreManifest>(&order)) return &manifest->attempt;
  return nullptr;
}

void SimDrainer::Add(Job job) {
  Require(store_ != nullptr, "I-23: an order to a durable tier that is not there");
  job.deadline = job.began + (job.Attempt() ? kPutWithin : kListWithin);
  if (const Id128* attempt = job.Attempt()) heard_[*attempt].progressed_at = job.began;
  jobs_.push_back(std::move(job));
}

void SimDrainer::Do(Nanos now, const action::StoreShard& order, std::vector<MemoryRef> memory) {
  Add({.order = order, .memory = std::move(memory), .began = now});
}
void SimDrainer::Do(Nanos now, const action::StoreManifest& order) { Add({.order = order, .memory = {}, .began = now}); }
void SimDrainer::Do(Nanos now, const action::ListStore& order) { Add({.order = order, .memory = {}, .began = now}); }

std::vector<size_t> SimDrainer::Ready(Nanos now) const {
  std::vector<size_t> ready;
  for (size_t i = 0; i < jobs_.size(); ++i) {
    if (store_->health() != StoreHealth::kHangs || now >= jobs_[i].deadline) ready.push_back(i);
  }
  return ready;
}

std::optional<Event> SimDrainer::Run(Nanos now, size_t index) {
  const size_t at = Ready(now)[index];
  Job& job = jobs_[at];
  Answer answer;
  const auto& order = job.order;
  if (now >= job.deadline) {
    if (store_->health() == StoreHealth::kHangs) SendLate(job);
    answer = std::visit([&](const auto& o) { return End(now, o, Status(StatusCode::kDeadline, "no answer in time")); }, order);
  } else {
    answer = std::visit([&](const auto& o) { return Request(now, job, o); }, order);
    ++job.answered;
  }
  if (answer && !std::holds_alternative<event::ShardProgress>(*answer)) jobs_.erase(jobs_.begin() + static_cast<ptrdiff_t>(at));
  return answer;
}

std::optional<Event> SimDrainer::RunListing(Nanos now) {
  const std::vector<size_t> ready = Ready(now);
  for (size_t i = 0; i < ready.size(); ++i) {
    if (std::holds_alternative<action::ListStore>(jobs_[ready[i]].order)) return Run(now, i);
  }
  return std::nullopt;
}

// What memory has of the shard, if it is what was sealed.
std::optional<std::vector<uint32_t>> SimDrainer::Compare(const Job& job, const SealRecord& record) const {
  const size_t count = ExtentsFor(record.length_bytes, extent_bytes_);
  if (job.memory.size() < count || RootOf(job.memory, count) != record.block_root) return std::nullopt;
  return WordsOf(job.memory, count);
}

// As durable/step_store.cc: the shard, unless it is there; read back what the store has not compared; then its checksums.
SimDrainer::Answer SimDrainer::Request(Nanos now, Job& job, const action::StoreShard& order) {
  const SealRecord& record = order.record;
  if (job.answered == 0) {
    auto words = Compare(job, record);
    if (!words) return End(now, order, Corrupt("memory differs from its seal"));
    job.words = std::move(*words);
    const Result<bool> made = store_->Write(ShardObjectKey(record), {job.words, ""});
    if (!made) return End(now, order, made.error());
    job.written = *made;
    heard_[record.attempt].progressed_at = now;
    return event::ShardProgress{record.Identity(), record.length_bytes};
  }
  const bool read_back = !job.written || !store_->verifies_checksums();
  if (job.answered == 1 && read_back) {
    const auto there = store_->Read(ShardObjectKey(record));
    if (!there) return End(now, order, there.error());
    if (BlockRoot(there->words) != record.block_root) return End(now, order, Corrupt("the store has other bytes"));
    return std::nullopt;
  }
  const Result<bool> made = store_->Write(ChecksumsObjectKey(record), {job.words, ""});
  if (!made) return End(now, order, made.error());
  return End(now, order, Status(), read_back);
}

SimDrainer::Answer SimDrainer::Request(Nanos now, Job& job, const action::StoreManifest& order) {
  const AttemptKey& key = order.step.records.front().key;
  const Result<bool> made = job.answered == 0 ? store_->Write(LineageObjectKey(key), {{}, MakeLineage(order.step.lineage)})
                                              : store_->Write(ManifestObjectKey(key), {{}, MakeManifest(order.step.records)});
  if (!made) return End(now, order, made.error());
  if (job.answered == 0) return std::nullopt;
  return End(now, order, Status());
}

SimDrainer::Answer SimDrainer::Request(Nanos now, Job&, const action::ListStore& order) {
  Result<std::vector<StoredStep>> steps = store_->List({order.uid, order.ns});
  return steps ? End(now, order, Status(), std::move(*steps)) : End(now, order, steps.error());
}

SimDrainer::Answer SimDrainer::End(Nanos now, const action::StoreShard& order, const Status& status, bool read_back) {
  Hear(now, order.record.attempt, status);
  return event::ShardStored{order.record.Identity(), status, read_back};
}

SimDrainer::Answer SimDrainer::End(Nanos now, const action::StoreManifest& order, const Status& status) {
  Hear(now, order.attempt, status);
  return event::ManifestStored{order.attempt, status};
}

SimDrainer::Answer SimDrainer::End(Nanos now, const action::ListStore& order, const Status& status, std::vector<StoredStep> steps) {
  if (!status.ok()) list_failed_at_[{order.uid, order.ns}] = now;
  return event::StoreListed{order.uid, order.ns, status, std::move(steps), {}};
}

void SimDrainer::Hear(Nanos now, const Id128& attempt, const Status& status) {
  Heard& heard = heard_[attempt];
  heard.failures = status.ok() ? 0 : heard.failures + 1;
  if (status.ok()) heard.progressed_at = now;
}

// It was sent, and nobody waits for it any more.
void SimDrainer::SendLate(const Job& job) {
  if (const auto* shard = std::get_if<action::StoreShard>(&job.order); shard && job.answered == 0) {
    if (auto words = Compare(job, shard->record)) store_->WriteLate(ShardObjectKey(shard->record), {std::move(*words), ""});
  } else if (const auto* manifest = std::get_if<action::StoreManifest>(&job.order); manifest && job.answered == 1) {
    store_->WriteLate(ManifestObjectKey(manifest->step.records.front().key), {{}, MakeManifest(manifest->step.records)});
  }
}

void SimDrainer::WorkerDied() {
  jobs_.clear();
  heard_.clear();
  list_failed_at_.clear();
}

bool SimDrainer::IsInTrouble(Nanos now, const Id128& attempt) const {
  const auto heard = heard_.find(attempt);
  if (heard == heard_.end()) return false;
  const auto of_attempt = [&](const Job& job) { return job.Attempt() && *job.Attempt() == attempt; };
  const bool sent = std::any_of(jobs_.begin(), jobs_.end(), of_attempt);
  return heard->second.failures > 0 || (sent && now >= heard->second.progressed_at + kStalled);
}

bool SimDrainer::IsUnlistable(Nanos now, const NamespaceKey& ns) const {
  const auto failed = list_failed_at_.find(ns);
  if (failed != list_failed_at_.end() && now < failed->second + kListingHolds) return true;
  return std::any_of(jobs_.begin(), jobs_.end(), [&](const Job& job) {
    const auto* order = std::get_if<action::ListStore>(&job.order);
    return order && NamespaceKey{order->uid, order->ns} == ns && now >= job.began + kAnswerWithin;
  });
}

}  // namespace sp::sim

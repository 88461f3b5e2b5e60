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
void SimDrainer::Do(Nanos now, const action::PlanRetention& order) { Add({.order = order, .memory = {}, .began = now}); }
void SimDrainer::Do(Nanos now, const action::DeleteSteps& order) {
  Add({.order = order, .memory = {}, .began = now});
  for (const StepName& step : order.steps) store_->Name(step);
}

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
    const Status late(StatusCode::kDeadline, "no answer in time");
    if (const auto* deletion = std::get_if<action::DeleteSteps>(&order)) answer = End(now, *deletion, late, std::move(job.gone));
    else answer = std::visit([&](const auto& o) { return End(now, o, late); }, order);
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

// Its shards are still there, and no mark; the lineage; the manifest.
SimDrainer::Answer SimDrainer::Request(Nanos now, Job& job, const action::StoreManifest& order) {
  const AttemptKey& key = order.step.records.front().key;
  if (job.answered == 0) {
    const auto keys = store_->ListKeys({key.ns, key.step, order.attempt});
    if (!keys) return End(now, order, keys.error());
    const auto has = [&](const std::string& wanted) { return std::ranges::find(*keys, wanted) != keys->end(); };
    // Of one daemon, nobody else deletes anything.
    Require(!has(StepPrefix(key) + std::string(kDeletingName)), "I-24: a step is being deleted that is on its way to the store");
    for (const SealRecord& record : order.step.records) {
      if (!has(ShardObjectKey(record)) || !has(ChecksumsObjectKey(record))) return End(now, order, Status(StatusCode::kIncomplete, "a shard has gone"));
    }
    return std::nullopt;
  }
  const Result<bool> made = job.answered == 1 ? store_->Write(LineageObjectKey(key), {{}, MakeLineage(order.step.lineage)})
                                              : store_->Write(ManifestObjectKey(key), {{}, MakeManifest(order.step.records)});
  if (!made) return End(now, order, made.error());
  if (job.answered == 1) return std::nullopt;
  return End(now, order, Status());
}

SimDrainer::Answer SimDrainer::Request(Nanos now, Job&, const action::ListStore& order) {
  Result<std::vector<StoredStep>> steps = store_->List({order.uid, order.ns});
  return steps ? End(now, order, Status(), std::move(*steps)) : End(now, order, steps.error());
}

// As durable/retention.cc, with a rule that knows only `keep_last`.
SimDrainer::Answer SimDrainer::Request(Nanos now, Job&, const action::PlanRetention& order) {
  const auto listing = store_->ListAll({order.uid, order.ns});
  if (!listing) return End(now, order, listing.error());
  std::vector<Departure> departures;
  for (const StepName& step : listing->remains) departures.push_back({step, "its deletion was cut short"});
  for (size_t i = keep_last_; i < listing->steps.size(); ++i) {
    const SealRecord& first = listing->steps[i].records.front();
    departures.push_back({{first.key.ns, first.key.step, first.attempt}, "not among the newest"});
  }
  return End(now, order, Status(), std::move(departures));
}

// As durable/step_store.cc: a mark, the manifest, what else is there, the mark. A step that cannot be deleted keeps no other one.
SimDrainer::Answer SimDrainer::Request(Nanos now, Job& job, const action::DeleteSteps& order) {
  const StepName& step = order.steps[job.at];
  const std::string mark = step.Prefix() + std::string(kDeletingName);
  Status status;
  bool done = false;
  switch (job.asked++) {
    case 0:
      if (const auto made = store_->Write(mark, {{}, "{}"}); !made) status = made.error();
      break;
    case 1: status = store_->Delete(step.Prefix() + "manifest.json"); break;
    case 2: {
      auto keys = store_->ListKeys(step);
      if (!keys) status = keys.error();
      else job.keys = std::move(*keys);
      std::erase(job.keys, mark);
      break;
    }
    default:
      done = job.keys.empty();
      status = store_->Delete(done ? mark : job.keys.front());
      if (!done) job.keys.erase(job.keys.begin());
      break;
  }
  if (status.ok() && !done) return std::nullopt;
  if (status.ok()) job.gone.push_back(step);
  else if (job.failed.ok()) job.failed = status;
  job.asked = 0;
  if (++job.at < order.steps.size()) return std::nullopt;
  return End(now, order, job.failed, std::move(job.gone));
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

SimDrainer::Answer SimDrainer::End(Nanos, const action::PlanRetention& order, const Status& status, std::vector<Departure> departures) {
  if (status.ok()) retention_failed_.erase({order.uid, order.ns});
  else retention_failed_.insert({order.uid, order.ns});
  return event::RetentionPlanned{order.uid, order.ns, status, std::move(departures)};
}

SimDrainer::Answer SimDrainer::End(Nanos, const action::DeleteSteps& order, const Status& status, std::vector<StepName> gone) {
  if (!status.ok()) retention_failed_.insert({order.uid, order.ns});
  deleted_ += gone.size();
  return event::StepsDeleted{order.uid, order.ns, status, std::move(gone)};
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
  } else if (const auto* manifest = std::get_if<action::StoreManifest>(&job.order); manifest && job.answered == 2) {
    store_->WriteLate(ManifestObjectKey(manifest->step.records.front().key), {{}, MakeManifest(manifest->step.records)});
  } else if (const auto* deletion = std::get_if<action::DeleteSteps>(&job.order); deletion && job.asked == 1) {
    store_->DeleteLate(deletion->steps[job.at].Prefix() + "manifest.json");
  }
}

void SimDrainer::WorkerDied() {
  jobs_.clear();
  heard_.clear();
  list_failed_at_.clear();
  retention_failed_.clear();
}

bool SimDrainer::IsInTrouble(Nanos now, const Id128& attempt) const {
  const auto heard = heard_.find(attempt);
  if (heard == heard_.end()) return false;
  const auto of_attempt = [&](const Job& job) { return job.Attempt() && *job.Attempt() == attempt; };
  const bool sent = std::any_of(jobs_.begin(), jobs_.end(), of_attempt);
  return heard->second.failures > 0 || (sent && now >= heard->second.progressed_at + kStalled);
}

bool SimDrainer::IsRetaining() const {
  return !retention_failed_.empty() || std::ranges::any_of(jobs_, [](const Job& job) {
    return std::holds_alternative<action::PlanRetention>(job.order) || std::holds_alternative<action::DeleteSteps>(job.order);
  });
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

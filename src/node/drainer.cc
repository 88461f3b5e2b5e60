#include "node/drainer.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "durable/open_store.h"
#include "durable/step_store.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr size_t kWaitingMax = 4096;
constexpr Nanos kSmallObjects = 60 * kNanosPerSecond;  // A manifest, a probe, one page of a listing.
// Of all shards together: what is slower, in each direction, is given up and tried again. A connection on which nothing moves is given up long before
// (s3_library.cc); this only ends what neither moves nor fails.
constexpr uint64_t kSlowestBytesPerSecond = 1'000'000;
constexpr Nanos kShardWithinMax = kUnfinishedForSeconds * kNanosPerSecond / 2;  // T_abort (I-24): sweeps leave what is younger alone.
constexpr Nanos kSweepEvery = 24 * 3600 * kNanosPerSecond;
// What a node whose memory is new takes over of one namespace: enough to resume from, and little of the ledger.
constexpr size_t kStepsListed = 16;
constexpr size_t kRecordsListed = 512;
constexpr size_t kKeysKnown = 100'000;  // Of manifests that need not be read again to plan what goes: 20 MB.
constexpr Nanos kDeleting = 300 * kNanosPerSecond;  // Of one order's steps; what is not done by then goes with the next plan.

int64_t UnixSeconds() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

Nanos ShardWithin(uint64_t bytes, uint32_t threads, uint64_t bytes_per_second) {
  const uint64_t slowest = bytes_per_second == 0 ? kSlowestBytesPerSecond : std::min(bytes_per_second, kSlowestBytesPerSecond);
  const uint64_t share = std::max<uint64_t>(slowest / threads, 1);
  const uint64_t seconds = 4 * std::min<uint64_t>(bytes / share, kShardWithinMax / kNanosPerSecond / 4);
  return kSmallObjects + static_cast<Nanos>(seconds) * kNanosPerSecond;
}

class Drainer::Door {
 public:
  Door(std::string url, const Clock& clock) : url_(std::move(url)), clock_(clock) {}

  Result<OpenedStore> Open(const CallLimits& limits) {
    const std::lock_guard lock(mutex_);
    if (opened_) return *opened_;
    SP_ASSIGN_OR_RETURN(std::shared_ptr<ObjectStore> store, OpenStore(url_, clock_));
    SP_ASSIGN_OR_RETURN(const StoreAbilities abilities, store->Probe(limits));
    if (!abilities.conditional_create) {
      return Error(StatusCode::kInvalidArgument, url_ + " lets a second writer replace an object that is there, so two daemons could write one step: use "
                                                        "a store that honours If-None-Match");
    }
    opened_ = OpenedStore{std::move(store), abilities};
    return *opened_;
  }

  // After trouble: what is there by then may be another directory, or need other credentials.
  void Close() {
    const std::lock_guard lock(mutex_);
    opened_.reset();
  }

 private:
  const std::string url_;
  const Clock& clock_;
  std::mutex mutex_;
  std::optional<OpenedStore> opened_;
};

Drainer::Drainer(std::string url, uint32_t threads, uint64_t bytes_per_second, const RetentionRule& rule, const Clock& clock, std::function<void(Event)> post)
    : clock_(clock), post_(std::move(post)), door_(std::make_shared<Door>(std::move(url), clock)), threads_(threads), bytes_per_second_(bytes_per_second),
      rate_(bytes_per_second), rule_(rule) {}

Drainer::~Drainer() {
  cancelled_ = true;
  executor_.reset();
}

Result<std::unique_ptr<Drainer>> Drainer::Create(const std::string& url, uint32_t threads, uint64_t bytes_per_second, const RetentionRule& rule,
                                                 const Clock& clock, std::function<void(Event)> post) {
  std::unique_ptr<Drainer> drainer(new Drainer(url, threads, bytes_per_second, rule, clock, std::move(post)));
  // One more for listings and manifests, which are short, so that no large shard holds them up.
  SP_ASSIGN_OR_RETURN(drainer->executor_, Executor::Create(threads + 1, kWaitingMax, true));
  return drainer;
}

CallLimits Drainer::Limits(Nanos within, const Progress& progress) const {
  CallLimits limits;
  limits.deadline = clock_.Now() + within;
  limits.cancelled = &cancelled_;
  if (progress) {
    limits.progress = [progress](uint64_t bytes) { progress->bytes += bytes; };
    limits.alive = [progress] { progress->alive = true; };
  }
  return limits;
}

// In short pauses, so that the end of the daemon need not wait for a long one.
void Drainer::WaitForTurn(uint64_t bytes, Counts& counts) {
  const Nanos at = rate_.Take(clock_.Now(), bytes);
  while (!cancelled_) {
    const Nanos left = at - clock_.Now();
    if (left <= 0) return;
    counts.alive = true;
    std::this_thread::sleep_for(std::chrono::nanoseconds(std::min(left, 20 * kNanosPerMilli)));
  }
}

void Drainer::Submit(std::function<Event()> job, const std::function<Event(const Status&)>& refused) {
  const bool submitted = executor_->Submit([this, job = std::move(job)] {
    // Shared only because a std::function must be copyable.
    auto event = std::make_shared<Event>(job());
    return Executor::Completion([this, event] { post_(std::move(*event)); });
  });
  if (!submitted) post_(refused(Status(StatusCode::kLimit, "too much waits for the store")));
}

void Drainer::StoreShard(const SealRecord& record, ExtentSet lease) {
  const Hash256 identity = record.Identity();
  auto progress = std::make_shared<Counts>();
  progress_[identity] = progress;
  const auto store = [this, record, lease = std::move(lease), progress]() -> Result<ConfirmedBy> {
    const CallLimits limits = Limits(ShardWithin(record.length_bytes, threads_, bytes_per_second_), progress);
    SP_ASSIGN_OR_RETURN(const OpenedStore opened, door_->Open(limits));
    PutSource source;
    source.size_bytes = record.length_bytes;
    source.block_crcs.resize(BlockCount(record.length_bytes));
    SP_RETURN_IF_ERROR(lease.Read(ChecksumListOffset(record.length_bytes),
                                  {reinterpret_cast<uint8_t*>(source.block_crcs.data()), 4 * source.block_crcs.size()}));
    source.read = [&lease](uint64_t offset, MutableByteSpan out) { return lease.Read(offset, out); };
    source.pace = [this, &progress](uint64_t bytes) { WaitForTurn(bytes, *progress); };
    return PutShard(*opened.store, opened.abilities, record, source, limits);
  };
  Submit(
      [store, identity, door = door_] {
        const Result<ConfirmedBy> by = store();
        if (!by) door->Close();
        return by ? event::ShardStored{identity, {}, *by == ConfirmedBy::kReadingBack} : event::ShardStored{identity, by.error(), false};
      },
      [identity](const Status& why) { return event::ShardStored{identity, why, false}; });
}

void Drainer::StoreManifest(const Id128& attempt, const StoredStep& step) {
  const auto store = [this, step]() -> Status {
    const CallLimits limits = Limits(kSmallObjects, nullptr);
    SP_ASSIGN_OR_RETURN(const OpenedStore opened, door_->Open(limits));
    SP_RETURN_IF_ERROR(PutManifest(*opened.store, opened.abilities, step, limits));
    // Whatever is still being written of it is not needed any more. If that cannot be swept now, the next sweep of all will find it.
    [[maybe_unused]] const auto swept = SweepUploads(*opened.store, StepPrefix(step.records.front().key), UnixSeconds(), limits);
    return {};
  };
  Submit(
      [store, attempt, door = door_] {
        const Status stored = store();
        if (!stored.ok()) door->Close();
        return event::ManifestStored{attempt, stored};
      },
      [attempt](const Status& why) { return event::ManifestStored{attempt, why}; });
}

void Drainer::List(uint32_t uid, const std::string& ns) {
  const auto list = [this, uid, ns]() -> Result<NewestSteps> {
    const CallLimits limits = Limits(5 * kSmallObjects, nullptr);
    SP_ASSIGN_OR_RETURN(const OpenedStore opened, door_->Open(limits));
    return ReadNewestSteps(*opened.store, ns, uid, kStepsListed, kRecordsListed, limits);
  };
  Submit(
      [list, uid, ns, door = door_] {
        Result<NewestSteps> found = list();
        if (!found) door->Close();
        return found ? event::StoreListed{uid, ns, {}, std::move(found->steps), std::move(found->damaged)}
                     : event::StoreListed{uid, ns, found.error(), {}, {}};
      },
      [uid, ns](const Status& why) { return event::StoreListed{uid, ns, why, {}, {}}; });
}

void Drainer::PlanRetention(uint32_t uid, const std::string& ns) {
  const auto plan = [this, uid, ns]() -> Result<std::vector<Departure>> {
    const CallLimits limits = Limits(5 * kSmallObjects, nullptr);
    SP_ASSIGN_OR_RETURN(const OpenedStore opened, door_->Open(limits));
    if (keys_.size() > kKeysKnown) keys_.clear();
    return sp::PlanRetention(*opened.store, rule_, ns, uid, UnixSeconds(), keys_, limits);
  };
  Submit(
      [plan, uid, ns, door = door_] {
        Result<std::vector<Departure>> departures = plan();
        if (!departures) door->Close();
        return departures ? event::RetentionPlanned{uid, ns, {}, std::move(*departures)} : event::RetentionPlanned{uid, ns, departures.error(), {}};
      },
      [uid, ns](const Status& why) { return event::RetentionPlanned{uid, ns, why, {}}; });
}

void Drainer::DeleteSteps(uint32_t uid, const std::string& ns, const std::vector<StepName>& steps) {
  const auto remove = [this, uid, ns, steps]() -> event::StepsDeleted {
    event::StepsDeleted done{uid, ns, {}, {}};
    const CallLimits limits = Limits(kDeleting, nullptr);
    const auto opened = door_->Open(limits);
    if (!opened) {
      done.status = opened.error();
      return done;
    }
    for (const StepName& step : steps) {  // One that cannot be deleted keeps no other one.
      const Status deleted = DeleteStep(*opened->store, step, limits);
      if (deleted.ok()) done.steps.push_back(step);
      else if (done.status.ok()) done.status = deleted;
    }
    return done;
  };
  Submit(
      [remove, door = door_] {
        event::StepsDeleted done = remove();
        if (!done.status.ok()) door->Close();
        return done;
      },
      [uid, ns](const Status& why) { return event::StepsDeleted{uid, ns, why, {}}; });
}

void Drainer::SweepIfDue() {
  if (clock_.Now() < sweep_at_) return;
  sweep_at_ = clock_.Now() + kSweepEvery;
  const auto sweep = [this]() -> Result<uint64_t> {
    const CallLimits limits = Limits(5 * kSmallObjects, nullptr);
    SP_ASSIGN_OR_RETURN(const OpenedStore opened, door_->Open(limits));
    return SweepUploads(*opened.store, "", UnixSeconds() - kUnfinishedForSeconds, limits);
  };
  Submit(
      [sweep]() -> Event {
        const Result<uint64_t> swept = sweep();
        return swept ? event::StoreSwept{{}, *swept} : event::StoreSwept{swept.error(), 0};
      },
      [](const Status& why) { return event::StoreSwept{why, 0}; });
}

void Drainer::PostProgress() {
  SweepIfDue();
  for (auto it = progress_.begin(); it != progress_.end();) {
    post_(event::ShardProgress{it->first, it->second->bytes, it->second->alive.exchange(false)});
    it = it->second.use_count() == 1 ? progress_.erase(it) : std::next(it);  // Its job is over.
  }
}

}  // namespace sp

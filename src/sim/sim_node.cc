#include "sim/sim_node.h"

#include <algorithm>

#include "base/check.h"
#include "base/crc32c.h"
#include "sim/model.h"

namespace sp::sim {
namespace {

constexpr Nanos kDrainWithin = 27 * kNanosPerSecond;  // Of a grace of 30 s, as node/worker.cc divides it.

MutableByteSpan Bytes(std::vector<uint64_t>& words) { return {reinterpret_cast<uint8_t*>(words.data()), words.size() * sizeof(uint64_t)}; }

}  // namespace

SimNode::SimNode(Host& host, CoreConfig config, SimStore* store, uint64_t ledger_bytes, uint64_t ledger_soft_limit)
    : host_(host), config_(std::move(config)), ledger_memory_(ledger_bytes / 8), ledger_soft_limit_(ledger_soft_limit),
      drainer_(store, config_.extent_bytes, config_.durable_keeps.value_or(0)) {}

void SimNode::Start() { Restart(); }

void SimNode::Deliver(const Event& event) {
  Note(event.index() + 1);
  if (!Execute(core_->Step(now_, event))) {
    WorkerDied();
  } else if (exits_) {
    host_.OnExit();
    LoseKeeper();
  }
  const Status status = core_->CheckInvariants();
  if (!status.ok()) Fail("bookkeeping: " + status.message());
}

bool SimNode::Execute(const std::vector<Action>& actions) {
  bool in_snapshot = false;
  for (auto it = actions.begin(); it != actions.end(); ++it) {
    const Action& action = *it;
    if (kill_after_ && (*kill_after_)-- == 0) {
      kill_after_.reset();
      // A kill in the middle of an append leaves bytes behind the end of the log.
      if (const auto* append = std::get_if<action::Append>(&action); append && !in_snapshot && kill_random_ % 2 == 0) {
        const std::vector<uint64_t> header(ledger_memory_.begin(), ledger_memory_.begin() + Ledger::kHeaderBytes / 8);
        if (ledger_->Append(append->entry).ok()) std::copy(header.begin(), header.end(), ledger_memory_.begin());
      }
      return false;
    }
    if (const auto* append = std::get_if<action::Append>(&action)) {
      Note(Crc32c(0, EncodeLedgerEntry(append->entry)));
      if (in_snapshot) continue;
      in_snapshot = Write(append->entry);
      host_.OnAppended(append->entry);
      // The snapshot has every entry of this step, so they are all written now.
      for (auto later = std::next(it); in_snapshot && later != actions.end(); ++later) {
        if (const auto* rest = std::get_if<action::Append>(&*later)) host_.OnAppended(rest->entry);
      }
      continue;
    }
    Perform(action);
  }
  return true;
}

bool SimNode::Write(const LedgerEntry& entry) {
  if (ledger_->used_bytes() <= ledger_soft_limit_ && ledger_->Append(entry).ok()) return false;
  const Status status = ledger_->Compact(core_->Snapshot());
  if (!status.ok()) Fail("ledger: " + status.ToString());
  ledger_soft_limit_ = ledger_->used_bytes() + (uint64_t{4} << 10) + Mix(trace_) % (uint64_t{16} << 10);
  return true;
}

void SimNode::Perform(const Action& any) {
  Note(any.index() + 100);
  if (const auto* a = std::get_if<action::Send>(&any)) {
    Note(Crc32c(0, a->frame.body));
    if (a->frame.Encode().size() > kFrameBytesMax) Fail("I-40: a frame that is too large");
    host_.OnFrame(a->connection, a->frame, Extents(a->extents), a->read_only);
  } else if (const auto* a = std::get_if<action::Close>(&any)) {
    host_.OnClosed(a->connection);
  } else if (const auto* a = std::get_if<action::WatchSession>(&any)) {
    watched_[a->session.session] = a->session;
    Add({.kind = Job::Kind::kWatch, .session = a->session});
  } else if (const auto* a = std::get_if<action::UnwatchSession>(&any)) {
    watched_.erase(a->session);
  } else if (const auto* a = std::get_if<action::CheckSeal>(&any)) {
    Add({.kind = Job::Kind::kSeal, .seal = *a, .memory = Extents(a->extents)});
  } else if (const auto* a = std::get_if<action::ReadStructure>(&any)) {
    Add({.kind = Job::Kind::kStructure, .structure = *a});
  } else if (const auto* a = std::get_if<action::CheckBlock>(&any)) {
    Add({.kind = Job::Kind::kBlock, .block = *a, .memory = Extents(a->extents)});
  } else if (const auto* a = std::get_if<action::CreateExtents>(&any)) {
    for (uint32_t i = 0; i < a->count; ++i) {
      if (extents_.contains(a->first + i)) Fail("I-10: an extent is created again");
      Add({.kind = Job::Kind::kCreate, .extents = {a->first + i}});
    }
    const auto creating = std::count_if(jobs_.begin(), jobs_.end(), [](const Job& j) { return j.kind == Job::Kind::kCreate; });
    if (extents_.size() + static_cast<size_t>(creating) > config_.extents_max) Fail("I-27: more memory than the pool may have");
  } else if (const auto* a = std::get_if<action::DropExtents>(&any)) {
    for (uint32_t id : a->extents) extents_.erase(id);
  } else if (const auto* a = std::get_if<action::WriteMarker>(&any)) {
    config_.markers.push_back(a->marker);  // A file: it outlives worker and keeper.
  } else if (const auto* a = std::get_if<action::StoreShard>(&any)) {
    drainer_.Do(now_, *a, Extents(a->extents));
  } else if (const auto* a = std::get_if<action::StoreManifest>(&any)) {
    drainer_.Do(now_, *a);
  } else if (const auto* a = std::get_if<action::ListStore>(&any)) {
    drainer_.Do(now_, *a);
  } else if (const auto* a = std::get_if<action::PlanRetention>(&any)) {
    drainer_.Do(now_, *a);
  } else if (const auto* a = std::get_if<action::DeleteSteps>(&any)) {
    host_.OnDeleting(*a);
    drainer_.Do(now_, *a);
  } else if (std::holds_alternative<action::ExitDaemon>(any)) {
    exits_ = true;
  }
}

void SimNode::RunJob(size_t index) {
  if (index >= jobs_.size()) {
    if (const auto event = drainer_.Run(now_, index - jobs_.size())) Deliver(*event);
    return;
  }
  const Job job = jobs_[index];
  jobs_.erase(jobs_.begin() + static_cast<ptrdiff_t>(index));
  switch (job.kind) {
    case Job::Kind::kSeal: return CheckSealJob(job.seal, job.memory);
    case Job::Kind::kBlock: {
      event::BlockChecked e{job.block.token, {}};
      const uint32_t count = ExtentsFor(job.block.length_bytes, config_.extent_bytes);
      if (job.memory.size() < count || RootOf(job.memory, count) != job.block.block_root) e.status = Status(StatusCode::kCorrupt, "block differs");
      return Deliver(e);
    }
    case Job::Kind::kStructure: {
      event::StructureRead e{job.structure.record, {}, {}};
      if (const ShardIndex* index = host_.FindStructure(job.structure.structure)) e.structure = PackedIndex::Of(*index);
      else e.status = Status(StatusCode::kProtocol, "malformed");
      return Deliver(e);
    }
    case Job::Kind::kCreate:
      if (failing_extents_ > 0) {
        --failing_extents_;
        return Deliver(event::ExtentFailed{job.extents[0], Status(StatusCode::kNoSpace, "no memory")});
      }
      extents_[job.extents[0]] = std::make_shared<Memory>(Memory{job.extents[0], 0, {}});
      return Deliver(event::ExtentCreated{job.extents[0]});
    case Job::Kind::kWatch:
      if (host_.IsProcessDead(job.session)) return Deliver(event::SessionDied{job.session.session});
      if (!host_.IsWatchable(job.session)) return Deliver(event::SessionUnwatchable{job.session.session});
      return;
    case Job::Kind::kDied: return Deliver(event::SessionDied{job.session.session});
  }
}

void SimNode::CheckSealJob(const action::CheckSeal& check, const std::vector<MemoryRef>& extents) {
  event::SealChecked e;
  e.lease = check.lease;
  const uint32_t count = ExtentsFor(check.length_bytes, config_.extent_bytes);
  if (extents.size() < count || RootOf(extents, count) != check.block_root) e.status = Status(StatusCode::kCorrupt, "the list does not hash to the root");
  if (e.status.ok() && check.want_structure) {
    if (const ShardIndex* index = host_.FindStructure(check.structure)) e.structure = PackedIndex::Of(*index);
    else e.status = Status(StatusCode::kProtocol, "malformed");
  }
  host_.OnSealChecked(check.lease, e.status.ok());
  Deliver(e);
}

void SimNode::RunAllJobs() {
  while (jobs() > 0) RunJob(0);
}

bool SimNode::RunListing() {
  const auto event = drainer_.RunListing(now_);
  if (event) Deliver(*event);
  return event.has_value();
}

void SimNode::ProcessDied(uint32_t pid) {
  for (const auto& [id, session] : watched_) {
    if (session.pid == pid && host_.IsWatchable(session)) Add({.kind = Job::Kind::kDied, .session = session});
  }
}

void SimNode::KillWorkerAfter(uint64_t actions, uint64_t random) {
  kill_after_ = actions;
  kill_random_ = random;
  if (actions == 0) {
    kill_after_.reset();
    WorkerDied();
  }
}

void SimNode::WorkerDied() {
  if (stopping()) LoseKeeper();  // A keeper that is to end starts no worker any more.
  else Restart();
}

void SimNode::Terminate() {
  if (stopping()) return;
  stop_by_ = now_ + kDrainWithin;
  Deliver(event::Shutdown{});
}

void SimNode::Advance(Nanos by) {
  now_ += by;
  if (stopping() && now_ >= *stop_by_) LoseKeeper();
}

void SimNode::LoseKeeper() {
  extents_.clear();
  std::fill(ledger_memory_.begin(), ledger_memory_.end(), 0);
  jobs_.clear();
  config_.incarnation = 0;
  config_.boot.bytes[0]++;
  host_.OnRestarted(true);
  stop_by_.reset();
  exits_ = false;
  Restart();
}

void SimNode::Restart() {
  const bool first = !core_;
  while (true) {
    // What the keeper was asked to create it may have created.
    for (const Job& job : jobs_) {
      const bool done = Mix(kill_random_, job.extents.empty() ? 0 : job.extents[0]) % 2;
      if (job.kind == Job::Kind::kCreate && done) extents_[job.extents[0]] = std::make_shared<Memory>(Memory{job.extents[0], 0, {}});
    }
    jobs_.clear();
    drainer_.WorkerDied();
    watched_.clear();
    if (!first) {
      ++restarts_;
      host_.OnRestarted(false);
    }
    if (config_.incarnation == 0 || !first) ++config_.incarnation;
    auto ledger = Ledger::Open(Bytes(ledger_memory_));
    SP_CHECK(ledger.has_value());
    ledger_.emplace(*ledger);
    const Ledger::Contents contents = ledger_->Read();
    if (contents.damaged_entries > 0) Fail("I-25: a kill damaged the ledger");
    core_ = std::make_unique<NodeCore>(config_);
    if (Execute(core_->Restore(now_, contents, ExtentIds()))) break;
  }
  const Status status = core_->CheckInvariants();
  if (!status.ok()) Fail("bookkeeping after a restart: " + status.message());
}

void SimNode::Compact() {
  if (!ledger_->Compact(core_->Snapshot()).ok()) Fail("ledger: a snapshot does not fit");
}

void SimNode::RunTimers() {
  for (int i = 0; i < 100; ++i) {
    const auto next = core_->NextDeadline();
    if (!next || *next > now_) return;
    Deliver(event::Tick{});
  }
  Fail("I-30: a deadline stays due however often the clock ticks");
}

std::vector<uint32_t> SimNode::ExtentIds() const {
  std::vector<uint32_t> ids;
  for (const auto& [id, memory] : extents_) ids.push_back(id);
  return ids;
}

MemoryRef SimNode::FindExtent(uint32_t id) const {
  auto it = extents_.find(id);
  return it == extents_.end() ? nullptr : it->second;
}

std::vector<MemoryRef> SimNode::Extents(const std::vector<uint32_t>& ids) const {
  std::vector<MemoryRef> out;
  for (uint32_t id : ids) {
    auto it = extents_.find(id);
    if (it == extents_.end()) Fail("I-10: extent " + std::to_string(id) + " is used and was dropped");
    out.push_back(it->second);
  }
  return out;
}

}  // namespace sp::sim

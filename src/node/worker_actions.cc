// What each action of the core means on this machine.
#include <malloc.h>

#include "node/shard_checks.h"
#include "node/state_dir.h"
#include "node/worker.h"
#include "os/pidfd.h"

namespace sp {
namespace {

constexpr Nanos kMarkerWarnEvery = 60 * kNanosPerSecond;

// Read and parsed one at a time: that takes several times its length (docs/operating/limits.md).
bool IsLarge(uint64_t static_part_bytes) { return static_part_bytes > uint64_t{1} << 20; }

Status Busy() { return Status(StatusCode::kLimit, "the daemon has too many checks waiting"); }

}  // namespace

Status Worker::Pump() {
  while (!events_.empty() && failed_.ok()) {
    const Event event = std::move(events_.front());
    events_.pop_front();
    cause_uid_.reset();
    if (const auto* received = std::get_if<event::Received>(&event)) {
      const auto it = connections_.find(received->connection);
      if (it == connections_.end()) continue;  // It was dropped meanwhile; nobody waits for an answer.
      cause_uid_ = it->second.identity().uid;
    } else if (const auto* connected = std::get_if<event::Connected>(&event)) {
      cause_uid_ = connected->uid;
    }
    ledger_->BeginStep();
    failed_ = CarryOut(core_->Step(clock_.Now(), event));
  }
  return failed_;
}

Status Worker::CarryOut(std::vector<Action> actions) {
  for (const Action& action : actions) {
    SP_RETURN_IF_ERROR(std::visit([this](const auto& a) { return Do(a); }, action));
  }
  return {};
}

// When not even a compacted log has room, nothing of this step was acknowledged yet: the worker ends, and the next one starts from the log as it
// was, where Admit keeps new work away.
Status Worker::Do(const action::Append& a) {
  const Status appended = ledger_->Append(a.entry, [this] { return core_->Snapshot(); });
  if (appended.ok()) return {};
  return Status(appended.code(), "the ledger takes no more entries (" + std::to_string(ledger_->used_bytes()) + " of " +
                                     std::to_string(ledger_->area_bytes()) + " bytes used): " + appended.message());
}

Status Worker::Do(const action::Send& a) {
  OutgoingFrame frame{a.frame.Encode(), {}, a.read_only};
  for (const uint32_t id : a.extents) {
    const auto it = extents_.find(id);
    if (it == extents_.end()) {
      DropConnection(a.connection, "extent " + std::to_string(id) + " is to be lent, but is not here");
      return {};
    }
    frame.extents.push_back(it->second);
  }
  SendTo(a.connection, std::move(frame));
  return {};
}

Status Worker::Do(const action::Close& a) {
  CloseAfterFlush(a.connection);
  return {};
}

Status Worker::Do(const action::WatchSession& a) {
  const Id128 session = a.session.session;
  if (a.connection != 0) {
    const auto it = connections_.find(a.connection);
    const Fd* pidfd = it == connections_.end() ? nullptr : &it->second.identity().pidfd;
    if (pidfd && pidfd->valid()) {
      Result<Fd> copy = pidfd->Duplicate();
      if (copy) {
        WatchPidfd(session, std::move(*copy));
        return {};
      }
      logger_.Log(LogSeverity::kWarning, "pidfd_not_copied", {{"cause", copy.error().ToString()}});
    }
    Post(event::SessionUnwatchable{session});
    return {};
  }
  const pid_t pid = static_cast<pid_t>(a.session.pid);
  if (pid == 0 || a.session.start_time == 0) {
    Post(event::SessionUnwatchable{session});
    return {};
  }
  // The pidfd first: if the number still means the same process afterwards, the pidfd is of that process.
  Result<Fd> pidfd = OpenPidfd(pid);
  const SameProcess same = StillSameProcess(pid, a.session.start_time);
  if (same == SameProcess::kNo || (!pidfd && pidfd.error().code() == StatusCode::kNotFound)) {
    Post(event::SessionDied{session});
  } else if (same == SameProcess::kUnknown || !pidfd) {
    Post(event::SessionUnwatchable{session});
  } else {
    WatchPidfd(session, std::move(*pidfd));
  }
  return {};
}

void Worker::WatchPidfd(const Id128& session, Fd pidfd) {
  const uint64_t watch = ++last_watch_;
  const Status added = epoll_->Add(pidfd.get(), EPOLLIN, Token(Source::kSession, watch));
  if (!added.ok()) {
    logger_.Log(LogSeverity::kWarning, "pidfd_not_watched", {{"cause", added.ToString()}});
    return Post(event::SessionUnwatchable{session});
  }
  if (const Status removed = Do(action::UnwatchSession{session}); !removed.ok()) failed_ = removed;
  watched_.emplace(watch, WatchedSession{session, std::move(pidfd)});
  watch_of_[session] = watch;
}

Status Worker::Do(const action::UnwatchSession& a) {
  const auto it = watch_of_.find(a.session);
  if (it == watch_of_.end()) return {};
  const auto watched = watched_.find(it->second);
  SP_RETURN_IF_ERROR(epoll_->Remove(watched->second.pidfd.get()));
  watched_.erase(watched);
  watch_of_.erase(it);
  return {};
}

Result<ExtentSet> Worker::ExtentsOf(const std::vector<uint32_t>& ids) const {
  std::vector<SharedFd> extents;
  for (const uint32_t id : ids) {
    const auto it = extents_.find(id);
    if (it == extents_.end()) return Error(StatusCode::kInternal, "extent " + std::to_string(id) + " is not here");
    extents.push_back(it->second);
  }
  return ExtentSet(std::move(extents), settings_.extent_bytes);
}

template <typename Check, typename Failed>
void Worker::RunCheck(const std::vector<uint32_t>& extents, Check check, Failed failed, bool large) {
  const Result<ExtentSet> lease = ExtentsOf(extents);
  if (!lease) return Post(failed(lease.error()));
  const bool submitted = executor_->Submit([this, lease = *lease, check = std::move(check), large] {
    // Shared only because a std::function must be copyable.
    auto result = std::make_shared<Event>(check(lease));
    if (large) malloc_trim(0);  // What parsing took goes back at once; this thread's heap would keep it.
    return Executor::Completion([this, result] { Post(std::move(*result)); });
  }, large);
  if (!submitted) Post(failed(Busy()));
}

Status Worker::Do(const action::CheckSeal& a) {
  RunCheck(
      a.extents, [a](const ExtentSet& lease) { return RunCheckSeal(a, lease); },
      [&](const Status& status) { return event::SealChecked{a.lease, status, nullptr}; }, IsLarge(a.header_bytes - a.static_offset));
  return {};
}

Status Worker::Do(const action::ReadStructure& a) {
  RunCheck(
      a.extents, [a](const ExtentSet& lease) { return RunReadStructure(a, lease); },
      [&](const Status& status) { return event::StructureRead{a.record, status, nullptr}; }, IsLarge(a.header_bytes - a.static_offset));
  return {};
}

Status Worker::Do(const action::CheckBlock& a) {
  RunCheck(
      a.extents, [a](const ExtentSet& lease) { return RunCheckBlock(a, lease); },
      [&](const Status& status) { return event::BlockChecked{a.token, status}; });
  return {};
}

Status Worker::Do(const action::StoreShard& a) {
  Result<ExtentSet> lease = ExtentsOf(a.extents);
  if (lease) drainer_->StoreShard(a.record, std::move(*lease));
  else Post(event::ShardStored{a.record.Identity(), lease.error(), false});
  return {};
}

Status Worker::Do(const action::StoreManifest& a) {
  drainer_->StoreManifest(a.attempt, a.step);
  return {};
}

Status Worker::Do(const action::ListStore& a) {
  drainer_->List(a.uid, a.ns);
  return {};
}

Status Worker::Do(const action::PlanRetention& a) {
  drainer_->PlanRetention(a.uid, a.ns);
  return {};
}

Status Worker::Do(const action::DeleteSteps& a) {
  drainer_->DeleteSteps(a.uid, a.ns, a.steps);
  return {};
}

// Extents of the keeper's start are made without our asking: those are answered when they are here.
Status Worker::Do(const action::CreateExtents& a) {
  const auto request = [&](uint32_t first, uint32_t count) -> Status {
    if (count == 0) return {};
    SP_ASSIGN_OR_RETURN([[maybe_unused]] const uint64_t id, keeper_->RequestCreate(first, count));
    return {};
  };
  uint32_t first = a.first, count = 0;
  for (uint32_t id = a.first; id < a.first + a.count; ++id) {
    const bool here = extents_.contains(id);
    if (!here && !coming_.contains(id)) {
      ++count;
      continue;
    }
    if (here) Post(event::ExtentCreated{id});
    SP_RETURN_IF_ERROR(request(first, count));
    first = id + 1;
    count = 0;
  }
  return request(first, count);
}

Status Worker::Do(const action::DropExtents& a) {
  for (const uint32_t id : a.extents) {
    extents_.erase(id);
    SP_ASSIGN_OR_RETURN([[maybe_unused]] const uint64_t request, keeper_->RequestDrop(id));
  }
  return {};
}

Status Worker::Do(const action::WriteMarker& a) {
  const auto failed = [this](const Status& status) {
    ++counters_.marker_failures;
    const Nanos now = clock_.Now();
    if (marker_warned_at_ != 0 && now < marker_warned_at_ + kMarkerWarnEvery) return;
    marker_warned_at_ = now;
    logger_.Log(LogSeverity::kError, "marker_not_written",
                {{"cause", status.ToString()}, {"failures", std::to_string(counters_.marker_failures)},
                 {"consequence", "if this node's memory is lost, that this namespace had steps is forgotten"}});
  };
  const bool submitted = executor_->Submit([marker = a.marker, dir = settings_.state_dir, failed] {
    const Status written = WriteMarkerFile(dir, marker);
    return Executor::Completion([written, failed] {
      if (!written.ok()) failed(written);
    });
  });
  if (!submitted) failed(Busy());
  return {};
}

Status Worker::Do(const action::Log& a) {
  if (cause_uid_ && !a.evidence) logger_.LogOfUid(clock_.Now(), *cause_uid_, a.severity, a.name, a.fields);
  else logger_.Log(a.severity, a.name, a.fields);
  return {};
}

Status Worker::Do(const action::ExitDaemon& a) {
  logger_.Log(LogSeverity::kInfo, "daemon_ends", {{"reason", a.reason}});
  if (keeper_ends_) return {};
  // The keeper answers with SIGTERM.
  SP_ASSIGN_OR_RETURN([[maybe_unused]] const uint64_t request, keeper_->RequestShutdown());
  return {};
}

}  // namespace sp

// What of the durable tier goes, when a newer step has become durable. Which steps its rule lets go is found out by the shell, from the store's own
// listing; whether they may go now is decided here: not while somebody reads them, and not what memory has.
//
// A SIGKILL of this worker leaves, after
//   planned     nothing: the next step that becomes durable plans again
//   tombstone   a step that is listed no more here, and still in the store: planned again
//   half gone   a mark in the store (DeleteStep), by which whoever plans next finds it
#include "node/node_core_impl.h"

namespace sp {

using Severity = action::Log::Severity;

namespace {
constexpr Nanos kRetryFirst = 60 * kNanosPerSecond;  // Nothing waits for it. Doubled up to an hour.
constexpr uint32_t kRetryDoublings = 6;
constexpr size_t kDeletedAtOnce = 256;  // Steps: a rule that is new may let go of very many.
}  // namespace

void NodeCore::Impl::WantRetention(const NamespaceKey& ns) {
  if (config_.durable_keeps) retentions_[ns].wanted = true;
}

void NodeCore::Impl::PumpRetention() {
  if (stopping_ || retaining_) return;
  const auto due = [&](const auto& r) { return r.second.wanted && r.second.retry_at <= now_; };
  auto next = std::find_if(retentions_.upper_bound(retained_last_), retentions_.end(), due);  // In turn.
  if (next == retentions_.end()) next = std::find_if(retentions_.begin(), retentions_.end(), due);
  if (next == retentions_.end()) return;
  next->second.wanted = false;
  retaining_ = true;
  retained_last_ = next->first;
  actions_.push_back(action::PlanRetention{next->first.uid, next->first.ns});
}

void NodeCore::Impl::On(const event::RetentionPlanned& e) {
  const NamespaceKey ns{e.uid, e.ns};
  if (!e.status.ok() || stopping_) return RetentionEnded(ns, e.status, false);
  Retention& retention = retentions_[ns];
  std::set<Id128> stay = PinnedAttempts(ns);
  // Of a launch that was rolled back the store's order is not the order in which this node would read: its own newest ones stay, too.
  const std::vector<const Attempt*> lineage = catalog_.Lineage(ns, Level::kDurable);
  for (size_t i = 0; i < std::min<size_t>(lineage.size(), config_.durable_keeps.value_or(0)); ++i) stay.insert(lineage[i]->key.AttemptId());
  std::vector<StepName> steps;
  for (const Departure& departure : e.departures) {
    const Id128& id = departure.step.attempt;
    // Whoever's it is: remains are not one user's.
    if (stay.contains(id) || drains_.contains(id) || HasMemory(id)) continue;
    const Attempt* attempt = catalog_.FindAttempt(ns, id);
    const bool known = attempt && !attempt->tombstone;
    if (known && (!attempt->durable || attempt->operator_pin)) continue;
    if (steps.size() == kDeletedAtOnce) {
      retention.wanted = true;
      break;
    }
    // Before it goes: from here on nobody is sent there.
    if (known) {
      Commit(ledger::Tombstone{ns.uid, ns.ns, id, ledger::TombstoneWhy::kRetired, "deleted from the durable tier: " + departure.why});
      trim_ = true;
    }
    retention.why[departure.step] = departure.why;
    steps.push_back(departure.step);
  }
  if (steps.empty()) return RetentionEnded(ns, {}, false);
  actions_.push_back(action::DeleteSteps{ns.uid, ns.ns, std::move(steps)});
}

void NodeCore::Impl::On(const event::StepsDeleted& e) {
  const NamespaceKey ns{e.uid, e.ns};
  counters_.stored_deleted += e.steps.size();
  for (const StepName& step : e.steps) {
    Log(Severity::kInfo, "stored_step_deleted",
        {{"namespace", ns.ns}, {"uid", std::to_string(ns.uid)}, {"step", std::to_string(step.step)}, {"attempt", step.attempt.ToHex()},
         {"why", retentions_[ns].why[step]}});
  }
  RetentionEnded(ns, e.status, !e.steps.empty());
}

void NodeCore::Impl::RetentionEnded(const NamespaceKey& ns, const Status& status, bool progress) {
  retaining_ = false;
  Retention& retention = retentions_[ns];
  retention.why.clear();
  if (!status.ok()) {
    retention.wanted = true;
    if (progress) retention.failures = 0;
    retention.retry_at = now_ + (kRetryFirst << std::min(retention.failures++, kRetryDoublings));
    Log(Severity::kWarning, "retention_in_trouble",
        {{"namespace", ns.ns}, {"store", config_.store}, {"why", status.ToString()}, {"again_in_ms", std::to_string((retention.retry_at - now_) / kNanosPerMilli)}});
  } else if (!retention.wanted) {
    retentions_.erase(ns);
  } else {
    retention.failures = 0;
    retention.retry_at = 0;
  }
  PumpRetention();
}

// Nothing depends on it, so nobody waits: it is tried again in a day.
void NodeCore::Impl::On(const event::StoreSwept& e) {
  if (!e.status.ok()) Log(action::Log::Severity::kWarning, "store_not_swept", {{"why", e.status.ToString()}});
  else if (e.uploads > 0) Log(action::Log::Severity::kInfo, "store_swept", {{"uploads_aborted", std::to_string(e.uploads)}});
}

}  // namespace sp

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
constexpr Nanos kRetryAfter = 60 * kNanosPerSecond;  // Nothing waits for it.
}  // namespace

void NodeCore::Impl::WantRetention(const NamespaceKey& ns) {
  if (config_.durable_keeps) retentions_[ns].wanted = true;
}

void NodeCore::Impl::PumpRetention() {
  if (stopping_) return;
  for (auto& [ns, retention] : retentions_) {
    if (!retention.wanted || retention.under_way || retention.retry_at > now_) continue;
    retention.wanted = false;
    retention.under_way = true;
    actions_.push_back(action::PlanRetention{ns.uid, ns.ns});
  }
}

void NodeCore::Impl::On(const event::RetentionPlanned& e) {
  const NamespaceKey ns{e.uid, e.ns};
  if (!e.status.ok()) return RetentionEnded(ns, e.status);
  const std::set<Id128> in_use = PinnedAttempts(ns);
  std::vector<const Attempt*> lineage = catalog_.Lineage(ns, Level::kDurable);
  lineage.resize(std::min<size_t>(lineage.size(), config_.durable_keeps.value_or(0)));
  std::vector<StepName> steps;
  for (const Departure& departure : e.departures) {
    const Id128& id = departure.step.attempt;
    const Attempt* attempt = catalog_.FindAttempt(ns, id);
    const bool known = attempt && !attempt->tombstone;
    // Of a launch that was rolled back the store's order is not the order in which this node would read: its own newest ones stay, too.
    const bool newest = std::ranges::find(lineage, attempt) != lineage.end();
    if (in_use.contains(id) || (known && (!attempt->durable || attempt->operator_pin || newest || HasMemory(id)))) continue;
    if (known) Commit(ledger::Tombstone{ns.uid, ns.ns, id, ledger::TombstoneWhy::kRetired, "deleted from the durable tier: " + departure.why});
    Log(Severity::kInfo, "stored_step_deleted",
        {{"namespace", ns.ns}, {"uid", std::to_string(ns.uid)}, {"step", std::to_string(departure.step.step)}, {"attempt", id.ToHex()}, {"why", departure.why}});
    steps.push_back(departure.step);
  }
  if (steps.empty()) return RetentionEnded(ns, {});
  counters_.stored_deleted += steps.size();
  actions_.push_back(action::DeleteSteps{ns.uid, ns.ns, std::move(steps)});
}

void NodeCore::Impl::On(const event::StepsDeleted& e) { RetentionEnded({e.uid, e.ns}, e.status); }

void NodeCore::Impl::RetentionEnded(const NamespaceKey& ns, const Status& status) {
  Retention& retention = retentions_[ns];
  retention.under_way = false;
  if (!status.ok()) {
    retention.wanted = true;
    retention.retry_at = now_ + kRetryAfter;
    Log(Severity::kWarning, "retention_in_trouble",
        {{"namespace", ns.ns}, {"store", config_.store}, {"why", status.ToString()}, {"again_in_ms", std::to_string(kRetryAfter / kNanosPerMilli)}});
    return;
  }
  if (!retention.wanted) retentions_.erase(ns);
  PumpRetention();
}

}  // namespace sp

// Which steps of the durable tier go, and why the others stay. One rule for the daemon, which follows it after each step that became durable, and for
// `safepoint gc`.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "durable/object_store.h"
#include "format/stored_step.h"

namespace sp {

// A step stays if any of these keeps it; the newest one stays in any case.
struct RetentionRule {
  uint64_t keep_last = 0;   // The newest steps, so many.
  uint64_t keep_every = 0;  // Steps that are a multiple of it; 0: none for that.
  int64_t keep_for_s = 0;   // Steps that were made at most so long before the newest: an idle job loses nothing.
  // keep_every alone deletes nothing: it names exceptions, and there has to be a rule.
  bool Deletes() const { return keep_last > 0 || keep_for_s > 0; }
};

struct DatedStep {
  uint64_t step = 0;
  int64_t modified_unix_s = 0;  // When its manifest was made, by the store's clock.
};

struct Judgement {
  bool stays = true;
  std::string why;
};

// Of one namespace and user, `newest_first` as a restore sees it: by generation, step and try. One judgement for each. `now_unix_s` is this machine's
// clock: ages count from the newest step's time or from now, whichever is earlier, so that one wrong clock deletes nothing early. Pure.
std::vector<Judgement> Judge(const RetentionRule& rule, std::span<const DatedStep> newest_first, int64_t now_unix_s);

// What the documents of a step say never changes, so they are read once. By the step's name, which has to be theirs. Bounded by whoever keeps it.
using KnownKeys = std::map<StepName, AttemptKey>;

// What is to go of one namespace and user: by the rule, and remains (ListStore) of whomever. A step that cannot be read is left alone, and counts for
// nothing.
Result<std::vector<Departure>> PlanRetention(ObjectStore& store, const RetentionRule& rule, const std::string& ns, uint32_t uid, int64_t now_unix_s,
                                             KnownKeys& known, const CallLimits& limits);

}  // namespace sp

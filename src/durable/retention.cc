#include "durable/retention.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "durable/step_store.h"

namespace sp {

namespace {

// Damaged, gone meanwhile, or not for us to read.
bool IsLeftAlone(StatusCode code) {
  return code == StatusCode::kCorrupt || code == StatusCode::kIncomplete || code == StatusCode::kNotFound || code == StatusCode::kLimit ||
         code == StatusCode::kDenied;
}

}  // namespace

std::vector<Judgement> Judge(const RetentionRule& rule, std::span<const DatedStep> newest_first, int64_t now_unix_s) {
  const int64_t newest_s = newest_first.empty() ? 0 : std::min(newest_first.front().modified_unix_s, now_unix_s);
  std::string why_gone = "not among the newest " + std::to_string(std::max<uint64_t>(rule.keep_last, 1));
  if (rule.keep_every > 0) why_gone += ", no multiple of " + std::to_string(rule.keep_every);
  if (rule.keep_for_s > 0) why_gone += ", made more than " + std::to_string(rule.keep_for_s) + " s before the newest";
  std::vector<Judgement> judgements;
  for (size_t age = 0; age < newest_first.size(); ++age) {
    const DatedStep& step = newest_first[age];
    const int64_t behind_s = newest_s - step.modified_unix_s;
    if (age == 0) judgements.push_back({true, "the newest step always stays"});
    else if (age < rule.keep_last) judgements.push_back({true, "among the newest " + std::to_string(rule.keep_last)});
    else if (rule.keep_every > 0 && step.step % rule.keep_every == 0) judgements.push_back({true, "a multiple of " + std::to_string(rule.keep_every)});
    else if (rule.keep_for_s > 0 && behind_s <= rule.keep_for_s) judgements.push_back({true, "made " + std::to_string(behind_s) + " s before the newest"});
    else if (!rule.Deletes()) judgements.push_back({true, "no rule says what goes"});
    else judgements.push_back({false, why_gone});
  }
  return judgements;
}

Result<std::vector<Departure>> PlanRetention(ObjectStore& store, const RetentionRule& rule, const std::string& ns, uint32_t uid, int64_t now_unix_s,
                                             KnownKeys& known, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(StoreListing listing, ListStore(store, ns, now_unix_s, limits));
  struct Candidate {
    AttemptKey key;
    FoundStep found;
  };
  std::vector<Candidate> own;
  for (const FoundStep& found : listing.steps) {
    auto key = known.find(found.name);
    if (key == known.end()) {
      const Result<StoredStep> read = ReadStoredStep(store, found.name, limits);
      if (!read && IsLeftAlone(read.error().code())) continue;
      if (!read) return std::unexpected(read.error());
      key = known.emplace(found.name, read->records.front().key).first;
    }
    if (key->second.uid == uid) own.push_back({key->second, found});
  }
  std::ranges::sort(own, std::ranges::greater(), [](const Candidate& c) { return std::tuple(c.key.generation, c.key.step, c.key.try_number); });
  std::vector<DatedStep> dated;
  for (const Candidate& c : own) dated.push_back({c.key.step, c.found.modified_unix_s});
  const std::vector<Judgement> judgements = Judge(rule, dated, now_unix_s);
  std::vector<Departure> departures = std::move(listing.remains);
  for (size_t i = 0; i < own.size(); ++i) {
    if (!judgements[i].stays) departures.push_back({own[i].found.name, judgements[i].why});
  }
  return departures;
}

}  // namespace sp

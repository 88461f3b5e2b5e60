// The durable tier's part of the reference model.
#include "sim/model.h"

namespace sp::sim {
namespace {

SealRecord RecordOf(const FixedBytes<SealRecord::kBytes>& bytes, ShardKind kind) {
  const auto record = SealRecord::Decode(bytes.span());
  Require(record.has_value() && record->kind == kind, "I-3: a record of the store's that cannot be decoded");
  return *record;
}

}  // namespace

void Model::On(const ledger::DurableWish& e) {
  Require(has_store_, "I-23: a wish for a tier that is not there was accepted");
  const auto it = attempts_.find(e.attempt);
  Require(it != attempts_.end() && !it->second.tombstone, "I-23: a wish for an attempt that is not there");
  ModelAttempt& a = it->second;
  Require(a.ns == NamespaceKey{e.uid, e.ns}, "I-38: a wish for another identity's step");
  Require(!a.durable && a.WantsDurable() != e.on, "I-32: a wish that changes nothing");
  Require(e.on || !e.reason.empty(), "I-31: given up without a reason");
  a.wish = e.on;
  a.was_given_up |= !e.on;
}

void Model::On(const ledger::StoredShard& e) {
  const SealRecord record = RecordOf(e.record, ShardKind::kData);
  const auto it = attempts_.find(record.attempt);
  Require(it != attempts_.end() && it->second.manifest && !it->second.tombstone, "I-23: a shard of a step that is not complete was stored");
  ModelAttempt& a = it->second;
  Require(record.key == a.key && record.world_size == a.world_size, "I-4: a shard of another attempt");
  const auto [shard, taken_over] = a.shards.emplace(record.rank, ModelShard{record});
  Require(!taken_over || a.durable, "I-23: a shard that memory never had");
  Require(shard->second.record == record, "I-3: another record for one shard");
  a.stored.insert(record.rank);
}

void Model::On(const ledger::StoredManifest& e) {
  const SealRecord record = RecordOf(e.record, ShardKind::kManifest);
  ModelAttempt& a = attempts_[record.attempt];
  Require(!a.tombstone, "I-16: a step that was closed or retired became durable");
  if (a.manifest && !a.durable) {
    Require(a.stored.size() == a.world_size, "I-23: durable before every shard was confirmed");
    Require(a.WantsDurable(), "I-23: a step became durable that nobody wants durable any more");
  } else {
    // Taken over from the store, again where a kill came in between.
    Require(a.shards.empty() || (a.durable && a.shards.size() < a.world_size), "I-32: a step became durable twice");
  }
  a.ns = {record.key.uid, record.key.ns};
  a.key = record.key;
  a.world_size = record.world_size;
  a.manifest = a.durable = true;
  had_complete_.insert(a.ns);
  auto& of_ns = generations_[a.ns];
  if (auto g = of_ns.find(a.key.generation); g != of_ns.end()) g->second.ever_complete = true;
}

void Model::On(const ledger::Evicted& e) {
  const auto it = attempts_.find(e.attempt);
  Require(it != attempts_.end() && it->second.durable && it->second.HasMemory(), "I-14: a step left memory that the store does not have");
  if (const char* rule = WhyKept(it->second)) Fail(rule);
  LeaveMemory(it->second);
}

void Model::TakeOver(const ledger::Generation& generation) {
  auto [it, added] = generations_[{generation.uid, generation.ns}].emplace(generation.generation, generation);
  it->second.ever_complete |= generation.ever_complete;
}

void Model::TakeOver(const StoredStep& step) {
  const SealRecord& first = step.records.front();
  ModelAttempt& a = attempts_[first.attempt];
  if (a.tombstone) return;
  for (const ledger::Generation& generation : step.lineage) TakeOver(generation);
  a.ns = {first.key.uid, first.key.ns};
  a.key = first.key;
  a.world_size = first.world_size;
  a.manifest = a.durable = true;
  for (const SealRecord& record : step.records) a.shards.emplace(record.rank, ModelShard{record});
  generations_[a.ns].at(a.key.generation).ever_complete = true;
  had_complete_.insert(a.ns);
}

bool Model::IsMine(const NamespaceKey& ns) const {
  return std::any_of(attempts_.begin(), attempts_.end(), [&](const auto& a) { return a.second.ns == ns && (!a.second.durable || a.second.HasMemory()); });
}

}  // namespace sp::sim

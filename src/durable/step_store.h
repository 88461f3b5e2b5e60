// Steps in a store: writing one so that it is whole or not there, and finding and reading it again (docs/formats/store.md).
//
// Order of writing: the shards and their checksums, the lineage, and last the manifest, by the one conditional Create. Every call here can be repeated
// after a crash at any point: what is there already is compared, never written again. Thread-safe; calls block, bounded by their CallLimits.
#pragma once

#include <memory>
#include <vector>

#include "durable/object_store.h"
#include "format/stored_step.h"

namespace sp {

enum class ConfirmedBy : uint8_t { kStore = 0, kReadingBack = 1 };

// Brings one shard to the store and returns who has confirmed its bytes. kCorrupt: its checksums do not hash to the record's root, or what lies in
// memory or in the store does not match them.
Result<ConfirmedBy> PutShard(ObjectStore& store, const StoreAbilities& abilities, const SealRecord& record, const PutSource& shard,
                             const CallLimits& limits);

// To be called when every shard was put: from here on the step is whole. kIncomplete: an object of it has gone since, or is being deleted. kCorrupt: another
// manifest is there under this attempt's key.
Status PutManifest(ObjectStore& store, const StoreAbilities& abilities, const StoredStep& step, const CallLimits& limits);

struct FoundStep {
  StepName name;
  int64_t modified_unix_s = 0;  // When its manifest was made, by the store's clock.
};

// The whole steps of one namespace, or of all (`ns` empty), ascending by namespace and step. A store's listing may lag: a step that is not in it may
// be there all the same.
Result<std::vector<FoundStep>> ListSteps(ObjectStore& store, const std::string& ns, const CallLimits& limits);

struct StoreListing {
  std::vector<FoundStep> steps;    // As ListSteps.
  std::vector<Departure> remains;  // Objects of steps that are not whole and never will be: nobody reads them, and they take room.
};
// Remains are what a deletion left that was cut short, and what nobody has finished writing in kUnfinishedForSeconds before the namespace's newest
// manifest was made, and before `now_unix_s`, this machine's clock: one wrong clock does not make a drain that is under way look old.
Result<StoreListing> ListStore(ObjectStore& store, const std::string& ns, int64_t now_unix_s, const CallLimits& limits);
inline constexpr int64_t kUnfinishedForSeconds = 7 * 24 * 3600;  // A shard of 1 TiB is written in half of it (T_abort, I-24).

struct NewestSteps {
  std::vector<StoredStep> steps;  // Newest first: by generation, step and try.
  Status damaged;                 // Not OK: what is the newest by the store's clock cannot be read (F68); names it.
};
// Of one namespace, what was written by this uid: those that were made last, at most `count` of them, with at most `records_max` shards in all but one at
// least. What the newest is their generations decide, not a clock: a job that was rolled back saves smaller steps again.
Result<NewestSteps> ReadNewestSteps(ObjectStore& store, const std::string& ns, uint32_t uid, size_t count, size_t records_max, const CallLimits& limits);

// kNotFound: no such step, or not whole. kCorrupt: its documents are damaged or belong to another step.
Result<StoredStep> ReadStoredStep(ObjectStore& store, const StepName& name, const CallLimits& limits);

// Aborts unfinished uploads of objects that steps have, under `prefix`: those whose writers are gone, and those that were begun before
// `begun_before_unix_s`. Returns how many. Others' uploads are left alone.
Result<uint64_t> SweepUploads(ObjectStore& store, const std::string& prefix, int64_t begun_before_unix_s, const CallLimits& limits);

// Deletes the manifest first, so that the step is never half there, then the objects that such a step has and nothing else. What is left of one that was
// cut short is found by ListStore: a mark is made first and goes last. Can be repeated.
Status DeleteStep(ObjectStore& store, const StepName& name, const CallLimits& limits);

// The block checksums of a shard, which hash to the record's root. kIncomplete: the object is missing although there is a manifest.
Result<std::vector<uint32_t>> ReadChecksums(ObjectStore& store, const SealRecord& record, const CallLimits& limits);

// A small object whole. kLimit: it has more than `bytes_max`.
Result<std::string> ReadObject(ObjectStore& store, const std::string& key, uint64_t bytes_max, const CallLimits& limits);

}  // namespace sp

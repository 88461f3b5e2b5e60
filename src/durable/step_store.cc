#include "durable/step_store.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <tuple>

#include "base/plant.h"
#include "durable/verify.h"
#include "format/constants.h"
#include "format/manifest.h"

namespace sp {
namespace {

static_assert(std::endian::native == std::endian::little, "checksum lists are written as they lie in memory");

constexpr uint64_t kDocumentMax = uint64_t{256} << 20;  // A manifest of 65,536 ranks has about 25 MB.

ByteSpan AsBytesOf(const std::vector<uint32_t>& list) { return {reinterpret_cast<const uint8_t*>(list.data()), 4 * list.size()}; }

// Made, or there already with the same bytes. Read back where nobody else has compared them (I-23).
Status CreateSame(ObjectStore& store, const StoreAbilities& abilities, const std::string& key, ByteSpan content, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(const bool made, store.Create(key, content, limits));
  if (made && (abilities.verifies_checksums || SP_PLANTED(never_read_back))) return {};
  const Result<std::string> there = ReadObject(store, key, content.size(), limits);
  if (!there && there.error().code() != StatusCode::kLimit) return there.error();
  if (there && *there == AsText(content)) return {};
  return Status(StatusCode::kCorrupt, ObjectUrl(store, key) + (made ? " does not hold what was written there" : " is there already and differs") +
                                          "; it is left as it is");
}

// The first writer's: a daemon that repeats this after a restart may know more of the lineage by then, but nothing else.
Status CreateLineage(ObjectStore& store, const StoreAbilities& abilities, const StoredStep& step, const CallLimits& limits) {
  const std::string key = LineageObjectKey(step.records.front().key);
  const std::string content = MakeLineage(step.lineage);
  SP_ASSIGN_OR_RETURN(const bool made, store.Create(key, AsBytes(content), limits));
  if (made && (abilities.verifies_checksums || SP_PLANTED(never_read_back))) return {};
  SP_ASSIGN_OR_RETURN(const std::string there, ReadObject(store, key, kDocumentMax, limits));
  if (there == content) return {};
  const auto lineage = ParseLineage(there);
  const auto of = [](const ledger::Generation& g) { return std::tuple(g.ns, g.uid, g.generation, g.nonce); };
  if (!made && lineage && of(lineage->front()) == of(step.lineage.front())) return {};
  return Status(StatusCode::kCorrupt, ObjectUrl(store, key) + (made ? " does not hold what was written there" : " is there already, of another step or damaged") +
                                          "; it is left as it is");
}

// Of a step that is about to get its manifest: all of it is there. A listing may lag behind, so what it lacks is asked for by name.
Status CheckObjects(ObjectStore& store, const StoredStep& step, const CallLimits& limits) {
  const std::string prefix = StepPrefix(step.records.front().key);
  std::map<std::string, uint64_t> sizes;
  SP_RETURN_IF_ERROR(ForEachObject(store, prefix, limits, [&](const ObjectInfo& object) { sizes[object.key] = object.size_bytes; }));
  if (const std::string mark = prefix + std::string(kDeletingName); sizes.contains(mark)) {
    return Status(StatusCode::kIncomplete, ObjectUrl(store, mark) + " is there: somebody is deleting the step");
  }
  const auto check = [&](const std::string& key, uint64_t size) -> Status {
    if (const auto listed = sizes.find(key); listed != sizes.end() && listed->second == size) return {};
    const Result<ObjectInfo> there = store.Head(key, limits);
    if (there && there->size_bytes == size) return {};
    if (!there && there.error().code() != StatusCode::kNotFound) return there.error();
    return Status(StatusCode::kIncomplete, ObjectUrl(store, key) + (there ? " has another length than it had" : " has gone") + " since it was confirmed");
  };
  for (const SealRecord& record : step.records) {
    SP_RETURN_IF_ERROR(check(ShardObjectKey(record), record.length_bytes));
    SP_RETURN_IF_ERROR(check(ChecksumsObjectKey(record), 4 * BlockCount(record.length_bytes)));
  }
  return {};
}

}  // namespace

Result<std::string> ReadObject(ObjectStore& store, const std::string& key, uint64_t bytes_max, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(const ObjectInfo info, store.Head(key, limits));
  if (info.size_bytes > bytes_max) {
    return Error(StatusCode::kLimit, ObjectUrl(store, key) + " has " + std::to_string(info.size_bytes) + " bytes, more than " + std::to_string(bytes_max));
  }
  std::string text(info.size_bytes, '\0');
  if (!text.empty()) SP_RETURN_IF_ERROR(store.ReadRange(key, 0, {reinterpret_cast<uint8_t*>(text.data()), text.size()}, limits));
  return text;
}

Result<ConfirmedBy> PutShard(ObjectStore& store, const StoreAbilities& abilities, const SealRecord& record, const PutSource& shard,
                             const CallLimits& limits) {
  const std::vector<uint32_t>& crcs = shard.block_crcs;
  if (shard.size_bytes != record.length_bytes || BlockRoot(crcs) != record.block_root) {
    return Error(StatusCode::kCorrupt, "the block checksums of rank " + std::to_string(record.rank) + " do not hash to the sealed root");
  }
  const std::string key = ShardObjectKey(record);
  const Result<ObjectInfo> there = store.Head(key, limits);
  if (!there && there.error().code() != StatusCode::kNotFound) return std::unexpected(there.error());
  if (!there) SP_RETURN_IF_ERROR(store.Put(key, shard, limits));
  // What somebody wrote before is believed no more than what a store wrote that does not look at checksums (I-23).
  const bool read_back = (there.has_value() || !abilities.verifies_checksums) && !SP_PLANTED(never_read_back);
  CallLimits silent = limits;  // Nothing new reaches the store.
  silent.progress = [&limits](uint64_t) {
    if (limits.alive) limits.alive();
  };
  if (read_back) SP_RETURN_IF_ERROR(VerifyObject(store, key, record.length_bytes, crcs, silent));
  SP_RETURN_IF_ERROR(CreateSame(store, abilities, ChecksumsObjectKey(record), AsBytesOf(crcs), silent));
  return read_back ? ConfirmedBy::kReadingBack : ConfirmedBy::kStore;
}

Status PutManifest(ObjectStore& store, const StoreAbilities& abilities, const StoredStep& step, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckObjects(store, step, limits));
  SP_RETURN_IF_ERROR(CreateLineage(store, abilities, step, limits));
  return CreateSame(store, abilities, ManifestObjectKey(step.records.front().key), AsBytes(MakeManifest(step.records)), limits);
}

Result<std::vector<FoundStep>> ListSteps(ObjectStore& store, const std::string& ns, const CallLimits& limits) {
  std::vector<FoundStep> found;
  SP_RETURN_IF_ERROR(ForEachObject(store, ns.empty() ? "" : ns + "/step-", limits, [&](const ObjectInfo& object) {
    if (auto name = ParseManifestKey(object.key)) found.push_back({std::move(*name), object.modified_unix_s});
  }));
  std::ranges::sort(found, {}, &FoundStep::name);
  return found;
}

Result<StoreListing> ListStore(ObjectStore& store, const std::string& ns, int64_t now_unix_s, const CallLimits& limits) {
  struct Folder {
    std::optional<int64_t> manifest;  // When it was made.
    int64_t newest = 0;               // Object.
    bool deleting = false;
  };
  std::map<StepName, Folder> folders;
  std::map<std::string, int64_t> newest_manifest;  // By namespace.
  SP_RETURN_IF_ERROR(ForEachObject(store, ns.empty() ? "" : ns + "/step-", limits, [&](const ObjectInfo& info) {
    const std::optional<StepObject> object = ParseStepObjectKey(info.key);
    if (!object || !IsOursInStep(object->file)) return;
    Folder& folder = folders[object->step];
    folder.newest = std::max(folder.newest, info.modified_unix_s);
    folder.deleting = folder.deleting || object->file == kDeletingName;
    if (!ParseManifestKey(info.key)) return;
    folder.manifest = info.modified_unix_s;
    int64_t& newest = newest_manifest[object->step.ns];
    newest = std::max(newest, info.modified_unix_s);
  }));
  StoreListing listing;
  for (const auto& [step, folder] : folders) {
    const auto newest = newest_manifest.find(step.ns);
    if (folder.manifest) listing.steps.push_back({step, *folder.manifest});
    else if (folder.deleting) listing.remains.push_back({step, "its deletion was cut short"});
    else if (newest != newest_manifest.end() && folder.newest < std::min(newest->second, now_unix_s) - kUnfinishedForSeconds) {
      listing.remains.push_back({step, "nobody has finished writing it in " + std::to_string(kUnfinishedForSeconds / (24 * 3600)) + " days"});
    }
  }
  return listing;
}

Result<NewestSteps> ReadNewestSteps(ObjectStore& store, const std::string& ns, uint32_t uid, size_t count, size_t records_max, const CallLimits& limits) {
  constexpr size_t kLooks = 1024;  // At manifests, those of others included.
  SP_ASSIGN_OR_RETURN(std::vector<FoundStep> found, ListSteps(store, ns, limits));
  // Those made in one second: the larger step first.
  std::ranges::stable_sort(found, std::ranges::greater(), [](const FoundStep& f) { return std::pair(f.modified_unix_s, f.name.step); });
  NewestSteps newest;
  for (size_t i = 0; i < std::min(found.size(), kLooks) && newest.steps.size() < 4 * count; ++i) {
    Result<StoredStep> step = ReadStoredStep(store, found[i].name, limits);
    if (step) {
      if (step->records.front().key.uid == uid) newest.steps.push_back(std::move(*step));
      continue;
    }
    const StatusCode code = step.error().code();
    if (code == StatusCode::kNotFound) continue;  // Deleted meanwhile.
    // Said of this step. Another error is of the store.
    const bool of_the_step = code == StatusCode::kCorrupt || code == StatusCode::kIncomplete || code == StatusCode::kLimit;
    if (!of_the_step) return std::unexpected(step.error());
    if (newest.steps.empty() && newest.damaged.ok()) newest.damaged = step.error();
  }
  const auto place = [](const StoredStep& s) {
    const AttemptKey& key = s.records.front().key;
    return std::tuple(key.generation, key.step, key.try_number);
  };
  std::ranges::sort(newest.steps, std::ranges::greater(), place);
  size_t kept = 0, records = 0;
  while (kept < std::min(newest.steps.size(), count) && (kept == 0 || records + newest.steps[kept].records.size() <= records_max)) {
    records += newest.steps[kept++].records.size();
  }
  newest.steps.resize(kept);
  return newest;
}

Result<StoredStep> ReadStoredStep(ObjectStore& store, const StepName& name, const CallLimits& limits) {
  const std::string prefix = name.Prefix();
  const auto damaged = [&](const std::string& what, const std::string& why) {
    return Error(StatusCode::kCorrupt, ObjectUrl(store, prefix + what) + ": " + why);
  };
  StoredStep step;
  SP_ASSIGN_OR_RETURN(const std::string manifest, ReadObject(store, prefix + "manifest.json", kDocumentMax, limits));
  Result<std::vector<SealRecord>> records = ParseManifest(manifest);
  if (!records) return damaged("manifest.json", records.error().message());
  step.records = std::move(*records);
  const AttemptKey& key = step.records.front().key;
  if (StepPrefix(key) != prefix) return damaged("manifest.json", "is the manifest of another step");
  const Result<std::string> lineage = ReadObject(store, prefix + "lineage.json", kDocumentMax, limits);
  if (!lineage && lineage.error().code() == StatusCode::kNotFound) {
    return Error(StatusCode::kIncomplete, ObjectUrl(store, prefix + "lineage.json") + " is missing, although the step's manifest is there");
  }
  if (!lineage) return std::unexpected(lineage.error());
  Result<std::vector<ledger::Generation>> generations = ParseLineage(*lineage);
  if (!generations) return damaged("lineage.json", generations.error().message());
  step.lineage = std::move(*generations);
  const ledger::Generation& own = step.lineage.front();
  if (own.ns != key.ns || own.uid != key.uid || own.generation != key.generation || own.nonce != key.nonce) {
    return damaged("lineage.json", "is the lineage of another step");
  }
  return step;
}

Result<std::vector<uint32_t>> ReadChecksums(ObjectStore& store, const SealRecord& record, const CallLimits& limits) {
  const std::string key = ChecksumsObjectKey(record);
  const std::string missing = " is missing, although the step's manifest is there";
  std::vector<uint32_t> crcs(BlockCount(record.length_bytes));
  const Status read = store.ReadRange(key, 0, {reinterpret_cast<uint8_t*>(crcs.data()), 4 * crcs.size()}, limits);
  if (read.code() == StatusCode::kNotFound) return Error(StatusCode::kIncomplete, ObjectUrl(store, key) + missing);
  SP_RETURN_IF_ERROR(read);
  if (BlockRoot(crcs) != record.block_root) return Error(StatusCode::kCorrupt, ObjectUrl(store, key) + " does not hash to the root in the manifest");
  return crcs;
}

Status DeleteStep(ObjectStore& store, const StepName& name, const CallLimits& limits) {
  const std::string prefix = name.Prefix(), mark = prefix + std::string(kDeletingName);
  const Result<bool> marked = store.Create(mark, AsBytes("{}"), limits);
  // Of a full disk more must be deletable than a mark needs room.
  if (!marked && marked.error().code() != StatusCode::kNoSpace) return marked.error();
  SP_RETURN_IF_ERROR(store.Delete(prefix + "manifest.json", limits));
  std::vector<std::string> ours;
  SP_RETURN_IF_ERROR(ForEachObject(store, prefix, limits, [&](const ObjectInfo& object) {
    if (object.key != mark && IsOursInStep(std::string_view(object.key).substr(prefix.size()))) ours.push_back(object.key);
  }));
  for (const std::string& key : ours) SP_RETURN_IF_ERROR(store.Delete(key, limits));
  return store.Delete(mark, limits);
}

Result<uint64_t> SweepUploads(ObjectStore& store, const std::string& prefix, int64_t begun_before_unix_s, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(const std::vector<UnfinishedUpload> uploads, store.ListUploads(prefix, limits));
  uint64_t aborted = 0;
  Status first;  // One that may not be aborted keeps no other one.
  for (const UnfinishedUpload& upload : uploads) {
    const bool ours = upload.key.starts_with(kProbeFolder) || ParseStepObjectKey(upload.key).has_value();
    if (!ours || (!upload.abandoned && upload.started_unix_s >= begun_before_unix_s)) continue;
    const Status status = store.AbortUpload(upload, limits);
    if (status.ok() || status.code() == StatusCode::kNotFound) ++aborted;
    else if (first.ok()) first = status;
  }
  if (!first.ok()) return std::unexpected(first);
  return aborted;
}

}  // namespace sp

// A whole step as the durable tier keeps it: names of its objects, and the document that says where its lineage goes on (docs/formats/store.md).
// Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/ledger.h"
#include "format/seal_record.h"

namespace sp {

struct StoredStep {
  std::vector<SealRecord> records;          // Of its shards, ranks 0 to W-1.
  std::vector<ledger::Generation> lineage;  // The generation that wrote it, its parent, and so on.
  friend bool operator==(const StoredStep&, const StoredStep&) = default;
};

// Keys, below the base of the store. They contain the attempt, so no two saves ever share one (I-24).
std::string StepPrefix(const AttemptKey& key);             // "run-3/step-40/<32 hex>/"
std::string ShardObjectKey(const SealRecord& record);      // StepPrefix + "rank-0.safetensors": the shard's very bytes.
std::string ChecksumsObjectKey(const SealRecord& record);  // StepPrefix + "rank-0.crc32c": u32 little-endian per 1 MiB block.
std::string LineageObjectKey(const AttemptKey& key);       // StepPrefix + "lineage.json"
std::string ManifestObjectKey(const AttemptKey& key);      // StepPrefix + "manifest.json": created last; with it the step is whole.
inline constexpr std::string_view kDeletingName = "deleting.json";  // Behind StepPrefix: somebody has begun to delete the step.

// What a manifest's key says. nullopt: the key is not that of a manifest.
struct StepName {
  std::string ns;
  uint64_t step = 0;
  Id128 attempt;
  std::string Prefix() const;
  friend auto operator<=>(const StepName&, const StepName&) = default;
};
std::optional<StepName> ParseManifestKey(std::string_view key);

// Of any object below a step's prefix. nullopt: the key is under no step.
struct StepObject {
  StepName step;
  std::string file;  // Behind the prefix: "rank-0.crc32c".
};
std::optional<StepObject> ParseStepObjectKey(std::string_view key);

// One of a step's own objects, by its name behind the prefix; everything else is somebody else's.
bool IsOursInStep(std::string_view file);

// A step that is to go, or what is left of one.
struct Departure {
  StepName step;
  std::string why;  // For people.
};

// The lineage as one line of JSON; its bytes depend on the generations only.
std::string MakeLineage(const std::vector<ledger::Generation>& lineage);
// kProtocol: malformed, another version, a parent that is not older, or generations of more than one namespace.
Result<std::vector<ledger::Generation>> ParseLineage(std::string_view json);

}  // namespace sp

#include "format/stored_step.h"

#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "format/constants.h"
#include "format/names.h"

namespace sp {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kStepWord = "step-";
constexpr std::string_view kManifestName = "manifest.json";
constexpr std::string_view kLineageName = "lineage.json";
constexpr uint32_t kLineageVersion = 1;
constexpr size_t kLineageMax = 100'000;  // Generations in one document.

std::string RankKey(const SealRecord& record, const char* extension) {
  return StepPrefix(record.key) + "rank-" + std::to_string(record.rank) + extension;
}

std::string PrefixOf(const std::string& ns, uint64_t step, const Id128& attempt) {
  return ns + "/" + std::string(kStepWord) + std::to_string(step) + "/" + attempt.ToHex() + "/";
}

// False: it is no whole number that `out` can hold. The library would convert "1.9e19", and that is undefined behaviour.
template <typename T>
bool TakeNumber(const Json& object, const char* name, T* out) {
  const Json& number = object.at(name);
  if (!number.is_number_unsigned() || number.get<uint64_t>() > std::numeric_limits<T>::max()) return false;
  *out = static_cast<T>(number.get<uint64_t>());
  return true;
}

}  // namespace

std::string StepPrefix(const AttemptKey& key) { return PrefixOf(key.ns, key.step, key.AttemptId()); }
std::string StepName::Prefix() const { return PrefixOf(ns, step, attempt); }
std::string ShardObjectKey(const SealRecord& record) { return RankKey(record, ".safetensors"); }
std::string ChecksumsObjectKey(const SealRecord& record) { return RankKey(record, ".crc32c"); }
std::string LineageObjectKey(const AttemptKey& key) { return StepPrefix(key) + std::string(kLineageName); }
std::string ManifestObjectKey(const AttemptKey& key) { return StepPrefix(key) + std::string(kManifestName); }

std::optional<StepObject> ParseStepObjectKey(std::string_view key) {
  StepName name;
  const size_t slash = key.find('/');
  if (slash == std::string_view::npos) return std::nullopt;
  name.ns = key.substr(0, slash);
  if (!CheckNamespace(name.ns).ok()) return std::nullopt;
  std::string_view rest = key.substr(slash + 1);
  if (!rest.starts_with(kStepWord)) return std::nullopt;
  rest.remove_prefix(kStepWord.size());
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), name.step);
  if (error != std::errc() || name.step > kStepMax) return std::nullopt;
  rest.remove_prefix(static_cast<size_t>(end - rest.data()));
  if (rest.size() < 34 || rest[0] != '/' || !Id128::FromHex(rest.substr(1, 32), &name.attempt)) return std::nullopt;
  // One spelling only: "step-007" is somebody else's.
  const std::string prefix = name.Prefix();
  if (!key.starts_with(prefix)) return std::nullopt;
  return StepObject{std::move(name), std::string(key.substr(prefix.size()))};
}

std::optional<StepName> ParseManifestKey(std::string_view key) {
  std::optional<StepObject> object = ParseStepObjectKey(key);
  if (!object || object->file != kManifestName) return std::nullopt;
  return std::move(object->step);
}

bool IsOursInStep(std::string_view file) {
  const bool shard = file.starts_with("rank-") && (file.ends_with(".safetensors") || file.ends_with(".crc32c"));
  return shard || file == kManifestName || file == kLineageName || file == kDeletingName;
}

std::string MakeLineage(const std::vector<ledger::Generation>& lineage) {
  Json list = Json::array();
  for (const ledger::Generation& g : lineage) {
    Json entry = {{"namespace", g.ns},   {"uid", g.uid},          {"generation", g.generation}, {"nonce", g.nonce.ToHex()},
                  {"world_size", g.world_size}, {"fresh", g.fresh}, {"ever_complete", g.ever_complete}, {"parent", Json()}};
    if (g.has_parent) entry["parent"] = {{"attempt", g.parent.ToHex()}, {"generation", g.parent_generation}, {"step", g.parent_step}};
    list.push_back(std::move(entry));
  }
  return Json{{"format", "safepoint-lineage"}, {"version", kLineageVersion}, {"generations", std::move(list)}}.dump();
}

Result<std::vector<ledger::Generation>> ParseLineage(std::string_view text) {
  const auto bad = [](const std::string& why) { return Error(StatusCode::kProtocol, "lineage: " + why); };
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded() || !json.is_object()) return bad("is no JSON object");
  std::vector<ledger::Generation> lineage;
  try {
    if (json.at("format") != "safepoint-lineage") return bad("is another document");
    if (json.at("version") != kLineageVersion) return bad("unknown version");
    const Json& list = json.at("generations");
    if (!list.is_array() || list.empty() || list.size() > kLineageMax) return bad("no generations");
    for (const Json& entry : list) {
      ledger::Generation g;
      g.ns = entry.at("namespace").get<std::string>();
      if (!TakeNumber(entry, "uid", &g.uid) || !TakeNumber(entry, "generation", &g.generation) || !TakeNumber(entry, "world_size", &g.world_size)) {
        return bad("a number");
      }
      g.fresh = entry.at("fresh").get<bool>();
      g.ever_complete = entry.at("ever_complete").get<bool>();
      if (!Id128::FromHex(entry.at("nonce").get<std::string>(), &g.nonce)) return bad("a nonce");
      if (const Json& parent = entry.at("parent"); !parent.is_null()) {
        g.has_parent = true;
        if (!Id128::FromHex(parent.at("attempt").get<std::string>(), &g.parent)) return bad("a parent");
        if (!TakeNumber(parent, "generation", &g.parent_generation) || !TakeNumber(parent, "step", &g.parent_step)) return bad("a parent's number");
      }
      lineage.push_back(std::move(g));
    }
  } catch (const Json::exception&) {
    return bad("a field is missing, or of another type");
  }
  for (size_t i = 0; i < lineage.size(); ++i) {
    const ledger::Generation& g = lineage[i];
    if (!CheckNamespace(g.ns).ok() || g.world_size == 0 || g.world_size > kWorldSizeMax || g.parent_step > kStepMax) return bad("a value out of range");
    if (g.ns != lineage[0].ns || g.uid != lineage[0].uid) return bad("generations of two namespaces");
    if (i > 0 && (!lineage[i - 1].has_parent || lineage[i - 1].parent_generation != g.generation || g.generation >= lineage[i - 1].generation)) {
      return bad("generation " + std::to_string(g.generation) + " is not the parent of the one before it");
    }
  }
  // One spelling only, as with the manifest: what a reader would drop silently is refused.
  if (MakeLineage(lineage) != text) return bad("is not the canonical text");
  return lineage;
}

}  // namespace sp

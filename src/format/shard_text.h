// Writes the static part of a shard's header (docs/formats/shard.md), and reads what was written in this very form, quickly. Other valid forms are
// for parsers of JSON (ShardIndex::ParseStaticPart). Pure.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace sp {

// One tensor of the file. `shape` and `offsets` (of the piece in its global tensor) have one number per dimension.
struct StaticEntry {
  std::string_view key;    // Valid UTF-8.
  std::string_view dtype;  // safetensors' name.
  std::span<const uint64_t> shape, offsets;
  uint64_t begin = 0, end = 0;  // In the data section.
};

// `safepoint`: the JSON text of that name, compact and ASCII. The result is ASCII, padded with spaces to a multiple of kAlignBytes. The keys
// are the caller's to keep apart and the offsets to get right: nothing is checked here.
std::string WriteStaticPart(std::span<const StaticEntry> entries, std::string_view safepoint);

// Appends `text` (valid UTF-8) as a JSON string with quotes; other characters than printable ASCII are escaped.
void AppendJsonString(std::string& out, std::string_view text);

struct StaticTexts {
  std::string sharding, safepoint;  // The JSON texts of DCP_SHARDING_INFO and safepoint.
  size_t entries = 0;               // Where the tensors begin, for ReadEntries.
};

// nullopt: the text has another form than WriteStaticPart gives it.
std::optional<StaticTexts> SplitStaticPart(std::string_view static_part);

// Calls `add` for every tensor, in file order, without offsets, which are in another text; the views are valid during the call. `text` begins where
// StaticTexts.entries says. False: the text has another form (keys with escapes included), or `add` returned false. What the numbers mean is not
// checked.
bool ReadEntries(std::string_view text, const std::function<bool(const StaticEntry&)>& add);

}  // namespace sp

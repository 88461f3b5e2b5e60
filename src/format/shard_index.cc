#include "format/shard_index.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <unordered_map>

#include "format/constants.h"
#include "format/json_events.h"

namespace sp {
namespace {

using Shape = std::vector<uint64_t>;

Status Malformed(const std::string& why) { return {StatusCode::kProtocol, "shard header: " + why}; }

// Bits of one element by the names that safetensors knows.
const std::unordered_map<std::string_view, uint32_t>& Dtypes() {
  static const std::unordered_map<std::string_view, uint32_t> kBits = {
      {"BOOL", 8},     {"F4", 4},           {"F6_E2M3", 6},     {"F6_E3M2", 6}, {"U8", 8},   {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
      {"F8_E8M0", 8},  {"F8_E4M3FNUZ", 8},  {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16}, {"F16", 16}, {"BF16", 16},   {"I32", 32},
      {"U32", 32},     {"F32", 32},         {"C64", 64},        {"F64", 64},    {"I64", 64}, {"U64", 64}};
  return kBits;
}
// As it stands in the table, which stays; empty for another name.
std::string_view KnownDtype(std::string_view dtype) {
  const auto found = Dtypes().find(dtype);
  return found == Dtypes().end() ? std::string_view() : found->first;
}

std::optional<uint64_t> Product(const Shape& shape) {
  uint64_t product = 1;
  // A zero makes the product zero whatever else is in the shape, so it must not hide behind an overflow.
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  for (uint64_t n : shape) {
    if (__builtin_mul_overflow(product, n, &product)) return std::nullopt;
  }
  return product;
}

// Keys, each with a list of at most kTensorRankMax numbers: their count, then they. The arrays come one after the other.
class ShapeMap : public PackedMap {
 public:
  void AddKey(std::string_view key) {
    PackedMap::AddKey(key);
    count_at_ = value().size();
    value().push_back(0);
  }
  bool AddNumber(uint64_t number) {
    if (static_cast<uint32_t>(value()[count_at_]) == kTensorRankMax) return false;
    ++value()[count_at_];
    PackNumber(value(), number);
    return true;
  }
  std::optional<Shape> FindShape(std::string_view key) const {
    const auto packed = Find(key);
    if (!packed) return std::nullopt;
    Shape shape;
    size_t at = 1;
    UnpackNumbers(*packed, at, static_cast<size_t>((*packed)[0]), shape);
    return shape;
  }

 private:
  size_t count_at_ = 0;
};

struct Entry {  // One tensor as the file states it.
  std::string key;
  std::string_view dtype;
  Shape shape;
  uint64_t data_offsets[2] = {0, 0};
  uint8_t offsets_given = 0;
};

// The header itself: {"__metadata__": {name: text}, key: {"dtype", "shape", "data_offsets"}}.
class HeaderEvents : public JsonEvents {
 public:
  std::vector<Entry> entries;
  std::string sharding_info, safepoint;
  bool has_sharding_info = false, has_safepoint = false;

  // Repeated keys are looked for when all are there. Then `sorted` has the places of the entries in the order of their keys.
  Status CheckKeys() {
    std::string twice;
    if (!metadata_.Sort(&twice)) return Repeated(twice);
    sorted.resize(entries.size());
    std::iota(sorted.begin(), sorted.end(), 0u);
    const auto key = [&](uint32_t i) -> const std::string& { return entries[i].key; };
    std::ranges::sort(sorted, {}, key);
    const auto found = std::ranges::adjacent_find(sorted, {}, key);
    return found == sorted.end() ? Status() : Repeated(key(*found));
  }
  std::optional<uint32_t> Find(std::string_view key) const {
    const auto found = std::ranges::lower_bound(sorted, key, {}, [&](uint32_t i) { return std::string_view(entries[i].key); });
    if (found == sorted.end() || entries[*found].key != key) return std::nullopt;
    return *found;
  }

 private:
  enum Member : uint8_t { kDtype = 1, kShape = 2, kOffsets = 4, kAll = 7 };
  static Status Repeated(std::string_view key) { return Malformed("repeated key at " + std::string(key.substr(0, 200))); }
  bool OnKey() override {
    if (depth() == 1) return KeyAt(1).size() <= kTensorNameBytesMax || Fail("tensor name longer than " + std::to_string(kTensorNameBytesMax) + " bytes");
    const std::string& key = KeyAt(2);
    if (InMetadata()) {
      if (key.size() > UINT16_MAX) return Fail("too long a key in __metadata__");
      metadata_.AddKey(key);
      return true;
    }
    const uint8_t member = key == "dtype" ? kDtype : key == "shape" ? kShape : key == "data_offsets" ? kOffsets : 0;
    if (member == 0) return Fail("unknown dtype or field" + Where());
    if (members_ & member) return Fail("repeated key" + Where());
    members_ |= member;
    return true;
  }
  bool OnObject() override {
    if (depth() != 1) return Unexpected("object");
    members_ = 0;
    if (InMetadata()) {
      if (has_metadata_) return Fail("repeated key" + Where());
      return has_metadata_ = true;
    }
    if (entries.size() == kTensorsPerShardMax) return Fail("more than " + std::to_string(kTensorsPerShardMax) + " tensors");
    entries.push_back({KeyAt(1), {}, {}});
    return true;
  }
  bool OnArray() override {
    return (depth() == 2 && !InMetadata() && (KeyAt(2) == "shape" || KeyAt(2) == "data_offsets")) || Unexpected("array");
  }
  bool OnEnd() override {
    if (depth() == 2 && KeyAt(2) == "shape") entries.back().shape.shrink_to_fit();
    if (depth() != 1 || InMetadata()) return true;
    return (members_ == kAll && !entries.back().dtype.empty()) || Fail("tensor without dtype, shape or data_offsets" + Where());
  }
  bool OnUint(uint64_t value) override {
    if (depth() != 3) return Unexpected("number");
    Entry& entry = entries.back();
    if (KeyAt(2) == "shape") {
      if (entry.shape.size() == kTensorRankMax) return Fail("too many dimensions" + Where());
      entry.shape.push_back(value);
      return true;
    }
    if (entry.offsets_given == 2) return Fail("more than two data offsets" + Where());
    entry.data_offsets[entry.offsets_given++] = value;
    return true;
  }
  bool OnText(std::string& value) override {
    if (depth() != 2) return Unexpected("string");
    if (!InMetadata()) {
      if (KeyAt(2) == "dtype") entries.back().dtype = KnownDtype(value);
      return !entries.back().dtype.empty() || Fail("unknown dtype or field" + Where());
    }
    if (KeyAt(2) == "DCP_SHARDING_INFO") has_sharding_info = true, sharding_info = std::move(value);
    if (KeyAt(2) == "safepoint") has_safepoint = true, safepoint = std::move(value);
    return true;  // Other metadata texts are for other readers.
  }
  bool InMetadata() const { return KeyAt(1) == "__metadata__"; }

  std::vector<uint32_t> sorted;
  PackedMap metadata_;
  bool has_metadata_ = false;
  uint8_t members_ = 0;  // Of the tensor that is being read.
};

// {key: {"saved_offsets": [..]}}
class ShardingEvents : public JsonEvents {
 public:
  ShapeMap offsets;

 private:
  bool OnObject() override {
    if (depth() != 1) return Unexpected("object");
    if (KeyAt(1).size() > kTensorNameBytesMax) return Fail("tensor name longer than " + std::to_string(kTensorNameBytesMax) + " bytes");
    offsets.AddKey(KeyAt(1));
    return true;
  }
  bool OnKey() override {
    if (depth() == 1) {
      seen_ = false;
      return true;
    }
    if (KeyAt(2) != "saved_offsets" || seen_) return Fail("unknown or repeated field" + Where());
    return seen_ = true;
  }
  bool OnArray() override { return depth() == 2 || Unexpected("array"); }
  bool OnUint(uint64_t value) override {
    if (depth() != 3) return Unexpected("number");
    return offsets.AddNumber(value) || Fail("too many dimensions" + Where());
  }
  bool OnEnd() override { return depth() != 1 || seen_ || Fail("no saved_offsets" + Where()); }

  bool seen_ = false;
};

// The safepoint text. Fields that this version does not know, and those that only readers of values need ("path"), are skipped.
class SafepointEvents : public JsonEvents {
 public:
  uint64_t version = 0;
  ShapeMap global, raw_shape;
  PackedMap alias, name;  // Values are texts.
  PackedMap fields;       // Without values.
  TextList expected;

 private:
  enum class Field { kVersion, kGlobal, kRaw, kAlias, kName, kExpected, kOther };
  bool OnKey() override {
    if (depth() == 1) {
      const std::string& k = KeyAt(1);
      field_ = k == "version" ? Field::kVersion : k == "global" ? Field::kGlobal : k == "raw" ? Field::kRaw : k == "alias" ? Field::kAlias
               : k == "name" ? Field::kName : k == "expected" ? Field::kExpected : Field::kOther;
      if (k.size() > UINT16_MAX) return Fail("too long a key");
      fields.AddKey(k);
      // Seen at once where it matters: the maps must not be filled by two fields.
      const bool repeated = field_ != Field::kOther && (seen_ & 1u << static_cast<int>(field_));
      seen_ |= 1u << static_cast<int>(field_);
      return !repeated || Fail("repeated key" + Where());
    }
    if (field_ == Field::kRaw && depth() == 3) {
      if (KeyAt(3) == "shape") {
        if (raw_has_shape_) return Fail("repeated key" + Where());
        raw_has_shape_ = true;
      }
      return true;
    }
    if (depth() != 2 || field_ == Field::kOther) return true;
    if (KeyAt(2).size() > kTensorNameBytesMax) return Fail("tensor name longer than " + std::to_string(kTensorNameBytesMax) + " bytes");
    if (field_ == Field::kGlobal) global.AddKey(KeyAt(2));
    if (field_ == Field::kRaw) raw_has_shape_ = false, raw_shape.AddKey(KeyAt(2));
    return true;
  }
  bool OnObject() override {
    const bool allowed = field_ == Field::kOther || (depth() == 1 && field_ != Field::kVersion && field_ != Field::kExpected) ||
                         (depth() == 2 && field_ == Field::kRaw);
    return allowed || Unexpected("object");
  }
  bool OnArray() override {
    const bool allowed = field_ == Field::kOther || (depth() == 1 && field_ == Field::kExpected) || (depth() == 2 && field_ == Field::kGlobal) ||
                         (depth() == 3 && field_ == Field::kRaw && KeyAt(3) == "shape");
    return allowed || Unexpected("array");
  }
  bool OnEnd() override {
    if (field_ != Field::kRaw || depth() != 2) return true;
    return raw_has_shape_ || Fail("no shape" + Where());
  }
  bool OnUint(uint64_t value) override {
    if (field_ == Field::kOther) return true;
    if (field_ == Field::kVersion && depth() == 1) {
      version = value;
      return true;
    }
    if (field_ == Field::kGlobal && depth() == 3) return global.AddNumber(value) || Fail("too many dimensions" + Where());
    if (field_ == Field::kRaw && depth() == 4) return raw_shape.AddNumber(value) || Fail("too many dimensions" + Where());
    return Unexpected("number");
  }
  bool OnText(std::string& value) override {
    if (field_ == Field::kOther) return true;
    if (field_ == Field::kRaw && depth() == 3 && KeyAt(3) == "dtype") return true;
    if (value.size() > kTensorNameBytesMax) return Fail("tensor name longer than " + std::to_string(kTensorNameBytesMax) + " bytes");
    if (field_ == Field::kAlias && depth() == 2) return AddText(alias, value);
    if (field_ == Field::kName && depth() == 2) return AddText(name, value);
    if (field_ != Field::kExpected || depth() != 2) return Unexpected("string");
    if (expected.size() == kTensorsPerShardMax) return Fail("more than " + std::to_string(kTensorsPerShardMax) + " expected names");
    expected.Add(value);
    return true;
  }
  bool OnOther() override { return field_ == Field::kOther || Unexpected("value"); }
  bool AddText(PackedMap& map, const std::string& text) {
    map.AddKey(KeyAt(2));
    PackText(map.value(), text);
    return true;
  }

  Field field_ = Field::kOther;
  bool raw_has_shape_ = false;
  uint32_t seen_ = 0;  // Known fields that were there.
};

std::optional<std::string_view> FindText(const PackedMap& map, std::string_view key) {
  const auto packed = map.Find(key);
  if (!packed) return std::nullopt;
  size_t at = 0;
  return UnpackText(*packed, at);
}

// The piece lies inside the global tensor and its bytes are as many as dtype and shape say.
Status CheckPiece(const TensorPiece& p, const Shape& stored_shape) {
  const auto bad = [&](const char* why) { return Malformed("tensor " + p.name + ": " + why); };
  const std::optional<uint64_t> elements = Product(stored_shape);
  uint64_t bits;
  if (!elements || __builtin_mul_overflow(*elements, uint64_t{Dtypes().at(p.dtype)}, &bits)) return bad("size overflows");
  if (p.begin > p.end || p.end > kShardBytesMax) return bad("bad data offsets");
  if (bits % 8 != 0 || bits / 8 != p.end - p.begin) return bad("data offsets contradict dtype and shape");
  if (!Product(p.global_shape) || !Product(p.shape)) return bad("size overflows");
  if (p.offsets.size() != p.shape.size() || p.global_shape.size() != p.shape.size()) return bad("offsets, shape and global shape differ in dimensions");
  for (size_t d = 0; d < p.shape.size(); ++d) {
    uint64_t piece_end;
    if (__builtin_add_overflow(p.offsets[d], p.shape[d], &piece_end) || piece_end > p.global_shape[d]) return bad("piece exceeds the global shape");
  }
  return {};
}

// As safetensors checks it: in order of their offsets, each piece begins where the one before it ended.
Result<uint64_t> CheckTiling(const std::vector<TensorPiece>& pieces) {
  std::vector<uint32_t> order(pieces.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return std::pair(pieces[a].begin, pieces[a].end) < std::pair(pieces[b].begin, pieces[b].end);
  });
  uint64_t end = 0;
  for (uint32_t i : order) {
    if (pieces[i].begin != end) {
      const char* what = pieces[i].begin < end ? " overlaps the one before it" : " leaves a gap before it";
      return std::unexpected(Malformed("tensor " + pieces[i].name + what));
    }
    end = pieces[i].end;
  }
  return end;
}

// What speaks of a tensor must speak of one that is there.
bool AllKnown(const PackedMap& map, const HeaderEvents& header, const PackedMap& alias) {
  for (size_t i = 0; i < map.size(); ++i) {
    if (!header.Find(map.Key(i)) && !alias.Contains(map.Key(i))) return false;
  }
  return true;
}

Status AddPieces(ShardIndex& index, HeaderEvents& header, const ShardingEvents& sharding, const SafepointEvents& info) {
  index.pieces.reserve(header.entries.size());
  for (Entry& e : header.entries) {
    auto offsets = sharding.offsets.FindShape(e.key);
    if (!offsets) return Malformed("tensor " + e.key + " is missing in DCP_SHARDING_INFO");
    if (e.offsets_given != 2) return Malformed("tensor " + e.key + ": bad data offsets");
    auto raw = info.raw_shape.FindShape(e.key);
    const bool is_raw = raw.has_value();
    Shape shape = is_raw ? std::move(*raw) : std::move(e.shape);
    auto global = info.global.FindShape(e.key);
    if (!global) global = shape;
    const auto name = FindText(info.name, e.key);
    TensorPiece piece{name ? std::string(*name) : e.key, std::string(e.dtype), std::move(shape), std::move(*offsets), std::move(*global),
                      e.data_offsets[0], e.data_offsets[1]};
    SP_RETURN_IF_ERROR(CheckPiece(piece, is_raw ? e.shape : piece.shape));
    index.pieces.push_back(std::move(piece));
  }
  return {};
}

Status AddAliases(ShardIndex& index, const HeaderEvents& header, const SafepointEvents& info) {
  if (index.pieces.size() + info.alias.size() > kTensorsPerShardMax) return Malformed("too many aliases");
  index.aliases.reserve(info.alias.size());
  for (size_t i = 0; i < info.alias.size(); ++i) {
    const std::string_view alias = info.alias.Key(i);
    size_t at = 0;
    const auto target = header.Find(UnpackText(info.alias.ValueOf(i), at));
    if (!target || header.Find(alias)) return Malformed("alias " + std::string(alias) + " contradicts the tensors");
    index.aliases.push_back({std::string(FindText(info.name, alias).value_or(alias)), *target});
  }
  return {};
}

Result<ShardIndex> Assemble(HeaderEvents& header, const ShardingEvents& sharding, SafepointEvents& info) {
  ShardIndex index;
  SP_RETURN_IF_ERROR(AddPieces(index, header, sharding, info));
  SP_ASSIGN_OR_RETURN(index.data_bytes, CheckTiling(index.pieces));
  for (const PackedMap* map : {static_cast<const PackedMap*>(&sharding.offsets), static_cast<const PackedMap*>(&info.global),
                               static_cast<const PackedMap*>(&info.raw_shape), static_cast<const PackedMap*>(&info.name)}) {
    if (!AllKnown(*map, header, info.alias)) return std::unexpected(Malformed("metadata about a tensor that is not in the file"));
  }
  SP_RETURN_IF_ERROR(AddAliases(index, header, info));
  index.expected = std::move(info.expected);
  return index;
}

// The texts go as soon as they are read: of a hostile header, each may be as long as the whole.
Status ReadTexts(ByteSpan static_part, HeaderEvents& header, ShardingEvents& sharding, SafepointEvents& info) {
  {
    std::string text = R"({"__metadata__":{"_":"")";  // Stands for the dynamic part, so that the rest is JSON.
    text += AsText(static_part);
    SP_RETURN_IF_ERROR(header.Parse(text, "shard header"));
  }
  SP_RETURN_IF_ERROR(header.CheckKeys());
  if (!header.has_sharding_info || !header.has_safepoint) return Malformed("no DCP_SHARDING_INFO or no safepoint text");
  SP_RETURN_IF_ERROR(sharding.Parse(header.sharding_info, "DCP_SHARDING_INFO"));
  header.sharding_info = std::string();
  SP_RETURN_IF_ERROR(info.Parse(header.safepoint, "safepoint text"));
  header.safepoint = std::string();
  std::string twice;
  for (PackedMap* map : {static_cast<PackedMap*>(&sharding.offsets), static_cast<PackedMap*>(&info.global), static_cast<PackedMap*>(&info.raw_shape),
                         &info.alias, &info.name, &info.fields}) {
    if (!map->Sort(&twice)) return Malformed("repeated key at " + twice.substr(0, 200));
  }
  return {};
}

}  // namespace

Result<ShardIndex> ShardIndex::ParseStaticPart(ByteSpan static_part) {
  if (static_part.size() > kHeaderBytesMax) return std::unexpected(Malformed("longer than " + std::to_string(kHeaderBytesMax) + " bytes"));
  HeaderEvents header;
  ShardingEvents sharding;
  SafepointEvents info;
  SP_RETURN_IF_ERROR(ReadTexts(static_part, header, sharding, info));
  if (info.version != 1) return std::unexpected(Malformed("unknown version " + std::to_string(info.version) + " of the safepoint text"));
  return Assemble(header, sharding, info);
}

}  // namespace sp

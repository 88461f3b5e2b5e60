#include "format/manifest.h"

#include <charconv>

#include "base/check.h"
#include "base/crc32c.h"
#include "format/constants.h"
#include "format/names.h"

// The text is canonical: there is exactly one for a set of records. So the reader expects that very text, field by field, and needs no general
// JSON parser: whatever deviates (another order, white space, a repeated field) is not a manifest of this version. No string in it can hold a
// character that JSON would have to escape.
namespace sp {
namespace {

// Builds the text and reads it: both directions list the fields once, in one order.
class Writer {
 public:
  void Literal(std::string_view text) { out_ += text; }
  template <std::unsigned_integral T>
  void Number(const T& value) {
    out_ += std::to_string(value);
  }
  template <size_t N>
  void Hex(const FixedBytes<N>& value) {
    out_ += value.ToHex();
  }
  void Name(const std::string& value) { out_ += value; }
  std::string Take() && { return std::move(out_); }

 private:
  std::string out_;
};

class Reader {
 public:
  explicit Reader(std::string_view in) : in_(in), size_(in.size()) {}
  void Literal(std::string_view text) {
    if (!in_.starts_with(text)) return Fail("expected " + std::string(text));
    in_.remove_prefix(text.size());
  }
  template <std::unsigned_integral T>
  void Number(T& value) {
    const auto [end, error] = std::from_chars(in_.data(), in_.data() + in_.size(), value);
    const auto digits = static_cast<size_t>(end - in_.data());
    if (error != std::errc() || (in_[0] == '0' && digits > 1)) return Fail("expected a number in range");
    in_.remove_prefix(digits);
  }
  template <size_t N>
  void Hex(FixedBytes<N>& value) {
    if (!FixedBytes<N>::FromHex(in_.substr(0, 2 * N), &value)) return Fail("expected " + std::to_string(2 * N) + " hex digits");
    in_.remove_prefix(2 * N);
  }
  void Name(std::string& value) {
    value = in_.substr(0, std::min<size_t>(in_.find('"'), kNamespaceBytesMax + 1));
    if (!CheckNamespace(value).ok()) return Fail("expected a namespace");
    in_.remove_prefix(value.size());
  }
  bool ok() const { return error_.empty(); }
  bool at_end() const { return in_.empty(); }
  Status status() const { return {StatusCode::kProtocol, "manifest: " + error_}; }
  void Fail(const std::string& why) {
    if (error_.empty()) error_ = why + " at byte " + std::to_string(size_ - in_.size());
    in_ = {};
  }

 private:
  std::string_view in_;
  size_t size_;
  std::string error_;
};

constexpr uint32_t kManifestVersion = 1;

template <class A>
void VersionFields(A& a, uint32_t& version) {
  a.Literal(R"({"format":"safepoint-manifest","version":)");
  a.Number(version);
}

template <class A>
void AttemptFields(A& a, AttemptKey& key, Id128& attempt, uint32_t& world_size) {
  a.Literal(R"(,"namespace":")"), a.Name(key.ns);
  a.Literal(R"(","uid":)"), a.Number(key.uid);
  a.Literal(R"(,"generation":)"), a.Number(key.generation);
  a.Literal(R"(,"nonce":")"), a.Hex(key.nonce);
  a.Literal(R"(","step":)"), a.Number(key.step);
  a.Literal(R"(,"try":)"), a.Number(key.try_number);
  a.Literal(R"(,"attempt":")"), a.Hex(attempt);
  a.Literal(R"(","world_size":)"), a.Number(world_size);
}

template <class A>
void ShardFields(A& a, SealRecord& r, Hash256& identity) {
  a.Literal(R"({"rank":)"), a.Number(r.rank);
  a.Literal(R"(,"record":")"), a.Hex(identity);
  a.Literal(R"(","length":)"), a.Number(r.length_bytes);
  a.Literal(R"(,"block_root":")"), a.Hex(r.block_root);
  a.Literal(R"(","crc32c":)"), a.Number(r.whole_crc);
  a.Literal(R"(,"header_bytes":)"), a.Number(r.header_bytes);
  a.Literal(R"(,"static_offset":)"), a.Number(r.static_offset);
  a.Literal(R"(,"structure":")"), a.Hex(r.structure);
  a.Literal(R"("})");
}

}  // namespace

std::string MakeManifest(const std::vector<SealRecord>& records) {
  SP_CHECK(!records.empty() && records.size() == records[0].world_size);
  Writer w;
  uint32_t version = kManifestVersion;
  VersionFields(w, version);
  SealRecord first = records[0];
  AttemptFields(w, first.key, first.attempt, first.world_size);
  w.Literal(R"(,"shards":[)");
  for (size_t rank = 0; rank < records.size(); ++rank) {
    SealRecord r = records[rank];
    SP_CHECK(r.kind == ShardKind::kData && r.rank == rank && r.world_size == first.world_size);
    SP_CHECK(r.key == first.key && r.attempt == first.attempt);
    if (rank > 0) w.Literal(",");
    Hash256 identity = r.Identity();
    ShardFields(w, r, identity);
  }
  w.Literal("]}");
  return std::move(w).Take();
}

SealRecord ManifestRecord(const std::vector<SealRecord>& records, const std::string& manifest) {
  SP_CHECK(!records.empty());
  SealRecord r;
  r.key = records[0].key;
  r.attempt = records[0].attempt;
  r.kind = ShardKind::kManifest;
  r.world_size = records[0].world_size;
  r.length_bytes = manifest.size();
  r.whole_crc = Crc32c(0, AsBytes(manifest));
  std::vector<uint32_t> blocks;
  for (uint64_t begin = 0; begin < manifest.size(); begin += kBlockBytes) {
    blocks.push_back(Crc32c(0, AsBytes(std::string_view(manifest).substr(begin, kBlockBytes))));
  }
  r.block_root = BlockRoot(blocks);
  return r;
}

Result<std::vector<SealRecord>> ParseManifest(std::string_view json) {
  const auto bad = [](const std::string& why) { return Error(StatusCode::kProtocol, "manifest: " + why); };
  Reader in(json);
  uint32_t version = 0;
  VersionFields(in, version);
  if (!in.ok()) return std::unexpected(in.status());
  if (version != kManifestVersion) return bad("unknown version " + std::to_string(version));
  SealRecord common;
  AttemptFields(in, common.key, common.attempt, common.world_size);
  in.Literal(R"(,"shards":[)");
  if (!in.ok()) return std::unexpected(in.status());
  if (common.world_size == 0 || common.world_size > kWorldSizeMax) return bad("world size out of range");
  std::vector<SealRecord> records;
  for (uint32_t rank = 0; rank < common.world_size && in.ok(); ++rank) {
    if (rank > 0) in.Literal(",");
    SealRecord& r = records.emplace_back(common);
    Hash256 identity;
    ShardFields(in, r, identity);
    if (!in.ok()) break;
    if (r.rank != rank) return bad("rank " + std::to_string(r.rank) + " in place of rank " + std::to_string(rank));
    // Decode holds every rule about a record's fields, so the record is made and read back.
    const auto bytes = r.Encode();
    if (auto checked = SealRecord::Decode(bytes); !checked) return bad("rank " + std::to_string(rank) + ": " + checked.error().message());
    if (r.Identity() != identity) return bad("rank " + std::to_string(rank) + ": fields do not hash to the record's identity");
  }
  in.Literal("]}");
  if (in.ok() && !in.at_end()) in.Fail("text left over");
  if (!in.ok()) return std::unexpected(in.status());
  return records;
}

}  // namespace sp

#include "format/seal_record.h"

#include <vector>

#include "base/check.h"
#include "base/crc32c.h"
#include "base/plant.h"
#include "base/sha256.h"
#include "format/constants.h"
#include "format/fixed_layout.h"
#include "format/names.h"

namespace sp {
namespace {

using layout::AllZero;
using layout::Get;
using layout::GetFixed;
using layout::Put;

// Offsets of the seal record's fields: docs/formats/seal-record.md.
namespace at {
constexpr size_t kMagic = 0;           // u32
constexpr size_t kVersion = 4;         // u16
constexpr size_t kKind = 6;            // u8
constexpr size_t kZero1 = 7;           // 1 byte
constexpr size_t kAttempt = 8;         // 16 bytes
constexpr size_t kNonce = 24;          // 16 bytes
constexpr size_t kGeneration = 40;     // u64
constexpr size_t kStep = 48;           // u64
constexpr size_t kTry = 56;            // u32
constexpr size_t kUid = 60;            // u32
constexpr size_t kWorldSize = 64;      // u32
constexpr size_t kRank = 68;           // u32
constexpr size_t kLength = 72;         // u64
constexpr size_t kHeaderBytes = 80;    // u64
constexpr size_t kStaticOffset = 88;   // u64
constexpr size_t kWholeCrc = 96;       // u32
constexpr size_t kNsLength = 100;      // u16
constexpr size_t kNs = 102;            // 200 bytes, zero padded
constexpr size_t kZero2 = 302;         // 2 bytes
constexpr size_t kBlockRoot = 304;     // 32 bytes
constexpr size_t kStructure = 336;     // 32 bytes
constexpr size_t kZero3 = 368;         // 12 bytes
constexpr size_t kCrc = 380;           // u32
static_assert(kNonce == kAttempt + sizeof(Id128) && kGeneration == kNonce + sizeof(Id128));
static_assert(kNs == kNsLength + 2 && kZero2 == kNs + kNamespaceBytesMax);
static_assert(kStructure == kBlockRoot + sizeof(Hash256) && kZero3 == kStructure + sizeof(Hash256));
static_assert(kCrc + 4 == SealRecord::kBytes);
}  // namespace at

namespace copy_at {
constexpr size_t kMagic = 0;    // u32
constexpr size_t kVersion = 4;  // u16
constexpr size_t kHeld = 6;     // u8
constexpr size_t kZero1 = 7;    // 1 byte
constexpr size_t kRecord = 8;   // 32 bytes
constexpr size_t kNode = 40;    // 16 bytes
constexpr size_t kBoot = 56;    // 16 bytes
constexpr size_t kZero2 = 72;   // 20 bytes
constexpr size_t kCrc = 92;     // u32
static_assert(kNode == kRecord + sizeof(Hash256) && kBoot == kNode + sizeof(Id128) && kZero2 == kBoot + sizeof(Id128));
static_assert(kCrc + 4 == CopyReport::kBytes);
}  // namespace copy_at

// The checks that every fixed-size record shares. The version is looked at before the checksum: only the first six bytes of a version that
// we do not know are known to us.
Status CheckEnvelope(ByteSpan bytes, size_t size, uint32_t magic, uint16_t version, const char* what) {
  const auto bad = [&](const std::string& why) { return Status(StatusCode::kProtocol, std::string(what) + ": " + why); };
  if (bytes.size() < 6 || Get<uint32_t>(bytes, 0) != magic) return bad("bad magic");
  if (const auto found = Get<uint16_t>(bytes, 4); found != version) return bad("unknown version " + std::to_string(found));
  if (bytes.size() != size) return bad(std::to_string(bytes.size()) + " bytes instead of " + std::to_string(size));
  if (Crc32c(0, bytes.first(size - 4)) != Get<uint32_t>(bytes, size - 4)) return bad("checksum mismatch");
  return {};
}

// What is wrong with the record's fields; null if they agree with each other.
const char* Contradiction(const SealRecord& r) {
  if (!CheckNamespace(r.key.ns).ok()) return "bad namespace";
  if (r.key.step > kStepMax) return "step out of range";
  if (r.world_size == 0 || r.world_size > kWorldSizeMax) return "world size out of range";
  if (r.rank >= r.world_size) return "rank is not below the world size";
  if (r.length_bytes > kShardBytesMax) return "length out of range";
  if (r.header_bytes > kHeaderBytesMax || r.header_bytes > r.length_bytes) return "header longer than allowed or than the shard";
  if (r.static_offset > r.header_bytes) return "static part begins behind the header";
  if (r.kind == ShardKind::kManifest &&
      (r.rank != 0 || r.header_bytes != 0 || r.static_offset != 0 || !r.structure.is_zero())) {
    return "manifest with fields of a data shard";
  }
  if (r.attempt != r.key.AttemptId() && !SP_PLANTED(attempt_hash_ignored)) return "attempt is not the hash of its key";
  return nullptr;
}

}  // namespace

Id128 AttemptKey::AttemptId() const {
  static constexpr char kTag[] = "safepoint attempt v1";  // With its final zero byte.
  std::array<uint8_t, 6> before{};
  Put(before, 0, uid);
  Put(before, 4, static_cast<uint16_t>(ns.size()));  // Longer names are refused wherever they enter.
  std::array<uint8_t, 36> after{};
  Put(after, 0, generation);
  Put(after, 8, nonce);
  Put(after, 24, step);
  Put(after, 32, try_number);
  const Hash256 hash = Sha256({AsBytes(std::string_view(kTag, sizeof kTag)), before, AsBytes(ns), after});
  return GetFixed<16>(hash.span(), 0);
}

std::array<uint8_t, SealRecord::kBytes> SealRecord::Encode() const {
  SP_CHECK(key.ns.size() <= kNamespaceBytesMax);
  std::array<uint8_t, kBytes> out{};
  Put(out, at::kMagic, kMagic);
  Put(out, at::kVersion, kVersion);
  Put(out, at::kKind, static_cast<uint8_t>(kind));
  Put(out, at::kAttempt, attempt);
  Put(out, at::kNonce, key.nonce);
  Put(out, at::kGeneration, key.generation);
  Put(out, at::kStep, key.step);
  Put(out, at::kTry, key.try_number);
  Put(out, at::kUid, key.uid);
  Put(out, at::kWorldSize, world_size);
  Put(out, at::kRank, rank);
  Put(out, at::kLength, length_bytes);
  Put(out, at::kHeaderBytes, header_bytes);
  Put(out, at::kStaticOffset, static_offset);
  Put(out, at::kWholeCrc, whole_crc);
  Put(out, at::kNsLength, static_cast<uint16_t>(key.ns.size()));
  std::copy(key.ns.begin(), key.ns.end(), out.begin() + at::kNs);
  Put(out, at::kBlockRoot, block_root);
  Put(out, at::kStructure, structure);
  Put(out, at::kCrc, Crc32c(0, ByteSpan(out).first(at::kCrc)));
  return out;
}

Result<SealRecord> SealRecord::Decode(ByteSpan bytes) {
  SP_RETURN_IF_ERROR(CheckEnvelope(bytes, kBytes, kMagic, kVersion, "seal record"));
  const auto bad = [](const char* why) { return Error(StatusCode::kProtocol, std::string("seal record: ") + why); };
  const auto raw_kind = Get<uint8_t>(bytes, at::kKind);
  if (raw_kind > static_cast<uint8_t>(ShardKind::kManifest)) return bad("unknown kind");
  const auto ns_length = Get<uint16_t>(bytes, at::kNsLength);
  if (ns_length > kNamespaceBytesMax) return bad("bad namespace");
  if (!AllZero(bytes.subspan(at::kZero1, 1)) || !AllZero(bytes.subspan(at::kZero2, 2)) || !AllZero(bytes.subspan(at::kZero3, 12)) ||
      !AllZero(bytes.subspan(at::kNs + ns_length, kNamespaceBytesMax - ns_length))) {
    return bad("padding is not zero");
  }
  SealRecord r;
  r.key.uid = Get<uint32_t>(bytes, at::kUid);
  r.key.ns = AsText(bytes.subspan(at::kNs, ns_length));
  r.key.generation = Get<uint64_t>(bytes, at::kGeneration);
  r.key.nonce = GetFixed<16>(bytes, at::kNonce);
  r.key.step = Get<uint64_t>(bytes, at::kStep);
  r.key.try_number = Get<uint32_t>(bytes, at::kTry);
  r.attempt = GetFixed<16>(bytes, at::kAttempt);
  r.kind = static_cast<ShardKind>(raw_kind);
  r.world_size = Get<uint32_t>(bytes, at::kWorldSize);
  r.rank = Get<uint32_t>(bytes, at::kRank);
  r.length_bytes = Get<uint64_t>(bytes, at::kLength);
  r.block_root = GetFixed<32>(bytes, at::kBlockRoot);
  r.whole_crc = Get<uint32_t>(bytes, at::kWholeCrc);
  r.header_bytes = Get<uint64_t>(bytes, at::kHeaderBytes);
  r.static_offset = Get<uint64_t>(bytes, at::kStaticOffset);
  r.structure = GetFixed<32>(bytes, at::kStructure);
  if (const char* why = Contradiction(r)) return bad(why);
  return r;
}

Hash256 SealRecord::Identity() const { return Sha256(Encode()); }

std::array<uint8_t, CopyReport::kBytes> CopyReport::Encode() const {
  std::array<uint8_t, kBytes> out{};
  Put(out, copy_at::kMagic, kMagic);
  Put(out, copy_at::kVersion, kVersion);
  Put(out, copy_at::kHeld, static_cast<uint8_t>(held ? 1 : 0));
  Put(out, copy_at::kRecord, record);
  Put(out, copy_at::kNode, node);
  Put(out, copy_at::kBoot, boot);
  Put(out, copy_at::kCrc, Crc32c(0, ByteSpan(out).first(copy_at::kCrc)));
  return out;
}

Result<CopyReport> CopyReport::Decode(ByteSpan bytes) {
  SP_RETURN_IF_ERROR(CheckEnvelope(bytes, kBytes, kMagic, kVersion, "copy report"));
  const auto held = Get<uint8_t>(bytes, copy_at::kHeld);
  if (held > 1) return Error(StatusCode::kProtocol, "copy report: held is neither 0 nor 1");
  if (!AllZero(bytes.subspan(copy_at::kZero1, 1)) || !AllZero(bytes.subspan(copy_at::kZero2, 20))) {
    return Error(StatusCode::kProtocol, "copy report: padding is not zero");
  }
  CopyReport report;
  report.record = GetFixed<32>(bytes, copy_at::kRecord);
  report.node = GetFixed<16>(bytes, copy_at::kNode);
  report.boot = GetFixed<16>(bytes, copy_at::kBoot);
  report.held = held == 1;
  return report;
}

Hash256 BlockRoot(std::span<const uint32_t> block_crcs) {
  std::vector<uint8_t> list(block_crcs.size() * 4);
  for (size_t i = 0; i < block_crcs.size(); ++i) Put(list, 4 * i, block_crcs[i]);
  return Sha256(list);
}

}  // namespace sp

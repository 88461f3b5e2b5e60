#include "node/shard_checks.h"

#include <bit>

#include "base/crc32c.h"
#include "base/sha256.h"
#include "format/constants.h"

namespace sp {
namespace {

static_assert(std::endian::native == std::endian::little, "the checksum list is read as it lies there");

uint64_t BlockLength(uint64_t length_bytes, uint64_t block) { return std::min(kBlockBytes, length_bytes - block * kBlockBytes); }

// The list behind the shard's bytes, found to hash to `root`.
Result<std::vector<uint32_t>> ReadChecksumList(const ExtentSet& lease, uint64_t length_bytes, const Hash256& root) {
  if (length_bytes > kShardBytesMax || LeaseBytes(length_bytes) > lease.size_bytes()) {
    return Error(StatusCode::kProtocol, "a shard of " + std::to_string(length_bytes) + " bytes does not fit its lease of " + std::to_string(lease.size_bytes()) + " bytes");
  }
  std::vector<uint32_t> list(BlockCount(length_bytes));
  SP_RETURN_IF_ERROR(lease.Read(ChecksumListOffset(length_bytes), {reinterpret_cast<uint8_t*>(list.data()), list.size() * sizeof(uint32_t)}));
  if (BlockRoot(list) != root) return Error(StatusCode::kCorrupt, "the block checksums do not hash to the sealed root");
  return list;
}

Result<std::vector<uint8_t>> ReadStaticPart(const ExtentSet& lease, uint64_t static_offset, uint64_t header_bytes, const Hash256& structure) {
  if (header_bytes > kHeaderBytesMax || static_offset > header_bytes) {
    return Error(StatusCode::kProtocol, "a header of " + std::to_string(header_bytes) + " bytes with its static part at " + std::to_string(static_offset) + " is refused");
  }
  std::vector<uint8_t> bytes(header_bytes - static_offset);
  SP_RETURN_IF_ERROR(lease.Read(static_offset, bytes));
  if (Sha256(bytes) != structure) return Error(StatusCode::kCorrupt, "the static part of the index does not match its hash");
  return bytes;
}

Status CheckList(const action::CheckSeal& check, const ExtentSet& lease) {
  SP_ASSIGN_OR_RETURN(const std::vector<uint32_t> list, ReadChecksumList(lease, check.length_bytes, check.block_root));
  uint32_t whole = 0;
  for (uint64_t block = 0; block < list.size(); ++block) whole = Crc32cCombine(whole, list[block], BlockLength(check.length_bytes, block));
  if (whole != check.whole_crc) return Status(StatusCode::kCorrupt, "the block checksums do not combine to the shard's checksum");
  return {};
}

Status CheckOneBlock(const action::CheckBlock& check, const ExtentSet& lease) {
  SP_ASSIGN_OR_RETURN(const std::vector<uint32_t> list, ReadChecksumList(lease, check.length_bytes, check.block_root));
  if (check.block >= list.size()) return Status(StatusCode::kInvalidArgument, "the shard has no block " + std::to_string(check.block));
  std::vector<uint8_t> bytes(BlockLength(check.length_bytes, check.block));
  SP_RETURN_IF_ERROR(lease.Read(check.block * kBlockBytes, bytes));
  if (Crc32c(0, bytes) != list[check.block]) return Status(StatusCode::kCorrupt, "block " + std::to_string(check.block) + " does not match its checksum");
  return {};
}

}  // namespace

event::SealChecked RunCheckSeal(const action::CheckSeal& check, const ExtentSet& lease) {
  event::SealChecked result;
  result.lease = check.lease;
  result.status = CheckList(check, lease);
  if (!result.status.ok()) return result;
  // Hashed also when the structure is known: what is sealed has it, not only says so.
  auto bytes = ReadStaticPart(lease, check.static_offset, check.header_bytes, check.structure);
  if (!bytes) {
    result.status = bytes.error();
    return result;
  }
  if (!check.want_structure) return result;
  auto index = ShardIndex::ParseStaticPart(*bytes);
  if (index) result.structure = PackedIndex::Of(std::move(*index));
  else result.status = index.error();
  return result;
}

event::StructureRead RunReadStructure(const action::ReadStructure& read, const ExtentSet& lease) {
  event::StructureRead result;
  result.record = read.record;
  const auto bytes = ReadStaticPart(lease, read.static_offset, read.header_bytes, read.structure);
  Result<ShardIndex> index = bytes ? ShardIndex::ParseStaticPart(*bytes) : std::unexpected(bytes.error());
  if (index) result.structure = PackedIndex::Of(std::move(*index));
  else result.status = index.error();
  return result;
}

event::BlockChecked RunCheckBlock(const action::CheckBlock& check, const ExtentSet& lease) { return {check.token, CheckOneBlock(check, lease)}; }

}  // namespace sp

#include "client/shard_reader.h"

#include <algorithm>

#include "base/crc32c.h"
#include "base/no_memory.h"
#include "base/sha256.h"
#include "client/extents.h"
#include "durable/open_store.h"
#include "format/fixed_layout.h"
#include "format/messages.h"
#include "os/memfd.h"

namespace sp {
namespace {

uint64_t BlockSize(const SealRecord& record, uint64_t block) {
  return std::min(kBlockBytes, record.length_bytes - block * kBlockBytes);
}

constexpr int kStoreRequests = 8;  // At once, of one read.

ReadResult<std::unique_ptr<ShardReader>> Incomplete(const Status& status, uint32_t rank) {
  if (status.code() == StatusCode::kCorrupt) return std::unexpected(ReadError(status, rank, std::nullopt, false));
  return std::unexpected(status);
}

}  // namespace

ShardReader::ShardReader(const SealRecord& record, std::unique_ptr<StoredShard> stored)
    : core_(nullptr), origin_(), record_(record), identity_(record_.Identity()), crcs_(stored->block_crcs()), stored_(std::move(stored)) {}

ReadResult<std::unique_ptr<ShardReader>> ShardReader::OpenStored(std::shared_ptr<ObjectStore> store, const SealRecord& record) {
  Result<std::unique_ptr<StoredShard>> stored = StoredShard::Open(std::move(store), record, ReadLimits(4 * BlockCount(record.length_bytes)));
  if (!stored) return Incomplete(stored.error(), record.rank);
  return std::unique_ptr<ShardReader>(new ShardReader(record, std::move(*stored)));
}

Status ShardReader::CheckUsable() const { return core_ ? core_->session.fork_guard().Check() : owner_.Check(); }

ShardReader::ShardReader(CoreHandle core, const Origin& origin, const SealRecord& record, std::vector<Fd> extents)
    : core_(std::move(core)), origin_(origin), record_(record), identity_(record.Identity()), extents_(std::move(extents)) {
  for (const Fd& fd : extents_) numbers_.push_back(fd.get());
}

ReadResult<std::unique_ptr<ShardReader>> ShardReader::Open(CoreHandle core, const Origin& origin, uint64_t pin, const AttemptInfo& info,
                                                           uint32_t rank, const FindStore& store) {
  const Nanos deadline = core->Deadline();
  const CallOptions options{.deadline = deadline, .boot = origin.boot};
  const ShardRequest shard{pin, rank, 0};
  const auto reply = core->session.Ask<ShardInfoReply>(MessageType::kShardInfo, shard, options);
  if (!reply && reply.error().code() == StatusCode::kCorrupt) return std::unexpected(ReadError(reply.error(), rank, std::nullopt, false));
  if (!reply) return std::unexpected(reply.error());
  const Result<SealRecord> record = SealRecord::Decode(reply->record.bytes);
  if (!record) return std::unexpected(record.error());
  if (record->attempt != info.attempt || record->rank != rank || record->kind != ShardKind::kData ||
      (reply->extents > 0 && uint64_t{reply->extents} * origin.extent_bytes < LeaseBytes(record->length_bytes))) {
    return std::unexpected(Status(StatusCode::kProtocol, "the daemon sent the record of another shard, or too few extents for rank " +
                                                             std::to_string(rank)));
  }
  if (reply->extents == 0) {
    Result<std::shared_ptr<ObjectStore>> found = store();
    if (!found) return std::unexpected(found.error());
    return OpenStored(std::move(*found), *record);
  }
  FetchExtentsRequest fetch;
  fetch.read_only = true;
  fetch.pin = pin;
  fetch.rank = rank;
  Result<std::vector<Fd>> extents = FetchExtents(core->session, fetch, reply->extents, origin, deadline);
  if (!extents) return std::unexpected(extents.error());
  std::unique_ptr<ShardReader> reader(new ShardReader(std::move(core), origin, *record, std::move(*extents)));
  const Status list = reader->LoadChecksumList();
  if (list.code() == StatusCode::kCorrupt) return std::unexpected(ReadError(list, rank, std::nullopt, false));
  if (!list.ok()) return std::unexpected(list);
  return reader;
}

ReadError ShardReader::Corrupt(std::optional<uint64_t> block, const std::string& what, bool state_modified) const {
  return ReadError(Status(StatusCode::kCorrupt, "shard of rank " + std::to_string(record_.rank) + " (step " + std::to_string(record_.key.step) +
                                                    ", attempt " + record_.attempt.ToHex() + "): " + what),
                   record_.rank, block, state_modified);
}

ShardSource ShardReader::Source() const {
  return {.extents = numbers_, .extent_bytes = origin_.extent_bytes, .length = record_.length_bytes, .block_crcs = crcs_};
}

Status ShardReader::ReadRaw(MutableByteSpan out, uint64_t offset) const {
  while (!out.empty()) {
    const uint64_t within = offset % origin_.extent_bytes;
    const uint64_t size = std::min<uint64_t>(out.size(), origin_.extent_bytes - within);
    SP_RETURN_IF_ERROR(PReadExact(numbers_[offset / origin_.extent_bytes], out.first(size), within));
    out = out.subspan(size);
    offset += size;
  }
  return {};
}

Status ShardReader::LoadChecksumList() {
  std::vector<uint8_t> list(4 * BlockCount(record_.length_bytes));
  SP_RETURN_IF_ERROR(ReadRaw(list, ChecksumListOffset(record_.length_bytes)));
  if (Sha256(list) != record_.block_root) return Corrupt(std::nullopt, "checksum list", false).status;
  crcs_.resize(list.size() / 4);
  for (size_t block = 0; block < crcs_.size(); ++block) crcs_[block] = layout::Get<uint32_t>(list, 4 * block);
  return {};
}

ReadResult<std::vector<uint8_t>> ShardReader::Header() {
  return OrNoMemory("read a header", [&]() -> ReadResult<std::vector<uint8_t>> {
    std::vector<uint8_t> header(record_.header_bytes);
    if (header.size() < 8 || record_.static_offset > header.size()) {
      return std::unexpected(Status(StatusCode::kProtocol, "the shard of rank " + std::to_string(record_.rank) + " has no header"));
    }
    const ScatterSegment all{0, header.size(), header.data()};
    if (const auto read = Read({&all, 1}); !read) {
      ReadError error = read.error();
      error.state_modified = false;  // The buffer is our own.
      return std::unexpected(std::move(error));
    }
    if (layout::Get<uint64_t>(header, 0) != header.size() - 8) return std::unexpected(Corrupt(0, "length of the header", false));
    if (Sha256(ByteSpan(header).subspan(record_.static_offset)) != record_.structure) {
      return std::unexpected(Corrupt(record_.static_offset / kBlockBytes, "static part of the header", false));
    }
    return header;
  });
}

ReadResult<uint64_t> ShardReader::Read(std::span<const ScatterSegment> segments, int threads) {
  ReadResult<uint64_t> read = OrNoMemory("read a shard", [&]() -> ReadResult<uint64_t> {
    if (const Status here = CheckUsable(); !here.ok()) return std::unexpected(here);
    if (stored_) {
      std::vector<WantedRange> ranges;
      uint64_t wanted = 0;
      for (const ScatterSegment& segment : segments) {
        ranges.push_back({segment.offset, segment.size, segment.target});
        wanted += segment.size;
      }
      // Blocks are read whole, and small ranges may want all of them.
      const StoredShard::Report report = stored_->Read(ranges, kStoreRequests, ReadLimits(record_.length_bytes));
      if (report.status.ok()) return wanted;
      if (report.status.code() == StatusCode::kCorrupt) {
        return std::unexpected(Corrupt(report.corrupt_blocks.front(), report.status.message(), report.target_modified));
      }
      ReadError error(report.status);
      error.state_modified = report.target_modified;
      return std::unexpected(std::move(error));
    }
    const CopyOutReport report = core_->engine.CopyOut(Source(), segments, {.threads = threads});
    if (report.status.code() == StatusCode::kCorrupt) {
      return std::unexpected(Corrupt(report.corrupt_blocks.front(), report.status.message(), report.target_modified));
    }
    if (!report.status.ok()) {
      ReadError error(report.status);
      error.state_modified = report.target_modified;
      return std::unexpected(std::move(error));
    }
    uint64_t bytes = 0;
    for (const ScatterSegment& segment : segments) bytes += segment.size;
    return bytes;
  });
  // What a copy without memory left in the targets is not known.
  if (!read && read.error().status.code() == StatusCode::kNoSpace) read.error().state_modified = !segments.empty();
  return read;
}

Result<std::vector<uint64_t>> ShardReader::Verify(uint64_t first, uint64_t count) {
  return OrNoMemory("verify a shard", [&]() -> Result<std::vector<uint64_t>> {
    SP_RETURN_IF_ERROR(CheckUsable());
    if (first > blocks() || count > blocks() - first) {
      return Error(StatusCode::kInvalidArgument, "blocks " + std::to_string(first) + " to " + std::to_string(first + count) + " of a shard of " +
                                                     std::to_string(blocks()) + " blocks");
    }
    if (stored_) {
      StoredShard::Report report = stored_->Verify(first, count, kStoreRequests, ReadLimits(count * kBlockBytes));
      if (!report.status.ok() && report.status.code() != StatusCode::kCorrupt) return std::unexpected(report.status);
      return std::move(report.corrupt_blocks);
    }
    if (count == blocks()) {  // The copy engine has threads for that.
      CopyOutReport report = core_->engine.CopyOut(Source(), {}, {.verify_all = true});
      if (!report.status.ok() && report.status.code() != StatusCode::kCorrupt) return std::unexpected(report.status);
      return std::move(report.corrupt_blocks);
    }
    std::vector<uint64_t> corrupt;
    std::vector<uint8_t> buffer(kBlockBytes);
    for (uint64_t block = first; block < first + count; ++block) {
      const auto read = ReadBlock(block, buffer);
      if (read) continue;
      if (read.error().status.code() != StatusCode::kCorrupt) return std::unexpected(read.error().status);
      corrupt.push_back(block);
    }
    return corrupt;
  });
}

ReadResult<uint64_t> ShardReader::CopyToFile(int fd) {
  return OrNoMemory("copy a shard to a file", [&]() -> ReadResult<uint64_t> {
    if (const Status here = CheckUsable(); !here.ok()) return std::unexpected(here);
    if (stored_) return CopyStoredToFile(fd);
    std::vector<uint8_t> buffer(kBlockBytes);
    for (uint64_t block = 0; block < blocks(); ++block) {
      const auto size = ReadBlock(block, buffer);
      if (!size) return size;
      const Status written = PWriteExact(fd, ByteSpan(buffer).first(*size), block * kBlockBytes);
      if (!written.ok()) return std::unexpected(written);
    }
    return record_.length_bytes;
  });
}

ReadResult<uint64_t> ShardReader::CopyStoredToFile(int fd) {
  constexpr uint64_t kPiece = 64 * kBlockBytes;
  std::vector<uint8_t> buffer(std::min(kPiece, record_.length_bytes));
  for (uint64_t begin = 0; begin < record_.length_bytes; begin += kPiece) {
    const ScatterSegment piece{begin, std::min(kPiece, record_.length_bytes - begin), buffer.data()};
    const auto read = Read({&piece, 1});
    if (!read) return read;
    const Status written = PWriteExact(fd, ByteSpan(buffer).first(piece.size), begin);
    if (!written.ok()) return std::unexpected(written);
  }
  return record_.length_bytes;
}

ReadResult<uint64_t> ShardReader::ReadBlock(uint64_t block, MutableByteSpan buffer) const {
  const MutableByteSpan bytes = buffer.first(BlockSize(record_, block));
  const Status read = ReadRaw(bytes, block * kBlockBytes);
  if (!read.ok() && read.code() != StatusCode::kCorrupt) return std::unexpected(read);
  if (!read.ok() || Crc32c(0, bytes) != crcs_[block]) {
    return std::unexpected(Corrupt(block, "block " + std::to_string(block), false));
  }
  return bytes.size();
}

}  // namespace sp

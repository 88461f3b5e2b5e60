#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>

#include "base/crc32c.h"
#include "base/plant.h"
#include "client/copy_engine_pieces.h"
#include "os/mapping.h"
#include "os/memfd.h"

namespace sp {
namespace {

uint64_t EndOf(const ScatterSegment& segment) { return segment.offset + segment.size; }

Status CheckSource(const ShardSource& source) {
  const auto bad = [](std::string message) { return Status(StatusCode::kInvalidArgument, std::move(message)); };
  if (source.block_crcs.size() != BlockCount(source.length)) {
    return bad(std::to_string(source.block_crcs.size()) + " checksums for " +
               std::to_string(BlockCount(source.length)) + " blocks");
  }
  if (source.mapped.data() != nullptr) {
    if (source.mapped.size() >= source.length) return {};
    return bad("mapped range of " + std::to_string(source.mapped.size()) + " bytes for a shard of " +
               std::to_string(source.length));
  }
  if (source.extent_bytes == 0 || source.extent_bytes % kBlockBytes != 0) {
    return bad("extent size " + std::to_string(source.extent_bytes) + " is no multiple of the block size");
  }
  const uint64_t needed = source.length / source.extent_bytes + (source.length % source.extent_bytes != 0);
  if (source.extents.size() >= needed) return {};
  return bad(std::to_string(source.extents.size()) + " extents of " + std::to_string(source.extent_bytes) +
             " bytes for a shard of " + std::to_string(source.length));
}

// The wanted ranges by offset, so that those of one block are found by a search although they may overlap.
class WantedRanges {
 public:
  static Result<WantedRanges> Make(std::span<const ScatterSegment> segments, uint64_t length) {
    WantedRanges wanted;
    wanted.segments_.reserve(segments.size());
    for (const ScatterSegment& segment : segments) {
      if (segment.offset > length || segment.size > length - segment.offset || (segment.size != 0 && !segment.target)) {
        return Error(StatusCode::kInvalidArgument,
                     "range at " + std::to_string(segment.offset) + ", size " + std::to_string(segment.size) +
                         ": no target, or not in the shard of " + std::to_string(length) + " bytes");
      }
      if (segment.size != 0) wanted.segments_.push_back(segment);
    }
    std::ranges::stable_sort(wanted.segments_, {}, &ScatterSegment::offset);
    wanted.ends_.reserve(wanted.segments_.size());
    uint64_t end = 0;
    for (const ScatterSegment& segment : wanted.segments_) wanted.ends_.push_back(end = std::max(end, EndOf(segment)));
    return wanted;
  }

  // Segments that may touch [begin, end), by offset. Where they overlap each other, some may end before `begin`.
  std::span<const ScatterSegment> Touching(uint64_t begin, uint64_t end) const {
    const auto first = std::ranges::upper_bound(ends_, begin) - ends_.begin();
    const auto last = std::ranges::lower_bound(segments_, end, {}, &ScatterSegment::offset) - segments_.begin();
    if (first >= last) return {};
    return std::span(segments_).subspan(static_cast<size_t>(first), static_cast<size_t>(last - first));
  }

 private:
  std::vector<ScatterSegment> segments_;  // By offset, none empty.
  std::vector<uint64_t> ends_;            // ends_[i] is the largest end of segments_[0..i].
};

// Bytes of blocks, from mapped memory where that is safe, else read into a buffer of the calling thread.
//
// Mapping 4 KiB pages and copying from them takes 1.5x of one memcpy, reading through the kernel 2.2x (measured, 1
// GiB). Pages are faulted in as they are touched: several threads share that cost, and a partial restore pays for its
// part only.
class BlockReader {
 public:
  explicit BlockReader(const ShardSource& source) : source_(source) {}

  // Not thread-safe, before any Read.
  void MapExtentOf(uint64_t block) {
    if (source_.mapped.data() != nullptr) return;
    const uint64_t extent = block * kBlockBytes / source_.extent_bytes;
    if (mappings_.empty()) mappings_.resize(source_.extents.size());
    std::optional<Mapping>& mapping = mappings_[extent];
    if (mapping.has_value()) return;
    mapping.emplace();
    // A file that somebody can shorten under a mapping kills this process, and an address space can be full: reading
    // works always.
    if (!CheckSealedSize(source_.extents[extent], source_.extent_bytes).ok()) return;
    Result<Mapping> mapped =
        Mapping::MapShared(source_.extents[extent], source_.extent_bytes, MapMode::kReadOnly, /*populate=*/false);
    if (mapped) *mapping = std::move(*mapped);
  }

  // The block's bytes, valid until the next call with this `buffer`. Thread-safe with a buffer per thread.
  Result<ByteSpan> Read(uint64_t block, std::unique_ptr<uint8_t[]>& buffer) const {
    const uint64_t begin = block * kBlockBytes;
    const uint64_t size = std::min(kBlockBytes, source_.length - begin);
    if (source_.mapped.data() != nullptr) return source_.mapped.subspan(begin, size);
    const uint64_t extent = begin / source_.extent_bytes;
    const uint64_t offset = begin % source_.extent_bytes;
    if (mappings_[extent]->valid()) return mappings_[extent]->bytes().subspan(offset, size);
    if (!buffer) buffer.reset(new (std::nothrow) uint8_t[kBlockBytes]);
    if (!buffer) return Error(StatusCode::kNoSpace, "no memory for a read buffer of one block");
    SP_RETURN_IF_ERROR(PReadExact(source_.extents[extent], {buffer.get(), size}, offset));
    return ByteSpan(buffer.get(), size);
  }

 private:
  const ShardSource& source_;
  std::vector<std::optional<Mapping>> mappings_;  // Empty: not asked for; an invalid mapping: to be read.
};

// Copies what `wanted` has of the block and returns the checksum of all of it.
uint32_t ScatterBlock(const CopyKernel& kernel, ByteSpan bytes, uint64_t begin,
                      std::span<const ScatterSegment> wanted) {
  const uint64_t end = begin + bytes.size();
  uint64_t summed = begin;  // The checksum covers [begin, summed).
  uint32_t crc = 0;
  for (const ScatterSegment& segment : wanted) {
    uint64_t from = std::max(segment.offset, begin);
    const uint64_t to = std::min(EndOf(segment), end);
    if (from >= to) continue;
    if (from > summed) {
      crc = Crc32c(crc, bytes.subspan(summed - begin, from - summed));
      summed = from;
    }
    if (from < summed) {  // Overlaps an earlier segment: these bytes are summed already.
      const uint64_t repeated = std::min(summed, to) - from;
      kernel.copy(0, bytes.data() + (from - begin), segment.target + (from - segment.offset), repeated);
      from += repeated;
    }
    if (from < to) {
      crc = kernel.copy(crc, bytes.data() + (from - begin), segment.target + (from - segment.offset), to - from);
      summed = to;
    }
  }
  return Crc32c(crc, bytes.subspan(summed - begin));
}

std::string DescribeCorrupt(const std::vector<uint64_t>& blocks) {
  std::string message = std::to_string(blocks.size()) + " corrupt block(s):";
  constexpr size_t kNamed = 8;
  for (size_t i = 0; i < std::min(blocks.size(), kNamed); ++i) message += " " + std::to_string(blocks[i]);
  if (blocks.size() > kNamed) message += " ...";
  return message;
}

}  // namespace

CopyOutReport CopyEngine::CopyOut(const ShardSource& source, std::span<const ScatterSegment> segments,
                                  const CopyOptions& options) {
  CopyOutReport report;
  report.status = internal::CheckOptions(options);
  if (report.status.ok()) report.status = CheckSource(source);
  if (!report.status.ok()) return report;
  Result<WantedRanges> wanted = WantedRanges::Make(segments, source.length);
  if (!wanted) {
    report.status = wanted.error();
    return report;
  }

  std::vector<uint64_t> todo;  // Blocks to read.
  BlockReader reader(source);
  for (uint64_t block = 0; block < source.block_crcs.size(); ++block) {
    const uint64_t begin = block * kBlockBytes;
    if (!options.verify_all && wanted->Touching(begin, std::min(begin + kBlockBytes, source.length)).empty()) continue;
    todo.push_back(block);
    reader.MapExtentOf(block);
  }

  std::mutex mutex;  // Guards `report` while pieces run.
  const auto copy_piece = [&](uint64_t first, uint64_t last, internal::PieceScratch& scratch) {
    for (uint64_t i = first; i < last; ++i) {
      const uint64_t block = todo[i];
      const uint64_t begin = block * kBlockBytes;
      const Result<ByteSpan> bytes = reader.Read(block, scratch.block);
      bool matches = false;
      bool copied = false;
      if (bytes) {
        const auto touching = wanted->Touching(begin, begin + bytes->size());
        copied = !touching.empty();
        matches = ScatterBlock(kernel_, *bytes, begin, touching) == source.block_crcs[block] || SP_PLANTED(mismatch_ignored_on_read);
      }
      std::lock_guard lock(mutex);
      report.target_modified |= copied;
      report.blocks_verified += matches ? 1 : 0;
      if (matches) continue;
      if (!bytes && bytes.error().code() != StatusCode::kCorrupt) {
        if (report.status.ok()) report.status = bytes.error();
        return false;
      }
      report.corrupt_blocks.push_back(block);
    }
    return true;
  };
  const bool complete = internal::RunPieces(threads_, todo.size(), options, kernel_.fence, copy_piece);
  std::ranges::sort(report.corrupt_blocks);
  if (!report.status.ok()) return report;
  if (!complete) {
    report.status = Status(StatusCode::kClosed, "copy cancelled");
  } else if (!report.corrupt_blocks.empty()) {
    report.status = Status(StatusCode::kCorrupt, DescribeCorrupt(report.corrupt_blocks));
  }
  return report;
}

std::vector<ScatterSegment> SegmentsInBlocks(std::span<const ScatterSegment> segments,
                                             std::span<const uint64_t> blocks) {
  std::vector<ScatterSegment> parts;
  for (const ScatterSegment& segment : segments) {
    for (auto block = std::ranges::lower_bound(blocks, segment.offset / kBlockBytes); block != blocks.end(); ++block) {
      const uint64_t from = std::max(segment.offset, *block * kBlockBytes);
      const uint64_t to = std::min(EndOf(segment), (*block + 1) * kBlockBytes);
      if (from >= to) break;
      parts.push_back({from, to - from, segment.target + (from - segment.offset)});
    }
  }
  return parts;
}

}  // namespace sp

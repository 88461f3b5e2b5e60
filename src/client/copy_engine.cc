#include "client/copy_engine.h"

#include <algorithm>
#include <string>

#include "base/plant.h"
#include "client/copy_engine_pieces.h"

namespace sp {
namespace {

Status CheckTiling(std::span<const CopySegment> segments, uint64_t length) {
  uint64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const CopySegment& segment = segments[i];
    const auto bad = [&](const char* what) {
      return Status(StatusCode::kInvalidArgument,
                    "segment " + std::to_string(i) + " at offset " + std::to_string(segment.offset) + ", size " +
                        std::to_string(segment.size) + ": " + what + " (expected offset " + std::to_string(end) +
                        ", shard length " + std::to_string(length) + ")");
    };
    if (segment.offset != end) return bad(segment.offset > end ? "leaves a gap" : "overlaps or is out of order");
    if (segment.size > length - end) return bad("goes past the end");
    if (segment.size != 0 && segment.source == nullptr) return bad("has no source");
    end += segment.size;
  }
  if (end == length) return {};
  return {StatusCode::kInvalidArgument,
          "segments end at " + std::to_string(end) + ", shard length is " + std::to_string(length)};
}

}  // namespace

Status CopyEngine::CopyIn(std::span<const CopySegment> segments, MutableByteSpan target, std::span<uint32_t> block_crcs,
                          const CopyOptions& options) {
  SP_RETURN_IF_ERROR(internal::CheckOptions(options));
  SP_RETURN_IF_ERROR(CheckTiling(segments, target.size()));
  const uint64_t blocks = BlockCount(target.size());
  if (block_crcs.size() != blocks) {
    return {StatusCode::kInvalidArgument, std::to_string(block_crcs.size()) + " checksum places for " +
                                              std::to_string(blocks) + " blocks"};
  }
  const auto copy_piece = [&](uint64_t first_block, uint64_t end_block, internal::PieceScratch&) {
    uint64_t at = first_block * kBlockBytes;
    // The first segment that ends behind `at`; empty segments before it are passed over.
    auto segment = std::partition_point(segments.begin(), segments.end(),
                                        [&](const CopySegment& s) { return s.offset + s.size <= at; });
    for (uint64_t block = first_block; block < end_block; ++block) {
      const uint64_t block_end = std::min<uint64_t>((block + 1) * kBlockBytes, target.size());
      uint32_t crc = 0;
      while (at < block_end) {
        const uint64_t size = std::min(segment->offset + segment->size, block_end) - at;
        if (size != 0) crc = kernel_.copy(crc, segment->source + (at - segment->offset), target.data() + at, size);
        at += size;
        if (at == segment->offset + segment->size) ++segment;
      }
      if (!SP_PLANTED(last_block_not_summed) || block + 1 < blocks) block_crcs[block] = crc;
    }
    return true;
  };
  if (!internal::RunPieces(threads_, blocks, options, kernel_.fence, copy_piece)) {
    return {StatusCode::kClosed, "copy cancelled"};
  }
  return {};
}

}  // namespace sp

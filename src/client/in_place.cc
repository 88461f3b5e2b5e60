#include "client/in_place.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "base/crc32c.h"

namespace sp {

Status CheckSegments(std::span<const CopySegment> segments, uint64_t length, bool tiling) {
  uint64_t end = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const CopySegment& segment = segments[i];
    const char* why = nullptr;
    if (segment.offset < end) why = "overlaps the one before or is out of order";
    else if (tiling && segment.offset > end) why = "leaves a gap";
    else if (segment.offset > length || segment.size > length - segment.offset) why = "goes past the end";
    else if (segment.size != 0 && segment.source == nullptr) why = "has no source";
    if (why != nullptr) {
      // The header is segment 0 here, so the numbers are those of the caller's list plus one.
      return {StatusCode::kInvalidArgument, (i == 0 ? "the header" : "segment " + std::to_string(i - 1)) + " at offset " +
                                                std::to_string(segment.offset) + ", size " + std::to_string(segment.size) + " " + why +
                                                " (expected offset " + std::to_string(end) + ", shard length " + std::to_string(length) + ")"};
    }
    end = segment.offset + segment.size;
  }
  if (!tiling || end == length) return {};
  return {StatusCode::kInvalidArgument, "the segments end at " + std::to_string(end) + ", shard length is " + std::to_string(length)};
}

Status FillInPlace(std::span<const CopySegment> segments, MutableByteSpan target, std::span<uint32_t> block_crcs,
                   const CopyOptions& options, CopyThreads& threads) {
  if (options.threads < 0 || options.threads > kCopyThreadsMax) {
    return {StatusCode::kInvalidArgument, "copy threads " + std::to_string(options.threads) + " not in 0.." + std::to_string(kCopyThreadsMax)};
  }
  SP_RETURN_IF_ERROR(CheckSegments(segments, target.size(), false));
  const uint64_t blocks = BlockCount(target.size());
  if (block_crcs.size() != blocks) {
    return {StatusCode::kInvalidArgument, std::to_string(block_crcs.size()) + " checksum places for " + std::to_string(blocks) + " blocks"};
  }
  const auto do_block = [&](uint64_t block) {
    const uint64_t begin = block * kBlockBytes;
    const uint64_t stop = std::min<uint64_t>(begin + kBlockBytes, target.size());
    auto segment = std::partition_point(segments.begin(), segments.end(),
                                        [&](const CopySegment& s) { return s.offset + s.size <= begin; });
    for (; segment != segments.end() && segment->offset < stop; ++segment) {
      const uint64_t from = std::max(segment->offset, begin);
      const uint64_t to = std::min(segment->offset + segment->size, stop);
      if (from < to) std::memcpy(target.data() + from, segment->source + (from - segment->offset), to - from);
    }
    block_crcs[block] = Crc32c(0, target.subspan(begin, stop - begin));  // While it is in the cache.
  };
  std::atomic<uint64_t> next = 0;
  std::atomic<uint64_t> done = 0;
  const auto work = [&] {
    while (options.cancel == nullptr || !options.cancel->load(std::memory_order_relaxed)) {
      const uint64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks) return;
      do_block(block);
      done.fetch_add(1, std::memory_order_relaxed);
    }
  };
  const int wanted = options.threads == 0 ? DefaultCopyThreads() : options.threads;
  threads.Run(static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(wanted), blocks)), work);
  if (done.load(std::memory_order_relaxed) != blocks) return {StatusCode::kClosed, "copy cancelled"};
  return {};
}

}  // namespace sp

#include "durable/stored_shard.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "base/crc32c.h"
#include "base/no_memory.h"
#include "durable/step_store.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr uint64_t kWindowBlocks = 8;  // Of one request, at most.

struct Window {
  uint64_t first = 0, count = 0;     // Blocks.
  std::vector<uint32_t> ranges;      // Those with bytes in it.
};

uint64_t BlockOf(uint64_t offset) { return offset / kBlockBytes; }

}  // namespace

StoredShard::StoredShard(std::shared_ptr<ObjectStore> store, const SealRecord& record, std::vector<uint32_t> crcs)
    : store_(std::move(store)), record_(record), key_(ShardObjectKey(record)), crcs_(std::move(crcs)) {}

Result<std::unique_ptr<StoredShard>> StoredShard::Open(std::shared_ptr<ObjectStore> store, const SealRecord& record, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(std::vector<uint32_t> crcs, ReadChecksums(*store, record, limits));
  return std::unique_ptr<StoredShard>(new StoredShard(std::move(store), record, std::move(crcs)));
}

StoredShard::Report StoredShard::Read(std::span<const WantedRange> ranges, int requests, const CallLimits& limits) const {
  std::vector<bool> wanted(crcs_.size());
  for (const WantedRange& range : ranges) {
    if (range.offset > record_.length_bytes || range.size > record_.length_bytes - range.offset) {
      return {Status(StatusCode::kInvalidArgument, std::to_string(range.size) + " bytes at " + std::to_string(range.offset) + " of a shard of " +
                                                       std::to_string(record_.length_bytes) + " bytes"),
              {}, false};
    }
    if (range.size == 0) continue;
    for (uint64_t block = BlockOf(range.offset); block <= BlockOf(range.offset + range.size - 1); ++block) wanted[block] = true;
  }
  return ReadBlocks(wanted, ranges, requests, limits);
}

StoredShard::Report StoredShard::Verify(uint64_t first, uint64_t count, int requests, const CallLimits& limits) const {
  std::vector<bool> wanted(crcs_.size());
  for (uint64_t block = first; block < std::min<uint64_t>(first + count, wanted.size()); ++block) wanted[block] = true;
  return ReadBlocks(wanted, {}, requests, limits);
}

StoredShard::Report StoredShard::ReadBlocks(const std::vector<bool>& wanted, std::span<const WantedRange> ranges, int requests,
                                            const CallLimits& limits) const {
  std::vector<Window> windows;
  std::vector<uint32_t> window_of(wanted.size(), UINT32_MAX);
  for (uint64_t block = 0; block < wanted.size(); ++block) {
    if (!wanted[block]) continue;
    const bool goes_on = !windows.empty() && windows.back().first + windows.back().count == block && windows.back().count < kWindowBlocks;
    if (goes_on) ++windows.back().count;
    else windows.push_back({block, 1, {}});
    window_of[block] = static_cast<uint32_t>(windows.size() - 1);
  }
  for (uint32_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].size == 0) continue;
    uint32_t last = UINT32_MAX;
    for (uint64_t block = BlockOf(ranges[i].offset); block <= BlockOf(ranges[i].offset + ranges[i].size - 1); ++block) {
      if (window_of[block] != last) windows[window_of[block]].ranges.push_back(i);
      last = window_of[block];
    }
  }

  Report report;
  std::mutex mutex;  // Guards `report`.
  std::atomic<size_t> next = 0;
  std::atomic<bool> failed = false;
  const auto work_or_throw = [&] {
    std::vector<uint8_t> buffer;
    for (size_t i = next++; i < windows.size() && !failed; i = next++) {
      const Window& window = windows[i];
      const uint64_t begin = window.first * kBlockBytes;
      const uint64_t size = std::min(window.count * kBlockBytes, record_.length_bytes - begin);
      // One range that wants all of it gets it without a copy.
      uint8_t* direct = nullptr;
      for (const uint32_t r : window.ranges) {
        if (ranges[r].offset <= begin && ranges[r].offset + ranges[r].size >= begin + size) direct = ranges[r].target + (begin - ranges[r].offset);
      }
      if (!direct) buffer.resize(kWindowBlocks * kBlockBytes);
      uint8_t* const bytes = direct ? direct : buffer.data();
      const Status read = store_->ReadRange(key_, begin, {bytes, size}, limits);
      std::vector<uint64_t> corrupt;
      if (read.ok()) {
        for (uint64_t block = window.first; block < window.first + window.count; ++block) {
          const uint64_t at = (block - window.first) * kBlockBytes;
          if (Crc32c(0, {bytes + at, std::min(kBlockBytes, size - at)}) != crcs_[block]) corrupt.push_back(block);
        }
        for (const uint32_t r : window.ranges) {
          const uint64_t from = std::max(ranges[r].offset, begin), to = std::min(ranges[r].offset + ranges[r].size, begin + size);
          uint8_t* const target = ranges[r].target + (from - ranges[r].offset);
          if (target != bytes + (from - begin)) std::memcpy(target, bytes + (from - begin), to - from);
        }
      } else if (read.code() == StatusCode::kCorrupt) {  // The object ends too early.
        for (uint64_t block = window.first; block < window.first + window.count; ++block) corrupt.push_back(block);
      }
      const std::lock_guard lock(mutex);
      report.target_modified = report.target_modified || (!window.ranges.empty() && (read.ok() || direct));
      report.corrupt_blocks.insert(report.corrupt_blocks.end(), corrupt.begin(), corrupt.end());
      if (!read.ok() && read.code() != StatusCode::kCorrupt && report.status.ok()) {
        report.status = read.code() == StatusCode::kNotFound
                            ? Status(StatusCode::kIncomplete, ObjectUrl(*store_, key_) + " is missing, although the step's manifest is there")
                            : read;
        failed = true;
      }
    }
  };
  const auto work = [&] {
    try {
      work_or_throw();
    } catch (const std::bad_alloc&) {
      const std::lock_guard lock(mutex);
      report.status = NoMemory("read a stored shard");
      report.target_modified = report.target_modified || !ranges.empty();
      failed = true;
    }
  };
  const size_t threads = std::min<size_t>(static_cast<size_t>(std::max(requests, 1)), windows.size());
  {
    std::vector<std::jthread> pool;
    try {
      for (size_t i = 1; i < threads; ++i) pool.emplace_back(work);
    } catch (const std::system_error&) {
      // Those that are there do it.
    } catch (const std::bad_alloc&) {
      // The same.
    }
    work();
  }
  std::sort(report.corrupt_blocks.begin(), report.corrupt_blocks.end());
  if (report.status.ok() && !report.corrupt_blocks.empty()) {
    report.status = Status(StatusCode::kCorrupt, ObjectUrl(*store_, key_) + ": block " + std::to_string(report.corrupt_blocks.front()) +
                                                     " does not match its checksum");
  }
  return report;
}

}  // namespace sp

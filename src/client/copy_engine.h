// The memory path: tensors into a lease's extents and back, with the CRC32C of every block made or checked in the same
// pass.
//
// Work is split by 4 MiB pieces of the shard, not by tensor, so that neither one huge tensor nor thousands of small
// ones serialise.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "client/copy_engine_threads.h"
#include "client/copy_kernel.h"
#include "format/constants.h"

namespace sp {

// Bytes that land at [offset, offset + size) of the shard.
struct CopySegment {
  const uint8_t* source = nullptr;
  uint64_t offset = 0;
  uint64_t size = 0;
};

// Bytes [offset, offset + size) of the shard that are wanted at `target`.
struct ScatterSegment {
  uint64_t offset = 0;
  uint64_t size = 0;
  uint8_t* target = nullptr;
};

struct CopyOptions {
  int threads = 0;                            // 0: DefaultCopyThreads(). At most kCopyThreadsMax.
  const std::atomic<bool>* cancel = nullptr;  // Looked at once per piece; makes the call return kClosed.
  bool verify_all = false;                    // CopyOut: read and check blocks that no segment touches, too.
};

// A shard to read: either `mapped` (at least `length` bytes, already mapped), or descriptors of its extents.
struct ShardSource {
  ByteSpan mapped;
  std::span<const int> extents;  // Extent i holds bytes [i * extent_bytes, (i + 1) * extent_bytes). Only borrowed.
  uint64_t extent_bytes = 0;     // A multiple of kBlockBytes, so that no block lies in two extents.
  uint64_t length = 0;
  std::span<const uint32_t> block_crcs;  // Checked against the root of the seal record by the caller.
};

struct CopyOutReport {
  // kCorrupt: see corrupt_blocks; all other wanted blocks were checked and copied all the same.
  // Another error: the copy stopped early, and corrupt_blocks has what was seen until then.
  Status status;
  // Ascending. Blocks that do not match their checksum or could not be read to their end. Their part of the targets
  // holds unverified bytes and must be replaced from another copy (SegmentsInBlocks) or reported as lost.
  std::vector<uint64_t> corrupt_blocks;
  uint64_t blocks_verified = 0;  // Read to their end and matching.
  bool target_modified = false;  // At least one byte of a target was written.
};

// Thread-safe: a call made while another one has the threads works on its caller's thread alone; so does every call in a
// forked child.
class CopyEngine {
 public:
  explicit CopyEngine(const CopyKernel& kernel = *FindCopyKernel(KernelKind::kAuto)) : kernel_(kernel) {}

  const char* KernelName() const { return kernel_.name; }

  // SAVE. Copies the segments into `target` and writes the CRC32C of each block of it to `block_crcs`
  // (BlockCount(target.size()) values). The checksums are of the source bytes (I-11): a source that changes meanwhile
  // gives blocks that do not verify (I-9). kInvalidArgument, with nothing written, unless the segments are in order and
  // tile [0, target.size()) exactly; empty ones are allowed. kClosed when cancelled: the target is half-written then,
  // the checksums are not to be used.
  Status CopyIn(std::span<const CopySegment> segments, MutableByteSpan target, std::span<uint32_t> block_crcs,
                const CopyOptions& options = {});

  // RESTORE. Segments in any order, with gaps, also overlapping in the shard (not in their targets). Every block with
  // at least one wanted byte is read whole and compared with its checksum (I-8); bytes go to the targets in the same
  // pass, so before a bad block is known to be bad. Whoever must not see a change before everything is verified calls
  // this with no segments and `verify_all` first. kInvalidArgument leaves the targets untouched. std::bad_alloc: targets
  // may hold unverified bytes.
  CopyOutReport CopyOut(const ShardSource& source, std::span<const ScatterSegment> segments,
                        const CopyOptions& options = {});

 private:
  const CopyKernel& kernel_;
  CopyThreads threads_;
};

// The parts of `segments` that lie in one of `blocks` (ascending): what to ask another copy for after CopyOut found
// those corrupt.
std::vector<ScatterSegment> SegmentsInBlocks(std::span<const ScatterSegment> segments,
                                             std::span<const uint64_t> blocks);

}  // namespace sp

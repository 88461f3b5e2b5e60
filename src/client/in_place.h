// The save path for bytes that are in the lease already (copied there by a device), plus some that are not. Thread-safe.
#pragma once

#include <span>

#include "client/copy_engine.h"

namespace sp {

// Copies the segments, which are in order and do not overlap but may leave gaps, into `target`; what they leave is taken as it is. Then
// writes the CRC32C of each block to `block_crcs`. Same errors as CopyEngine::CopyIn; kInvalidArgument before anything is written.
Status FillInPlace(std::span<const CopySegment> segments, MutableByteSpan target, std::span<uint32_t> block_crcs,
                   const CopyOptions& options, CopyThreads& threads);

// kInvalidArgument unless the segments are in order, inside [0, length), and without overlap, and, when `tiling`, without a gap.
Status CheckSegments(std::span<const CopySegment> segments, uint64_t length, bool tiling);

}  // namespace sp

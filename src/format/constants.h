// Numbers that leave the process: block size, limits of outsider-controlled values (docs/operating/limits.md). Pure.
#pragma once

#include <cstdint>

namespace sp {

inline constexpr uint64_t kBlockBytes = 1u << 20;         // One CRC32C per block of a shard; the last may be short.
inline constexpr uint64_t kAlignBytes = 4096;             // Checksum list and tensor data start at multiples of this.
inline constexpr uint64_t kFrameBytesMax = 64u << 10;     // A whole socket message, header included.
inline constexpr uint32_t kDescriptorsPerFrameMax = 128;  // SCM_RIGHTS batch.
inline constexpr uint64_t kNamespaceBytesMax = 200;
inline constexpr uint64_t kStoreUrlBytesMax = 1024;
inline constexpr uint32_t kWorldSizeMax = 65536;
inline constexpr uint64_t kStepMax = (uint64_t{1} << 63) - 1;
inline constexpr uint64_t kShardBytesMax = uint64_t{1} << 40;
inline constexpr uint64_t kHeaderBytesMax = 256u << 20;   // safetensors header of one shard, length word included.
inline constexpr uint32_t kTensorsPerShardMax = 4'000'000;
inline constexpr uint64_t kTensorNameBytesMax = 1024;
inline constexpr uint32_t kTensorRankMax = 64;            // Dimensions of one tensor.
inline constexpr uint32_t kExtentsMax = 4096;             // Per node (DESIGN 4.1).
inline constexpr uint32_t kJsonDepthMax = 16;

inline constexpr uint64_t BlockCount(uint64_t length) { return length / kBlockBytes + (length % kBlockBytes != 0); }
inline constexpr uint64_t AlignUp(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }
// The block checksum list (u32 little-endian each) lies behind the shard's bytes in its lease.
inline constexpr uint64_t ChecksumListOffset(uint64_t length) { return AlignUp(length, kAlignBytes); }
// Bytes a lease needs for a shard of `length` bytes.
inline constexpr uint64_t LeaseBytes(uint64_t length) { return ChecksumListOffset(length) + 4 * BlockCount(length); }

}  // namespace sp

// Seal record: the immutable statement that a shard's bytes are final (docs/formats/seal-record.md). Pure.
//
// 384 bytes, little-endian, with a version and a CRC32C; its SHA-256 is its identity. Where copies of the shard are is never in it.
#pragma once

#include <array>
#include <string>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

enum class ShardKind : uint8_t { kData = 0, kManifest = 1 };

// What names one try at saving one step; the same on all ranks without a message.
struct AttemptKey {
  uint32_t uid = 0;  // Namespace identity: uid of the peer.
  std::string ns;
  uint64_t generation = 0;
  Id128 nonce;  // The launch's nonce: two histories that both reach generation g never share an attempt.
  uint64_t step = 0;
  uint32_t try_number = 0;

  // First 16 bytes of SHA-256 over a domain tag and the fields.
  Id128 AttemptId() const;
  friend bool operator==(const AttemptKey&, const AttemptKey&) = default;
};

struct SealRecord {
  static constexpr size_t kBytes = 384;
  static constexpr uint32_t kMagic = 0x52535053;  // "SPSR"
  static constexpr uint16_t kVersion = 1;

  AttemptKey key;
  Id128 attempt;  // == key.AttemptId()
  ShardKind kind = ShardKind::kData;
  uint32_t world_size = 0;
  uint32_t rank = 0;           // 0 for a manifest.
  uint64_t length_bytes = 0;   // The shard (a safetensors file), without its checksum list.
  Hash256 block_root;          // SHA-256 of the little-endian CRC32C list, one per 1 MiB block.
  uint32_t whole_crc = 0;      // CRC32C of all bytes.
  uint64_t header_bytes = 0;   // Data: length word + JSON of the safetensors header. Manifest: 0.
  uint64_t static_offset = 0;  // Data: the header's static part is [static_offset, header_bytes). Manifest: 0.
  Hash256 structure;           // Data: SHA-256 of the static part. Manifest: zero.

  std::array<uint8_t, kBytes> Encode() const;
  // kProtocol: not a record, another version, a bad checksum, fields that contradict each other.
  static Result<SealRecord> Decode(ByteSpan bytes);
  Hash256 Identity() const;  // SHA-256 of the encoded bytes.
  friend bool operator==(const SealRecord&, const SealRecord&) = default;
};

// A statement that may be withdrawn: node N (boot B) holds a verified copy of record R. 96 bytes; versioned, checksummed.
struct CopyReport {
  static constexpr size_t kBytes = 96;
  static constexpr uint32_t kMagic = 0x52435053;  // "SPCR"
  static constexpr uint16_t kVersion = 1;

  Hash256 record;
  Id128 node;
  Id128 boot;
  bool held = true;  // false: withdrawn.

  std::array<uint8_t, kBytes> Encode() const;
  static Result<CopyReport> Decode(ByteSpan bytes);
  friend bool operator==(const CopyReport&, const CopyReport&) = default;
};

// Root of a block checksum list.
Hash256 BlockRoot(std::span<const uint32_t> block_crcs);

}  // namespace sp

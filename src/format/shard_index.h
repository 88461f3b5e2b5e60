// Shard index: what is in one shard, read from the static part of its safetensors header (docs/formats/shard.md). Pure.
//
// A shard is a valid safetensors file: u64 length N | JSON of N bytes | data. The JSON begins with the values that change every step, padded with
// spaces to a fixed room; from `static_offset` on, the text depends only on the structure of the state. Its SHA-256 is the structure hash. The
// static part starts in the middle of the "__metadata__" object, so that the daemon reads it without the values (it never looks at those).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "format/packed_text.h"

namespace sp {

struct TensorPiece {
  std::string name;                     // Global tensor name (the key in the file may carry an "@k" suffix).
  std::string dtype;                    // safetensors' name, e.g. "F32"; true dtype of raw tensors is the reader's business.
  std::vector<uint64_t> shape;          // Of this piece.
  std::vector<uint64_t> offsets;        // Of this piece in the global tensor, one per dimension.
  std::vector<uint64_t> global_shape;
  uint64_t begin = 0, end = 0;          // Data offsets within the data section.
  friend bool operator==(const TensorPiece&, const TensorPiece&) = default;
};

// One more name for a piece: a short text may ask for millions, so it holds no numbers of its own.
struct PieceAlias {
  std::string name;
  uint32_t piece = 0;  // Place in ShardIndex::pieces.
  friend bool operator==(const PieceAlias&, const PieceAlias&) = default;
};

struct ShardIndex {
  std::vector<TensorPiece> pieces;  // In file order of the header.
  std::vector<PieceAlias> aliases;  // By the text of their keys.
  uint64_t data_bytes = 0;
  // Names that *some* rank must hold so that the attempt is whole; the same list on all ranks that agreed on ownership. Empty: no claim.
  TextList expected;

  // `static_part`: header bytes [static_offset, header_bytes). kProtocol names what is wrong. Bounded: kTensorsPerShardMax, kJsonDepthMax,
  // offsets tile [0, data_bytes) exactly, products of shapes do not overflow; memory is a small multiple of the text (limits.md).
  static Result<ShardIndex> ParseStaticPart(ByteSpan static_part);
};

// What the coverage check needs of an index, in less memory than its text: kept by the daemon until the ranks of an attempt are together.
struct PackedIndex {
  std::string entries;  // Pieces and aliases; only coverage.cc reads them.
  uint32_t count = 0;
  uint64_t data_bytes = 0;
  std::shared_ptr<const TextList> expected;  // Equal lists of several ranks may be shared.

  static std::shared_ptr<PackedIndex> Of(ShardIndex index);
  // What it costs to keep and to check it, without `expected`.
  uint64_t cost() const { return 256 + entries.size() + uint64_t{32} * count; }
};

// The pieces of every tensor, over all ranks, fill its volume without partial overlap; identical pieces may repeat (DESIGN 5).
// kIncomplete names the first tensor with a gap, kCorrupt one with contradicting shapes or a partial overlap.
Status CheckCoverage(const std::vector<const PackedIndex*>& ranks);

}  // namespace sp

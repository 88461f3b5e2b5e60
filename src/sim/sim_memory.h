// The memory that the simulated node lends: one word stands for the content of an extent. Pure.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "format/constants.h"
#include "format/seal_record.h"

namespace sp::sim {

// The memory of one extent. It lives as long as somebody maps it, like a memfd; 0 is zeros.
struct Memory {
  uint32_t id = 0;
  uint32_t word = 0;
  std::optional<uint32_t> uid;  // Under which it was ever lent.
};
using MemoryRef = std::shared_ptr<Memory>;

// What a shard's block checksum list is made of here: the words of the extents it fills.
inline std::vector<uint32_t> WordsOf(const std::vector<MemoryRef>& extents, size_t count) {
  std::vector<uint32_t> words;
  for (size_t i = 0; i < count; ++i) words.push_back(extents[i]->word);
  return words;
}
inline Hash256 RootOf(const std::vector<MemoryRef>& extents, size_t count) { return BlockRoot(WordsOf(extents, count)); }
inline uint32_t ExtentsFor(uint64_t length, uint64_t extent_bytes) {
  return static_cast<uint32_t>((LeaseBytes(length) + extent_bytes - 1) / extent_bytes);
}

}  // namespace sp::sim

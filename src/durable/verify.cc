#include "durable/verify.h"

#include <algorithm>

#include "base/aligned_buffer.h"
#include "base/crc32c.h"
#include "base/no_memory.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr uint64_t kWindowBytes = 8 * kBlockBytes;

Status Differs(const ObjectStore& store, const std::string& key, const std::string& how) {
  return {StatusCode::kCorrupt, "verify " + store.url() + "/" + key + ": " + how};
}

}  // namespace

Status VerifyObject(ObjectStore& store, const std::string& key, uint64_t size_bytes, std::span<const uint32_t> block_crcs, const CallLimits& limits) {
  if (block_crcs.size() != BlockCount(size_bytes)) {
    return {StatusCode::kInvalidArgument, "verify " + store.url() + "/" + key + ": " + std::to_string(block_crcs.size()) + " checksums for " +
                                              std::to_string(BlockCount(size_bytes)) + " blocks"};
  }
  SP_ASSIGN_OR_RETURN(const ObjectInfo info, store.Head(key, limits));
  if (info.size_bytes != size_bytes) {
    return Differs(store, key, std::to_string(info.size_bytes) + " bytes long, not " + std::to_string(size_bytes));
  }
  return OrNoMemory("the window for reading an object back", [&]() -> Status {
    const AlignedBuffer window(std::min(size_bytes, kWindowBytes));
    CallLimits from_the_store = limits;
    from_the_store.past_cache = true;
    for (uint64_t at = 0; at < size_bytes; at += kWindowBytes) {
      const MutableByteSpan bytes = window.span().first(std::min(kWindowBytes, size_bytes - at));
      SP_RETURN_IF_ERROR(store.ReadRange(key, at, bytes, from_the_store));
      for (uint64_t begin = 0; begin < bytes.size(); begin += kBlockBytes) {
        const uint64_t block = (at + begin) / kBlockBytes;
        if (Crc32c(0, bytes.subspan(begin, std::min<uint64_t>(kBlockBytes, bytes.size() - begin))) != block_crcs[block]) {
          return Differs(store, key,
                         "block " + std::to_string(block) + " (from byte " + std::to_string(block * kBlockBytes) + ") is not what was sealed");
        }
      }
      if (limits.progress) limits.progress(bytes.size());
    }
    return {};
  });
}

}  // namespace sp

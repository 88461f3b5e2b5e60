#include "node/extent_set.h"

#include <algorithm>

#include "os/memfd.h"

namespace sp {

Status ExtentSet::Read(uint64_t offset, MutableByteSpan out) const {
  if (offset > size_bytes() || out.size() > size_bytes() - offset) {
    return Status(StatusCode::kProtocol, "bytes " + std::to_string(offset) + "+" + std::to_string(out.size()) + " are not within the " +
                                             std::to_string(size_bytes()) + " bytes of the lease");
  }
  while (!out.empty()) {
    const uint64_t within = offset % extent_bytes_;
    const size_t count = static_cast<size_t>(std::min<uint64_t>(out.size(), extent_bytes_ - within));
    SP_RETURN_IF_ERROR(PReadExact(extents_[offset / extent_bytes_]->get(), out.first(count), within));
    out = out.subspan(count);
    offset += count;
  }
  return {};
}

}  // namespace sp

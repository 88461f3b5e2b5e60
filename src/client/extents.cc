#include "client/extents.h"

#include <iterator>

#include "os/memfd.h"

namespace sp {
namespace {

constexpr uint64_t kManyFds = 256;    // From here on the usual soft limit of 1,024 may be too low.
constexpr uint64_t kSpareFds = 1024;  // What the trainer may have open itself.

}  // namespace

Result<std::vector<Fd>> FetchExtents(Session& session, FetchExtentsRequest request, uint32_t extents, const Origin& origin, Nanos deadline) {
  const auto bad = [&](const std::string& why) {
    return Error(StatusCode::kProtocol, "daemon at " + session.socket_path() + ": fetching extents: " + why);
  };
  if (extents == 0 || extents > kExtentsMax) return bad(std::to_string(extents) + " extents");
  if (extents > kManyFds) SP_RETURN_IF_ERROR(EnsureFdLimit(extents + kSpareFds));
  std::vector<Fd> fds;
  while (fds.size() < extents) {
    request.first = static_cast<uint32_t>(fds.size());
    const CallOptions options{.deadline = deadline, .boot = origin.boot, .fds_max = kDescriptorsPerFrameMax};
    SP_ASSIGN_OR_RETURN(Reply reply, session.Call(MessageType::kFetchExtents, Encode(request), options));
    SP_RETURN_IF_ERROR(reply.frame.ToStatus());
    SP_ASSIGN_OR_RETURN(const auto batch, Decode<FetchExtentsReply>(reply.frame.body));
    if (batch.first != request.first || batch.count == 0 || batch.count != reply.fds.size() || batch.total != extents ||
        batch.count > extents - batch.first) {
      return bad(std::to_string(batch.count) + " from " + std::to_string(batch.first) + " of " + std::to_string(batch.total) +
                 " announced, " + std::to_string(reply.fds.size()) + " came; asked for those from " + std::to_string(request.first) +
                 " of " + std::to_string(extents));
    }
    for (const Fd& fd : reply.fds) {
      if (Status sealed = CheckSealedSize(fd.get(), origin.extent_bytes); !sealed.ok()) return bad(sealed.message());
    }
    fds.insert(fds.end(), std::make_move_iterator(reply.fds.begin()), std::make_move_iterator(reply.fds.end()));
  }
  return fds;
}

}  // namespace sp

#include "node/client_connection.h"

#include "os/memfd.h"
#include "os/unix_socket.h"

namespace sp {

Status ClientConnection::SendFrame(const OutgoingFrame& frame) const {
  std::vector<int> fds;
  std::vector<Fd> reopened;
  for (const SharedFd& extent : frame.extents) {
    if (frame.read_only) {
      SP_ASSIGN_OR_RETURN(Fd fd, ReopenReadOnly(extent->get()));
      fds.push_back(fd.get());
      reopened.push_back(std::move(fd));
    } else {
      fds.push_back(extent->get());
    }
  }
  return SendMessage(socket_.get(), frame.bytes, fds);
}

size_t ClientConnection::Cost(const OutgoingFrame& frame) {
  return sizeof frame + frame.bytes.size() + frame.extents.size() * sizeof(SharedFd);
}

Status ClientConnection::Send(OutgoingFrame frame) {
  if (queued_bytes_ + Cost(frame) > kQueuedBytesMax) {
    return Status(StatusCode::kLimit, "the client reads no replies: " + std::to_string(queued_bytes_) + " bytes wait for it");
  }
  queued_bytes_ += Cost(frame);
  queue_.push_back(std::move(frame));
  return queue_.size() == 1 ? Flush() : Status();
}

Status ClientConnection::Flush() {
  must_retry_ = false;
  while (!queue_.empty()) {
    const OutgoingFrame& next = queue_.front();
    // Descriptors that nobody receives count against this user's limit, for all its sockets: never more of them under way than one message has.
    if (!next.extents.empty()) {
      SP_ASSIGN_OR_RETURN(const size_t unread, UnreadByPeer(socket_.get()));
      if (unread > 0) {
        must_retry_ = true;
        return {};
      }
    }
    const Status sent = SendFrame(next);
    if (sent.code() == StatusCode::kUnavailable) return {};
    if (sent.code() == StatusCode::kLimit) {
      must_retry_ = true;
      return {};
    }
    SP_RETURN_IF_ERROR(sent);
    queued_bytes_ -= Cost(next);
    queue_.pop_front();
  }
  return {};
}

}  // namespace sp

// The daemon's end of one client's socket, with the replies that wait for it. Owned by the event loop.
#pragma once

#include <deque>
#include <vector>

#include "base/clock.h"
#include "format/constants.h"
#include "node/extent_set.h"
#include "os/peer_identity.h"

namespace sp {

struct OutgoingFrame {
  std::vector<uint8_t> bytes;
  std::vector<SharedFd> extents;  // Go with it, in order; at most kDescriptorsPerFrameMax.
  bool read_only = false;         // Re-opened so that the client cannot write through them.
};

class ClientConnection {
 public:
  // A client that does not read its replies is dropped when more than this waits for it (F87).
  static constexpr size_t kQueuedBytesMax = 4 * kFrameBytesMax;

  ClientConnection(Fd socket, PeerIdentity identity) : socket_(std::move(socket)), identity_(std::move(identity)) {}

  int fd() const { return socket_.get(); }
  const PeerIdentity& identity() const { return identity_; }

  // Sends it now, or queues it. kLimit: the queue is full. kClosed: the client is gone.
  Status Send(OutgoingFrame frame);
  // Sends what waits, as far as the socket takes it; OK also when something still waits.
  Status Flush();
  bool has_queued() const { return !queue_.empty(); }
  // Waits because the client has not taken the descriptors before, or too many are under way on this machine: no event of the socket tells
  // when that changes.
  bool must_retry() const { return must_retry_; }

  // When set: nothing is read any more, and the socket closes once the queue is empty, or then.
  Nanos closing_by = 0;
  uint32_t watched_events = 0;  // What epoll watches for.

 private:
  Status SendFrame(const OutgoingFrame& frame) const;
  static size_t Cost(const OutgoingFrame& frame);  // Memory that it holds while it waits.

  Fd socket_;
  PeerIdentity identity_;
  std::deque<OutgoingFrame> queue_;
  size_t queued_bytes_ = 0;
  bool must_retry_ = false;
};

}  // namespace sp

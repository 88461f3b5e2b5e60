// One connection to the daemon: a socket that has said Hello. Used by one thread at a time.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "format/messages.h"
#include "os/fd.h"

namespace sp {

// The daemon's memory that ids of slots, leases and pins belong to. A daemon with another boot knows nothing of them.
struct Origin {
  Id128 boot;
  uint64_t extent_bytes = 0;
};

struct Reply {
  Frame frame;          // Its status is the daemon's answer.
  std::vector<Fd> fds;  // Descriptors that came with it.
  Origin origin;        // Who answered.
};

class Connection {
 public:
  // Connects and says Hello. kNotFound, kUnavailable: nobody listens, or the daemon is going away. kClosed: it went away in
  // mid-handshake. kProtocol: it speaks another version (both are named), or it is no daemon of ours. Times are absolute.
  static Result<Connection> Open(const std::string& socket_path, const HelloRequest& hello, Nanos deadline);

  // Sends a request and waits for its answer. An error means that the connection is of no use any more: kClosed when the daemon went
  // away (repeat the request on a new connection), kDeadline, kProtocol for an answer that is none.
  Result<Reply> Exchange(MessageType type, ByteSpan body, size_t fds_max, Nanos deadline);

  const HelloReply& daemon() const { return daemon_; }
  int fd() const { return fd_.get(); }

 private:
  explicit Connection(Fd fd) : fd_(std::move(fd)) {}
  Result<Frame> RoundTrip(MessageType type, ByteSpan body, size_t fds_max, Nanos deadline, std::vector<Fd>* fds);

  Fd fd_;
  HelloReply daemon_;
  uint64_t next_request_ = 1;
};

}  // namespace sp

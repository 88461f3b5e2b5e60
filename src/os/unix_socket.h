// Unix sockets of type SOCK_SEQPACKET: whole messages, with descriptors. Thread-safe; all sockets are non-blocking and
// close-on-exec. Deadlines are absolute times of MonotonicNow().
#pragma once

#include <sys/types.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "os/fd.h"

namespace sp {

inline constexpr size_t kMaxFdsPerMessage = 128;
// sockaddr_un has room for 107 bytes; the rest is for the temporary name that ListenUnix binds before it renames.
inline constexpr size_t kMaxSocketPathBytes = 100;

Nanos MonotonicNow();  // The clock of SteadyClock.

// A listening socket at `path` with permissions `mode`. It appears under its name only when it can take connections; a
// stale socket file is replaced. kUnavailable when somebody listens there, kInvalidArgument when the path is too long
// or is something other than a socket. Two callers at the same instant must be kept apart by a FileLock.
Result<Fd> ListenUnix(const std::string& path, mode_t mode, int backlog = 1024);

// Waits while the listener's queue is full. kUnavailable when nobody listens, kNotFound when there is no such file,
// kDeadline.
Result<Fd> ConnectUnix(const std::string& path, Nanos deadline);

// kUnavailable when nobody waits to be accepted.
Result<Fd> AcceptUnix(int listener);

// Two connected ends.
Result<std::pair<Fd, Fd>> UnixSocketPair();

// Bytes that were sent on this socket and that its peer has not received yet; more than the messages had, and 0 when there are none.
Result<size_t> UnreadByPeer(int fd);

// Sends one message with at most kMaxFdsPerMessage descriptors (copies; the caller keeps its own), whole or not at all.
// kUnavailable: the peer's queue is full. kClosed: the peer is gone. kLimit: too many descriptors are in flight.
Status SendMessage(int fd, ByteSpan data, std::span<const int> fds = {});

struct ReceivedMessage {
  size_t size_bytes = 0;  // Of the caller's buffer.
  std::vector<Fd> fds;    // Close-on-exec.
};

// Receives one message. A message longer than `buffer`, or with more than `max_fds` descriptors, is kProtocol; whatever
// descriptors came are closed on every error. kUnavailable: nothing there. kClosed: the peer is gone, or sent an empty
// message (the two cannot be told apart, and no message of ours is empty).
Result<ReceivedMessage> ReceiveMessage(int fd, MutableByteSpan buffer, size_t max_fds);

// False when `timeout` (>= 0) passes first. True also when the peer is gone: the next receive says so.
Result<bool> WaitReadable(int fd, Nanos timeout);
Result<bool> WaitWritable(int fd, Nanos timeout);

// The same, but wait until `deadline` instead of answering kUnavailable; then kDeadline.
Status SendMessageBy(int fd, ByteSpan data, std::span<const int> fds, Nanos deadline);
Result<ReceivedMessage> ReceiveMessageBy(int fd, MutableByteSpan buffer, size_t max_fds, Nanos deadline);

}  // namespace sp

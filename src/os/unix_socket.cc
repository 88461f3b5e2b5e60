#include "os/unix_socket.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "os/errors.h"
#include "os/system.h"

namespace sp {
namespace {

Result<sockaddr_un> Address(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path || path.find('\0') != std::string::npos) {
    return Error(StatusCode::kInvalidArgument, "socket path '" + path + "' has " + std::to_string(path.size()) +
                                                   " bytes, allowed are 1 to " + std::to_string(kMaxSocketPathBytes));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

const sockaddr* Generic(const sockaddr_un& address) { return reinterpret_cast<const sockaddr*>(&address); }

Result<Fd> NewSocket(int extra_flags) {
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | extra_flags, 0));
  if (!fd.valid()) return ErrnoError(errno, "create a Unix socket");
  return fd;
}

// OK when `path` is free or holds a socket that nobody serves.
Status CheckNotServed(const std::string& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) return errno == ENOENT ? Status() : ErrnoStatus(errno, "stat " + path);
  if (!S_ISSOCK(info.st_mode)) return Status(StatusCode::kInvalidArgument, path + " exists and is not a socket");
  SP_ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  SP_ASSIGN_OR_RETURN(Fd probe, NewSocket(SOCK_NONBLOCK));
  // Only a refusal proves that nobody listens; EAGAIN, for instance, is a listener with a full queue.
  if (::connect(probe.get(), Generic(address), sizeof address) != 0 && errno == ECONNREFUSED) return {};
  return Status(StatusCode::kUnavailable, "another process listens on " + path);
}

Result<bool> WaitFor(int fd, short events, Nanos timeout) {
  const Nanos deadline = MonotonicNow() + std::max<Nanos>(timeout, 0);
  for (;;) {
    const Nanos left = std::max<Nanos>(deadline - MonotonicNow(), 0);
    const timespec wait{.tv_sec = static_cast<time_t>(left / kNanosPerSecond), .tv_nsec = left % kNanosPerSecond};
    pollfd entry{.fd = fd, .events = events, .revents = 0};
    const int ready = ::ppoll(&entry, 1, &wait, nullptr);
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return ErrnoError(errno, "poll a socket");
    if (ready == 0) return false;
  }
}

}  // namespace

Nanos MonotonicNow() { return SteadyClock().Now(); }

Result<Fd> ListenUnix(const std::string& path, mode_t mode, int backlog) {
  if (path.size() > kMaxSocketPathBytes) {
    return Error(StatusCode::kInvalidArgument, "socket path '" + path + "' has " + std::to_string(path.size()) +
                                                   " bytes, allowed are " + std::to_string(kMaxSocketPathBytes));
  }
  SP_RETURN_IF_ERROR(CheckNotServed(path));
  const std::string temporary = path + "." + RandomId128().ToHex().substr(0, 6);
  SP_ASSIGN_OR_RETURN(const sockaddr_un address, Address(temporary));
  SP_ASSIGN_OR_RETURN(Fd fd, NewSocket(SOCK_NONBLOCK));
  if (::bind(fd.get(), Generic(address), sizeof address) != 0) return ErrnoError(errno, "bind " + path);
  // Nobody can connect before listen(), so the permissions of the moment between do not matter.
  if (::chmod(temporary.c_str(), mode) != 0 || ::listen(fd.get(), backlog) != 0 ||
      ::rename(temporary.c_str(), path.c_str()) != 0) {
    const int err = errno;
    ::unlink(temporary.c_str());
    return ErrnoError(err, "listen on " + path);
  }
  return fd;
}

Result<Fd> ConnectUnix(const std::string& path, Nanos deadline) {
  SP_ASSIGN_OR_RETURN(const sockaddr_un address, Address(path));
  SP_ASSIGN_OR_RETURN(Fd fd, NewSocket(SOCK_NONBLOCK));
  // A non-blocking connect does not queue behind a full backlog, and no poll can wait for it; a send timeout can.
  if (::connect(fd.get(), Generic(address), sizeof address) == 0) return fd;
  while (errno == EAGAIN || errno == EINTR) {
    const Nanos left = deadline - MonotonicNow();
    if (left <= 0) return Error(StatusCode::kDeadline, "connect to " + path + ": its queue stayed full");
    SP_ASSIGN_OR_RETURN(fd, NewSocket(0));
    // Rounded up, because zero would mean "for ever".
    const timeval wait{.tv_sec = static_cast<time_t>(left / kNanosPerSecond),
                       .tv_usec = left % kNanosPerSecond / 1000 + 1};
    if (::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait) != 0) {
      return ErrnoError(errno, "set a connect timeout");
    }
    if (::connect(fd.get(), Generic(address), sizeof address) == 0) return fd;
  }
  return ErrnoError(errno, "connect to " + path);
}

Result<Fd> AcceptUnix(int listener) {
  Fd fd(RetryOnEintr([&] { return ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK); }));
  if (!fd.valid()) return ErrnoError(errno, "accept");
  return fd;
}

Result<std::pair<Fd, Fd>> UnixSocketPair() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) {
    return ErrnoError(errno, "socketpair");
  }
  return std::pair(Fd(ends[0]), Fd(ends[1]));
}

Result<size_t> UnreadByPeer(int fd) {
  int bytes = 0;
  if (::ioctl(fd, SIOCOUTQ, &bytes) != 0) return ErrnoError(errno, "ask what a peer has not received");
  return static_cast<size_t>(std::max(bytes, 0));
}

Status SendMessage(int fd, ByteSpan data, std::span<const int> fds) {
  if (data.empty() || fds.size() > kMaxFdsPerMessage) {
    return Status(StatusCode::kInvalidArgument, "message of " + std::to_string(data.size()) + " bytes and " +
                                                    std::to_string(fds.size()) + " descriptors");
  }
  iovec part{.iov_base = const_cast<uint8_t*>(data.data()), .iov_len = data.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFdsPerMessage)] = {};
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  const ssize_t sent = RetryOnEintr([&] { return ::sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL); });
  if (sent < 0) return ErrnoStatus(errno, "send a message of " + std::to_string(data.size()) + " bytes");
  if (static_cast<size_t>(sent) != data.size()) {
    return Status(StatusCode::kInternal, "a message was sent in part; not a SOCK_SEQPACKET socket?");
  }
  return {};
}

Result<ReceivedMessage> ReceiveMessage(int fd, MutableByteSpan buffer, size_t max_fds) {
  iovec part{.iov_base = buffer.data(), .iov_len = buffer.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFdsPerMessage)];
  max_fds = std::min(max_fds, kMaxFdsPerMessage);
  if (max_fds > 0) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * max_fds);
  }
  // Take ownership of every descriptor before anything can fail: they are open in this process already. So the room for them is made first;
  // the kernel rounds its own up.
  ReceivedMessage received;
  received.fds.reserve(max_fds > 0 ? max_fds + 1 : 0);
  const ssize_t got = RetryOnEintr([&] { return ::recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC); });
  if (got < 0) return ErrnoError(errno, "receive a message");
  received.size_bytes = static_cast<size_t>(got);
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int number;
      std::memcpy(&number, CMSG_DATA(header) + i * sizeof number, sizeof number);
      received.fds.emplace_back(number);
    }
  }
  if (message.msg_flags & MSG_TRUNC) {
    return Error(StatusCode::kProtocol, "message longer than " + std::to_string(buffer.size()) + " bytes");
  }
  // The kernel rounds the room for descriptors up, so one more than asked for may have fitted.
  if ((message.msg_flags & MSG_CTRUNC) || received.fds.size() > max_fds) {
    return Error(StatusCode::kProtocol, "message with more than " + std::to_string(max_fds) +
                                            " descriptors, or more than this process may open");
  }
  if (got == 0) return Error(StatusCode::kClosed, "the peer closed the connection");
  return received;
}

Result<bool> WaitReadable(int fd, Nanos timeout) { return WaitFor(fd, POLLIN, timeout); }
Result<bool> WaitWritable(int fd, Nanos timeout) { return WaitFor(fd, POLLOUT, timeout); }

Status SendMessageBy(int fd, ByteSpan data, std::span<const int> fds, Nanos deadline) {
  for (;;) {
    Status sent = SendMessage(fd, data, fds);
    if (sent.code() != StatusCode::kUnavailable) return sent;
    SP_ASSIGN_OR_RETURN(const bool ready, WaitWritable(fd, deadline - MonotonicNow()));
    if (!ready) return Status(StatusCode::kDeadline, "the peer did not take a message in time");
  }
}

Result<ReceivedMessage> ReceiveMessageBy(int fd, MutableByteSpan buffer, size_t max_fds, Nanos deadline) {
  for (;;) {
    Result<ReceivedMessage> received = ReceiveMessage(fd, buffer, max_fds);
    if (received || received.error().code() != StatusCode::kUnavailable) return received;
    SP_ASSIGN_OR_RETURN(const bool ready, WaitReadable(fd, deadline - MonotonicNow()));
    if (!ready) return Error(StatusCode::kDeadline, "the peer did not send a message in time");
  }
}

}  // namespace sp

#include "os/peer_identity.h"

#include <sys/socket.h>

#include "os/errors.h"
#include "os/pidfd.h"

namespace sp {
namespace {

constexpr int kSoPeerPidfd = 77;  // Newer than the C library's headers (Linux 6.5).

}  // namespace

Result<PeerIdentity> GetPeerIdentity(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return ErrnoError(errno, "read the credentials of a peer");
  }
  PeerIdentity peer;
  peer.pid = credentials.pid;
  peer.uid = credentials.uid;
  peer.gid = credentials.gid;

  int pidfd = -1;
  length = sizeof pidfd;
  if (::getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &pidfd, &length) == 0) {
    peer.pidfd.Reset(pidfd);  // The kernel makes pidfds close-on-exec.
    peer.pidfd_source = PidfdSource::kSocket;
  } else if (errno == ENOPROTOOPT && peer.pid > 0) {
    // Only for kernels without the option. After any other error (the peer has gone) the pid may be somebody else's
    // already.
    if (Result<Fd> opened = OpenPidfd(peer.pid)) {
      peer.pidfd = std::move(*opened);
      peer.pidfd_source = PidfdSource::kOpened;
    }
  }
  if (peer.pid > 0) peer.start_time = ProcessStartTime(peer.pid);
  // Alive after we looked: what we saw under that number was the peer.
  if (peer.pidfd.valid() && !IsAlive(peer.pidfd)) peer.start_time = 0;
  return peer;
}

}  // namespace sp

// Who is at the other end of a Unix socket, as the kernel knows it; never what the peer says about itself.
#pragma once

#include <sys/types.h>

#include <cstdint>

#include "os/fd.h"

namespace sp {

enum class PidfdSource {
  kNone,    // The kernel or the pid namespace gave none; the peer's death cannot be proved.
  kSocket,  // SO_PEERPIDFD: exactly the process that connected.
  kOpened,  // pidfd_open of the pid at accept time: the same, unless the pid was reused before we looked.
};

// uid and gid are those at connect time. pid is 0 when it has no number in our pid namespace.
struct PeerIdentity {
  pid_t pid = 0;
  uid_t uid = 0;
  gid_t gid = 0;
  Fd pidfd;
  PidfdSource pidfd_source = PidfdSource::kNone;
  uint64_t start_time = 0;  // See ProcessStartTime; 0 when it cannot be seen.
};

Result<PeerIdentity> GetPeerIdentity(int socket);

}  // namespace sp

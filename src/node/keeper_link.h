// The worker's end of its connection to the keeper. Owned by the worker's event loop.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "base/clock.h"
#include "node/keeper_protocol.h"
#include "os/fd.h"

namespace sp {

struct KeptExtent {
  uint32_t id;
  Fd fd;
};

struct KeeperAttachment {
  uint64_t extent_bytes = 0;
  uint64_t incarnation = 0;       // How often the keeper started a worker, this one included.
  uint64_t extents_to_come = 0;   // Of the start; each is still announced by an event.
  Fd ledger;
  std::vector<KeptExtent> extents;  // By ascending id. Contents are those the last worker left.
};

struct KeeperEvent {
  enum class Kind {
    kCreated,       // `fd` is the extent.
    kCreateFailed,  // `count` extents from `id` on do not exist; `status` says why.
    kDropped,       // `status` is OK or kNotFound.
  };
  Kind kind;
  uint64_t request_id;  // What RequestCreate or RequestDrop returned; 0 for extents of the start.
  uint32_t id;
  uint64_t count;
  Fd fd;
  Status status;
};

class KeeperLink {
 public:
  explicit KeeperLink(Fd control) : control_(std::move(control)) {}

  // Blocks until everything the keeper holds is here. Once, before anything else. kDeadline, kClosed (the keeper is
  // gone), kProtocol.
  Result<KeeperAttachment> Attach(Nanos deadline);

  // Ids are the worker's choice; one that exists, or more extents than the keeper's maximum, is refused by an event.
  Result<uint64_t> RequestCreate(uint32_t first_id, uint32_t count);
  Result<uint64_t> RequestDrop(uint32_t id);
  Result<uint64_t> RequestShutdown();  // SIGTERM follows.

  int fd() const { return control_.get(); }  // Readable: call ReadEvents.
  // Everything that is there now, without blocking. kClosed: the keeper is gone, and this process is about to be.
  Result<std::vector<KeeperEvent>> ReadEvents();

 private:
  Result<uint64_t> Request(KeeperFrame frame);
  Status Flush();

  Fd control_;
  uint64_t last_request_id_ = 0;
  // Requests that found the socket full. Every request is answered, so the next answer is the moment to go on.
  std::deque<KeeperFrame> unsent_;
};

}  // namespace sp

// What a client and its leases, transfers and pins share. Thread-safe; its parts lock themselves.
#pragma once

#include <cstddef>
#include <limits>
#include <memory>
#include <new>

#include "client/cancel_list.h"
#include "client/copy_engine.h"
#include "client/keep_alive.h"
#include "client/session.h"
#include "client/slot_cache.h"
#include "client/task_pool.h"
#include "os/unix_socket.h"

namespace sp {

inline constexpr Nanos kForever = std::numeric_limits<Nanos>::max();  // As a deadline: none.
inline constexpr size_t kTransferThreads = 4;
inline constexpr size_t kTransfersMax = 64;  // Waiting or running, aborts of dropped leases included.

// Owners: the Client, and each Lease, ReadPin and ShardReader that it gave out. Tasks and renewals borrow it: Client::Close ends them all
// before the Client lets go. In a forked child nobody may let go of it last, because its threads and locks do not exist there: owners keep
// it in a CoreHandle.
struct ClientCore {
  ClientCore(SessionOptions options, Nanos timeout) : session(std::move(options)), timeout(timeout) {}

  Nanos Deadline() const { return MonotonicNow() + timeout; }

  Session session;
  SlotCache slots;
  CopyEngine engine;
  CopyThreads in_place_threads;
  CancelList transfers;
  const Nanos timeout;  // For calls that have none of their own.
  // Last, so that they are destroyed first: their threads use the above.
  KeepAlive keep_alive;
  TaskPool tasks{kTransferThreads, kTransfersMax};
};

class CoreHandle {
 public:
  explicit CoreHandle(std::shared_ptr<ClientCore> core) : core_(std::move(core)) {}
  CoreHandle(const CoreHandle&) = default;
  CoreHandle(CoreHandle&&) = default;
  CoreHandle& operator=(const CoreHandle&) = delete;
  ~CoreHandle() {
    if (!core_ || core_->session.fork_guard().in_owner()) return;
    // In a forked child one reference stays for ever: this copy is never destroyed.
    alignas(std::shared_ptr<ClientCore>) std::byte kept[sizeof core_];
    new (kept) std::shared_ptr<ClientCore>(std::move(core_));
  }

  explicit operator bool() const { return core_ != nullptr; }
  ClientCore* operator->() const { return core_.get(); }
  ClientCore& operator*() const { return *core_; }

 private:
  std::shared_ptr<ClientCore> core_;
};

}  // namespace sp

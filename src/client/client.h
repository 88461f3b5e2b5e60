// The client library of safepoint: one session with the node's daemon. Thread-safe.
//
// Connects, keeps slots mapped, hands out leases to save into and pins to read from. Everything that it gave out may outlive it; after
// Close it answers kClosed. Unusable in a forked child: kUnavailable there, and destroying it does nothing to the parent.
// Timeouts are relative, in nanoseconds, and bound the whole call, reconnects included.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/client_core.h"
#include "client/lease.h"
#include "client/private_daemon.h"
#include "client/read_pin.h"
#include "format/messages.h"

namespace sp {

inline constexpr Nanos kDefaultTimeout = 30 * kNanosPerSecond;

struct ClientOptions {
  std::string socket_path;
  std::string client_name;
  std::optional<StartOptions> start;  // Start a private daemon when nobody listens.
  Nanos timeout = kDefaultTimeout;    // Also of the calls that take none.
};

// What a save names; `length` is the shard's, without its checksum list.
struct ReserveOptions {
  std::string ns;
  uint64_t generation = 0;
  Id128 nonce;
  uint64_t step = 0;
  uint32_t try_number = 0, world_size = 0, rank = 0;
  uint64_t length = 0;
};

class Client {
 public:
  // kUnavailable, naming the socket: nobody serves it. kProtocol: another protocol version; nothing was touched.
  static Result<std::unique_ptr<Client>> Connect(const ClientOptions& options);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  HelloReply daemon() const { return core_->session.daemon(); }  // Of the newest connection.
  const std::string& socket_path() const { return core_->session.socket_path(); }
  bool started_daemon() const { return core_->session.started_daemon(); }
  size_t mapped_slots() const { return core_->slots.size(); }
  std::vector<uint64_t> mappings() const { return core_->slots.mappings(); }  // MappedSlot::number() of each.
  Nanos timeout() const { return core_->timeout; }

  Result<OpenGenerationReply> OpenGeneration(const OpenGenerationRequest& request, Nanos timeout);

  // Announces `count` shards of `length` bytes; returns how many slots are ready, and mapped in this process.
  Result<uint32_t> PrepareSlots(const std::string& ns, uint64_t length, uint32_t count, Nanos timeout);
  Result<std::unique_ptr<Lease>> Reserve(const ReserveOptions& options, Nanos timeout);

  // Waits until the attempt has the level; the level reached. kDeadline: not in time. kForever is allowed; the daemon may then be
  // unreachable for the client's timeout at most (kUnavailable).
  Result<Level> Wait(const std::string& ns, const Id128& attempt, Level level, Nanos timeout);

  Result<AttemptInfo> Latest(const std::string& ns, Level level = Level::kMemory);
  Result<std::vector<AttemptInfo>> ListSteps(const std::string& ns);
  Result<std::vector<NamespaceInfo>> ListNamespaces();
  Result<std::unique_ptr<ReadPin>> OpenRead(const OpenReadRequest& request);
  Status PinStep(const std::string& ns, const Id128& attempt, bool on);
  // Asks for level `durable`. kUnavailable: the daemon has no durable tier. kClosed: the attempt has ended without being whole, or was retired.
  Status MakeDurable(const std::string& ns, const Id128& attempt);
  Result<std::string> StatusJson();

  // Ends waits, lets running transfers finish for up to `timeout`, cancels those that are left, unmaps the slots and says Bye. Also done by
  // the destructor.
  void Close(Nanos timeout);
  void Close() { Close(core_->timeout); }

 private:
  explicit Client(const ClientOptions& options);
  CallOptions Within(Nanos timeout) const;
  CallOptions Within() const { return Within(core_->timeout); }

  CoreHandle core_;
  std::atomic<bool> closed_ = false;
};

}  // namespace sp

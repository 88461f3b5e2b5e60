// A session with the daemon over a few connections. Thread-safe.
//
// Each call borrows a connection, so one that waits does not hold up the others. When the daemon's worker goes away in mid-call, the
// session connects again (the keeper's listening socket stays, so connecting waits for the next worker) and repeats the request, which is
// idempotent, until the call's deadline. Unusable in a forked child: kUnavailable.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "client/connection.h"
#include "client/fork_guard.h"
#include "client/private_daemon.h"

namespace sp {

inline constexpr size_t kConnectionsMax = 8;
inline constexpr size_t kLongCallsMax = 6;  // The rest is for calls that are answered at once.

struct CallOptions {
  Nanos deadline = 0;  // Absolute.
  // The ids in the request are of this boot: kClosed, with nothing sent, when the daemon has another memory by now.
  std::optional<Id128> boot;
  size_t fds_max = 0;
  bool long_call = false;  // Waits for what others do. Ended by Interrupt().
  bool if_there = false;   // Where nobody listens, nobody is waited for, and none is started: kUnavailable.
};

struct SessionOptions {
  std::string socket_path;
  std::string client_name;            // For the daemon's log; cut to 64 bytes.
  std::optional<StartOptions> start;  // With it, a daemon is started whenever nobody listens.
};

class Session {
 public:
  explicit Session(SessionOptions options);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // The first connection. Unlike later ones it does not wait for somebody to listen: kUnavailable at once.
  Status Connect(Nanos deadline);

  // The daemon's answer, which may be an error status. An error here: kUnavailable (the daemon cannot be reached; names the socket),
  // kDeadline (reached, but no answer; the outcome is unknown), kProtocol, kClosed (see CallOptions::boot, Interrupt, End).
  Result<Reply> Call(MessageType type, ByteSpan body, const CallOptions& options);

  // The same, with the daemon's error turned into ours and its body decoded.
  template <typename T, typename Request>
  Result<T> Ask(MessageType type, const Request& request, const CallOptions& options) {
    SP_ASSIGN_OR_RETURN(const Reply reply, Call(type, Encode(request), options));
    SP_RETURN_IF_ERROR(reply.frame.ToStatus());
    return Decode<T>(reply.frame.body);
  }

  HelloReply daemon() const;  // As of the newest connection.
  bool started_daemon() const;
  const std::string& socket_path() const { return options_.socket_path; }
  const ForkGuard& fork_guard() const { return guard_; }

  // Long calls return kClosed, now and from now on.
  void Interrupt();
  // Says Bye if the daemon can be reached by `deadline` (else it finds out when this process ends); after that every call is kClosed.
  void End(Nanos deadline);

 private:
  // A place among the users, and their connection once there is one. One that is dropped, by an error or for want of memory, gives its place
  // back and closes its connection.
  class Borrowed {
   public:
    Borrowed() = default;
    Borrowed(Borrowed&& other) noexcept
        : session(std::exchange(other.session, nullptr)), ticket(other.ticket), connection(std::move(other.connection)) {}
    Borrowed& operator=(Borrowed&&) = delete;
    ~Borrowed() {
      if (session != nullptr) session->GiveBack(std::move(*this), false);
    }

    Session* session = nullptr;  // Null: no place.
    uint64_t ticket = 0;
    std::optional<Connection> connection;
  };

  Result<Borrowed> Borrow(const CallOptions& options);
  void GiveBack(Borrowed borrowed, bool usable) noexcept;
  Result<Connection> Open(const CallOptions& options);
  void Pause(Nanos time, const CallOptions& options);
  Status Stopped(bool long_call) const;  // With mutex_ held.

  const SessionOptions options_;
  const ForkGuard guard_;
  HelloRequest hello_;

  mutable std::mutex mutex_;  // Guards everything below. Never held while waiting for the daemon.
  std::condition_variable changed_;
  struct User {
    int fd = -1;  // -1 while connecting.
    bool long_call = false;
  };
  std::map<uint64_t, User> users_;  // Calls in progress, by ticket.
  std::vector<Connection> idle_;      // Never more than kConnectionsMax, for which there is room from the start.
  uint64_t next_ticket_ = 1;
  size_t long_calls_ = 0;
  std::optional<HelloReply> daemon_;
  bool started_daemon_ = false;
  bool interrupted_ = false;
  bool ended_ = false;
};

}  // namespace sp

#include "client/session.h"

#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/check.h"
#include "base/no_memory.h"
#include "os/system.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr Nanos kBackoffFirst = kNanosPerMilli;
constexpr Nanos kBackoffMax = 50 * kNanosPerMilli;

std::chrono::steady_clock::time_point At(Nanos deadline) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(deadline));
}

}  // namespace

Session::Session(SessionOptions options) : options_(std::move(options)) {
  hello_.session = RandomId128();
  hello_.client_name = options_.client_name.substr(0, 64);
  idle_.reserve(kConnectionsMax);
}

Status Session::Connect(Nanos deadline) {
  SP_ASSIGN_OR_RETURN(Borrowed borrowed, Borrow({.deadline = deadline}));
  GiveBack(std::move(borrowed), true);
  return {};
}

Result<Reply> Session::Call(MessageType type, ByteSpan body, const CallOptions& options) {
  for (size_t lost = 0;; ++lost) {
    // Every idle connection of a worker that went away fails once, at no cost. Beyond that, something fails again and again.
    if (lost > kConnectionsMax) Pause(kBackoffMax, options);
    SP_ASSIGN_OR_RETURN(Borrowed borrowed, Borrow(options));
    if (options.boot && borrowed.connection->daemon().boot != *options.boot) {
      GiveBack(std::move(borrowed), true);
      return Error(StatusCode::kClosed, "the daemon at " + socket_path() + " was replaced and its memory with it: what this was part of is gone");
    }
    Result<Reply> reply = borrowed.connection->Exchange(type, body, options.fds_max, options.deadline);
    GiveBack(std::move(borrowed), reply.has_value());
    if (reply) return reply;
    switch (reply.error().code()) {
      case StatusCode::kClosed: break;  // The worker went away, or we were interrupted: Borrow says which.
      case StatusCode::kDeadline:
        return Error(StatusCode::kDeadline, "the daemon at " + socket_path() + " did not answer in time");
      default: return Error(reply.error().code(), "daemon at " + socket_path() + ": " + reply.error().message());
    }
  }
}

HelloReply Session::daemon() const {
  std::lock_guard lock(mutex_);
  return daemon_.value_or(HelloReply{});
}

bool Session::started_daemon() const {
  std::lock_guard lock(mutex_);
  return started_daemon_;
}

Status Session::Stopped(bool long_call) const {
  if (!ended_ && !(interrupted_ && long_call)) return {};
  return {StatusCode::kClosed, "the client of " + options_.socket_path + " was closed"};
}

Result<Session::Borrowed> Session::Borrow(const CallOptions& options) {
  SP_RETURN_IF_ERROR(guard_.Check());
  Borrowed borrowed;  // Goes after the lock, which it takes to go.
  std::unique_lock lock(mutex_);
  const auto has_place = [&] {
    return !Stopped(options.long_call).ok() ||
           (users_.size() < kConnectionsMax && (!options.long_call || long_calls_ < kLongCallsMax));
  };
  if (!changed_.wait_until(lock, At(options.deadline), has_place)) {
    return Error(StatusCode::kDeadline, "all connections to " + socket_path() + " stayed in use");
  }
  SP_RETURN_IF_ERROR(Stopped(options.long_call));
  const uint64_t ticket = next_ticket_++;
  User& user = users_[ticket];
  user.long_call = options.long_call;
  if (options.long_call) ++long_calls_;
  borrowed.session = this;
  borrowed.ticket = ticket;
  if (!idle_.empty()) {
    borrowed.connection = std::move(idle_.back());
    idle_.pop_back();
    user.fd = borrowed.connection->fd();
    return borrowed;
  }
  lock.unlock();
  Result<Connection> opened = Open(options);
  lock.lock();
  Status why = opened ? Stopped(options.long_call) : opened.error();
  if (!why.ok()) return std::unexpected(std::move(why));
  users_[ticket].fd = opened->fd();
  borrowed.connection = std::move(*opened);
  return borrowed;
}

void Session::GiveBack(Borrowed borrowed, bool usable) noexcept {
  borrowed.session = nullptr;
  std::lock_guard lock(mutex_);
  const auto user = users_.find(borrowed.ticket);
  SP_CHECK(user != users_.end());
  if (user->second.long_call) --long_calls_;
  users_.erase(user);
  const bool current = borrowed.connection && daemon_ && borrowed.connection->daemon().boot == daemon_->boot;
  if (usable && current && !ended_ && idle_.size() < kConnectionsMax) idle_.push_back(std::move(*borrowed.connection));
  // Closed before the lock goes: Interrupt and End shut down only descriptors of users.
  borrowed.connection.reset();
  changed_.notify_all();
}

Result<Connection> Session::Open(const CallOptions& options) {
  const auto unreachable = [&](const Status& why) {
    return Error(StatusCode::kUnavailable, "no safepoint daemon can be reached at " + socket_path() + ": " + why.message());
  };
  Nanos backoff = kBackoffFirst;
  for (;;) {
    Result<Connection> opened = Connection::Open(socket_path(), hello_, options.deadline);
    std::unique_lock lock(mutex_);
    if (opened) {
      if (daemon_ && daemon_->boot != opened->daemon().boot) idle_.clear();
      daemon_ = opened->daemon();
      return opened;
    }
    SP_RETURN_IF_ERROR(Stopped(options.long_call));
    const StatusCode code = opened.error().code();
    const bool nobody = code == StatusCode::kNotFound || code == StatusCode::kUnavailable;
    if (code == StatusCode::kDeadline) return unreachable(opened.error());
    if (!nobody && code != StatusCode::kClosed) return opened;
    if (nobody && (options.if_there || (!options_.start && !daemon_))) return unreachable(opened.error());
    if (MonotonicNow() >= options.deadline) return unreachable(opened.error());
    lock.unlock();
    if (nobody && options_.start) {
      SP_ASSIGN_OR_RETURN(const bool started, EnsureDaemon(*options_.start, socket_path(), options.deadline));
      lock.lock();
      started_daemon_ |= started;
      lock.unlock();
    }
    Pause(backoff, options);  // A daemon that is just going away, or was not there, may be back in a moment.
    backoff = std::min(2 * backoff, kBackoffMax);
  }
}

void Session::Pause(Nanos time, const CallOptions& options) {
  std::unique_lock lock(mutex_);
  changed_.wait_until(lock, At(std::min(MonotonicNow() + time, options.deadline)), [&] { return !Stopped(options.long_call).ok(); });
}

void Session::Interrupt() {
  if (!guard_.in_owner()) return;
  std::lock_guard lock(mutex_);
  interrupted_ = true;
  for (const auto& [ticket, user] : users_) {
    // Wakes the thread that waits on it with the same error as a lost daemon. The descriptor is its user's to close.
    if (user.long_call && user.fd >= 0) ::shutdown(user.fd, SHUT_RDWR);
  }
  changed_.notify_all();
}

void Session::End(Nanos deadline) {
  if (!guard_.in_owner()) return;
  bool connected = false;
  {
    std::lock_guard lock(mutex_);
    connected = !idle_.empty() && !ended_;
  }
  if (connected) {
    // Not reached: the daemon finds out by itself when this process ends.
    [[maybe_unused]] const Result<Reply> bye = OrNoMemory("bye", [&] { return Call(MessageType::kBye, {}, {.deadline = deadline, .if_there = true}); });
  }
  std::lock_guard lock(mutex_);
  ended_ = true;
  for (const auto& [ticket, user] : users_) {
    if (user.fd >= 0) ::shutdown(user.fd, SHUT_RDWR);
  }
  idle_.clear();
  changed_.notify_all();
}

}  // namespace sp

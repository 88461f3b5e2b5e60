// The worker's side of its clients' sockets and of the keeper's.
#include <algorithm>

#include "node/worker.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr int kAcceptsPerTurn = 64;
constexpr int kFramesPerTurn = 16;  // Of one client, so that a busy one does not starve the others.
constexpr Nanos kAcceptPause = 100 * kNanosPerMilli;
constexpr Nanos kCloseWithin = 5 * kNanosPerSecond;

}  // namespace

void Worker::Accept() {
  for (int i = 0; i < kAcceptsPerTurn && listening_; ++i) {
    Result<Fd> socket = AcceptUnix(listener_.get());
    if (!socket && socket.error().code() == StatusCode::kUnavailable) return;
    if (!socket) return PauseAccepting(socket.error());
    Result<PeerIdentity> identity = GetPeerIdentity(socket->get());
    if (!identity) {
      logger_.Log(LogSeverity::kWarning, "client_without_identity", {{"cause", identity.error().ToString()}});
      continue;
    }
    const ConnectionId id = ++last_connection_;
    const event::Connected connected{id, identity->uid, static_cast<uint32_t>(identity->pid), identity->start_time};
    ClientConnection connection(std::move(*socket), std::move(*identity));
    connection.watched_events = EPOLLIN;
    const Status watched = epoll_->Add(connection.fd(), EPOLLIN, Token(Source::kConnection, id));
    if (!watched.ok()) return PauseAccepting(watched);
    connections_.emplace(id, std::move(connection));
    Post(connected);
  }
}

// No descriptor is free, most likely: those who are connected are served, new ones wait in the listener's queue (F52).
void Worker::PauseAccepting(const Status& why) {
  logger_.Log(LogSeverity::kWarning, "accept_paused", {{"cause", why.ToString()}});
  if (epoll_->Remove(listener_.get()).ok()) listening_ = false;
  accept_again_at_ = clock_.Now() + kAcceptPause;
}

void Worker::ReadFrames(ConnectionId id) {
  std::array<uint8_t, kFrameBytesMax> buffer;
  for (int i = 0; i < kFramesPerTurn; ++i) {
    const auto it = connections_.find(id);
    if (it == connections_.end()) return;
    if (it->second.closing_by != 0) {
      // Only its hang-up can be reported; what it still says is of no interest.
      const auto rest = ReceiveMessage(it->second.fd(), buffer, 0);
      if (!rest && rest.error().code() == StatusCode::kClosed) Forget(it);
      return;
    }
    const auto message = ReceiveMessage(it->second.fd(), buffer, 0);
    if (!message) {
      const Status& status = message.error();
      if (status.code() == StatusCode::kUnavailable) return;
      if (status.code() == StatusCode::kProtocol) return RefuseFrame(id, status);
      if (status.code() == StatusCode::kClosed) return Forget(it);
      return DropConnection(id, status.ToString());
    }
    ++counters_.frames_received;
    Result<Frame> frame = Frame::Decode(ByteSpan(buffer).first(message->size_bytes));
    if (!frame) return RefuseFrame(id, frame.error());
    const Status admitted = ledger_->Admit(frame->type, clock_.Now(), [this] { return core_->Snapshot(); });
    if (!admitted.ok()) {
      SendTo(id, {Frame::Error(frame->type, frame->request_id, admitted).Encode(), {}, false});
      continue;
    }
    Post(event::Received{id, std::move(*frame)});
    // One at a time, so that the ledger's room is judged with everything before it applied.
    const Status pumped = Pump();
    if (!pumped.ok()) return;  // Pump remembers it; the loop ends with it.
  }
}

void Worker::RefuseFrame(ConnectionId id, const Status& why) {
  ++counters_.frames_refused;
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  logger_.LogOfUid(clock_.Now(), it->second.identity().uid, LogSeverity::kWarning, "frame_refused",
                   {{"connection", std::to_string(id)}, {"pid", std::to_string(it->second.identity().pid)}, {"cause", why.message()}});
  const Status reply(StatusCode::kProtocol, why.message());
  SendTo(id, {Frame::Error(MessageType::kHello, 0, reply).Encode(), {}, false});
  CloseAfterFlush(id);
}

void Worker::SendTo(ConnectionId id, OutgoingFrame frame) {
  const auto it = connections_.find(id);
  if (it == connections_.end() || it->second.closing_by != 0) return;
  const Status sent = it->second.Send(std::move(frame));
  if (sent.ok()) return WatchForOutput(id, it->second);
  if (sent.code() == StatusCode::kClosed) return Forget(it);
  DropConnection(id, sent.ToString());
}

void Worker::FlushConnection(ConnectionId id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  const Status flushed = it->second.Flush();
  if (!flushed.ok() || (it->second.closing_by != 0 && !it->second.has_queued())) return Forget(it);
  WatchForOutput(id, it->second);
}

// Afterwards the core knows the client to be gone; what waits for it is still sent.
void Worker::CloseAfterFlush(ConnectionId id) {
  const auto it = connections_.find(id);
  if (it == connections_.end() || it->second.closing_by != 0) return;
  // A socket that is closed with messages unread gives its peer an error instead of the replies that were sent before.
  std::array<uint8_t, kFrameBytesMax> unread;
  for (int i = 0; i < kFramesPerTurn && ReceiveMessage(it->second.fd(), unread, 0); ++i) {
  }
  if (!it->second.has_queued()) return Forget(it);
  it->second.closing_by = clock_.Now() + kCloseWithin;
  WatchForOutput(id, it->second);
  Post(event::Disconnected{id});
}

void Worker::DropConnection(ConnectionId id, const std::string& why) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  ++counters_.clients_dropped;
  logger_.LogOfUid(clock_.Now(), it->second.identity().uid, LogSeverity::kWarning, "client_dropped",
                   {{"connection", std::to_string(id)}, {"pid", std::to_string(it->second.identity().pid)}, {"cause", why}});
  Forget(it);
}

void Worker::Forget(ConnectionMap::iterator it) {
  const ConnectionId id = it->first;
  const bool core_knows = it->second.closing_by != 0;
  // Closing the only descriptor of a socket ends the watch as well; Remove can only fail when there is none.
  if (const Status removed = epoll_->Remove(it->second.fd()); !removed.ok()) {
    logger_.Log(LogSeverity::kError, "unwatch_failed", {{"cause", removed.ToString()}});
  }
  connections_.erase(it);
  if (!core_knows) Post(event::Disconnected{id});
}

void Worker::WatchForOutput(ConnectionId id, ClientConnection& connection) {
  uint32_t wanted = connection.closing_by != 0 ? 0u : static_cast<uint32_t>(EPOLLIN);
  if (connection.has_queued() && !connection.must_retry()) wanted |= EPOLLOUT;
  if (wanted == connection.watched_events) return;
  const Status changed = epoll_->Modify(connection.fd(), wanted, Token(Source::kConnection, id));
  if (changed.ok()) connection.watched_events = wanted;
  else DropConnection(id, changed.ToString());
}

Status Worker::HandleKeeper() {
  SP_ASSIGN_OR_RETURN(std::vector<KeeperEvent> events, keeper_->ReadEvents());
  for (KeeperEvent& event : events) {
    switch (event.kind) {
      case KeeperEvent::Kind::kCreated:
        extents_[event.id] = std::make_shared<const Fd>(std::move(event.fd));
        coming_.erase(event.id);
        Post(event::ExtentCreated{event.id});
        break;
      case KeeperEvent::Kind::kCreateFailed:
        logger_.Log(LogSeverity::kError, "extents_not_made",
                    {{"first", std::to_string(event.id)}, {"count", std::to_string(event.count)}, {"of_start", event.request_id == 0 ? "true" : "false"},
                     {"extent_bytes", std::to_string(settings_.extent_bytes)}, {"extents_held", std::to_string(extents_.size())},
                     {"cause", event.status.ToString()}});
        // The memory that was there when the settings were checked has gone since. Better no daemon than a smaller one, unless somebody uses it
        // already (F48).
        if (event.request_id == 0 && incarnation_ == 1 && last_connection_ == 0) {
          return Refuse(Status(StatusCode::kNoSpace, "setting pool_prefault: only " + std::to_string(extents_.size() * settings_.extent_bytes) + " of " +
                                                  std::to_string(settings_.pool_prefault_bytes) + " bytes could be made"));
        }
        for (uint64_t i = 0; i < event.count; ++i) {
          coming_.erase(event.id + static_cast<uint32_t>(i));
          Post(event::ExtentFailed{event.id + static_cast<uint32_t>(i), event.status});
        }
        break;
      case KeeperEvent::Kind::kDropped:
        if (!event.status.ok()) {
          logger_.Log(LogSeverity::kError, "extent_not_dropped", {{"extent", std::to_string(event.id)}, {"cause", event.status.ToString()}});
        }
        break;
    }
  }
  return {};
}

}  // namespace sp

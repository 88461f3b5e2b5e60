#include "node/keeper_link.h"

#include <algorithm>

#include "os/unix_socket.h"

namespace sp {
namespace {

struct Received {
  KeeperFrame frame;
  std::vector<Fd> fds;
};

Result<Received> Decode(Result<ReceivedMessage> message, ByteSpan buffer) {
  if (!message) return std::unexpected(std::move(message).error());
  SP_ASSIGN_OR_RETURN(const KeeperFrame frame, DecodeKeeperFrame(buffer.first(message->size_bytes)));
  return Received{.frame = frame, .fds = std::move(message->fds)};
}

Status Unexpected(const KeeperFrame& frame) {
  return Status(StatusCode::kProtocol,
                "unexpected answer " + std::to_string(static_cast<uint16_t>(frame.command)) + " from the keeper");
}

Status StatusOf(const KeeperFrame& frame) {
  if (frame.status_code == 0) return {};
  return Status(static_cast<StatusCode>(frame.status_code), "refused by the keeper; its log has the cause");
}

Result<KeeperEvent> ToEvent(Received received) {
  const KeeperFrame& frame = received.frame;
  KeeperEvent event{.kind = KeeperEvent::Kind::kCreated,
                    .request_id = frame.request_id,
                    .id = static_cast<uint32_t>(frame.arg0),
                    .count = 1,
                    .fd = Fd(),
                    .status = StatusOf(frame)};
  switch (frame.command) {
    case KeeperCommand::kExtentCreated:
      if (received.fds.size() != 1) return std::unexpected(Unexpected(frame));
      event.fd = std::move(received.fds[0]);
      return event;
    case KeeperCommand::kCreateFailed:
      event.kind = KeeperEvent::Kind::kCreateFailed;
      event.count = frame.arg1;
      return event;
    case KeeperCommand::kDropped:
      event.kind = KeeperEvent::Kind::kDropped;
      return event;
    default:
      return std::unexpected(Unexpected(frame));
  }
}

}  // namespace

Result<KeeperAttachment> KeeperLink::Attach(Nanos deadline) {
  const auto request = EncodeKeeperFrame({.command = KeeperCommand::kAttach, .request_id = ++last_request_id_});
  SP_RETURN_IF_ERROR(SendMessageBy(control_.get(), request, {}, deadline));
  std::array<uint8_t, kKeeperFrameBytes> buffer;
  const auto receive = [&] {
    return Decode(ReceiveMessageBy(control_.get(), buffer, kMaxFdsPerMessage, deadline), buffer);
  };
  SP_ASSIGN_OR_RETURN(Received first, receive());
  if (first.frame.command != KeeperCommand::kAttached || first.fds.size() != 1 || first.frame.arg1 > kMaxExtents) {
    return std::unexpected(Unexpected(first.frame));
  }
  KeeperAttachment attachment{.extent_bytes = first.frame.arg0,
                              .incarnation = first.frame.arg2,
                              .extents_to_come = first.frame.arg3,
                              .ledger = std::move(first.fds[0]),
                              .extents = {}};
  const uint64_t expected = first.frame.arg1;
  while (attachment.extents.size() < expected) {
    SP_ASSIGN_OR_RETURN(Received batch, receive());
    const uint64_t room = expected - attachment.extents.size();
    if (batch.frame.command != KeeperCommand::kExtents || batch.fds.empty() || batch.fds.size() != batch.frame.arg1 ||
        batch.fds.size() > room) {
      return std::unexpected(Unexpected(batch.frame));
    }
    uint32_t id = static_cast<uint32_t>(batch.frame.arg0);
    for (Fd& fd : batch.fds) attachment.extents.push_back({.id = id++, .fd = std::move(fd)});
  }
  return attachment;
}

Result<uint64_t> KeeperLink::Request(KeeperFrame frame) {
  frame.request_id = ++last_request_id_;
  unsent_.push_back(frame);
  SP_RETURN_IF_ERROR(Flush());
  return frame.request_id;
}

Result<uint64_t> KeeperLink::RequestCreate(uint32_t first_id, uint32_t count) {
  return Request({.command = KeeperCommand::kCreateExtents, .arg0 = first_id, .arg1 = count});
}

Result<uint64_t> KeeperLink::RequestDrop(uint32_t id) {
  return Request({.command = KeeperCommand::kDropExtent, .arg0 = id});
}

Result<uint64_t> KeeperLink::RequestShutdown() { return Request({.command = KeeperCommand::kShutdown}); }

Status KeeperLink::Flush() {
  while (!unsent_.empty()) {
    const Status sent = SendMessage(control_.get(), EncodeKeeperFrame(unsent_.front()));
    if (sent.code() == StatusCode::kUnavailable) return {};
    SP_RETURN_IF_ERROR(sent);
    unsent_.pop_front();
  }
  return {};
}

Result<std::vector<KeeperEvent>> KeeperLink::ReadEvents() {
  std::vector<KeeperEvent> events;
  std::array<uint8_t, kKeeperFrameBytes> buffer;
  for (;;) {
    Result<ReceivedMessage> message = ReceiveMessage(control_.get(), buffer, 1);
    if (!message && message.error().code() == StatusCode::kUnavailable) break;
    SP_ASSIGN_OR_RETURN(Received received, Decode(std::move(message), buffer));
    SP_ASSIGN_OR_RETURN(KeeperEvent event, ToEvent(std::move(received)));
    events.push_back(std::move(event));
  }
  SP_RETURN_IF_ERROR(Flush());
  return events;
}

}  // namespace sp

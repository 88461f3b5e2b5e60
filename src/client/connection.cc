#include "client/connection.h"

#include <utility>

#include "os/unix_socket.h"

namespace sp {
namespace {

Status WrongVersion(const std::string& path, const std::string& theirs) {
  return {StatusCode::kProtocol, "this client speaks protocol version " + std::to_string(kProtocolVersion) + ", the daemon at " + path +
                                     " does not: " + theirs};
}

}  // namespace

Result<Connection> Connection::Open(const std::string& socket_path, const HelloRequest& hello, Nanos deadline) {
  SP_ASSIGN_OR_RETURN(Fd fd, ConnectUnix(socket_path, deadline));
  Connection connection(std::move(fd));
  SP_ASSIGN_OR_RETURN(const Frame frame, connection.RoundTrip(MessageType::kHello, Encode(hello), 0, deadline, nullptr));
  if (frame.version != kProtocolVersion) return std::unexpected(WrongVersion(socket_path, "it speaks version " + std::to_string(frame.version)));
  if (frame.status == StatusCode::kProtocol) return std::unexpected(WrongVersion(socket_path, frame.ToStatus().message()));
  SP_RETURN_IF_ERROR(frame.ToStatus());
  SP_ASSIGN_OR_RETURN(connection.daemon_, Decode<HelloReply>(frame.body));
  const HelloReply& daemon = connection.daemon_;
  if (daemon.version != kProtocolVersion) return std::unexpected(WrongVersion(socket_path, "it chose version " + std::to_string(daemon.version)));
  if (daemon.extent_bytes == 0 || daemon.extent_bytes % kBlockBytes != 0) {
    return Error(StatusCode::kProtocol, "the daemon at " + socket_path + " has extents of " + std::to_string(daemon.extent_bytes) +
                                            " bytes, no multiple of " + std::to_string(kBlockBytes));
  }
  return connection;
}

Result<Reply> Connection::Exchange(MessageType type, ByteSpan body, size_t fds_max, Nanos deadline) {
  Reply reply;
  SP_ASSIGN_OR_RETURN(reply.frame, RoundTrip(type, body, fds_max, deadline, &reply.fds));
  reply.origin = {daemon_.boot, daemon_.extent_bytes};
  return reply;
}

Result<Frame> Connection::RoundTrip(MessageType type, ByteSpan body, size_t fds_max, Nanos deadline, std::vector<Fd>* fds) {
  const Frame request{kProtocolVersion, type, next_request_++, StatusCode::kOk, std::vector<uint8_t>(body.begin(), body.end())};
  SP_RETURN_IF_ERROR(SendMessageBy(fd_.get(), request.Encode(), {}, deadline));
  std::vector<uint8_t> buffer(kFrameBytesMax);
  SP_ASSIGN_OR_RETURN(ReceivedMessage message, ReceiveMessageBy(fd_.get(), buffer, fds_max, deadline));
  SP_ASSIGN_OR_RETURN(Frame frame, Frame::Decode(ByteSpan(buffer).first(message.size_bytes)));
  // A daemon that could not read our request, or has too many connections, answers request 0 and closes the connection.
  if (frame.status != StatusCode::kOk && frame.request_id == 0 && type != MessageType::kHello) return std::unexpected(frame.ToStatus());
  const bool answers = frame.request_id == request.request_id || (type == MessageType::kHello && frame.request_id == 0);
  if (frame.type != type || !answers) {
    return Error(StatusCode::kProtocol, "answer of type " + std::to_string(static_cast<int>(frame.type)) + " to request " +
                                            std::to_string(frame.request_id) + ", expected type " + std::to_string(static_cast<int>(type)) +
                                            ", request " + std::to_string(request.request_id));
  }
  if (fds != nullptr) *fds = std::move(message.fds);
  return frame;
}

}  // namespace sp

#include "format/messages.h"

#include <algorithm>

#include "format/fixed_layout.h"

namespace sp {
namespace {

using layout::Get;
using layout::Put;

// Offsets of the frame header: docs/formats/socket.md.
namespace at {
constexpr size_t kMagic = 0;        // u32
constexpr size_t kVersion = 4;      // u16
constexpr size_t kType = 6;         // u16
constexpr size_t kRequestId = 8;    // u64
constexpr size_t kStatus = 16;      // u16
constexpr size_t kZero = 18;        // u16
constexpr size_t kBodyLength = 20;  // u32
static_assert(kBodyLength + 4 == Frame::kHeaderBytes);
}  // namespace at

constexpr size_t kBodyBytesMax = kFrameBytesMax - Frame::kHeaderBytes;
constexpr size_t kErrorTextBytesMax = 4096;

}  // namespace

std::vector<uint8_t> Frame::Encode() const {
  if (body.size() > kBodyBytesMax) {
    // Bodies grow with numbers that outsiders choose, so this is no reason to abort: the other side learns what happened.
    return Error(type, request_id, Status(StatusCode::kLimit, "message of " + std::to_string(body.size()) + " bytes; the limit is " +
                                                                  std::to_string(kBodyBytesMax)))
        .Encode();
  }
  std::vector<uint8_t> out(kHeaderBytes + body.size());
  Put(out, at::kMagic, kMagic);
  Put(out, at::kVersion, version);
  Put(out, at::kType, static_cast<uint16_t>(type));
  Put(out, at::kRequestId, request_id);
  Put(out, at::kStatus, static_cast<uint16_t>(status));
  Put(out, at::kBodyLength, static_cast<uint32_t>(body.size()));
  std::copy(body.begin(), body.end(), out.begin() + kHeaderBytes);
  return out;
}

Result<Frame> Frame::Decode(ByteSpan bytes) {
  const auto bad = [](const std::string& why) { return sp::Error(StatusCode::kProtocol, "frame: " + why); };
  if (bytes.size() < kHeaderBytes) return bad("shorter than its header");
  if (bytes.size() > kFrameBytesMax) return bad("longer than " + std::to_string(kFrameBytesMax) + " bytes");
  if (Get<uint32_t>(bytes, at::kMagic) != kMagic) return bad("bad magic");
  const auto type = Get<uint16_t>(bytes, at::kType);
  const auto version = Get<uint16_t>(bytes, at::kVersion);
  if (version != kProtocolVersion && type != static_cast<uint16_t>(MessageType::kHello)) {
    return bad("unknown version " + std::to_string(version));
  }
  if (type == 0 || type > static_cast<uint16_t>(kMessageTypeLast)) return bad("unknown type " + std::to_string(type));
  const auto status = Get<uint16_t>(bytes, at::kStatus);
  if (status > static_cast<uint16_t>(StatusCode::kInternal)) return bad("unknown status " + std::to_string(status));
  if (Get<uint16_t>(bytes, at::kZero) != 0) return bad("reserved field is not zero");
  const ByteSpan body = bytes.subspan(kHeaderBytes);
  if (Get<uint32_t>(bytes, at::kBodyLength) != body.size()) return bad("body length contradicts the message length");
  return Frame{version, static_cast<MessageType>(type), Get<uint64_t>(bytes, at::kRequestId), static_cast<StatusCode>(status),
               std::vector<uint8_t>(body.begin(), body.end())};
}

Frame Frame::Error(MessageType type, uint64_t request_id, const Status& status) {
  const ByteSpan text = AsBytes(status.message()).first(std::min(status.message().size(), kErrorTextBytesMax));
  return Frame{kProtocolVersion, type, request_id, status.code(), std::vector<uint8_t>(text.begin(), text.end())};
}

Status Frame::ToStatus() const {
  if (status == StatusCode::kOk) return {};
  return {status, std::string(AsText(body))};
}

std::string_view LevelName(Level level) {
  switch (level) {
    case Level::kNone: return "none";
    case Level::kMemory: return "memory";
    case Level::kReplicated: return "replicated";
    case Level::kDurable: return "durable";
  }
  return "unknown";
}

std::string_view AttemptStateName(AttemptState state) {
  switch (state) {
    case AttemptState::kOpen: return "open";
    case AttemptState::kComplete: return "complete";
    case AttemptState::kClosed: return "closed";
    case AttemptState::kCorrupt: return "corrupt";
    case AttemptState::kRetired: return "retired";
  }
  return "unknown";
}

}  // namespace sp

#include "node/keeper_protocol.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace sp {
namespace {

static_assert(std::endian::native == std::endian::little, "the frame travels as it lies in memory");

bool IsKnown(KeeperCommand command) {
  switch (command) {
    case KeeperCommand::kAttach:
    case KeeperCommand::kCreateExtents:
    case KeeperCommand::kDropExtent:
    case KeeperCommand::kShutdown:
    case KeeperCommand::kAttached:
    case KeeperCommand::kExtents:
    case KeeperCommand::kExtentCreated:
    case KeeperCommand::kCreateFailed:
    case KeeperCommand::kDropped:
      return true;
  }
  return false;
}

}  // namespace

std::array<uint8_t, kKeeperFrameBytes> EncodeKeeperFrame(const KeeperFrame& frame) {
  return std::bit_cast<std::array<uint8_t, kKeeperFrameBytes>>(frame);
}

Result<KeeperFrame> DecodeKeeperFrame(ByteSpan bytes) {
  if (bytes.size() != kKeeperFrameBytes) {
    return Error(StatusCode::kProtocol, "keeper message of " + std::to_string(bytes.size()) + " bytes");
  }
  KeeperFrame frame;
  std::memcpy(&frame, bytes.data(), sizeof frame);
  if (frame.magic != kKeeperMagic || frame.version != kKeeperVersion) {
    return Error(StatusCode::kProtocol, "keeper message of another version (" + std::to_string(frame.version) + ")");
  }
  if (!IsKnown(frame.command) || frame.status_code > static_cast<uint32_t>(StatusCode::kInternal) ||
      std::ranges::any_of(frame.reserved, [](uint8_t b) { return b != 0; })) {
    return Error(StatusCode::kProtocol,
                 "keeper message with command " + std::to_string(static_cast<uint16_t>(frame.command)) +
                     ", status " + std::to_string(frame.status_code) + ", or reserved bytes in use");
  }
  return frame;
}

}  // namespace sp

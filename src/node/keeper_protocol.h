// What keeper and worker say to each other over their socket pair: messages of exactly 64 bytes, little-endian, so that
// the keeper has nothing to parse. Descriptors travel beside them (SCM_RIGHTS). Both ends are the same binary, so one
// version is enough.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

// Numbers under which the worker finds what it inherits.
inline constexpr int kWorkerControlFd = 3;
inline constexpr int kWorkerListenFd = 4;

inline constexpr uint32_t kKeeperMagic = 0x70656b53;  // "Skep"
inline constexpr uint16_t kKeeperVersion = 1;
inline constexpr uint32_t kMaxExtents = 4096;

enum class KeeperCommand : uint16_t {
  // Worker to keeper.
  kAttach = 1,         // First and once. Answered by kAttached, then kExtents until all are there.
  kCreateExtents = 2,  // arg0: first id, arg1: count. Answered per extent, or refused as a whole by one kCreateFailed.
  kDropExtent = 3,     // arg0: id. Answered by kDropped; the memory goes when the worker's own copies are gone too.
  kShutdown = 4,       // End the whole daemon: the worker gets SIGTERM.
  // Keeper to worker.
  kAttached = 101,       // arg0: extent bytes, arg1: number of extents that follow, arg2: incarnation of the worker,
                         // from 1, arg3: extents of the start still to be made, then kExtentCreated. Descriptor:
                         // the ledger.
  kExtents = 102,        // arg0: first id, arg1: count. Descriptors: of the ids in order.
  kExtentCreated = 103,  // arg0: id. One descriptor.
  kCreateFailed = 104,   // arg0: first id, arg1: count, status_code: why. None of these exists.
  kDropped = 105,        // arg0: id, status_code: kOk, or kNotFound.
};

// One message, laid out as it travels.
struct KeeperFrame {
  uint32_t magic = kKeeperMagic;
  uint16_t version = kKeeperVersion;
  KeeperCommand command = {};
  uint64_t request_id = 0;  // Of the command that this answers; 0 for extents of the start.
  uint64_t arg0 = 0;
  uint64_t arg1 = 0;
  uint64_t arg2 = 0;
  uint64_t arg3 = 0;
  uint32_t status_code = 0;  // A StatusCode.
  std::array<uint8_t, 12> reserved{};  // Zero.
};
inline constexpr size_t kKeeperFrameBytes = 64;
static_assert(sizeof(KeeperFrame) == kKeeperFrameBytes);
static_assert(offsetof(KeeperFrame, version) == 4 && offsetof(KeeperFrame, command) == 6);
static_assert(offsetof(KeeperFrame, request_id) == 8 && offsetof(KeeperFrame, arg0) == 16);
static_assert(offsetof(KeeperFrame, arg1) == 24 && offsetof(KeeperFrame, arg2) == 32);
static_assert(offsetof(KeeperFrame, arg3) == 40);
static_assert(offsetof(KeeperFrame, status_code) == 48 && offsetof(KeeperFrame, reserved) == 52);

std::array<uint8_t, kKeeperFrameBytes> EncodeKeeperFrame(const KeeperFrame& frame);
// kProtocol for another length, magic, version, an unknown command or status, or reserved bytes in use.
Result<KeeperFrame> DecodeKeeperFrame(ByteSpan bytes);

}  // namespace sp

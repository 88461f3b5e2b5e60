// For tests of this folder: a fake daemon with a client, and a small shard.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "client/client.h"
#include "client/fake_daemon.h"
#include "format/fixed_layout.h"
#include "os/test_util.h"

namespace sp {

class ClientTest : public testing::Test {
 protected:
  ClientTest() : daemon_(directory_.File("s")) {}

  std::unique_ptr<Client> Connect(Nanos timeout = 10 * kNanosPerSecond) {
    auto client = Client::Connect({.socket_path = directory_.File("s"), .client_name = "test", .timeout = timeout});
    EXPECT_TRUE(client.has_value()) << client.error().ToString();
    return client ? std::move(*client) : nullptr;
  }

  static ReserveOptions Shard(uint64_t length, uint64_t step = 1) {
    return {.ns = "job", .generation = 1, .nonce = {{7}}, .step = step, .world_size = 1, .length = length};
  }

  TemporaryDirectory directory_;
  FakeDaemon daemon_;
};

// Bytes of a shard: a header that passes the reader's checks, then data.
struct TestShard {
  static constexpr uint64_t kHeaderBytes = 8192;
  static constexpr uint64_t kStaticOffset = 4096;

  explicit TestShard(uint64_t length) : bytes(length) {
    uint32_t x = 12345;
    for (uint8_t& b : bytes) b = static_cast<uint8_t>((x = x * 1664525 + 1013904223) >> 24);
    layout::Put<uint64_t>(bytes, 0, kHeaderBytes - 8);
    seal.static_offset = kStaticOffset;
    seal.structure = Sha256(ByteSpan(bytes).subspan(kStaticOffset, kHeaderBytes - kStaticOffset));
  }
  ByteSpan header() const { return ByteSpan(bytes).first(kHeaderBytes); }
  // The data in two segments.
  std::vector<CopySegment> segments() const {
    const uint64_t middle = kHeaderBytes + (bytes.size() - kHeaderBytes) / 3;
    return {{bytes.data() + kHeaderBytes, kHeaderBytes, middle - kHeaderBytes},
            {bytes.data() + middle, middle, bytes.size() - middle}};
  }

  std::vector<uint8_t> bytes;
  SealInfo seal;
};

}  // namespace sp

#include "format/messages.h"

#include "format/fixed_layout.h"
#include "format/test_values.h"

namespace sp {
namespace {

using testing::Counting;
using testing::GoldenRecord;
using testing::Hex;
using testing::Randomizer;
using testing::RandomValue;

// From a second implementation, written from docs/formats/socket.md only.
constexpr char kGoldenReserve[] =
    "53504631010004008877665544332211000000004d0000000d0000006c6c616d612d37625f72756e3307000000000000"
    "00000102030405060708090a0b0c0d0e0fb004000000000000020000000200000001000000000010000000000000f205"
    "2a01000000";
constexpr char kGoldenError[] = "53504631010004000900000000000000070000000c000000706f6f6c2069732066756c6c";

template <typename T>
class Body : public ::testing::Test {};
using Bodies = ::testing::Types<Empty, AttemptInfo, HelloRequest, HelloReply, OpenGenerationRequest, OpenGenerationReply, PrepareSlotsRequest,
                                PrepareSlotsReply, ReserveRequest, ReserveReply, FetchExtentsRequest, FetchExtentsReply, SealRequest, SealReply,
                                LeaseRequest, WaitRequest, WaitReply, NamespaceRequest, ListStepsReply, ListNamespacesReply, OpenReadRequest,
                                OpenReadReply, ShardRequest, ShardInfoReply, ReportCorruptReply, PinRequest, PinStepRequest, StatusReply>;
TYPED_TEST_SUITE(Body, Bodies);

TYPED_TEST(Body, RoundTrip) {
  Randomizer random(3);
  for (int i = 0; i < 300; ++i) {
    const auto value = RandomValue<TypeParam>(random);
    const std::vector<uint8_t> bytes = Encode(value);
    const auto decoded = Decode<TypeParam>(bytes);
    ASSERT_TRUE(decoded.has_value()) << decoded.error().ToString();
    ASSERT_EQ(Encode(*decoded), bytes);
  }
}

TYPED_TEST(Body, EveryTruncationAndExtensionIsRefused) {
  Randomizer random(4);
  for (int i = 0; i < 30; ++i) {
    std::vector<uint8_t> bytes = Encode(RandomValue<TypeParam>(random));
    for (size_t n = 0; n < bytes.size(); ++n) {
      const auto decoded = Decode<TypeParam>(ByteSpan(bytes).first(n));
      ASSERT_FALSE(decoded.has_value()) << n << " of " << bytes.size();
      ASSERT_EQ(decoded.error().code(), StatusCode::kProtocol);
    }
    bytes.push_back(0);
    ASSERT_FALSE(Decode<TypeParam>(bytes).has_value());
  }
}

TYPED_TEST(Body, AnyBytesGiveAnErrorOrAValueThatEncodesBack) {
  Randomizer random(5);
  for (int i = 0; i < 3000; ++i) {
    std::vector<uint8_t> bytes = Encode(RandomValue<TypeParam>(random));
    for (uint64_t changes = random.Next() % 4; changes > 0 && !bytes.empty(); --changes) {
      bytes[random.Next() % bytes.size()] = static_cast<uint8_t>(random.Next() % 3 == 0 ? 0xff : random.Next());
    }
    const auto decoded = Decode<TypeParam>(bytes);
    ASSERT_TRUE(!decoded.has_value() || Encode(*decoded) == bytes);
  }
}

TEST(Bodies, HostileLengthsAllocateNothing) {
  // A list that claims 2^32 - 1 elements in four bytes, and a text that claims more than there is.
  EXPECT_FALSE(Decode<ListStepsReply>(std::vector<uint8_t>(4, 0xff)).has_value());
  EXPECT_FALSE(Decode<PrepareSlotsReply>(std::vector<uint8_t>{0x00, 0x10, 0, 0}).has_value());
  EXPECT_FALSE(Decode<PinStepRequest>(std::vector<uint8_t>{200, 0, 0, 0, 'a'}).has_value());
  PinStepRequest long_name;
  long_name.ns = std::string(201, 'a');
  EXPECT_FALSE(Decode<PinStepRequest>(Encode(long_name)).has_value());
  std::vector<uint8_t> bytes = Encode(WaitReply{});
  bytes[0] = 4;
  EXPECT_FALSE(Decode<WaitReply>(bytes).has_value()) << "no such level";
  bytes = Encode(ReportCorruptReply{});
  bytes[0] = 2;
  EXPECT_FALSE(Decode<ReportCorruptReply>(bytes).has_value()) << "neither false nor true";
}

ReserveRequest GoldenReserve() {
  const AttemptKey key = GoldenRecord(0).key;
  ReserveRequest r;
  r.ns = key.ns;
  r.generation = key.generation;
  r.nonce = key.nonce;
  r.step = key.step;
  r.try_number = key.try_number;
  r.world_size = 2;
  r.rank = 1;
  r.bytes = 1 << 20;
  r.timeout_ns = 5'000'000'000;
  return r;
}

TEST(Frame, GoldenBytes) {
  EXPECT_EQ(Hex(MakeFrame(MessageType::kReserve, 0x1122334455667788, GoldenReserve()).Encode()), kGoldenReserve);
  EXPECT_EQ(Hex(Frame::Error(MessageType::kReserve, 9, Status(StatusCode::kNoSpace, "pool is full")).Encode()), kGoldenError);
}

TEST(Frame, RoundTripOfEveryType) {
  Randomizer random(6);
  for (uint16_t type = 1; type <= static_cast<uint16_t>(kMessageTypeLast); ++type) {
    for (uint16_t status = 0; status <= static_cast<uint16_t>(StatusCode::kInternal); ++status) {
      Frame f{kProtocolVersion, static_cast<MessageType>(type), random.Next(), static_cast<StatusCode>(status), {}};
      f.body.resize(random.Next() % 100);
      for (uint8_t& b : f.body) b = static_cast<uint8_t>(random.Next());
      const auto decoded = Frame::Decode(f.Encode());
      ASSERT_TRUE(decoded.has_value()) << decoded.error().ToString();
      EXPECT_EQ(decoded->version, f.version);
      EXPECT_EQ(decoded->type, f.type);
      EXPECT_EQ(decoded->request_id, f.request_id);
      EXPECT_EQ(decoded->status, f.status);
      EXPECT_EQ(decoded->body, f.body);
    }
  }
}

TEST(Frame, EveryTruncationAndExtensionIsRefused) {
  std::vector<uint8_t> bytes = MakeFrame(MessageType::kReserve, 1, GoldenReserve()).Encode();
  for (size_t n = 0; n < bytes.size(); ++n) ASSERT_FALSE(Frame::Decode(ByteSpan(bytes).first(n)).has_value()) << n;
  bytes.push_back(0);
  EXPECT_FALSE(Frame::Decode(bytes).has_value());
}

TEST(Frame, HeadersThatAreRefused) {
  const auto refused = [](size_t offset, auto value, MessageType type = MessageType::kReserve) {
    std::vector<uint8_t> bytes = MakeFrame(type, 1, Empty{}).Encode();
    layout::Put(bytes, offset, value);
    return !Frame::Decode(bytes).has_value();
  };
  EXPECT_TRUE(refused(0, uint32_t{0x31465052}));
  EXPECT_TRUE(refused(4, uint16_t{2}));
  EXPECT_FALSE(refused(4, uint16_t{2}, MessageType::kHello)) << "the version is agreed on by Hello, so it must get through";
  EXPECT_TRUE(refused(6, uint16_t{0}));
  EXPECT_TRUE(refused(6, static_cast<uint16_t>(static_cast<uint16_t>(kMessageTypeLast) + 1)));
  EXPECT_TRUE(refused(16, uint16_t{15}));
  EXPECT_TRUE(refused(18, uint16_t{1}));
  EXPECT_TRUE(refused(20, uint32_t{1}));
  EXPECT_TRUE(refused(20, uint32_t{0xffffffff}));
}

TEST(Frame, SizeIsBounded) {
  Frame f{kProtocolVersion, MessageType::kStatus, 77, StatusCode::kOk, std::vector<uint8_t>(kFrameBytesMax - Frame::kHeaderBytes, 1)};
  std::vector<uint8_t> bytes = f.Encode();
  EXPECT_EQ(bytes.size(), kFrameBytesMax);
  EXPECT_TRUE(Frame::Decode(bytes).has_value());
  bytes.push_back(1);
  layout::Put(bytes, 20, static_cast<uint32_t>(bytes.size() - Frame::kHeaderBytes));
  EXPECT_FALSE(Frame::Decode(bytes).has_value());
  // A body that is too large becomes an error for the same request, not a crash and not a frame that nobody can receive.
  f.body.push_back(1);
  const auto decoded = Frame::Decode(f.Encode());
  ASSERT_TRUE(decoded.has_value());
  EXPECT_EQ(decoded->request_id, 77u);
  EXPECT_EQ(decoded->ToStatus().code(), StatusCode::kLimit);
}

TEST(Frame, ErrorsCarryTheirText) {
  const Status status(StatusCode::kFenced, "generation 8 is open");
  EXPECT_EQ(Frame::Decode(Frame::Error(MessageType::kSeal, 3, status).Encode())->ToStatus(), status);
  EXPECT_TRUE(MakeFrame(MessageType::kSeal, 3, Empty{}).ToStatus().ok());
  const Status endless(StatusCode::kInternal, std::string(1 << 20, 'x'));
  EXPECT_EQ(Frame::Decode(Frame::Error(MessageType::kSeal, 3, endless).Encode())->ToStatus().message().size(), 4096u);
}

TEST(Names, OfLevelsAndStates) {
  EXPECT_EQ(LevelName(Level::kNone), "none");
  EXPECT_EQ(LevelName(Level::kMemory), "memory");
  EXPECT_EQ(LevelName(Level::kReplicated), "replicated");
  EXPECT_EQ(LevelName(Level::kDurable), "durable");
  EXPECT_EQ(AttemptStateName(AttemptState::kOpen), "open");
  EXPECT_EQ(AttemptStateName(AttemptState::kComplete), "complete");
  EXPECT_EQ(AttemptStateName(AttemptState::kClosed), "closed");
  EXPECT_EQ(AttemptStateName(AttemptState::kCorrupt), "corrupt");
  EXPECT_EQ(AttemptStateName(AttemptState::kRetired), "retired");
}

}  // namespace
}  // namespace sp

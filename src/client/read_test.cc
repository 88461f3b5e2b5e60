// Pins and readers: the path of a restore.
#include <fcntl.h>

#include "client/client_test_util.h"
#include "os/files.h"

namespace sp {
namespace {

constexpr uint64_t kLength = 3 * kBlockBytes + 12345;

class ReadTest : public ClientTest {
 protected:
  void SetUp() override {
    daemon_.Start();
    client_ = Connect();
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client_->Reserve(Shard(kLength), kDefaultTimeout));
    SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard_.header(), shard_.segments(), shard_.seal));
    SP_ASSERT_OK(transfer.WaitSealed(kForever));
  }
  std::unique_ptr<ReadPin> Pin() {
    auto pin = client_->OpenRead({.ns = "job"});
    EXPECT_TRUE(pin.has_value());
    return std::move(*pin);
  }

  TestShard shard_{kLength};
  std::unique_ptr<Client> client_;
};

TEST_F(ReadTest, HeaderBytesAndFileAreThoseThatWereSaved) {
  const auto pin = Pin();
  const auto reader = pin->Shard(0);
  ASSERT_TRUE(reader.has_value()) << reader.error().status.ToString();
  EXPECT_EQ((*reader)->record().length_bytes, kLength);
  EXPECT_EQ((*reader)->blocks(), 4u);
  const auto header = (*reader)->Header();
  ASSERT_TRUE(header.has_value()) << header.error().status.ToString();
  EXPECT_TRUE(std::ranges::equal(*header, shard_.header()));

  std::vector<uint8_t> part(kBlockBytes + 100);
  const std::vector<ScatterSegment> segments = {{9000, 50, part.data()}, {kBlockBytes - 7, kBlockBytes + 50, part.data() + 50}};
  EXPECT_EQ((*reader)->Read(segments, 1), kBlockBytes + 100);
  EXPECT_TRUE(std::equal(part.begin(), part.begin() + 50, shard_.bytes.begin() + 9000));
  EXPECT_TRUE(std::equal(part.begin() + 50, part.end(), shard_.bytes.begin() + kBlockBytes - 7));

  const Fd file(::open(directory_.File("f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  EXPECT_EQ((*reader)->CopyToFile(file.get()), kLength);
  SP_ASSERT_OK_AND_ASSIGN(const std::string content, ReadFile(directory_.File("f"), kLength));
  EXPECT_TRUE(std::ranges::equal(AsBytes(content), shard_.bytes));
  EXPECT_EQ((*reader)->Verify(0, 4), std::vector<uint64_t>{});
}

// I-8: never a wrong byte without an error, and the error says where.
TEST_F(ReadTest, ACorruptBlockIsNamed) {
  const auto pin = Pin();
  daemon_.Corrupt(2 * kBlockBytes + 5);
  auto reader = pin->Shard(0);
  ASSERT_TRUE(reader.has_value());
  std::vector<uint8_t> target(kLength);
  const ScatterSegment all{0, kLength, target.data()};
  const auto read = (*reader)->Read({&all, 1});
  ASSERT_FALSE(read.has_value());
  EXPECT_EQ(read.error().status.code(), StatusCode::kCorrupt);
  EXPECT_EQ(read.error().rank, 0u);
  EXPECT_EQ(read.error().block, 2u);
  EXPECT_TRUE(read.error().state_modified);
  EXPECT_EQ((*reader)->Verify(0, 4), std::vector<uint64_t>{2});
  EXPECT_EQ((*reader)->Verify(1, 3), std::vector<uint64_t>{2});
  EXPECT_EQ((*reader)->Verify(3, 1), std::vector<uint64_t>{});
  SP_EXPECT_CODE(kInvalidArgument, (*reader)->Verify(3, 2));
  const Fd file(::open(directory_.File("f").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  EXPECT_EQ((*reader)->CopyToFile(file.get()).error().block, 2u);
  const ScatterSegment first{0, 100, target.data()};
  EXPECT_EQ((*reader)->Read({&first, 1}), 100u);  // The others are fine.
  EXPECT_EQ(pin->ReportCorrupt(0, 2), true);
}

TEST_F(ReadTest, ACorruptChecksumListIsNamed) {
  const auto pin = Pin();
  daemon_.Corrupt(ChecksumListOffset(kLength) + 4);
  const auto reader = pin->Shard(0);
  ASSERT_FALSE(reader.has_value());
  EXPECT_EQ(reader.error().status.code(), StatusCode::kCorrupt);
  EXPECT_EQ(reader.error().rank, 0u);
  EXPECT_EQ(reader.error().block, std::nullopt);
  EXPECT_NE(reader.error().status.message().find("checksum list"), std::string::npos);
}

TEST_F(ReadTest, ARankThatIsNotThereIsNotFound) { EXPECT_EQ(Pin()->Shard(1).error().status.code(), StatusCode::kNotFound); }

TEST_F(ReadTest, ARecordOfAnotherAttemptIsRefused) {
  const auto pin = Pin();
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client_->Reserve(Shard(kLength, 2), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard_.header(), shard_.segments(), shard_.seal));
  SP_ASSERT_OK(transfer.WaitSealed(kForever));  // The fake daemon now serves step 2 for every pin.
  EXPECT_EQ(pin->Shard(0).error().status.code(), StatusCode::kProtocol);  // I-4
}

// I-17: a pin is held while it is used, given back by close and by the destructor, once.
TEST_F(ReadTest, PinsAreGivenBackOnce) {
  auto pin = Pin();
  pin->Close();
  pin->Close();
  EXPECT_EQ(daemon_.SeenCount(MessageType::kUnpin), 1u);
  EXPECT_EQ(pin->Shard(0).error().status.code(), StatusCode::kClosed);
  pin.reset();
  Pin().reset();
  client_->Close();
  EXPECT_EQ(daemon_.SeenCount(MessageType::kUnpin), 2u);
}

TEST_F(ReadTest, AnOpenPinIsRenewed) {
  daemon_.pin_ns = 3 * kNanosPerMilli;
  const auto pin = Pin();
  daemon_.AwaitSeen(MessageType::kShardInfo, 3);
}

TEST_F(ReadTest, ReadersOutliveAReplacedDaemonPinsDoNot) {
  const auto pin = Pin();
  auto reader = pin->Shard(0);
  ASSERT_TRUE(reader.has_value());
  daemon_.ReplaceMemory();
  EXPECT_TRUE((*reader)->Header().has_value());
  EXPECT_EQ(pin->Shard(0).error().status.code(), StatusCode::kClosed);
}

}  // namespace
}  // namespace sp

// S3Store against a server that lies or breaks, by the rows F57 to F69 of the fault catalogue, and the conformance suite against its honest
// self. No test waits for anything but a deadline, and those are short.
#include "durable/s3_fake_server.h"

#include <sys/socket.h>

#include "durable/object_store_conformance.h"
#include "durable/s3_store.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr char kSecret[] = "topsecret", kAccessKey[] = "AKIDEXAMPLE", kToken[] = "token-that-nobody-sees";

class FakePlace final : public ConformancePlace {
 public:
  explicit FakePlace(FakeS3Server::Abilities abilities = {}) : server(abilities) {
    options.bucket = "bucket";
    options.base = "base";
    options.endpoint = server.endpoint();
    options.region = "us-east-1";
    options.path_style = true;
    options.part_bytes = 5u << 20;
    options.credentials = S3Credentials{kAccessKey, kSecret, kToken};
    options.backoff_min = options.backoff_max = kNanosPerMilli;
    Open();
  }

  void Open() { store_ = S3Store::Open(options, clock_).value(); }
  ObjectStore& store() override { return *store_; }
  const Clock& clock() override { return clock_; }
  bool LeaveUnfinishedUpload(const std::string& key) override {
    server.Answer({.method = "POST", .key = options.base + "/" + key, .query = {{"uploads", ""}}});
    return true;
  }

  FakeS3Server server;
  S3Options options;

 private:
  SteadyClock clock_;
  std::unique_ptr<ObjectStore> store_;
};

StoreFactory FakeFactory(const char* name, FakeS3Server::Abilities abilities) {
  return {name, [abilities] { return std::make_unique<FakePlace>(abilities); }};
}

INSTANTIATE_TEST_SUITE_P(FakeS3, ObjectStoreConformance,
                         testing::Values(FakeFactory("Honest", {}), FakeFactory("WithoutChecksums", {.conditions_on_complete = false, .checksums = false})),
                         StoreName);

class S3Lies : public testing::Test {
 protected:
  S3Lies() : small_(conformance::Bytes(1000)), large_(conformance::Bytes(11 * kBlockBytes + 5)) {}

  ObjectStore& store() { return place_.store(); }
  FakeS3Server& server() { return place_.server; }
  void SetLie(FakeS3Server::Lie lie) { server().SetLie(std::move(lie)); }
  // The first `times` requests for which `applies` get `reply`.
  void LieTimes(int times, std::function<bool(const FakeRequest&)> applies, FakeReply reply) {
    SetLie([=, left = times](const FakeRequest& request) mutable -> std::optional<FakeReply> {
      if (!applies(request) || left == 0) return std::nullopt;
      --left;
      return reply;
    });
  }
  Status PutLarge(const CallLimits& limits = {}) { return store().Put("large", PutSource::OfMemory(large_), limits); }
  std::string LargeText() const { return std::string(AsText(large_)); }
  Nanos Now() { return place_.clock().Now(); }

  static bool Always(const FakeRequest&) { return true; }
  static bool IsComplete(const FakeRequest& request) { return request.Is("POST", "uploadId"); }
  static bool IsPart(const FakeRequest& request) { return request.Is("PUT", "partNumber"); }

  static constexpr int kForEver = 1 << 30;
  FakePlace place_;
  const std::vector<uint8_t> small_, large_;
};

TEST_F(S3Lies, F57BurstsOf503AreOutlasted) {
  LieTimes(3, Always, FakeError(503, "SlowDown"));
  SP_ASSERT_OK(store().Put("small", PutSource::OfMemory(small_), {}));
  EXPECT_EQ(server().requests(), 4u);
  LieTimes(4, IsPart, FakeError(500, "InternalError"));
  SP_ASSERT_OK(PutLarge());
  EXPECT_TRUE(server().Object("base/large") == LargeText());
  LieTimes(3, Always, FakeError(503, "ServiceUnavailable"));
  std::vector<uint8_t> back(large_.size());
  SP_ASSERT_OK(store().ReadRange("large", 0, back, {}));
  EXPECT_TRUE(back == large_);
}

TEST_F(S3Lies, F57BusyWithoutAnyHeaderIsBusy) {
  LieTimes(3, Always, {.raw = "HTTP/1.1 503 busy\r\n\r\n"});
  SP_ASSERT_OK(store().Put("small", PutSource::OfMemory(small_), {}));
  EXPECT_EQ(server().requests(), 4u);
}

TEST_F(S3Lies, F57ResetsAreOutlasted) {
  LieTimes(3, Always, {.drop = true});
  std::vector<uint8_t> back(large_.size());
  server().SetObject("base/large", LargeText());
  SP_ASSERT_OK(store().ReadRange("large", 0, back, {}));
  EXPECT_TRUE(back == large_);
}

TEST_F(S3Lies, F57AttemptsAreBounded) {
  LieTimes(kForEver, Always, FakeError(503, "SlowDown"));
  SP_EXPECT_CODE(kUnavailable, store().Head("small", {}));
  EXPECT_EQ(server().requests(), place_.options.attempts_max);
  LieTimes(kForEver, Always, {.drop = true});
  SP_EXPECT_CODE(kUnavailable, store().Head("small", {}));
  EXPECT_EQ(server().requests(), 2 * place_.options.attempts_max);
}

TEST_F(S3Lies, NobodyListensIsUnavailable) {
  {
    const FakeS3Server gone;
    place_.options.endpoint = gone.endpoint();
  }
  place_.Open();
  SP_EXPECT_CODE(kUnavailable, store().Head("small", {}));
}

TEST_F(S3Lies, F58AHangEndsAtTheDeadlineAndALateSuccessIsFoundByAsking) {
  SetLie([this](const FakeRequest& request) -> std::optional<FakeReply> {
    if (request.method != "PUT") return std::nullopt;
    server().Answer(request);  // It is made, but the reply does not come.
    return FakeReply{.hang = true};
  });
  const Nanos begin = Now();
  SP_EXPECT_CODE(kDeadline, store().Put("small", PutSource::OfMemory(small_), {.deadline = begin + 100 * kNanosPerMilli}));
  EXPECT_LT(Now() - begin, 3 * kNanosPerSecond);
  EXPECT_EQ(store().Head("small", {}).value().size_bytes, small_.size());
  SetLie(nullptr);
  SP_ASSERT_OK(store().Put("small", PutSource::OfMemory(small_), {}));
}

TEST_F(S3Lies, F58AHangEndsWhenCancelled) {
  LieTimes(kForEver, IsPart, {.hang = true});
  std::atomic<bool> cancelled = false;
  std::thread canceller([&] {
    while (server().Count("PUT", "partNumber") == 0) std::this_thread::yield();
    cancelled = true;
  });
  SP_EXPECT_CODE(kClosed, PutLarge({.cancelled = &cancelled}));
  canceller.join();
  EXPECT_EQ(server().uploads(), 0u);  // Aborted.
}

TEST_F(S3Lies, F58AHangOfAReadEndsAtTheDeadline) {
  LieTimes(kForEver, Always, {.hang = true});
  std::vector<uint8_t> out(10);
  SP_EXPECT_CODE(kDeadline, store().ReadRange("small", 0, out, {.deadline = Now() + 50 * kNanosPerMilli}));
}

TEST_F(S3Lies, F58AReplyThatStopsOnItsConnectionsLastRequestEndsAtTheDeadline) {
  server().SetObject("base/large", LargeText());
  SetLie([this](const FakeRequest& request) -> std::optional<FakeReply> {
    FakeReply reply = server().Answer(request);
    reply.headers["connection"] = "close";
    reply.missing_bytes = 100;
    reply.hang = true;
    return reply;
  });
  std::vector<uint8_t> back(1000);
  const Nanos begin = Now();
  SP_EXPECT_CODE(kDeadline, store().ReadRange("large", 0, back, {.deadline = begin + 100 * kNanosPerMilli}));
  EXPECT_LT(Now() - begin, 3 * kNanosPerSecond);
}

// A server that takes no connection: its queue is full, so the system answers nobody.
class FullListener {
 public:
  FullListener() {
    acceptor_.open(boost::asio::ip::tcp::v4());
    acceptor_.bind({boost::asio::ip::address_v4::loopback(), 0});
    acceptor_.listen(0);
    const auto address = acceptor_.local_endpoint();
    for (auto& socket : sockets_) {
      socket.open(boost::asio::ip::tcp::v4());
      socket.native_non_blocking(true);
      ::connect(socket.native_handle(), address.data(), static_cast<socklen_t>(address.size()));  // Begun, never done.
    }
  }
  std::string endpoint() const { return "http://127.0.0.1:" + std::to_string(acceptor_.local_endpoint().port()); }

 private:
  boost::asio::io_context context_;
  boost::asio::ip::tcp::acceptor acceptor_{context_};
  std::array<boost::asio::ip::tcp::socket, 4> sockets_{boost::asio::ip::tcp::socket(context_), boost::asio::ip::tcp::socket(context_),
                                                       boost::asio::ip::tcp::socket(context_), boost::asio::ip::tcp::socket(context_)};
};

TEST_F(S3Lies, AStoreEndsWithoutTheConnectionsThatNobodyWaitsForAnyMore) {
  const FullListener nobody;
  place_.options.endpoint = nobody.endpoint();
  place_.options.connections_max = 1;
  place_.options.connect_timeout = 300 * kNanosPerMilli;
  auto closing = S3Store::Open(place_.options, place_.clock()).value();
  for (int i = 0; i < 20; ++i) SP_EXPECT_CODE(kDeadline, closing->Head("small", {.deadline = Now() + 5 * kNanosPerMilli}));
  const Nanos begin = Now();
  closing.reset();
  EXPECT_LT(Now() - begin, 2 * kNanosPerSecond);  // Not 20 times 0.3 s.
}

TEST_F(S3Lies, F59AnErrorInsideA200OfCompleteIsNoSuccess) {
  for (const std::string white_space : {"", "   \n\n   \n"}) {
    for (const std::string code : {"AccessDenied", "InternalError", "NoSuchBucket"}) {
      FakeReply reply = FakeError(200, code);
      reply.body = white_space + (white_space.empty() ? reply.body : reply.body.substr(reply.body.find("<Error")));
      LieTimes(kForEver, IsComplete, reply);
      if (code == "AccessDenied") SP_EXPECT_CODE(kDenied, PutLarge());
      else SP_EXPECT_CODE(kUnavailable, PutLarge());
      EXPECT_EQ(server().Object("base/large"), std::nullopt);
      EXPECT_EQ(server().uploads(), 0u);  // Aborted.
    }
  }
  SetLie(nullptr);
  SP_ASSERT_OK(PutLarge());
}

TEST_F(S3Lies, F59A200OfCompleteThatIsCutOffIsNoSuccess) {
  for (const std::string body : {"", "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag>", "<html>welcome to the proxy</html>", "OK"}) {
    LieTimes(kForEver, IsComplete, {.body = body});
    SP_EXPECT_CODE(kUnavailable, PutLarge());
    EXPECT_EQ(server().Object("base/large"), std::nullopt) << body;
  }
}

TEST_F(S3Lies, F59WhiteSpaceBeforeTheAnswerIsNoError) {
  SetLie([this](const FakeRequest& request) -> std::optional<FakeReply> {
    if (!IsComplete(request)) return std::nullopt;
    FakeReply reply = server().Answer(request);
    reply.body = "\n\n    \n" + reply.body;
    return reply;
  });
  SP_ASSERT_OK(PutLarge());
}

TEST_F(S3Lies, F60ALostReplyToCompleteIsLookedUp) {
  SetLie([this, lost = false](const FakeRequest& request) mutable -> std::optional<FakeReply> {
    if (!IsComplete(request) || lost) return std::nullopt;
    lost = true;
    server().Answer(request);
    return FakeReply{.drop = true};
  });
  SP_ASSERT_OK(PutLarge());
  EXPECT_EQ(server().Count("POST", "uploadId"), 2u);  // The second got NoSuchUpload.
  EXPECT_TRUE(server().Object("base/large") == LargeText());
}

TEST_F(S3Lies, F60WhatIsLookedUpMustBeTheObject) {
  std::string other = LargeText();
  for (int round = 0; round < 2; ++round) {
    if (round == 0) other.back() ^= 1;  // The same length, another checksum.
    else other.pop_back();
    SetLie([&](const FakeRequest& request) -> std::optional<FakeReply> {
      if (!IsComplete(request)) return std::nullopt;
      server().SetObject("base/large", other);
      return FakeError(404, "NoSuchUpload");
    });
    SP_EXPECT_CODE(kCorrupt, PutLarge());
    SP_ASSERT_OK(store().Delete("large", {}));
  }
}

TEST_F(S3Lies, F60ALostReplyToCreateIsNotCalledALoss) {
  SetLie([this, lost = false](const FakeRequest& request) mutable -> std::optional<FakeReply> {
    if (lost) return std::nullopt;
    lost = true;
    server().Answer(request);
    return FakeReply{.drop = true};
  });
  SP_EXPECT_CODE(kUnavailable, store().Create("manifest.json", small_, {}));
  EXPECT_TRUE(server().Object("base/manifest.json") == std::string(AsText(small_)));
}

TEST_F(S3Lies, F62AnUploadThatSomebodyAbortedIsUnavailable) {
  LieTimes(1, IsPart, FakeError(404, "NoSuchUpload"));
  SP_EXPECT_CODE(kUnavailable, PutLarge());
  SP_ASSERT_OK(PutLarge());
}

TEST_F(S3Lies, F63GivenCredentialsThatExpiredAreDenied) {
  LieTimes(kForEver, Always, FakeError(400, "ExpiredToken"));
  SP_EXPECT_CODE(kDenied, store().Head("small", {}).has_value() ? Status() : store().List("", "", {}).error());
  EXPECT_LE(server().requests(), 2u);
}

// The chain is asked anew when the store calls what it gave expired, past its cache.
TEST_F(S3Lies, F63CredentialsOfTheChainAreReadAgainWhenTheyExpired) {
  ::setenv("AWS_ACCESS_KEY_ID", "FIRST", 1);
  ::setenv("AWS_SECRET_ACCESS_KEY", kSecret, 1);
  place_.options.credentials.reset();
  place_.Open();
  SP_ASSERT_OK(store().Put("small", PutSource::OfMemory(small_), {}));
  SetLie([](const FakeRequest& request) -> std::optional<FakeReply> {
    if (request.headers.at("authorization").find("Credential=SECOND/") != std::string::npos) return std::nullopt;
    return FakeError(400, "ExpiredToken");
  });
  ::setenv("AWS_ACCESS_KEY_ID", "SECOND", 1);
  const auto listed = store().List("", "", {});
  SP_ASSERT_OK(listed);
  EXPECT_EQ(listed->objects.size(), 1u);
  // Without newer ones it is a matter of waiting.
  SetLie([](const FakeRequest&) { return FakeError(400, "ExpiredToken"); });
  SP_EXPECT_CODE(kUnavailable, store().List("", "", {}));
  ::unsetenv("AWS_ACCESS_KEY_ID");
  ::unsetenv("AWS_SECRET_ACCESS_KEY");
}

TEST_F(S3Lies, F64A403IsDeniedAtOnceAndTellsNoSecret) {
  for (const std::string code : {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}) {
    const size_t before = server().requests();
    LieTimes(kForEver, Always, FakeError(403, code));
    const Status put = store().Put("small", PutSource::OfMemory(small_), {});
    SP_EXPECT_CODE(kDenied, put);
    EXPECT_EQ(server().requests(), before + 1);
    EXPECT_NE(put.message().find(code), std::string::npos) << put.message();
    EXPECT_NE(put.message().find("s3://bucket/base/small"), std::string::npos) << put.message();
    for (const char* secret : {kSecret, kAccessKey, kToken}) EXPECT_EQ(put.message().find(secret), std::string::npos) << put.message();
  }
  EXPECT_EQ(store().url().find(kAccessKey), std::string::npos);
}

TEST_F(S3Lies, F65ARedirectIsNeverFollowed) {
  const FakeS3Server elsewhere;
  for (const unsigned status : {301u, 302u, 307u, 308u}) {
    FakeReply reply = FakeError(status, "PermanentRedirect");
    reply.headers = {{"location", elsewhere.endpoint() + "/bucket/base/small"}, {"x-amz-bucket-region", "eu-central-1"}};
    LieTimes(kForEver, Always, reply);
    const Status put = store().Put("small", PutSource::OfMemory(small_), {});
    SP_EXPECT_CODE(kInvalidArgument, put);
    EXPECT_NE(put.message().find("eu-central-1"), std::string::npos) << put.message();
    std::vector<uint8_t> out(10);
    SP_EXPECT_CODE(kInvalidArgument, store().ReadRange("small", 0, out, {}));
    SP_EXPECT_CODE(kInvalidArgument, store().Head("small", {}));
  }
  EXPECT_EQ(elsewhere.requests(), 0u);
}

TEST_F(S3Lies, F65AWrongRegionAndASkewedClockAreTold) {
  FakeReply reply = FakeError(400, "AuthorizationHeaderMalformed");
  LieTimes(kForEver, Always, reply);
  const Status region = store().Put("small", PutSource::OfMemory(small_), {});
  SP_EXPECT_CODE(kInvalidArgument, region);
  EXPECT_NE(region.message().find("region"), std::string::npos);
  LieTimes(kForEver, Always, FakeError(403, "RequestTimeTooSkewed"));
  const Status clock = store().Put("small", PutSource::OfMemory(small_), {});
  SP_EXPECT_CODE(kInvalidArgument, clock);
  EXPECT_NE(clock.message().find("clock"), std::string::npos);
}

TEST_F(S3Lies, F66ABodyThatIsCutOffIsNeverTakenForWhole) {
  server().SetObject("base/large", LargeText());
  const auto cut = [this](int times) {
    SetLie([this, left = times](const FakeRequest& request) mutable -> std::optional<FakeReply> {
      if (!request.Is("GET") || left-- <= 0) return std::nullopt;
      FakeReply reply = server().Answer(request);
      reply.missing_bytes = 100;
      return reply;
    });
  };
  std::vector<uint8_t> back(large_.size());
  cut(2);
  SP_ASSERT_OK(store().ReadRange("large", 0, back, {}));
  EXPECT_TRUE(back == large_);
  cut(kForEver);
  SP_EXPECT_CODE(kUnavailable, store().ReadRange("large", 0, back, {}));
}

TEST_F(S3Lies, F66AnObjectThatShrankIsCorrupt) {
  server().SetObject("base/large", LargeText().substr(0, large_.size() - 1));
  std::vector<uint8_t> back(large_.size());
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 0, back, {}));
  server().SetObject("base/large", LargeText().substr(0, 10));
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 0, back, {}));
}

TEST_F(S3Lies, F66AReplyOfOtherBytesThanAskedForIsCorrupt) {
  server().SetObject("base/large", LargeText());
  std::vector<uint8_t> back(1000);
  const auto other_range = [this](const char* range) {
    SetLie([this, range](const FakeRequest& request) -> std::optional<FakeReply> {
      FakeRequest other = request;
      other.headers["range"] = range;
      return server().Answer(other);
    });
  };
  other_range("bytes=0-999");
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 5000, back, {}));
  other_range("bytes=5000-6100");
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 5000, back, {}));
  // A server that does not know ranges sends everything, which must not run over the end of the caller's memory.
  other_range("");
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 0, back, {}));
  for (const std::string range : {"", "bytes 0-999", "bytes -999/2000", "bytes 999-0/2000", "bytes 0-1000/2000", "0-999/2000", "bytes 0-99999999999999999999/1"}) {
    LieTimes(kForEver, Always, {.status = 206, .headers = {{"content-range", range}}, .body = std::string(1000, 'x')});
    SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 0, back, {}));
  }
  LieTimes(kForEver, Always, {.status = 206, .headers = {{"content-range", "bytes 0-999/2000"}}, .body = std::string(1001, 'x')});
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("large", 0, back, {}));
}

TEST_F(S3Lies, F66AReplyWithoutMeasureIsCutOff) {
  LieTimes(kForEver, Always, {.body = std::string(20u << 20, 'x')});
  SP_EXPECT_CODE(kCorrupt, store().List("", "", {}));
  std::map<std::string, std::string> headers;
  for (int i = 0; i < 400; ++i) headers["x-" + std::to_string(i)] = std::string(60u << 10, 'x');
  LieTimes(kForEver, Always, {.headers = headers});
  EXPECT_FALSE(store().Head("small", {}).has_value());
}

TEST_F(S3Lies, APartIsReadAsItIsSent) {
  std::atomic<size_t> largest = 0, read = 0;
  PutSource source = PutSource::OfMemory(large_);
  source.read = [&](uint64_t offset, MutableByteSpan out) -> Status {
    for (size_t seen = largest; seen < out.size() && !largest.compare_exchange_weak(seen, out.size());) {}
    read += out.size();
    std::ranges::copy(ByteSpan(large_).subspan(offset, out.size()), out.begin());
    return {};
  };
  std::vector<uint64_t> turns;
  source.pace = [&](uint64_t bytes) { turns.push_back(bytes); };
  SP_ASSERT_OK(store().Put("large", source, {}));
  EXPECT_LE(largest, place_.options.fragment_bytes);
  EXPECT_EQ(read, large_.size());
  EXPECT_EQ(turns, (std::vector<uint64_t>{5u << 20, 5u << 20, (1u << 20) + 5}));
  EXPECT_TRUE(server().Object("base/large") == LargeText());
  source.read = [](uint64_t, MutableByteSpan) -> Status { return {StatusCode::kUnavailable, "gone"}; };
  SP_EXPECT_CODE(kUnavailable, store().Put("other", source, {}));
  EXPECT_EQ(server().uploads(), 0u);
}

TEST_F(S3Lies, WhoWaitsForAConnectionIsCancelledAtOnce) {
  place_.options.connections_max = 1;
  place_.Open();
  std::atomic<bool> stop_put = false, stop_head = false;
  std::atomic<int> hanging = 0;
  SetLie([&](const FakeRequest& request) -> std::optional<FakeReply> {
    if (!IsPart(request)) return std::nullopt;
    ++hanging;
    return FakeReply{.hang = true};
  });
  std::thread put([&] { SP_EXPECT_CODE(kClosed, PutLarge({.cancelled = &stop_put})); });
  while (hanging == 0) std::this_thread::yield();
  SP_EXPECT_CODE(kDeadline, store().Head("small", {.deadline = Now() + 50 * kNanosPerMilli}));
  std::thread head([&] { SP_EXPECT_CODE(kClosed, store().Head("small", {.cancelled = &stop_head})); });
  stop_head = true;
  head.join();
  EXPECT_EQ(hanging, 1);  // What has the connection still has it.
  stop_put = true;
  put.join();
  SP_EXPECT_CODE(kNotFound, store().Head("small", {}));
}

TEST_F(S3Lies, F66AFlippedBitIsFoundByWhoeverVerifies) {
  SP_ASSERT_OK(PutLarge());
  std::string flipped = LargeText();
  flipped[3 * kBlockBytes + 1] ^= 4;
  server().SetObject("base/large", flipped);
  SP_EXPECT_CODE(kCorrupt, VerifyObject(store(), "large", large_.size(), PutSource::OfMemory(large_).block_crcs, {}));
}

TEST_F(S3Lies, F66AStoreThatSaysItHasOtherBytesIsBelieved) {
  SetLie([this](const FakeRequest& request) -> std::optional<FakeReply> {
    if (!IsPart(request)) return std::nullopt;
    FakeReply reply = server().Answer(request);
    reply.headers["x-amz-checksum-crc32c"] = "AAAAAA==";
    return reply;
  });
  SP_EXPECT_CODE(kCorrupt, PutLarge());
  EXPECT_EQ(server().uploads(), 0u);
}

// I-23: blocks are compared with the seal as they are sent, and the request that holds one which differs ends before its last byte.
TEST_F(S3Lies, MemoryThatChangedSinceItsSealIsNeverSentWhole) {
  SetLie([](const FakeRequest& request) -> std::optional<FakeReply> {
    if (IsPart(request)) ADD_FAILURE() << "a part arrived";
    return std::nullopt;
  });
  const std::vector<uint32_t> seal = PutSource::OfMemory(large_).block_crcs;
  std::vector<uint8_t> changed = large_;
  for (const uint64_t at : {4 * kBlockBytes, 9 * kBlockBytes, large_.size() - 1}) changed[at] ^= 1;  // One in each part.
  SP_EXPECT_CODE(kCorrupt, store().Put("large", PutSource::OfMemory(changed, seal), {}));
  SetLie(nullptr);
  changed = large_;
  changed[9 * kBlockBytes] ^= 1;
  const Status put = store().Put("large", PutSource::OfMemory(changed, seal), {});
  SP_EXPECT_CODE(kCorrupt, put);
  EXPECT_NE(put.message().find("block 9 "), std::string::npos) << put.message();
  SP_EXPECT_CODE(kCorrupt, store().Put("small", PutSource::OfMemory(small_, {1}), {}));
  EXPECT_EQ(server().Object("base/small"), std::nullopt);
  EXPECT_EQ(server().uploads(), 0u);
  EXPECT_EQ(server().Object("base/large"), std::nullopt);
}

TEST_F(S3Lies, F67AListThatIsCutOffOrNoListIsUnavailable) {
  for (const std::string body : {"", "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>", "<ListBucketResult><Contents>", "{}"}) {
    LieTimes(kForEver, Always, {.body = body});
    SP_EXPECT_CODE(kUnavailable, store().List("", "", {}));
    SP_EXPECT_CODE(kUnavailable, store().ListUploads("", {}));
  }
}

TEST_F(S3Lies, F67AnEndlessListOfUploadsEnds) {
  LieTimes(kForEver, Always,
           {.body = "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker></ListMultipartUploadsResult>"});
  SP_EXPECT_CODE(kUnavailable, store().ListUploads("", {}));
}

TEST_F(S3Lies, KeysOfOthersAreLeftOut) {
  for (const char* key : {"base/mine", "base2/other", "other", "base/with space", "base/"}) server().SetObject(key, "x");
  const auto page = store().List("", "", {});
  SP_ASSERT_OK(page);
  ASSERT_EQ(page->objects.size(), 1u);
  EXPECT_EQ(page->objects[0].key, "mine");
  EXPECT_EQ(page->objects[0].modified_unix_s, 1795766400);
}

TEST_F(S3Lies, F69ARacingUploadIsLeftAsItIs) {
  SetLie([this](const FakeRequest& request) -> std::optional<FakeReply> {
    if (IsComplete(request)) server().SetObject("base/large", LargeText());
    return std::nullopt;
  });
  SP_ASSERT_OK(PutLarge());
  EXPECT_EQ(server().uploads(), 0u);
}

TEST_F(S3Lies, AFullStoreIsNoSpace) {
  LieTimes(kForEver, Always, FakeError(403, "QuotaExceeded"));
  SP_EXPECT_CODE(kNoSpace, store().Put("small", PutSource::OfMemory(small_), {}));
  LieTimes(kForEver, Always, FakeError(507, "XMinioStorageFull"));
  SP_EXPECT_CODE(kNoSpace, store().Put("small", PutSource::OfMemory(small_), {}));
}

// A probe is repeated for as long as there is trouble, so none may leave something.
TEST_F(S3Lies, AProbeThatFailsLeavesNothing) {
  LieTimes(kForEver, [](const FakeRequest& request) { return request.Is("GET") && !request.key.empty(); }, FakeError(403, "AccessDenied"));
  SP_EXPECT_CODE(kDenied, store().Probe({}));
  EXPECT_EQ(store().List("", "", {}).value().objects.size(), 0u);
  LieTimes(kForEver, [puts = 0](const FakeRequest& request) mutable { return request.Is("PUT") && ++puts > 1; }, FakeError(403, "AccessDenied"));
  SP_EXPECT_CODE(kDenied, store().Probe({}));
  EXPECT_EQ(store().List("", "", {}).value().objects.size(), 0u);
}

// F69: who loses the race is told whether the winner's is the same.
TEST_F(S3Lies, F69AnotherObjectOfTheSameLengthIsNotTakenForThisOne) {
  std::string other = LargeText();
  other[5] ^= 1;
  SetLie([this, other](const FakeRequest& request) -> std::optional<FakeReply> {
    if (IsComplete(request)) server().SetObject("base/large", other);
    return std::nullopt;
  });
  SP_EXPECT_CODE(kCorrupt, PutLarge());
  EXPECT_TRUE(server().Object("base/large") == other);
}

// A reply to HEAD has no document that could tell why.
TEST_F(S3Lies, F63AHeadWithoutAReasonAsksForNewCredentials) {
  LieTimes(1, Always, {.status = 400});
  place_.options.credentials.reset();
  ASSERT_EQ(::setenv("AWS_ACCESS_KEY_ID", kAccessKey, 1) | ::setenv("AWS_SECRET_ACCESS_KEY", kSecret, 1), 0);
  place_.Open();
  SP_EXPECT_CODE(kNotFound, store().Head("small", {}));
  EXPECT_EQ(server().requests(), 2u);
  LieTimes(kForEver, Always, {.status = 400});
  const auto head = store().Head("small", {});
  SP_EXPECT_CODE(kInvalidArgument, head);
  EXPECT_NE(head.error().message().find("expired credentials can be one"), std::string::npos) << head.error().message();
  ::unsetenv("AWS_ACCESS_KEY_ID");
  ::unsetenv("AWS_SECRET_ACCESS_KEY");
}

// F70: what waits for its turn does not keep what has arrived from being seen.
TEST_F(S3Lies, ProgressIsToldWhileThePaceHoldsBack) {
  const std::vector<uint8_t> content = conformance::Bytes(8 * place_.options.part_bytes);
  uint64_t arrived = 0;
  std::vector<uint64_t> arrived_before;  // Each part's turn.
  PutSource source = PutSource::OfMemory(content);
  source.pace = [&](uint64_t) {
    while (server().Count("PUT", "partNumber") < arrived_before.size()) std::this_thread::yield();  // A slow pace: the store has all but this one.
    arrived_before.push_back(arrived);
  };
  SP_ASSERT_OK(store().Put("large", source, {.progress = [&](uint64_t bytes) { arrived += bytes; }}));
  ASSERT_EQ(arrived_before.size(), 8u);
  EXPECT_GT(arrived_before.back(), 0u);
}

TEST(S3Probe, FindsOutWhatTheStoreIgnores) {
  for (const bool conditions : {false, true}) {
    for (const bool checksums : {false, true}) {
      FakePlace place({.conditions = conditions, .checksums = checksums});
      const auto abilities = place.store().Probe({});
      SP_ASSERT_OK(abilities);
      EXPECT_EQ(abilities->conditional_create, conditions);
      EXPECT_EQ(abilities->verifies_checksums, checksums);
      EXPECT_EQ(place.store().List("", "", {}).value().objects.size(), 0u);
    }
  }
}

}  // namespace
}  // namespace sp

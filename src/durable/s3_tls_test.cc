// S3Store over TLS: what it does when the certificate is right, and that it says nothing to anybody whose certificate is not.
#include <fstream>
#include <thread>

#include "durable/object_store_conformance.h"
#include "durable/s3_fake_server.h"
#include "durable/s3_store.h"
#include "durable/tls_door.h"
#include "os/test_util.h"

namespace sp {
namespace {

class TlsPlace final : public ConformancePlace {
 public:
  explicit TlsPlace(const SelfSigned& identity = MakeSelfSigned("IP:127.0.0.1")) : door_(identity, server.port()) {
    options.bucket = "bucket";
    options.endpoint = "https://127.0.0.1:" + std::to_string(door_.port());
    options.region = "us-east-1";
    options.path_style = true;
    options.part_bytes = 5u << 20;
    options.credentials = S3Credentials{"AKIDEXAMPLE", "topsecret", ""};
    options.backoff_min = options.backoff_max = kNanosPerMilli;
    options.attempts_max = 2;
    options.ca_file = directory_.File("ca.pem");
    std::ofstream(options.ca_file) << identity.certificate_pem;
    Open();
  }
  void Open() { store_ = S3Store::Open(options, clock_).value(); }
  ObjectStore& store() override { return *store_; }
  const Clock& clock() override { return clock_; }
  bool LeaveUnfinishedUpload(const std::string& key) override {
    server.Answer({.method = "POST", .key = key, .query = {{"uploads", ""}}});
    return true;
  }
  // Nothing gets through, and the message says why. From any thread.
  void ExpectRefused(const std::string& why) {
    const auto found = store().Head("a", {});
    SP_EXPECT_CODE(kUnavailable, found);
    EXPECT_NE(found.error().message().find(why), std::string::npos) << found.error().message();
    EXPECT_EQ(server.requests(), 0u) << "not even a signature";
  }

  FakeS3Server server;
  S3Options options;

 private:
  TemporaryDirectory directory_;
  TlsDoor door_;
  SteadyClock clock_;
  std::unique_ptr<ObjectStore> store_;
};

INSTANTIATE_TEST_SUITE_P(TlsS3, ObjectStoreConformance, testing::Values(StoreFactory{"Tls", [] { return std::make_unique<TlsPlace>(); }}), StoreName);

// All at once: after a failed handshake s2n waits for 10 to 30 s before it says so, lest the time tell an attacker something.
TEST(S3Tls, CertificatesThatProveNothingAreRefused) {
  TlsPlace untrusted, of_another_host(MakeSelfSigned("DNS:other.example")), expired(MakeSelfSigned("IP:127.0.0.1", -3600));
  untrusted.options.ca_file = "";
  untrusted.Open();
  std::vector<std::thread> threads;
  for (TlsPlace* place : {&untrusted, &of_another_host, &expired}) {
    threads.emplace_back([place] { place->ExpectRefused("name it with ca_file"); });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(S3Tls, ACertificateFileThatIsNotThereIsSaidToBe) {
  TlsPlace place;
  place.options.ca_file = "/nowhere/ca.pem";
  SteadyClock clock;
  const auto opened = S3Store::Open(place.options, clock);
  SP_EXPECT_CODE(kInvalidArgument, opened);
  EXPECT_NE(opened.error().message().find("/nowhere/ca.pem"), std::string::npos) << opened.error().message();
}

TEST(S3Tls, APlainServerIsNoTlsServer) {
  TlsPlace place;
  place.options.endpoint = "https://127.0.0.1:" + std::to_string(place.server.port());
  place.Open();
  const auto found = place.store().Head("a", {});
  EXPECT_FALSE(found.has_value());
  EXPECT_EQ(found.error().code(), StatusCode::kUnavailable) << found.error().ToString();
}

}  // namespace
}  // namespace sp

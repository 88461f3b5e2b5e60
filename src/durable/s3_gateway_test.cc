// The conformance suite and a few checks of our own against a real store: the S3 gateway of Ceph, started by tests/gateway/ceph_gateway.sh (or one that
// is running already, at SAFEPOINT_TEST_S3 = endpoint, with the script's keys). Skipped where its programs are not installed.
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>

#include "durable/object_store_conformance.h"
#include "durable/s3_calls.h"
#include "durable/s3_store.h"
#include "durable/s3_xml.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr char kAccessKey[] = "testkey", kSecretKey[] = "testsecret", kBucket[] = "safepoint-test";

// Output of a shell command; nothing if it fails.
std::optional<std::string> RunShell(const std::string& command) {
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return std::nullopt;
  std::string output;
  std::array<char, 512> buffer;
  while (const size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) output.append(buffer.data(), got);
  const int status = ::pclose(pipe);
  if (status != 0) return std::nullopt;
  while (output.ends_with('\n')) output.pop_back();
  return output;
}

// One gateway for all tests of this program, started by the first that needs it.
class Gateway : public testing::Environment {
 public:
  const std::string& endpoint() {
    if (started_) return endpoint_;
    started_ = true;
    const std::string given = ProcessEnvironment("SAFEPOINT_TEST_S3");
    if (!given.empty()) {
      endpoint_ = given;
    } else if (!RunShell(Script("check"))) {
      why_not_ = "the programs of Ceph are not installed (ceph-mon ceph-osd radosgw ceph-common)";
      return endpoint_;
    } else {
      directory_.emplace();
      // From here on a gateway that does not start is a failure, not a reason to skip.
      endpoint_ = RunShell(Script("start " + directory_->path() + "/ceph " + std::to_string(::getpid()))).value_or("");
    }
    return endpoint_;
  }
  std::string why_not() {
    endpoint();
    return why_not_;
  }

  void TearDown() override {
    if (directory_) RunShell(Script("stop " + directory_->path() + "/ceph"));
    directory_.reset();
  }

 private:
  static std::string Script(const std::string& arguments) { return std::string("bash ") + SP_SOURCE_DIR + "/tests/gateway/ceph_gateway.sh " + arguments; }

  bool started_ = false;
  std::string endpoint_, why_not_;
  std::optional<TemporaryDirectory> directory_;
};

Gateway* const gateway = static_cast<Gateway*>(testing::AddGlobalTestEnvironment(new Gateway));

class GatewayPlace final : public ConformancePlace {
 public:
  explicit GatewayPlace(S3Checksums checksums = S3Checksums::kHeader, uint64_t part_bytes = 5u << 20) {
    static int places = 0;
    options.bucket = kBucket;
    options.base = "place-" + std::to_string(::getpid()) + "/" + std::to_string(++places);
    options.endpoint = gateway->endpoint();
    options.region = "us-east-1";
    options.path_style = true;
    options.checksums = checksums;
    options.part_bytes = part_bytes;
    options.credentials = S3Credentials{kAccessKey, kSecretKey, ""};
    client = S3Client::Open(options, clock_).value();
    const auto made = S3Call(*client, {.method = "PUT"}, "make the bucket", {});
    if (!made) ADD_FAILURE() << made.error().ToString();
    store_ = S3Store::Open(options, clock_).value();
  }

  ObjectStore& store() override { return *store_; }
  const Clock& clock() override { return clock_; }
  bool LeaveUnfinishedUpload(const std::string& key) override {
    S3Request request{.method = "POST", .key = options.base + "/" + key, .query = {{"uploads", ""}}};
    const auto begun = S3Call(*client, request, "leave an upload", {});
    const auto id = begun ? XmlUploadId(begun->body) : Result<std::string>(std::unexpected(begun.error()));
    if (!id) return false;
    const std::vector<uint8_t> content = conformance::Bytes(1000);
    request.method = "PUT";
    request.query = {{"partNumber", "1"}, {"uploadId", *id}};
    request.body = ByteSpan(content);
    return S3Call(*client, request, "leave a part", {}).has_value();
  }

  S3Options options;
  std::unique_ptr<S3Client> client;

 private:
  SteadyClock clock_;
  std::unique_ptr<ObjectStore> store_;
};

StoreFactory CephFactory(const char* name, S3Checksums checksums) {
  return {name, [checksums]() -> std::unique_ptr<ConformancePlace> { return gateway->endpoint().empty() ? nullptr : std::make_unique<GatewayPlace>(checksums); },
          [] { return gateway->why_not(); }};
}

class S3Gateway : public testing::Test {
 protected:
  void SetUp() override {
    if (!gateway->why_not().empty()) GTEST_SKIP() << gateway->why_not();
    ASSERT_FALSE(gateway->endpoint().empty()) << "the gateway did not start";
  }
};

INSTANTIATE_TEST_SUITE_P(Ceph, ObjectStoreConformance,
                         testing::Values(CephFactory("Header", S3Checksums::kHeader), CephFactory("NoChecksums", S3Checksums::kNone)), StoreName);

// What drain and restore do with this store depends on it, so it is written down here and not only found out.
TEST_F(S3Gateway, AbilitiesOfThisGateway) {
  GatewayPlace place;
  const auto abilities = place.store().Probe({});
  SP_ASSERT_OK(abilities);
  EXPECT_TRUE(abilities->conditional_create);
  EXPECT_FALSE(abilities->verifies_checksums);  // Ceph 16 to 18 take x-amz-checksum-crc32c and do not look at it.
}

TEST_F(S3Gateway, ManyPartsOfALengthThatIsNoMultipleOfAPart) {
  GatewayPlace place;
  const std::vector<uint8_t> content = conformance::Bytes(33 * kBlockBytes + 12345);
  uint64_t progress = 0;
  SP_ASSERT_OK(place.store().Put("parts", PutSource::OfMemory(content), {.progress = [&](uint64_t bytes) { progress += bytes; }}));
  EXPECT_EQ(progress, content.size());
  std::vector<uint8_t> back(content.size());
  SP_ASSERT_OK(place.store().ReadRange("parts", 0, back, {}));
  EXPECT_TRUE(back == content);
}

TEST_F(S3Gateway, WrongCredentialsAreDeniedAndNotTold) {
  GatewayPlace place;
  place.options.credentials = S3Credentials{kAccessKey, "wrong-secret-value", ""};
  SteadyClock clock;
  const auto store = S3Store::Open(place.options, clock).value();
  const auto created = store->Create("key", {}, {});
  SP_EXPECT_CODE(kDenied, created);
  EXPECT_EQ(created.error().message().find("wrong-secret-value"), std::string::npos);
  EXPECT_EQ(created.error().message().find(kAccessKey), std::string::npos) << created.error().ToString();
}

TEST_F(S3Gateway, AMissingBucketIsNotFound) {
  GatewayPlace place;
  place.options.bucket = "safepoint-no-such-bucket";
  SteadyClock clock;
  const auto store = S3Store::Open(place.options, clock).value();
  SP_EXPECT_CODE(kNotFound, store->Create("key", {}, {}));
  SP_EXPECT_CODE(kNotFound, store->List("", "", {}));
}

}  // namespace
}  // namespace sp

// The pure parts of the S3 store: URLs, checksums of parts, documents, what a reply means.
#include <aws/http/http.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "base/crc32c.h"
#include "durable/s3_checksums.h"
#include "durable/s3_errors.h"
#include "durable/s3_options.h"
#include "durable/s3_upload.h"
#include "durable/s3_xml.h"
#include "format/constants.h"
#include "os/test_util.h"

namespace sp {
namespace {

Environment With(std::map<std::string, std::string> values) {
  return [values = std::move(values)](const char* name) {
    const auto found = values.find(name);
    return found == values.end() ? std::string() : found->second;
  };
}

TEST(S3Url, TakesWhatItSaysFromItAndTheRestFromTheEnvironment) {
  const auto all = ParseS3Url("s3://bucket/a/b/?endpoint=http%3A%2F%2Flocalhost:9000/&region=r-1&path_style=false&checksums=none&ca_file=/etc/ca%20x.pem",
                              With({{"AWS_ENDPOINT_URL", "https://other"}, {"AWS_REGION", "other"}}));
  SP_ASSERT_OK(all);
  EXPECT_EQ(all->bucket, "bucket");
  EXPECT_EQ(all->base, "a/b");
  EXPECT_EQ(all->endpoint, "http://localhost:9000");
  EXPECT_EQ(all->region, "r-1");
  EXPECT_FALSE(all->path_style);
  EXPECT_EQ(all->checksums, S3Checksums::kNone);
  EXPECT_EQ(all->ca_file, "/etc/ca x.pem");
  EXPECT_EQ(S3Authority(*all), "http://bucket.localhost:9000");

  const auto environment = With({{"AWS_ENDPOINT_URL_S3", "https://s3.example"}, {"AWS_ENDPOINT_URL", "https://all.example"}, {"AWS_DEFAULT_REGION", "d"}});
  const auto rest = ParseS3Url("s3://bucket", environment);
  SP_ASSERT_OK(rest);
  EXPECT_EQ(rest->endpoint, "https://s3.example");
  EXPECT_EQ(rest->region, "d");
  EXPECT_TRUE(rest->path_style);
  EXPECT_EQ(rest->base, "");
  EXPECT_EQ(S3Authority(*rest), "https://s3.example");

  const auto aws = ParseS3Url("s3://bucket/x", With({{"AWS_REGION", "eu-west-1"}}));
  SP_ASSERT_OK(aws);
  EXPECT_FALSE(aws->path_style);
  EXPECT_EQ(S3Authority(*aws), "https://bucket.s3.eu-west-1.amazonaws.com");
}

TEST(S3Url, IsWrittenSoThatItReadsTheSameInAnyEnvironment) {
  const auto hostile = With({{"AWS_ENDPOINT_URL", "https://other"}, {"AWS_REGION", "other"}});
  for (const char* text : {"s3://bucket?region=eu-west-1", "s3://bucket/a/b?endpoint=http://h:1&checksums=none", "s3://b-1/x?endpoint=https://h&path_style=false",
                           "s3://bucket?endpoint=https://h&ca_file=/a%26b"}) {
    const auto options = ParseS3Url(text, With({}));
    SP_ASSERT_OK(options);
    const auto again = ParseS3Url(S3Url(*options), hostile);
    SP_ASSERT_OK(again);
    EXPECT_EQ(S3Url(*again), S3Url(*options)) << text;
    EXPECT_EQ(S3Authority(*again), S3Authority(*options)) << text;
    EXPECT_EQ(again->path_style, options->path_style) << text;
  }
}

TEST(S3Url, RefusesWhatItCannotMean) {
  for (const char* text : {"", "s3:", "s3://", "s3://?region=r", "gs://bucket", "s3://ab?region=r", "s3://bucket", "s3://bucket/a//b?region=r",
                           "s3://bucket/../x?region=r", "s3://bucket?region=r#f", "s3://bucket?region=r r", "s3://bucket?endpoint=h",
                           "s3://bucket?endpoint=ftp://h", "s3://bucket?endpoint=http://", "s3://bucket?endpoint=http://h:", "s3://bucket?endpoint=http://h:66000",
                           "s3://bucket?endpoint=http://h/path", "s3://bucket?endpoint=http://user:secret@h", "s3://bucket?region=r&path_style=yes",
                           "s3://bucket?region=r&checksums=md5", "s3://bucket?region=r&unknown=1", "s3://bucket?region=%zz", "s3://user:secret@bucket?region=r"}) {
    const auto options = ParseS3Url(text, With({}));
    SP_EXPECT_CODE(kInvalidArgument, options);
    EXPECT_EQ(options.error().message().find("secret"), std::string::npos) << options.error().message();
  }
}

TEST(S3Checksums, OfPartsComeFromThoseOfBlocks) {
  std::vector<uint8_t> content(3 * kBlockBytes + 77);
  for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i * 31 + (i >> 12));
  std::vector<uint32_t> blocks;
  for (uint64_t at = 0; at < content.size(); at += kBlockBytes) {
    blocks.push_back(Crc32c(0, ByteSpan(content).subspan(at, std::min<uint64_t>(kBlockBytes, content.size() - at))));
  }
  const uint64_t size = content.size();
  for (const auto& [begin, end] : {std::pair<uint64_t, uint64_t>{0, size}, {0, kBlockBytes}, {kBlockBytes, 3 * kBlockBytes}, {2 * kBlockBytes, size},
                                   {3 * kBlockBytes, size}, {0, 0}}) {
    EXPECT_EQ(CrcOfRange(blocks, size, begin, end), Crc32c(0, ByteSpan(content).subspan(begin, end - begin)));
  }
}

TEST(S3Checksums, AreWrittenAsS3DoesAndReadBack) {
  EXPECT_EQ(CrcToBase64(Crc32c(0, AsBytes("123456789"))), "4waSgw==");  // e3069283, the check value of CRC32C.
  for (const uint32_t crc : {0u, 1u, 0xffffffffu, 0xe3069283u}) EXPECT_EQ(CrcFromBase64(CrcToBase64(crc)), crc);
  for (const char* text : {"", "4waSgw==-3", "4waSgw=", "4waSgw", "4waS!w==", "4waSgx==", "========"}) EXPECT_EQ(CrcFromBase64(text), std::nullopt) << text;
}

TEST(S3PartPlan, CoversTheObjectWithAtMostTenThousandParts) {
  const S3PartPlan plan(uint64_t{1} << 40, 16u << 20);
  EXPECT_LE(plan.count(), S3PartPlan::kPartsMax);
  EXPECT_EQ(plan.part_bytes % kBlockBytes, 0u);
  EXPECT_EQ(plan.end(plan.count() - 1), uint64_t{1} << 40);
  EXPECT_EQ(S3PartPlan((32u << 20) + 1, 16u << 20).count(), 3u);
  EXPECT_EQ(S3PartPlan(32u << 20, 16u << 20).count(), 2u);
}

TEST(S3Xml, ReadsDocumentsWithEntitiesAndUnknownElements) {
  const auto page = XmlListPage(
      "<?xml version=\"1.0\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Name>b</Name><IsTruncated>true</IsTruncated>"
      "<NextContinuationToken>a&amp;b</NextContinuationToken><Contents><Key>x&lt;y</Key><Owner><ID>1</ID></Owner><Size>5000000000</Size>"
      "<LastModified>1970-01-02T00:00:00.000Z</LastModified></Contents></ListBucketResult>");
  SP_ASSERT_OK(page);
  EXPECT_EQ(page->next, "a&b");
  ASSERT_EQ(page->objects.size(), 1u);
  EXPECT_EQ(page->objects[0].key, "x<y");
  EXPECT_EQ(page->objects[0].size_bytes, 5000000000u);
  EXPECT_EQ(page->objects[0].modified_unix_s, 86400);
  EXPECT_EQ(UnixSecondsOfDate("Fri, 02 Jan 1970 00:00:00 GMT"), 86400);
  EXPECT_EQ(UnixSecondsOfDate("yesterday"), 0);
}

TEST(S3Xml, DeepNestingIsNoMatterOfTheStack) {
  std::string deep;
  for (int i = 0; i < 1'000'000; ++i) deep += "<a>";
  EXPECT_FALSE(XmlListPage(deep).has_value());
  EXPECT_EQ(XmlErrorCode(deep), "");
}

TEST(S3Xml, WritesTheListOfParts) {
  EXPECT_EQ(XmlCompleteRequest({{1, "\"e&1\"", 0xe3069283u}, {2, "e2", std::nullopt}}),
            "<?xml version=\"1.0\"?><CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Part><PartNumber>1</PartNumber><ETag>\"e&amp;1\"</ETag>"
            "<ChecksumCRC32C>4waSgw==</ChecksumCRC32C></Part><Part><PartNumber>2</PartNumber><ETag>e2</ETag></Part></CompleteMultipartUpload>");
}

S3Reply Refusal(int status, const std::string& code) {
  S3Reply reply;
  reply.http_status = status;
  reply.body = "<Error><Code>" + code + "</Code></Error>";
  return reply;
}

TEST(S3Errors, MapToCodesThatACallerCanActOn) {
  S3Options options;
  options.bucket = "bucket";
  options.region = "r";
  options.credentials = S3Credentials{};
  const struct {
    int status;
    const char* code;
    StatusCode wanted;
    bool transient;
  } cases[] = {{404, "NoSuchKey", StatusCode::kNotFound, false},
               {404, "NoSuchBucket", StatusCode::kNotFound, false},
               {404, "", StatusCode::kNotFound, false},
               {403, "AccessDenied", StatusCode::kDenied, false},
               {401, "", StatusCode::kDenied, false},
               {403, "RequestTimeTooSkewed", StatusCode::kInvalidArgument, false},
               {403, "QuotaExceeded", StatusCode::kNoSpace, false},
               {301, "PermanentRedirect", StatusCode::kInvalidArgument, false},
               {400, "AuthorizationHeaderMalformed", StatusCode::kInvalidArgument, false},
               {400, "BadDigest", StatusCode::kCorrupt, false},
               {400, "ExpiredToken", StatusCode::kDenied, false},
               {400, "InvalidRequest", StatusCode::kInvalidArgument, false},
               {400, "RequestTimeout", StatusCode::kUnavailable, true},
               {408, "", StatusCode::kUnavailable, true},
               {416, "InvalidRange", StatusCode::kCorrupt, false},
               {429, "", StatusCode::kUnavailable, true},
               {503, "SlowDown", StatusCode::kUnavailable, true},
               {500, "", StatusCode::kUnavailable, true},
               {501, "NotImplemented", StatusCode::kInvalidArgument, false},
               {507, "", StatusCode::kNoSpace, false},
               {509, "", StatusCode::kUnavailable, true}};
  for (const auto& c : cases) {
    const S3Reply reply = Refusal(c.status, c.code);
    EXPECT_EQ(S3Failure(reply, "put s3://bucket/key", options).code(), c.wanted) << c.status << " " << c.code;
    EXPECT_EQ(S3IsTransient(reply), c.transient) << c.status << " " << c.code;
  }
  options.credentials.reset();
  EXPECT_EQ(S3Failure(Refusal(400, "ExpiredToken"), "put", options).code(), StatusCode::kUnavailable);
  S3Reply silent;
  silent.failure = AWS_ERROR_HTTP_CHANNEL_THROUGHPUT_FAILURE;
  EXPECT_TRUE(S3IsTransient(silent));
  EXPECT_EQ(S3Failure(silent, "put", options).code(), StatusCode::kUnavailable);
  S3Reply broken = silent;  // What ended it is not the network's fault.
  broken.source = Status(StatusCode::kCorrupt, "block 3");
  EXPECT_FALSE(S3IsTransient(broken));
  EXPECT_EQ(S3Failure(broken, "put", options).code(), StatusCode::kCorrupt);
  EXPECT_EQ(S3ErrorCode(Refusal(400, "bad\ncode <>&\x1b[31m")), "");  // No document at all.
  EXPECT_EQ(S3ErrorCode(Refusal(400, "\x1b[31mBad")), "31mBad");
}

}  // namespace
}  // namespace sp

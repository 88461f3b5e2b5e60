// Where an S3 store is and how to talk to it: the s3:// URL, read once. Pure, but for the environment that is handed in.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"

namespace sp {

struct S3Credentials {
  std::string access_key_id, secret_access_key, session_token;
};

enum class S3Checksums {
  kHeader,  // CRC32C of every object and part, made from the sealed block checksums.
  kNone,    // For stores that refuse requests with it.
};

struct S3Options {
  std::string bucket;
  std::string base;      // Prefix of all keys, without a slash at either end; may be empty.
  std::string endpoint;  // "https://host:port", without a path. Empty: the public endpoint of AWS in `region`.
  std::string region;
  bool path_style = false;  // https://endpoint/bucket/key instead of https://bucket.endpoint/key.
  S3Checksums checksums = S3Checksums::kHeader;
  std::string ca_file;  // Certificates to trust instead of the system's.

  // Not in the URL.
  std::optional<S3Credentials> credentials;  // None: the usual chain (environment, profile, web identity, container, instance), re-read in time.
  uint32_t connections_max = 16;             // And requests of one call in flight.
  uint32_t threads = 2;                      // Network threads.
  uint64_t part_bytes = 16u << 20;           // A multiple of kBlockBytes, at least 5 MiB. Grows for objects of more than 10,000 parts.
  uint64_t fragment_bytes = 512u << 10;      // What is handed to the socket or to TLS at once. Of the first store of a process.
  uint32_t attempts_max = 6;                 // Of one request, with jittered pauses between them that double from backoff_min to backoff_max.
  Nanos backoff_min = 100 * kNanosPerMilli;
  Nanos backoff_max = 5 * kNanosPerSecond;
  Nanos connect_timeout = 3 * kNanosPerSecond;
};

// Value of an environment variable, empty if there is none.
using Environment = std::function<std::string(const char* name)>;
std::string ProcessEnvironment(const char* name);

// "s3://bucket/base?endpoint=https://host:port&region=r&path_style=true&checksums=none&ca_file=/path", everything after the bucket optional, values
// percent-encoded where need be. What it leaves out comes from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION, AWS_DEFAULT_REGION, in this order
// and nothing else; then: region us-east-1 if there is an endpoint (kInvalidArgument if there is none), path style if there is an endpoint.
Result<S3Options> ParseS3Url(std::string_view url, const Environment& environment = ProcessEnvironment);

// kInvalidArgument if the store could not be opened with them.
Status CheckS3Options(const S3Options& options);

// The URL from which ParseS3Url makes the same, whatever the environment.
std::string S3Url(const S3Options& options);
// "s3://bucket/base/key", for messages.
std::string S3ObjectUrl(const S3Options& options, const std::string& key);
// Scheme, host and port that requests go to, the bucket in the host name unless path_style.
std::string S3Authority(const S3Options& options);

// RFC 3986: all but letters, digits, "-._~" and, if `keep_slash`, "/" becomes %XX.
std::string PercentEncode(std::string_view text, bool keep_slash);

}  // namespace sp

// aws-c-s3 alone, the yardstick of s3_bench: parts from mapped memory, without checksums, and ranges into memory (spec: donated buffers both ways).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/bytes.h"
#include "durable/s3_client.h"
#include "durable/s3_options.h"

namespace sp {

// Thread-safe. Ends the process on an error.
class AwsCS3 {
 public:
  // `options.credentials` are given. `requests` makes and completes the multipart uploads.
  AwsCS3(const S3Options& options, S3Client& requests);
  ~AwsCS3();

  void Upload(const std::string& key, ByteSpan bytes);
  void Download(const std::string& key, uint64_t offset, MutableByteSpan into);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sp

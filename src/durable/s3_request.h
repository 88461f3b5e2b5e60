// One request to an S3 store and what came back. Plain data.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"

namespace sp {

struct S3Request {
  std::string operation;      // S3's name for it, e.g. "PutObject".
  std::string method = "GET";
  std::string key;            // With the base; empty: the bucket.
  std::vector<std::pair<std::string, std::string>> query, headers;  // Neither encoded nor signed yet.
  ByteSpan body;              // Memory of the caller, read again at each attempt.
  MutableByteSpan into;       // If not empty: GetObject of [offset, offset + into.size()), written there and not to S3Reply::body.
  uint64_t offset = 0;
};

struct S3Reply {
  int failure = 0;             // aws-c-* error number; 0: a reply with a status of success. Decide by Failed() and by s3_errors.h.
  int http_status = 0;         // 0 where no reply arrived, and for errors that the library only names (5xx).
  std::map<std::string, std::string> headers;  // Names in lower case.
  std::string body;
  uint64_t received_bytes = 0;  // Into S3Request::into.
  uint32_t attempts = 0;
  bool maybe_done = false;      // An earlier attempt may have taken effect without our learning it.

  bool failed() const { return failure != 0; }
  std::string header(const std::string& lower_case_name) const {
    const auto found = headers.find(lower_case_name);
    return found == headers.end() ? std::string() : found->second;
  }
};

}  // namespace sp

// One request to an S3 store and what came back. Plain data.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "durable/object_store.h"

namespace sp {

// What is sent with a request: bytes of memory, or of a source.
struct S3Body {
  S3Body() = default;
  S3Body(ByteSpan given) : memory(given) {}  // NOLINT(google-explicit-constructor): a body is bytes, whoever holds them.
  // Bytes [from, to) of `given`, read as they are sent and compared, where the source has checksums. `from` is a multiple of kBlockBytes.
  S3Body(const PutSource& given, uint64_t from, uint64_t to) : source(&given), begin(from), end(to) {}
  uint64_t size() const { return source == nullptr ? memory.size() : end - begin; }

  ByteSpan memory;
  const PutSource* source = nullptr;
  uint64_t begin = 0, end = 0;
};

struct S3Request {
  std::string method = "GET";
  std::string key;            // With the base; empty: the bucket.
  std::vector<std::pair<std::string, std::string>> query, headers;  // Neither encoded nor signed yet.
  S3Body body;                // Of the caller; read again at each attempt.
  MutableByteSpan into;       // If not empty: GET of [offset, offset + into.size()), written there and not to S3Reply::body.
  uint64_t offset = 0;
};

struct S3Reply {
  bool sent = false;           // Some of the request, on a connection that there was.
  int failure = 0;             // aws-c-* error number: there is no reply, or not all of it.
  Status source;               // Not OK: the body could not be read or does not match its checksums, so the request was broken off.
  bool wrong_content = false;  // It contradicts what was asked for or what its own headers say.
  bool error_inside = false;   // HTTP 200, and the document is an error (F59).
  int http_status = 0;         // 0 where no reply arrived.
  std::map<std::string, std::string> headers;  // Names in lower case.
  std::string body;
  uint64_t received_bytes = 0;  // Into S3Request::into.
  uint32_t attempts = 0;
  bool maybe_done = false;      // An earlier attempt may have taken effect without our learning it.

  bool failed() const { return failure != 0 || !source.ok() || wrong_content || error_inside || http_status < 200 || http_status > 299; }
  std::string header(const std::string& lower_case_name) const {
    const auto found = headers.find(lower_case_name);
    return found == headers.end() ? std::string() : found->second;
  }
};

}  // namespace sp

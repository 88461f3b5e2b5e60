// Requests to one S3 endpoint: signed, in parallel, tried again, bounded by CallLimits. Thread-safe.
//
// Memory that a request reads or fills belongs to the caller. Network threads touch it until its last attempt is over (s3_exchange.h); so no call here
// returns before that, also when it was cancelled or its deadline has passed.
//
// Attempts are repeated here: so a deadline or a cancel ends the pause between them at once, each attempt is signed with the
// newest credentials, and whoever asked learns that an earlier attempt may have taken effect (S3Reply::maybe_done).
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "durable/object_store.h"
#include "durable/s3_options.h"
#include "durable/s3_request.h"

namespace sp {

class S3Client {
 public:
  static Result<std::unique_ptr<S3Client>> Open(const S3Options& options, const Clock& clock);
  ~S3Client();  // No call is running. Waits for the network threads to end.

  const S3Options& options() const;

  // Sends one request and waits. A reply of the store, also a refusal, is a reply; kDeadline and kClosed when there is none for that reason. `what`
  // begins their messages.
  Result<S3Reply> Send(const S3Request& request, const std::string& what, const CallLimits& limits);

  // Sends `count` requests, connections_max of them at once. `make` is called when a place is free, `done` with the last reply of each, both on the
  // calling thread and in no particular order; the first error that `done` returns ends the rest and is returned.
  Status SendAll(size_t count, const std::function<Result<S3Request>(size_t)>& make, const std::function<Status(size_t, S3Reply&&)>& done,
                 const std::string& what, const CallLimits& limits);

 private:
  class Impl;
  class Batch;
  explicit S3Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace sp

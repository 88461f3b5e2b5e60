// The objects of aws-c-* that a client needs, owned and released in order. Thread-safe once made.
#pragma once

#include <aws/auth/credentials.h>
#include <aws/common/uri.h>
#include <aws/http/connection_manager.h>

#include <memory>
#include <mutex>

#include "base/clock.h"
#include "base/status.h"
#include "durable/s3_options.h"

struct aws_event_loop_group;
struct aws_host_resolver;
struct aws_client_bootstrap;
struct aws_tls_ctx;

namespace sp {

class S3Library {
 public:
  static Result<std::unique_ptr<S3Library>> Make(const S3Options& options);
  ~S3Library();  // Waits until the threads of all these objects have ended.
  S3Library(const S3Library&) = delete;
  S3Library& operator=(const S3Library&) = delete;

  const std::string& host() const { return host_; }  // For the Host header.

  // The pool of connections to the endpoint, S3Options::connections_max of them. Who wants one more waits for it, until this ends.
  aws_http_connection_manager* connections() { return connections_; }

  struct ReleaseProvider {
    void operator()(aws_credentials_provider* provider) const { aws_credentials_provider_release(provider); }
  };
  using Provider = std::unique_ptr<aws_credentials_provider, ReleaseProvider>;
  // A reference to the provider that is to sign the next request.
  Provider provider();
  // The store called the credentials expired: asks the chain anew, past its cache. At most every few seconds, and not for given credentials.
  void Refresh(const Clock& clock);

 private:
  S3Library() = default;
  Status Init(const S3Options& options);
  Status Connect(bool tls);
  Provider NewProvider();

  S3Options options_;
  std::string host_;
  aws_uri endpoint_{};
  aws_event_loop_group* loops_ = nullptr;
  aws_host_resolver* resolver_ = nullptr;
  aws_client_bootstrap* bootstrap_ = nullptr;
  aws_tls_ctx* tls_ = nullptr;
  aws_http_connection_manager* connections_ = nullptr;
  std::mutex mutex_;
  Provider provider_;  // Under mutex_.
  Nanos refreshed_at_ = 0;  // Under mutex_; 0: never.

  struct Ended;  // Counts objects that end on threads of their own.
  std::shared_ptr<Ended> ended_;  // Shared with the shutdown callbacks.
};

inline aws_byte_cursor AwsCursor(std::string_view text) {
  return {text.size(), reinterpret_cast<uint8_t*>(const_cast<char*>(text.data()))};
}
inline std::string_view AwsText(const aws_byte_cursor& cursor) { return {reinterpret_cast<const char*>(cursor.ptr), cursor.len}; }

}  // namespace sp

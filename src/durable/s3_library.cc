#include "durable/s3_library.h"

#include <aws/auth/auth.h>
#include <aws/common/thread.h>
#include <aws/http/connection.h>
#include <aws/http/http.h>
#include <aws/io/channel.h>
#include <aws/io/channel_bootstrap.h>
#include <aws/io/event_loop.h>
#include <aws/io/host_resolver.h>
#include <aws/io/socket.h>
#include <aws/io/tls_channel_handler.h>

#include <chrono>
#include <condition_variable>
#include <map>

namespace sp {
namespace {

constexpr size_t kHostsMax = 16;
constexpr uint64_t kIdleMillisecondsMax = 20'000;  // Then it is closed: a firewall may have forgotten it, which only a request that hangs would tell.
constexpr uint32_t kPortOfHttp = 80, kPortOfHttps = 443;
constexpr uint32_t kSilentSecondsMax = 30;  // A connection on which nothing moves for as long, while something should, is given up. As in aws-c-s3.
constexpr Nanos kRefreshPause = 5 * kNanosPerSecond;

// The library joins a thread of its own when the next one ends, so somebody has to ask for the last. It can only be asked for all threads of the process:
// when no client is left, and none is being made.
std::mutex living_mutex;
int living = 0;  // Under living_mutex.

// What TLS needs to know of the certificates to trust: the system's, or those of `ca_file`. A reference; null: aws_last_error. To read them takes 50 ms, and
// every rank of a job opens stores, so the process reads them again only when its last reading is a while ago.
aws_tls_ctx* SharedTls(const std::string& ca_file) {
  constexpr auto kReadAgainAfter = std::chrono::minutes(10);
  struct Read {
    aws_tls_ctx* context = nullptr;
    std::chrono::steady_clock::time_point at;
  };
  static std::mutex mutex;
  static std::map<std::string, Read>& contexts = *new std::map<std::string, Read>;
  const std::lock_guard lock(mutex);
  const auto now = std::chrono::steady_clock::now();
  std::erase_if(contexts, [&](const auto& c) {
    if (now - c.second.at < kReadAgainAfter) return false;
    aws_tls_ctx_release(c.second.context);
    return true;
  });
  Read& read = contexts[ca_file];
  if (read.context == nullptr) {
    aws_tls_ctx_options options;
    aws_tls_ctx_options_init_default_client(&options, aws_default_allocator());
    const bool trusted =
        ca_file.empty() || aws_tls_ctx_options_override_default_trust_store_from_path(&options, nullptr, ca_file.c_str()) == AWS_OP_SUCCESS;
    if (trusted) read = {aws_tls_client_ctx_new(aws_default_allocator(), &options), now};
    aws_tls_ctx_options_clean_up(&options);
  }
  if (read.context == nullptr) contexts.erase(ca_file);
  else return aws_tls_ctx_acquire(read.context);
  return nullptr;
}

Status Failed(const char* what) { return {StatusCode::kUnavailable, std::string("s3: ") + what + ": " + aws_error_str(aws_last_error())}; }

}  // namespace

struct S3Library::Ended {
  std::mutex mutex;
  std::condition_variable changed;
  int running = 0;

  void Begin() {
    const std::lock_guard lock(mutex);
    ++running;
  }
  static void End(void* self) {
    auto* ended = static_cast<Ended*>(self);
    const std::lock_guard lock(ended->mutex);
    --ended->running;
    ended->changed.notify_all();
  }
  void WaitUntil(int left) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return running <= left; });
  }
};

Result<std::unique_ptr<S3Library>> S3Library::Make(const S3Options& options) {
  // Never cleaned up: the tables that it fills belong to the process.
  static std::once_flag once;
  std::call_once(once, [&] {
    g_aws_channel_max_fragment_size = options.fragment_bytes;
    aws_http_library_init(aws_default_allocator());
    aws_auth_library_init(aws_default_allocator());
  });
  {
    const std::lock_guard lock(living_mutex);
    ++living;
  }
  std::unique_ptr<S3Library> library(new S3Library());
  SP_RETURN_IF_ERROR(library->Init(options));
  return library;
}

Status S3Library::Init(const S3Options& options) {
  options_ = options;
  ended_ = std::make_shared<Ended>();
  aws_allocator* const allocator = aws_default_allocator();
  const std::string authority = S3Authority(options);
  const aws_byte_cursor authority_text = AwsCursor(authority);
  if (aws_uri_init_parse(&endpoint_, allocator, &authority_text) != AWS_OP_SUCCESS) {
    return {StatusCode::kInvalidArgument, "s3: '" + authority + "' is no address"};
  }
  host_ = AwsText(*aws_uri_authority(&endpoint_));

  const aws_shutdown_callback_options at_end{Ended::End, ended_.get()};
  aws_event_loop_group_options loop_options{};
  loop_options.loop_count = static_cast<uint16_t>(options.threads);
  loop_options.shutdown_options = &at_end;
  ended_->Begin();
  loops_ = aws_event_loop_group_new(allocator, &loop_options);
  if (loops_ == nullptr) {
    Ended::End(ended_.get());
    return Failed("no network threads");
  }
  aws_host_resolver_default_options resolver_options{};
  resolver_options.max_entries = kHostsMax;
  resolver_options.el_group = loops_;
  resolver_ = aws_host_resolver_new_default(allocator, &resolver_options);
  aws_client_bootstrap_options bootstrap_options{};
  bootstrap_options.event_loop_group = loops_;
  bootstrap_options.host_resolver = resolver_;
  bootstrap_ = aws_client_bootstrap_new(allocator, &bootstrap_options);
  if (bootstrap_ == nullptr) return Failed("no connections can be made");

  tls_ = SharedTls(options.ca_file);
  if (tls_ == nullptr) {
    return {StatusCode::kInvalidArgument, "s3: TLS cannot be set up" + (options.ca_file.empty() ? "" : " with the ca_file '" + options.ca_file + "'") +
                                              ": " + aws_error_str(aws_last_error())};
  }

  provider_ = NewProvider();
  if (provider_ == nullptr) return Failed("no source of credentials");
  return Connect(authority.starts_with("https:"));
}

Status S3Library::Connect(bool tls) {
  aws_socket_options socket{};
  socket.type = AWS_SOCKET_STREAM;
  socket.connect_timeout_ms = static_cast<uint32_t>(options_.connect_timeout / kNanosPerMilli);
  socket.tcp_nodelay = AWS_SOCKET_TCP_NODELAY_ON;
  const aws_http_connection_monitoring_options monitoring{.minimum_throughput_bytes_per_second = 1,
                                                          .allowable_throughput_failure_interval_seconds = kSilentSecondsMax,
                                                          .statistics_observer_fn = nullptr,
                                                          .statistics_observer_user_data = nullptr};
  const proxy_env_var_settings no_proxy{};  // Not from the environment: a proxy meant for pip would carry the checkpoints.
  aws_http_connection_manager_options options{};
  options.bootstrap = bootstrap_;
  options.initial_window_size = SIZE_MAX;
  options.socket_options = &socket;
  options.monitoring_options = &monitoring;
  options.host = *aws_uri_host_name(&endpoint_);
  options.port = aws_uri_port(&endpoint_) != 0 ? aws_uri_port(&endpoint_) : tls ? kPortOfHttps : kPortOfHttp;
  options.proxy_ev_settings = &no_proxy;
  options.max_connections = options_.connections_max;
  options.max_connection_idle_in_milliseconds = kIdleMillisecondsMax;
  options.shutdown_complete_callback = Ended::End;
  options.shutdown_complete_user_data = ended_.get();
  aws_tls_connection_options connection_tls{};
  aws_tls_connection_options_init_from_ctx(&connection_tls, tls_);
  const bool named = aws_tls_connection_options_set_server_name(&connection_tls, aws_default_allocator(), &options.host) == AWS_OP_SUCCESS;
  if (tls) options.tls_connection_options = &connection_tls;
  if (named) {
    ended_->Begin();
    connections_ = aws_http_connection_manager_new(aws_default_allocator(), &options);
    if (connections_ == nullptr) Ended::End(ended_.get());
  }
  aws_tls_connection_options_clean_up(&connection_tls);
  return connections_ == nullptr ? Failed("no connections can be made") : Status();
}

S3Library::~S3Library() {
  // The connections first, which use all others; the threads last, on which all of them end.
  if (connections_ != nullptr) aws_http_connection_manager_release(connections_);
  provider_.reset();
  if (ended_ != nullptr && loops_ != nullptr) ended_->WaitUntil(1);
  aws_client_bootstrap_release(bootstrap_);
  aws_host_resolver_release(resolver_);
  aws_tls_ctx_release(tls_);
  aws_event_loop_group_release(loops_);
  if (ended_ != nullptr) ended_->WaitUntil(0);
  aws_uri_clean_up(&endpoint_);
  const std::lock_guard lock(living_mutex);
  if (--living == 0) aws_thread_join_all_managed();
}

S3Library::Provider S3Library::provider() {
  const std::lock_guard lock(mutex_);
  return Provider(aws_credentials_provider_acquire(provider_.get()));
}

void S3Library::Refresh(const Clock& clock) {
  if (options_.credentials) return;
  const std::lock_guard lock(mutex_);
  if (refreshed_at_ != 0 && clock.Now() - refreshed_at_ < kRefreshPause) return;
  refreshed_at_ = clock.Now();
  if (Provider fresh = NewProvider()) provider_ = std::move(fresh);
}

S3Library::Provider S3Library::NewProvider() {
  aws_allocator* const allocator = aws_default_allocator();
  const aws_credentials_provider_shutdown_options at_end{Ended::End, ended_.get()};
  ended_->Begin();
  aws_credentials_provider* provider = nullptr;
  if (options_.credentials) {
    aws_credentials_provider_static_options given{};
    given.shutdown_options = at_end;
    given.access_key_id = AwsCursor(options_.credentials->access_key_id);
    given.secret_access_key = AwsCursor(options_.credentials->secret_access_key);
    given.session_token = AwsCursor(options_.credentials->session_token);
    provider = aws_credentials_provider_new_static(allocator, &given);
  } else {
    aws_credentials_provider_chain_default_options chain{};
    chain.shutdown_options = at_end;
    chain.bootstrap = bootstrap_;
    chain.tls_ctx = tls_;
    provider = aws_credentials_provider_new_chain_default(allocator, &chain);
  }
  if (provider == nullptr) Ended::End(ended_.get());
  return Provider(provider);
}

}  // namespace sp

#if defined(__SANITIZE_THREAD__)
// The libraries are linked as they are, so ThreadSanitizer sees their copies and frees but not the atomic counts that order them. What it says with one
// of their functions on the stack, which is also where our callbacks are called from, means nothing; all else of ours is still judged.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:aws_\nrace:^s_\nrace:^s2n_\n"; }
#endif

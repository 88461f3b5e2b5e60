#include "aws_c_s3.h"

#include <aws/auth/credentials.h>
#include <aws/auth/signing_config.h>
#include <aws/common/uri.h>
#include <aws/http/request_response.h>
#include <aws/io/channel.h>
#include <aws/io/channel_bootstrap.h>
#include <aws/io/event_loop.h>
#include <aws/io/host_resolver.h>
#include <aws/io/tls_channel_handler.h>
#include <aws/s3/s3_client.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "durable/s3_calls.h"
#include "durable/s3_library.h"
#include "durable/s3_xml.h"

namespace sp {
namespace {

constexpr uint64_t kMemoryLimit = uint64_t{12} << 30;  // Of the library's buffer pool, which these requests do not use.

template <typename T>
T* Need(T* made) {
  if (made != nullptr) return made;
  std::fprintf(stderr, "aws-c-s3: %s\n", aws_error_str(aws_last_error()));
  std::exit(1);
}

// Requests under way, at most so many.
class Window {
 public:
  explicit Window(size_t most) : most_(most) {}
  void Enter() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return under_way_ < most_; });
    ++under_way_;
  }
  void Leave() {
    const std::lock_guard lock(mutex_);
    --under_way_;
    changed_.notify_all();
  }
  void WaitForAll() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return under_way_ == 0; });
  }

 private:
  const size_t most_;
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t under_way_ = 0;
};

// One meta request.
struct Request {
  Window* window = nullptr;
  std::string etag;
  aws_byte_buf into{};

  static int OnHeaders(aws_s3_meta_request*, const aws_http_headers* headers, int, void* data) {
    aws_byte_cursor value{};
    if (aws_http_headers_get(headers, AwsCursor("ETag"), &value) == AWS_OP_SUCCESS) {
      static_cast<Request*>(data)->etag.assign(reinterpret_cast<const char*>(value.ptr), value.len);
    }
    return AWS_OP_SUCCESS;
  }
  static void OnFinish(aws_s3_meta_request*, const aws_s3_meta_request_result* result, void*) {
    if (result->error_code == 0) return;
    std::fprintf(stderr, "aws-c-s3: %s, HTTP %d\n", aws_error_str(result->error_code), result->response_status);
    std::exit(1);
  }
  static void OnGone(void* data) { static_cast<Request*>(data)->window->Leave(); }
};

}  // namespace

class AwsCS3::Impl {
 public:
  Impl(const S3Options& given, S3Client& given_requests) : options(given), requests(given_requests) {
    aws_allocator* const allocator = aws_default_allocator();
    aws_s3_library_init(allocator);
    const std::string authority = S3Authority(options);
    const aws_byte_cursor text = AwsCursor(authority);
    if (aws_uri_init_parse(&endpoint, allocator, &text) != AWS_OP_SUCCESS) std::exit(1);
    aws_event_loop_group_options loop_options{};
    loop_options.loop_count = static_cast<uint16_t>(options.threads);
    loops = Need(aws_event_loop_group_new(allocator, &loop_options));
    aws_host_resolver_default_options resolver_options{};
    resolver_options.max_entries = 4;
    resolver_options.el_group = loops;
    resolver = Need(aws_host_resolver_new_default(allocator, &resolver_options));
    aws_client_bootstrap_options bootstrap_options{};
    bootstrap_options.event_loop_group = loops;
    bootstrap_options.host_resolver = resolver;
    bootstrap = Need(aws_client_bootstrap_new(allocator, &bootstrap_options));
    aws_tls_ctx_options tls_options;
    aws_tls_ctx_options_init_default_client(&tls_options, allocator);
    if (!options.ca_file.empty()) aws_tls_ctx_options_override_default_trust_store_from_path(&tls_options, nullptr, options.ca_file.c_str());
    tls = Need(aws_tls_client_ctx_new(allocator, &tls_options));
    aws_tls_ctx_options_clean_up(&tls_options);
    aws_credentials_provider_static_options keys{};
    keys.access_key_id = AwsCursor(options.credentials->access_key_id);
    keys.secret_access_key = AwsCursor(options.credentials->secret_access_key);
    provider = Need(aws_credentials_provider_new_static(allocator, &keys));

    aws_tls_connection_options connection_tls{};
    aws_tls_connection_options_init_from_ctx(&connection_tls, tls);
    aws_signing_config_aws signing{};
    aws_s3_init_default_signing_config(&signing, AwsCursor(options.region), provider);
    aws_s3_client_config config{};
    config.max_active_connections_override = options.connections_max;
    config.region = AwsCursor(options.region);
    config.client_bootstrap = bootstrap;
    config.tls_mode = authority.starts_with("https:") ? AWS_MR_TLS_ENABLED : AWS_MR_TLS_DISABLED;
    config.tls_connection_options = &connection_tls;
    config.signing_config = &signing;
    config.throughput_target_gbps = 10;
    config.memory_limit_in_bytes = kMemoryLimit;
    client = Need(aws_s3_client_new(allocator, &config));
    aws_tls_connection_options_clean_up(&connection_tls);
  }

  // Counted references: the threads end once nothing needs them any more.
  ~Impl() {
    aws_s3_client_release(client);
    aws_credentials_provider_release(provider);
    aws_client_bootstrap_release(bootstrap);
    aws_host_resolver_release(resolver);
    aws_tls_ctx_release(tls);
    aws_event_loop_group_release(loops);
    aws_uri_clean_up(&endpoint);
  }

  void Start(Request* request, const char* method, const std::string& path, ByteSpan body, uint64_t offset) {
    aws_http_message* const message = Need(aws_http_message_new_request(aws_default_allocator()));
    const auto add = [&](std::string_view name, std::string_view value) {
      aws_http_header header{};
      header.name = AwsCursor(name);
      header.value = AwsCursor(value);
      aws_http_message_add_header(message, header);
    };
    const aws_byte_cursor host = *aws_uri_authority(&endpoint);
    aws_http_message_set_request_method(message, AwsCursor(method));
    aws_http_message_set_request_path(message, AwsCursor(path));
    add("host", AwsText(host));
    aws_signing_config_aws signing{};
    aws_s3_init_default_signing_config(&signing, AwsCursor(options.region), provider);
    aws_s3_meta_request_options meta{};
    meta.signing_config = &signing;
    meta.message = message;
    meta.endpoint = &endpoint;
    meta.user_data = request;
    meta.headers_callback = Request::OnHeaders;
    meta.finish_callback = Request::OnFinish;
    meta.shutdown_callback = Request::OnGone;
    if (request->into.buffer == nullptr) {
      add("content-length", std::to_string(body.size()));
      meta.type = AWS_S3_META_REQUEST_TYPE_DEFAULT;
      meta.operation_name = AwsCursor("UploadPart");
      meta.request_body = AwsCursor(AsText(body));
    } else {
      add("range", "bytes=" + std::to_string(offset) + "-" + std::to_string(offset + request->into.capacity - 1));
      meta.type = AWS_S3_META_REQUEST_TYPE_GET_OBJECT;
      meta.part_size = request->into.capacity;
      meta.recv_buffer = &request->into;
    }
    aws_s3_meta_request_release(Need(aws_s3_client_make_meta_request(client, &meta)));
    aws_http_message_release(message);
  }

  std::string Path(const std::string& key) const { return (options.path_style ? "/" + options.bucket : "") + "/" + PercentEncode(key, true); }

  const S3Options options;
  S3Client& requests;
  aws_uri endpoint{};
  aws_event_loop_group* loops = nullptr;
  aws_host_resolver* resolver = nullptr;
  aws_client_bootstrap* bootstrap = nullptr;
  aws_tls_ctx* tls = nullptr;
  aws_credentials_provider* provider = nullptr;
  aws_s3_client* client = nullptr;
};

AwsCS3::AwsCS3(const S3Options& options, S3Client& requests) : impl_(std::make_unique<Impl>(options, requests)) {}
AwsCS3::~AwsCS3() = default;

void AwsCS3::Upload(const std::string& key, ByteSpan bytes) {
  const auto call = [&](const S3Request& request) {
    auto reply = S3Call(impl_->requests, request, key, {});
    if (reply) return std::move(*reply);
    std::fprintf(stderr, "%s\n", reply.error().ToString().c_str());
    std::exit(1);
  };
  const S3Reply begun = call({.method = "POST", .key = key, .query = {{"uploads", ""}}});
  const std::string id = XmlUploadId(begun.body).value();
  const uint64_t part = impl_->options.part_bytes;
  std::vector<Request> parts((bytes.size() + part - 1) / part);
  Window window(impl_->options.connections_max);
  for (size_t i = 0; i < parts.size(); ++i) {
    window.Enter();
    parts[i].window = &window;
    const std::string path = impl_->Path(key) + "?partNumber=" + std::to_string(i + 1) + "&uploadId=" + PercentEncode(id, false);
    impl_->Start(&parts[i], "PUT", path, bytes.subspan(i * part, std::min<uint64_t>(part, bytes.size() - i * part)), 0);
  }
  window.WaitForAll();
  std::vector<XmlPart> sent(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) sent[i] = {static_cast<uint32_t>(i + 1), parts[i].etag, std::nullopt};
  const std::string document = XmlCompleteRequest(sent);
  call({.method = "POST", .key = key, .query = {{"uploadId", id}}, .body = AsBytes(document)});
}

void AwsCS3::Download(const std::string& key, uint64_t offset, MutableByteSpan into) {
  const uint64_t part = impl_->options.part_bytes;
  std::vector<Request> parts((into.size() + part - 1) / part);
  Window window(impl_->options.connections_max);
  for (size_t i = 0; i < parts.size(); ++i) {
    window.Enter();
    parts[i].window = &window;
    const MutableByteSpan piece = into.subspan(i * part, std::min<uint64_t>(part, into.size() - i * part));
    parts[i].into = aws_byte_buf_from_empty_array(piece.data(), piece.size());
    impl_->Start(&parts[i], "GET", impl_->Path(key), {}, offset + i * part);
  }
  window.WaitForAll();
}

}  // namespace sp

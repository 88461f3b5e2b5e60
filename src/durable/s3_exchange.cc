#include "durable/s3_exchange.h"

#include <aws/auth/signable.h>
#include <aws/auth/signing.h>
#include <aws/auth/signing_config.h>
#include <aws/auth/signing_result.h>
#include <aws/common/date_time.h>
#include <aws/http/connection.h>
#include <aws/http/connection_manager.h>
#include <aws/io/stream.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "base/crc32c.h"
#include "format/constants.h"

namespace sp {
namespace {

// Of a reply that is not written into the caller's memory. The longest is a page of a thousand keys.
constexpr size_t kKeptBytesMax = 16u << 20;

std::string LowerCase(std::string_view text) {
  std::string out(text);
  std::ranges::transform(out, out.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return out;
}

// "bytes 5-14/100": what it says of first and last byte.
bool ParseContentRange(std::string_view text, uint64_t* first, uint64_t* last) {
  if (!text.starts_with("bytes ")) return false;
  const char* const end = text.data() + text.size();
  const auto dash = std::from_chars(text.data() + 6, end, *first);
  if (dash.ec != std::errc() || dash.ptr == end || *dash.ptr != '-') return false;
  const auto slash = std::from_chars(dash.ptr + 1, end, *last);
  return slash.ec == std::errc() && slash.ptr != end && *slash.ptr == '/' && *first <= *last;
}

int LastError() {
  const int error = aws_last_error();
  return error == 0 ? static_cast<int>(AWS_ERROR_UNKNOWN) : error;
}

}  // namespace

// A range of a PutSource as the library's kind of stream. Only on the thread of its connection.
class S3Exchange::SourceStream : public aws_input_stream {
 public:
  explicit SourceStream(const S3Body& body) : aws_input_stream{}, source_(*body.source), begin_(body.begin), end_(body.end), at_(body.begin) {
    static constexpr aws_input_stream_vtable kCalls = {.seek = Seek, .read = Read, .get_status = GetStatus, .get_length = GetLength,
                                                       .acquire = nullptr, .release = nullptr};
    impl = this;
    vtable = &kCalls;
    aws_ref_count_init(&ref_count, this, [](void* self) { delete static_cast<SourceStream*>(self); });
  }

  const Status& status() const { return status_; }

 private:
  static SourceStream& Of(aws_input_stream* stream) { return *static_cast<SourceStream*>(stream->impl); }

  static int Seek(aws_input_stream* stream, int64_t offset, aws_stream_seek_basis basis) {
    SourceStream& self = Of(stream);
    if (basis != AWS_SSB_BEGIN || offset != 0) return aws_raise_error(AWS_IO_STREAM_INVALID_SEEK_POSITION);
    self.at_ = self.begin_;
    self.crc_ = 0;
    return AWS_OP_SUCCESS;
  }

  // Fills what there is room for. A block's last bytes are not handed on unless it matches its checksum, so a wrong request is never complete.
  static int Read(aws_input_stream* stream, aws_byte_buf* into) {
    SourceStream& self = Of(stream);
    while (self.at_ < self.end_ && into->len < into->capacity) {
      const uint64_t block = self.at_ / kBlockBytes, block_end = std::min(self.end_, (block + 1) * kBlockBytes);
      const MutableByteSpan out(into->buffer + into->len, std::min<uint64_t>(into->capacity - into->len, block_end - self.at_));
      self.status_ = self.source_.read(self.at_, out);
      if (self.status_.ok() && !self.source_.block_crcs.empty()) {
        self.crc_ = Crc32c(self.crc_, out);
        if (self.at_ + out.size() == block_end && std::exchange(self.crc_, 0) != self.source_.block_crcs[block]) self.status_ = BlockDiffers(block);
      }
      if (!self.status_.ok()) return aws_raise_error(AWS_IO_STREAM_READ_FAILED);
      self.at_ += out.size();
      into->len += out.size();
    }
    return AWS_OP_SUCCESS;
  }

  static int GetStatus(aws_input_stream* stream, aws_stream_status* status) {
    *status = {.is_end_of_stream = Of(stream).at_ == Of(stream).end_, .is_valid = Of(stream).status_.ok()};
    return AWS_OP_SUCCESS;
  }

  static int GetLength(aws_input_stream* stream, int64_t* length) {
    *length = static_cast<int64_t>(Of(stream).end_ - Of(stream).begin_);
    return AWS_OP_SUCCESS;
  }

  const PutSource& source_;
  const uint64_t begin_, end_;
  uint64_t at_;
  uint32_t crc_ = 0;  // Of the block at at_, as far as it was read.
  Status status_;
};

// What the library calls. `data` is a reference of the exchange to itself: of the attempts to connect and to sign, and of the stream.
struct S3Exchange::Callbacks {
  using Reference = std::shared_ptr<S3Exchange>;
  static void* Keep(S3Exchange* exchange) { return new Reference(exchange->shared_from_this()); }
  static Reference Take(void* data) { return std::move(*std::unique_ptr<Reference>(static_cast<Reference*>(data))); }
  static S3Exchange& Of(void* data) { return **static_cast<Reference*>(data); }

  static void Connected(aws_http_connection* connection, int error, void* data) { Take(data)->OnConnection(connection, error); }
  static void Signed(aws_signing_result* result, int error, void* data) { Take(data)->OnSigned(result, error); }
  static int Headers(aws_http_stream*, aws_http_header_block block, const aws_http_header* headers, size_t count, void* data) {
    return block == AWS_HTTP_HEADER_BLOCK_MAIN ? Of(data).OnHeaders(headers, count) : AWS_OP_SUCCESS;
  }
  static int HeadersDone(aws_http_stream* stream, aws_http_header_block block, void* data) {
    int status = 0;
    if (block != AWS_HTTP_HEADER_BLOCK_MAIN) return AWS_OP_SUCCESS;
    if (aws_http_stream_get_incoming_response_status(stream, &status) != AWS_OP_SUCCESS) return AWS_OP_ERR;
    return Of(data).OnHeadersDone(status);
  }
  static int Body(aws_http_stream*, const aws_byte_cursor* body, void* data) { return Of(data).OnBody({body->ptr, body->len}); }
  static void Complete(aws_http_stream*, int error, void* data) { Of(data).OnComplete(error); }
  static void Destroyed(void* data) { Take(data); }
};

std::shared_ptr<S3Exchange> S3Exchange::Start(S3Library& library, const S3Options& options, const S3Request& request, std::function<void()> over) {
  const std::shared_ptr<S3Exchange> exchange(new S3Exchange(library, options, request, std::move(over)));
  if (exchange->MakeMessage(library.host())) {
    aws_http_connection_manager_acquire_connection(exchange->connections_, Callbacks::Connected, Callbacks::Keep(exchange.get()));
  } else {
    exchange->Finish(LastError());
  }
  return exchange;
}

S3Exchange::S3Exchange(S3Library& library, const S3Options& options, const S3Request& request, std::function<void()> over) :
    options_(options), request_(request), provider_(library.provider()), connections_(library.connections()), over_(std::move(over)) {}

S3Exchange::~S3Exchange() {
  aws_signable_destroy(signable_);
  aws_http_message_release(message_);
}

bool S3Exchange::MakeMessage(const std::string& host) {
  message_ = aws_http_message_new_request(aws_default_allocator());
  if (message_ == nullptr) return false;
  std::string path = options_.path_style ? "/" + options_.bucket : "";
  if (!request_.key.empty() || !options_.path_style) path += "/" + PercentEncode(request_.key, true);
  char separator = '?';
  for (const auto& [name, value] : request_.query) {
    path += separator + PercentEncode(name, false) + "=" + PercentEncode(value, false);
    separator = '&';
  }
  bool good = aws_http_message_set_request_method(message_, AwsCursor(request_.method)) == AWS_OP_SUCCESS &&
              aws_http_message_set_request_path(message_, AwsCursor(path)) == AWS_OP_SUCCESS;
  const auto add = [&](std::string_view name, std::string_view value) {
    aws_http_header header{};
    header.name = AwsCursor(name);
    header.value = AwsCursor(value);
    good = good && aws_http_message_add_header(message_, header) == AWS_OP_SUCCESS;
  };
  add("host", host);
  add("user-agent", "safepoint");
  if (request_.method == "PUT" || request_.method == "POST") add("content-length", std::to_string(request_.body.size()));
  if (!request_.into.empty()) {
    add("range", "bytes=" + std::to_string(request_.offset) + "-" + std::to_string(request_.offset + request_.into.size() - 1));
  }
  for (const auto& [name, value] : request_.headers) add(name, value);
  return good && SetBody();
}

bool S3Exchange::SetBody() {
  aws_input_stream* body = nullptr;
  if (request_.body.size() == 0) return true;
  if (request_.body.source != nullptr) {
    body = stream_of_source_ = new SourceStream(request_.body);
  } else {
    const aws_byte_cursor bytes = AwsCursor(AsText(request_.body.memory));
    body = aws_input_stream_new_from_cursor(aws_default_allocator(), &bytes);
    if (body == nullptr) return false;
  }
  aws_http_message_set_body_stream(message_, body);
  aws_input_stream_release(body);  // The message has a reference of its own.
  return true;
}

void S3Exchange::OnConnection(aws_http_connection* connection, int error) {
  if (connection == nullptr) return Finish(error == 0 ? static_cast<int>(AWS_ERROR_UNKNOWN) : error);
  connection_ = connection;
  if (IsOver()) return GiveUp(0);
  // Not earlier: a signature is good for 15 minutes, and the wait for a connection may be longer.
  if (const int failure = Sign(); failure != 0) GiveUp(failure);
}

int S3Exchange::Sign() {
  aws_signing_config_aws signing{};
  signing.config_type = AWS_SIGNING_CONFIG_AWS;
  signing.algorithm = AWS_SIGNING_ALGORITHM_V4;
  signing.signature_type = AWS_ST_HTTP_REQUEST_HEADERS;
  signing.region = AwsCursor(options_.region);
  signing.service = AwsCursor("s3");
  signing.credentials_provider = provider_.get();
  // The body is not hashed: TLS protects it on the way, and its checksum, which is signed, to the end. As all clients do.
  signing.signed_body_header = AWS_SBHT_X_AMZ_CONTENT_SHA256;
  signing.signed_body_value = g_aws_signed_body_value_unsigned_payload;
  aws_date_time_init_now(&signing.date);
  signable_ = aws_signable_new_http_request(aws_default_allocator(), message_);
  if (signable_ == nullptr) return LastError();
  void* const self = Callbacks::Keep(this);
  const auto* const config = reinterpret_cast<const aws_signing_config_base*>(&signing);
  if (aws_sign_request_aws(aws_default_allocator(), signable_, config, Callbacks::Signed, self) == AWS_OP_SUCCESS) return 0;
  const int error = LastError();  // Then it does not call back.
  Callbacks::Take(self);
  return error;
}

void S3Exchange::OnSigned(aws_signing_result* result, int error) {
  if (error == 0 && aws_apply_signing_result_to_http_request(message_, aws_default_allocator(), result) != AWS_OP_SUCCESS) error = LastError();
  if (error == 0) error = Send();
  if (error != 0) GiveUp(error);
}

// 0: OnComplete follows, on this thread or another.
int S3Exchange::Send() {
  aws_http_make_request_options options{};
  options.self_size = sizeof options;
  options.request = message_;
  options.on_response_headers = Callbacks::Headers;
  options.on_response_header_block_done = Callbacks::HeadersDone;
  options.on_response_body = Callbacks::Body;
  options.on_complete = Callbacks::Complete;
  options.on_destroy = Callbacks::Destroyed;
  const std::lock_guard lock(mutex_);
  if (stage_ == Stage::kOver) return AWS_ERROR_HTTP_STREAM_CANCELLED;
  options.user_data = Callbacks::Keep(this);
  stream_ = aws_http_connection_make_request(connection_, &options);
  if (stream_ == nullptr) {
    const int error = LastError();
    Callbacks::Take(options.user_data);
    return error;
  }
  if (aws_http_stream_activate(stream_) != AWS_OP_SUCCESS) {
    const int error = LastError();
    aws_http_stream_release(std::exchange(stream_, nullptr));
    return error;
  }
  stage_ = Stage::kStreaming;
  reply_.sent = true;
  return 0;
}

// Before anything was sent.
void S3Exchange::GiveUp(int error) {
  aws_http_connection_manager_release_connection(connections_, connection_);
  Finish(error);
}

bool S3Exchange::IsOver() {
  const std::lock_guard lock(mutex_);
  return stage_ == Stage::kOver;
}

int S3Exchange::WrongContent() {
  reply_.wrong_content = true;
  return aws_raise_error(AWS_ERROR_HTTP_PROTOCOL_ERROR);
}

int S3Exchange::OnHeaders(const aws_http_header* headers, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    kept_bytes_ += headers[i].name.len + headers[i].value.len;
    if (kept_bytes_ > kKeptBytesMax) return WrongContent();
    reply_.headers[LowerCase(AwsText(headers[i].name))] = AwsText(headers[i].value);
  }
  return AWS_OP_SUCCESS;
}

int S3Exchange::OnHeadersDone(int status) {
  reply_.http_status = status;
  if (request_.into.empty() || reply_.failed()) return AWS_OP_SUCCESS;
  uint64_t first = 0, last = 0;
  const bool range = reply_.http_status == 206 && ParseContentRange(reply_.header("content-range"), &first, &last);
  if (!range || first != request_.offset || last - first >= request_.into.size()) return WrongContent();
  return AWS_OP_SUCCESS;
}

int S3Exchange::OnBody(ByteSpan body) {
  if (request_.into.empty() || reply_.failed()) {
    kept_bytes_ += body.size();
    if (kept_bytes_ > kKeptBytesMax) return WrongContent();
    reply_.body += AsText(body);
    return AWS_OP_SUCCESS;
  }
  if (body.size() > request_.into.size() - reply_.received_bytes) return WrongContent();
  std::memcpy(request_.into.data() + reply_.received_bytes, body.data(), body.size());
  reply_.received_bytes += body.size();
  return AWS_OP_SUCCESS;
}

void S3Exchange::OnComplete(int error) {
  aws_http_stream* stream = nullptr;
  {
    const std::lock_guard lock(mutex_);
    stream = std::exchange(stream_, nullptr);
  }
  if (stream_of_source_ != nullptr) reply_.source = stream_of_source_->status();
  // One that is not fit for another request is closed by this.
  aws_http_connection_manager_release_connection(connections_, connection_);
  Finish(error);
  aws_http_stream_release(stream);
}

void S3Exchange::Finish(int error) {
  std::function<void()> over;
  {
    const std::lock_guard lock(mutex_);
    over = std::exchange(over_, nullptr);
    stage_ = Stage::kOver;
    if (over) reply_.failure = error;
  }
  if (over) over();
}

void S3Exchange::Cancel() {
  {
    const std::lock_guard lock(mutex_);
    if (stage_ == Stage::kStreaming) {
      // Not aws_http_stream_cancel, which does nothing once the reply has said that this is its connection's last.
      if (stream_ != nullptr) aws_http_connection_close(connection_);
      return;
    }
  }
  Finish(AWS_ERROR_HTTP_STREAM_CANCELLED);
}

}  // namespace sp

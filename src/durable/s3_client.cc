#include "durable/s3_client.h"

#include <aws/auth/signing_config.h>
#include <aws/http/request_response.h>
#include <aws/s3/s3_client.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <random>
#include <vector>

#include "base/check.h"
#include "durable/s3_errors.h"
#include "durable/s3_library.h"

namespace sp {
namespace {

constexpr std::chrono::milliseconds kTick{10};  // How late a cancel or a deadline may be noticed.
constexpr size_t kErrorBodyBytesMax = 64u << 10;

struct ReleaseMessage {
  void operator()(aws_http_message* message) const { aws_http_message_release(message); }
};
using Message = std::unique_ptr<aws_http_message, ReleaseMessage>;

std::string LowerCase(std::string_view text) {
  std::string out(text);
  std::ranges::transform(out, out.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  return out;
}

void CopyHeaders(const aws_http_headers* headers, S3Reply* reply) {
  for (size_t i = 0; headers != nullptr && i < aws_http_headers_count(headers); ++i) {
    aws_http_header header{};
    if (aws_http_headers_get_index(headers, i, &header) == AWS_OP_SUCCESS) reply->headers[LowerCase(AwsText(header.name))] = AwsText(header.value);
  }
}

}  // namespace

class S3Client::Impl {
 public:
  Impl(const S3Options& given, const Clock& given_clock) : options(given), clock(given_clock) {}

  const S3Options options;
  const Clock& clock;
  std::unique_ptr<S3Library> aws;
};

// The requests of one SendAll. Everything but the callbacks happens on the thread that called; the callbacks only write into their Call.
class S3Client::Batch {
 public:
  Batch(Impl& impl, size_t count, const std::function<Result<S3Request>(size_t)>& make, const std::function<Status(size_t, S3Reply&&)>& done,
        const std::string& what, const CallLimits& limits)
      : impl_(impl), count_(count), make_(make), done_(done), what_(what), limits_(limits), random_(std::random_device{}()) {}

  Status Run() {
    while (true) {
      Check();
      StartWhatMay();
      if (calls_.empty()) return status_;
      WaitForNews();
      CollectFinished();
    }
  }

 private:
  enum class State { kPause, kRunning, kFinished, kGone };

  // One request and its attempts, one after the other.
  struct Call {
    Batch* batch = nullptr;
    size_t index = 0;
    S3Request request;
    S3Reply reply;
    aws_s3_meta_request* meta = nullptr;  // Ours from the start of an attempt to its finish.
    aws_byte_buf into{};
    uint32_t attempts = 0;
    bool maybe_done = false, cancelled = false;
    Nanos again_at = 0;
    State state = State::kPause;  // Under mutex_.
  };

  static Call& CallOf(void* data) { return *static_cast<Call*>(data); }

  static int OnHeaders(aws_s3_meta_request*, const aws_http_headers* headers, int status, void* data) {
    CallOf(data).reply.http_status = status;
    CopyHeaders(headers, &CallOf(data).reply);
    return AWS_OP_SUCCESS;
  }
  static int OnBody(aws_s3_meta_request*, const aws_byte_cursor* body, uint64_t, void* data) {
    CallOf(data).reply.body += AwsText(*body);
    return AWS_OP_SUCCESS;
  }
  static void OnFinish(aws_s3_meta_request*, const aws_s3_meta_request_result* result, void* data) {
    Call& call = CallOf(data);
    call.reply.failure = result->error_code;
    if (result->response_status != 0) call.reply.http_status = result->response_status;
    CopyHeaders(result->error_response_headers, &call.reply);
    if (result->error_response_body != nullptr) {
      call.reply.body = AwsText(aws_byte_cursor_from_buf(result->error_response_body)).substr(0, kErrorBodyBytesMax);
    }
    call.reply.received_bytes = call.into.len;
    call.batch->Announce(call, State::kFinished);
  }
  static void OnGone(void* data) { CallOf(data).batch->Announce(CallOf(data), State::kGone); }

  void Announce(Call& call, State state) {
    const std::lock_guard lock(mutex_);  // Held for the notification, too: the batch may end right after.
    call.state = state;
    news_ = true;
    changed_.notify_one();
  }

  // Cancelled, or too late: nothing new is begun, and what runs is ended.
  void Check() {
    if (status_.ok()) status_ = CheckLimits(limits_, impl_.clock.Now(), what_);
    if (status_.ok()) return;
    for (auto call = calls_.begin(); call != calls_.end();) {
      const State state = StateOf(*call);
      if (state == State::kRunning && !call->cancelled) {
        call->cancelled = true;
        aws_s3_meta_request_cancel(call->meta);
      }
      if (state == State::kPause) call = calls_.erase(call);
      else ++call;
    }
  }

  State StateOf(const Call& call) {
    const std::lock_guard lock(mutex_);
    return call.state;
  }

  void StartWhatMay() {
    if (!status_.ok()) return;
    const Nanos now = impl_.clock.Now();
    for (Call& call : calls_) {
      if (StateOf(call) == State::kPause && call.again_at <= now) Start(call);
    }
    while (next_ < count_ && calls_.size() < impl_.options.connections_max) {
      auto request = make_(next_);
      if (!request) {
        status_ = request.error();
        return;
      }
      Call& call = calls_.emplace_back();
      call.batch = this;
      call.index = next_++;
      call.request = std::move(*request);
      Start(call);  // It is on its way while the next one is made, for which a part may have to be read.
    }
  }

  Message MakeMessage(const Call& call) {
    const S3Request& request = call.request;
    Message message(aws_http_message_new_request(aws_default_allocator()));
    if (message == nullptr) return nullptr;
    std::string path = impl_.options.path_style ? "/" + impl_.options.bucket : "";
    if (!request.key.empty() || !impl_.options.path_style) path += "/" + PercentEncode(request.key, true);
    char separator = '?';
    for (const auto& [name, value] : request.query) {
      path += separator + PercentEncode(name, false) + "=" + PercentEncode(value, false);
      separator = '&';
    }
    bool good = aws_http_message_set_request_method(message.get(), AwsCursor(request.method)) == AWS_OP_SUCCESS &&
                aws_http_message_set_request_path(message.get(), AwsCursor(path)) == AWS_OP_SUCCESS;
    const auto add = [&](std::string_view name, std::string_view value) {
      aws_http_header header{};
      header.name = AwsCursor(name);
      header.value = AwsCursor(value);
      good = good && aws_http_message_add_header(message.get(), header) == AWS_OP_SUCCESS;
    };
    add("host", impl_.aws->host());
    if (request.method == "PUT" || request.method == "POST") add("content-length", std::to_string(request.body.size()));
    if (!request.into.empty()) {
      add("range", "bytes=" + std::to_string(request.offset) + "-" + std::to_string(request.offset + request.into.size() - 1));
    }
    for (const auto& [name, value] : request.headers) add(name, value);
    return good ? std::move(message) : nullptr;
  }

  void Start(Call& call) {
    ++call.attempts;
    call.reply = S3Reply{};
    const Message message = MakeMessage(call);
    const S3Library::Provider provider = impl_.aws->provider();
    aws_signing_config_aws signing{};
    aws_s3_init_default_signing_config(&signing, AwsCursor(impl_.options.region), provider.get());
    aws_s3_meta_request_options options{};
    options.type = AWS_S3_META_REQUEST_TYPE_DEFAULT;
    options.operation_name = AwsCursor(call.request.operation);
    options.signing_config = &signing;
    options.message = message.get();
    options.endpoint = impl_.aws->endpoint();
    options.user_data = &call;
    options.headers_callback = OnHeaders;
    options.finish_callback = OnFinish;
    options.shutdown_callback = OnGone;
    if (call.request.into.empty()) {
      options.body_callback = OnBody;
      options.request_body = AwsCursor(AsText(call.request.body));
      if (call.request.body.empty()) options.request_body = {};
    } else {
      // One GET, straight into the caller's memory.
      options.type = AWS_S3_META_REQUEST_TYPE_GET_OBJECT;
      options.operation_name = {};
      options.part_size = call.request.into.size();
      call.into = aws_byte_buf_from_empty_array(call.request.into.data(), call.request.into.size());
      options.recv_buffer = &call.into;
    }
    SetState(call, State::kRunning);
    call.meta = message == nullptr ? nullptr : aws_s3_client_make_meta_request(impl_.aws->client(), &options);
    if (call.meta == nullptr) {  // Then there are no callbacks.
      call.reply.failure = message == nullptr ? AWS_ERROR_OOM : aws_last_error();
      Announce(call, State::kGone);
    }
  }

  void SetState(Call& call, State state) {
    const std::lock_guard lock(mutex_);
    call.state = state;
  }

  void WaitForNews() {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kTick, [&] { return news_; });
    news_ = false;
  }

  void CollectFinished() {
    for (auto call = calls_.begin(); call != calls_.end();) {
      const State state = StateOf(*call);
      if ((state == State::kFinished || state == State::kGone) && call->meta != nullptr) {
        // The library's last reference, or nearly: its shutdown callback follows.
        aws_s3_meta_request_release(std::exchange(call->meta, nullptr));
      }
      if (state != State::kGone || Repeat(*call)) {
        ++call;
        continue;
      }
      call->reply.attempts = call->attempts;
      call->reply.maybe_done = call->maybe_done;
      if (status_.ok() && !call->cancelled) status_ = done_(call->index, std::move(call->reply));
      call = calls_.erase(call);
    }
  }

  // True: the call goes on with another attempt.
  bool Repeat(Call& call) {
    if (!status_.ok() || call.cancelled) return false;
    const bool expired = S3WantsNewCredentials(call.reply);
    if (expired) impl_.aws->Refresh(impl_.clock);
    if (!S3IsTransient(call.reply) && !(expired && !impl_.options.credentials)) return false;
    if (call.attempts >= impl_.options.attempts_max) return false;
    call.maybe_done |= S3MayBeDone(call.reply);
    const Nanos longest = std::min(impl_.options.backoff_max, impl_.options.backoff_min << std::min(call.attempts - 1, 20u));
    call.again_at = impl_.clock.Now() + std::uniform_int_distribution<Nanos>(longest / 4, longest)(random_);
    SetState(call, State::kPause);
    return true;
  }

  Impl& impl_;
  const size_t count_;
  const std::function<Result<S3Request>(size_t)>& make_;
  const std::function<Status(size_t, S3Reply&&)>& done_;
  const std::string& what_;
  const CallLimits& limits_;
  std::minstd_rand random_;  // Only for the length of pauses.
  size_t next_ = 0;
  std::list<Call> calls_;  // A list: the library knows their addresses.
  Status status_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool news_ = false;  // Under mutex_.
};

S3Client::S3Client(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
S3Client::~S3Client() = default;
const S3Options& S3Client::options() const { return impl_->options; }

Result<std::unique_ptr<S3Client>> S3Client::Open(const S3Options& options, const Clock& clock) {
  SP_RETURN_IF_ERROR(CheckS3Options(options));
  auto impl = std::make_unique<Impl>(options, clock);
  SP_ASSIGN_OR_RETURN(impl->aws, S3Library::Make(options));
  return std::unique_ptr<S3Client>(new S3Client(std::move(impl)));
}

Status S3Client::SendAll(size_t count, const std::function<Result<S3Request>(size_t)>& make, const std::function<Status(size_t, S3Reply&&)>& done,
                         const std::string& what, const CallLimits& limits) {
  return Batch(*impl_, count, make, done, what, limits).Run();
}

Result<S3Reply> S3Client::Send(const S3Request& request, const std::string& what, const CallLimits& limits) {
  S3Reply last;
  SP_RETURN_IF_ERROR(SendAll(
      1, [&](size_t) -> Result<S3Request> { return request; },
      [&](size_t, S3Reply&& reply) {
        last = std::move(reply);
        return Status();
      },
      what, limits));
  return last;
}

}  // namespace sp

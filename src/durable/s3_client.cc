#include "durable/s3_client.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <mutex>
#include <random>
#include <vector>

#include "base/check.h"
#include "durable/s3_errors.h"
#include "durable/s3_exchange.h"
#include "durable/s3_library.h"

namespace sp {
namespace {

constexpr std::chrono::milliseconds kTick{10};  // How late a cancel or a deadline may be noticed.

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
      const bool more = StartWhatMay();
      if (calls_.empty() && !more) return status_;
      if (!more) WaitForNews();
      CollectFinished();
    }
  }

 private:
  enum class State { kPause, kRunning, kOver };

  // One request and its attempts, one after the other.
  struct Call {
    size_t index = 0;
    S3Request request;
    std::shared_ptr<S3Exchange> attempt;
    uint32_t attempts = 0;
    bool maybe_done = false, cancelled = false;
    Nanos again_at = 0;
    State state = State::kPause;  // Under mutex_.
  };

  void AnnounceOver(Call& call) {
    const std::lock_guard lock(mutex_);  // Held for the notification, too: the batch may end right after.
    call.state = State::kOver;
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
        call->attempt->Cancel();
      }
      if (state == State::kPause) call = calls_.erase(call);
      else ++call;
    }
  }

  State StateOf(const Call& call) {
    const std::lock_guard lock(mutex_);
    return call.state;
  }

  // Those that are to be repeated, and one that is new: `make_` may take its time. True: another one could be started.
  bool StartWhatMay() {
    if (!status_.ok()) return false;
    const Nanos now = impl_.clock.Now();
    for (Call& call : calls_) {
      if (StateOf(call) == State::kPause && call.again_at <= now) Start(call);
    }
    if (next_ == count_ || calls_.size() >= impl_.options.connections_max) return false;
    auto request = make_(next_);
    if (!request) {
      status_ = request.error();
      return false;
    }
    Call& call = calls_.emplace_back();
    call.index = next_++;
    call.request = std::move(*request);
    Start(call);
    return next_ < count_ && calls_.size() < impl_.options.connections_max;
  }

  void Start(Call& call) {
    ++call.attempts;
    SetState(call, State::kRunning);
    call.attempt = S3Exchange::Start(*impl_.aws, impl_.options, call.request, [this, &call] { AnnounceOver(call); });
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
      if (StateOf(*call) != State::kOver) {
        ++call;
        continue;
      }
      S3Reply reply = call->attempt->TakeReply();
      reply.error_inside = !reply.failed() && !S3ErrorCode(reply).empty();
      if (Repeat(*call, reply)) {
        ++call;
        continue;
      }
      reply.attempts = call->attempts;
      reply.maybe_done = call->maybe_done;
      if (status_.ok() && !call->cancelled) status_ = done_(call->index, std::move(reply));
      call = calls_.erase(call);
    }
  }

  // True: the call goes on with another attempt.
  bool Repeat(Call& call, const S3Reply& reply) {
    if (!status_.ok() || call.cancelled) return false;
    const bool expired = S3WantsNewCredentials(reply);
    if (expired) impl_.aws->Refresh(impl_.clock);
    if (!S3IsTransient(reply) && !(expired && !impl_.options.credentials)) return false;
    if (call.attempts >= impl_.options.attempts_max) return false;
    call.maybe_done |= S3MayBeDone(reply);
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

#include "node/keeper_fake_worker.h"

#include <signal.h>
#include <unistd.h>

#include <filesystem>
#include <iostream>
#include <map>
#include <sstream>

#include "base/check.h"
#include "node/keeper.h"
#include "node/keeper_link.h"
#include "os/epoll.h"
#include "os/memfd.h"
#include "os/signals.h"
#include "os/test_util.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

Nanos Later() { return MonotonicNow() + 30 * kNanosPerSecond; }

class FakeWorker {
 public:
  FakeWorker() : fds_at_start_(CountOpenFds()), link_(Fd(kWorkerControlFd)), listener_(kWorkerListenFd) {}

  int Run() {
    constexpr int kSignals[] = {SIGTERM, SIGHUP};
    const SignalFd signals = SignalFd::Create(kSignals).value();
    Result<KeeperAttachment> attached = link_.Attach(Later());
    if (!attached) return Fail("attach", attached.error());
    attachment_ = std::move(*attached);
    for (KeptExtent& extent : attachment_.extents) extents_[extent.id] = std::move(extent.fd);
    Epoll epoll = Epoll::Create().value();
    SP_CHECK(epoll.Add(signals.fd(), EPOLLIN, 1).ok() && epoll.Add(link_.fd(), EPOLLIN, 2).ok() &&
             epoll.Add(listener_.get(), EPOLLIN, 3).ok());
    for (;;) {
      const auto events = epoll.Wait(-1);
      SP_CHECK(events.has_value());
      for (const Epoll::Event& event : *events) {
        if (event.token == 1) {
          const int number = signals.Read().value()->number;
          if (number == SIGTERM && !ignore_term_) return 0;
          if (number == SIGHUP) ++hups_;
        } else if (event.token == 2) {
          if (!Take()) return 3;
        } else {
          Serve();
        }
      }
    }
  }

 private:
  int Fail(const char* what, const Status& status) {
    std::cerr << "fake worker: " << what << ": " << status.ToString() << "\n";
    return 3;
  }

  // Reads the keeper's events; false when the keeper is gone.
  bool Take() {
    Result<std::vector<KeeperEvent>> events = link_.ReadEvents();
    if (!events) return false;
    for (KeeperEvent& event : *events) {
      answered_ += event.count;
      if (event.kind == KeeperEvent::Kind::kCreated) {
        log_ += "created:" + std::to_string(event.id) + " ";
        extents_[event.id] = std::move(event.fd);
      } else if (event.kind == KeeperEvent::Kind::kCreateFailed) {
        log_ += "failed:" + std::to_string(event.id) + "+" + std::to_string(event.count) + ":" +
                std::string(StatusCodeName(event.status.code())) + " ";
      } else {
        if (event.status.ok()) extents_.erase(event.id);
        last_drop_ = StatusCodeName(event.status.code());
        ++drops_;
      }
    }
    return true;
  }

  void AwaitDrops(uint64_t count) {
    while (drops_ < count) {
      SP_CHECK(WaitReadable(link_.fd(), 30 * kNanosPerSecond).value() && Take());
    }
    drops_ = 0;
  }

  void Serve() {
    Result<Fd> client = AcceptUnix(listener_.get());
    if (!client) return;
    std::array<uint8_t, 4096> buffer;
    const Result<ReceivedMessage> question = ReceiveMessageBy(client->get(), buffer, 0, Later());
    if (!question) return;
    std::istringstream words(std::string(AsText(ByteSpan(buffer).first(question->size_bytes))));
    std::string answer = Do(words);
    if (answer.empty()) answer = "-";
    (void)SendMessageBy(client->get(), AsBytes(answer), {}, Later());
  }

  std::string Info() {
    std::ostringstream out;
    bool sealed = true;
    std::string ids;
    for (const auto& [id, fd] : extents_) {
      sealed = sealed && CheckSealedSize(fd.get(), attachment_.extent_bytes).ok();
      ids += (ids.empty() ? "" : ",") + std::to_string(id);
    }
    out << "pid=" << ::getpid() << " incarnation=" << attachment_.incarnation << " sealed=" << sealed
        << " fds=" << fds_at_start_ << " hups=" << hups_ << " ids=" << ids;
    return out.str();
  }

  std::string Get(int fd) {
    std::array<uint8_t, 32> text;
    if (const Status got = PReadExact(fd, text, 0); !got.ok()) return got.ToString();
    return reinterpret_cast<const char*>(text.data());
  }

  std::string Put(int fd, const std::string& text) {
    std::array<uint8_t, 32> padded{};
    std::copy_n(text.begin(), std::min<size_t>(text.size(), 31), padded.begin());
    return PWriteExact(fd, padded, 0).ToString();
  }

  std::string Do(std::istringstream& words) {
    std::string verb, text;
    uint64_t a = 0, b = 0;
    words >> verb;
    if (verb == "info") return Info();
    if (verb == "get") return words >> a, Get(extents_.at(static_cast<uint32_t>(a)).get());
    if (verb == "put") return words >> a >> text, Put(extents_.at(static_cast<uint32_t>(a)).get(), text);
    if (verb == "get-ledger") return Get(attachment_.ledger.get());
    if (verb == "put-ledger") return words >> text, Put(attachment_.ledger.get(), text);
    if (verb == "create" || verb == "create-nowait") {
      words >> a >> b;
      log_.clear();
      answered_ = 0;
      SP_CHECK(link_.RequestCreate(static_cast<uint32_t>(a), static_cast<uint32_t>(b)).has_value());
      while (verb == "create" && answered_ < std::max<uint64_t>(b, 1)) {
        SP_CHECK(WaitReadable(link_.fd(), 30 * kNanosPerSecond).value() && Take());
        if (b == 0) break;
      }
      return log_;
    }
    if (verb == "drop") {
      words >> a;
      SP_CHECK(link_.RequestDrop(static_cast<uint32_t>(a)).has_value());
      AwaitDrops(1);
      return last_drop_;
    }
    if (verb == "flood-drops") {  // Far more than both sockets hold, without reading an answer in between.
      words >> a;
      for (uint64_t i = 0; i < a; ++i) SP_CHECK(link_.RequestDrop(4'000'000'000).has_value());
      AwaitDrops(a);
      return "OK";
    }
    if (verb == "ignore-term") return ignore_term_ = true, "OK";
    if (verb == "shutdown") return link_.RequestShutdown() ? "OK" : "failed";
    if (verb == "exit") words >> a, ::_exit(static_cast<int>(a));
    if (verb == "close-control") return ::close(link_.fd()), ::dup2(0, link_.fd()), "OK";
    if (verb == "raw") return words >> text, SendRaw(text);
    return "unknown command " + verb;
  }

  std::string SendRaw(const std::string& kind) {
    KeeperFrame frame{.command = KeeperCommand::kDropExtent};
    if (kind == "magic") frame.magic = 1;
    if (kind == "version") frame.version = 2;
    if (kind == "command") frame.command = static_cast<KeeperCommand>(77);
    if (kind == "keeper-command") frame.command = KeeperCommand::kAttached;
    if (kind == "attach") frame.command = KeeperCommand::kAttach;
    if (kind == "reserved") frame.reserved[11] = 1;
    if (kind == "status") frame.status_code = 999;
    const auto bytes = EncodeKeeperFrame(frame);
    std::vector<uint8_t> message(bytes.begin(), bytes.end());
    if (kind == "short") message.pop_back();
    if (kind == "long") message.push_back(0);
    const int with[] = {0};
    const std::span<const int> fds = kind == "descriptor" ? std::span<const int>(with) : std::span<const int>();
    return SendMessage(link_.fd(), message, fds).ToString();
  }

  int fds_at_start_;
  KeeperLink link_;
  Fd listener_;
  KeeperAttachment attachment_;
  std::map<uint32_t, Fd> extents_;
  std::string log_;
  std::string last_drop_;
  uint64_t answered_ = 0;
  uint64_t drops_ = 0;
  int hups_ = 0;
  bool ignore_term_ = false;
};

}  // namespace

int FakeWorkerMain(std::string_view mode) {
  constexpr std::string_view kWait = "wait-for:";
  if (mode == "fail") return 1;
  if (mode == "refuse") return kExitConfig;
  if (mode.starts_with(kWait) && !std::filesystem::exists(mode.substr(kWait.size()))) return 1;
  return FakeWorker().Run();
}

}  // namespace sp

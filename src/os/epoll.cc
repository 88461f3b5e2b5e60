#include "os/epoll.h"

#include <array>

#include "os/errors.h"

namespace sp {
namespace {

constexpr int kEventsPerWait = 128;

}  // namespace

Result<Epoll> Epoll::Create() {
  Fd fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!fd.valid()) return ErrnoError(errno, "epoll_create1");
  Epoll epoll(std::move(fd));
  epoll.events_.reserve(kEventsPerWait);  // So that waiting needs no memory.
  return epoll;
}

Status Epoll::Control(int operation, int fd, uint32_t events, uint64_t token, const char* what) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = token;
  if (::epoll_ctl(fd_.get(), operation, fd, &event) == 0) return {};
  return ErrnoStatus(errno, std::string(what) + " descriptor " + std::to_string(fd));
}

Status Epoll::Add(int fd, uint32_t events, uint64_t token) {
  return Control(EPOLL_CTL_ADD, fd, events, token, "watch");
}
Status Epoll::Modify(int fd, uint32_t events, uint64_t token) {
  return Control(EPOLL_CTL_MOD, fd, events, token, "change the watch on");
}
Status Epoll::Remove(int fd) { return Control(EPOLL_CTL_DEL, fd, 0, 0, "stop watching"); }

Result<std::span<const Epoll::Event>> Epoll::Wait(int timeout_ms) {
  std::array<epoll_event, kEventsPerWait> ready;
  const int count = ::epoll_wait(fd_.get(), ready.data(), kEventsPerWait, timeout_ms);
  if (count < 0 && errno != EINTR) return ErrnoError(errno, "epoll_wait");
  events_.clear();
  for (int i = 0; i < count; ++i) events_.push_back({.token = ready[i].data.u64, .events = ready[i].events});
  return std::span<const Event>(events_);
}

}  // namespace sp

// Which process made an object. A forked child has copies of our objects, but neither their threads nor their mappings (those are
// kept from it), and its descriptors are shared with the parent. Thread-safe.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <string>

#include "base/status.h"

namespace sp {

class ForkGuard {
 public:
  bool in_owner() const { return ::getpid() == owner_; }
  // kUnavailable in a forked child. To be asked before any lock is taken: in a child, a lock may be held for ever.
  Status Check() const {
    if (in_owner()) return {};
    return {StatusCode::kUnavailable, "process " + std::to_string(::getpid()) + " is a forked child of process " +
                                          std::to_string(owner_) + ", which made this client; make a new client here"};
  }

 private:
  pid_t owner_ = ::getpid();
};

}  // namespace sp

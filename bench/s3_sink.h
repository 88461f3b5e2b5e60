// A server on loopback that takes S3 requests and keeps nothing: bodies are discarded in the kernel, GET sends zeros from a file in memory. It measures
// the client. One thread per connection; runs in a process of its own, so that its CPU time is not the client's.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace sp {

struct S3Sink {
  pid_t pid = -1;
  uint16_t port = 0;
};

// Forks: call it before any thread is started. The child ends with SIGKILL, which StopS3Sink sends, or with its parent.
S3Sink StartS3Sink(uint64_t object_bytes_max);
void StopS3Sink(const S3Sink& sink);

}  // namespace sp

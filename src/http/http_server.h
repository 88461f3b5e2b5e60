// HTTP/1.1 for a few read-only pages, on one thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/status.h"

namespace sp {

struct HttpResponse {
  unsigned status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

struct HttpLimits {  // reliability reference, 8.4
  uint32_t header_bytes_max = 16u << 10;
  uint32_t headers_max = 64;
  uint32_t target_bytes_max = 4096;
  uint32_t connections_max = 64;
  uint32_t requests_per_connection_max = 1000;
  Nanos header_timeout = 5 * kNanosPerSecond;  // From accept, or from the last reply, to the end of the header.
  Nanos write_timeout = 5 * kNanosPerSecond;
};

// Thread-safe. The destructor closes every connection and joins the thread.
class HttpServer {
 public:
  // Called on the server's thread; must not block.
  using Handler = std::function<HttpResponse()>;

  // `host` is a numeric address; port 0 takes any free one. kUnavailable: the address is in use; kInvalidArgument: it is none of ours.
  static Result<std::unique_ptr<HttpServer>> Start(const std::string& host, uint16_t port, std::map<std::string, Handler> pages,
                                                   HttpLimits limits = {});
  ~HttpServer();

  uint16_t port() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace sp

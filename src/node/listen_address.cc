#include "node/listen_address.h"

#include <arpa/inet.h>

#include <cstring>

#include "node/units.h"

namespace sp {

Result<ListenAddress> ParseListenAddress(const std::string& text) {
  const auto refuse = [] { return Error(StatusCode::kInvalidArgument, "is not a numeric address with a port"); };
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return refuse();
  const auto port = ParseCount(text.substr(colon + 1));
  if (!port || *port > 65535) return refuse();
  std::string host = text.substr(0, colon);
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) {
    return ListenAddress{host, static_cast<uint16_t>(*port), (ntohl(v4.s_addr) >> 24) == 127};
  }
  if (host.size() < 2 || host.front() != '[' || host.back() != ']') return refuse();
  host = host.substr(1, host.size() - 2);
  in6_addr v6;
  if (inet_pton(AF_INET6, host.c_str(), &v6) != 1) return refuse();
  return ListenAddress{host, static_cast<uint16_t>(*port), std::memcmp(&v6, &in6addr_loopback, sizeof v6) == 0};
}

}  // namespace sp

// "127.0.0.1:9202" or "[::1]:9202": a numeric address and a port. Pure.
#pragma once

#include <string>

#include "base/status.h"

namespace sp {

struct ListenAddress {
  std::string host;  // Numeric, without brackets.
  uint16_t port = 0;
  bool loopback = false;
};

// Names are refused: what they mean could change after the address was checked.
Result<ListenAddress> ParseListenAddress(const std::string& text);

}  // namespace sp

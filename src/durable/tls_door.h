// A TLS server in front of another one, for tests: takes connections on loopback, shows its certificate and passes on what comes through. One thread.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <string>
#include <thread>

namespace sp {

// A certificate that signs itself.
struct SelfSigned {
  std::string certificate_pem, key_pem;
};
// `subject_alt_name`: "IP:127.0.0.1" or "DNS:store.example". Valid from now for `seconds`; where that is negative, until then.
SelfSigned MakeSelfSigned(const std::string& subject_alt_name, long seconds = 3600);

class TlsDoor {
 public:
  TlsDoor(const SelfSigned& identity, uint16_t behind_port);
  ~TlsDoor();
  uint16_t port() const { return acceptor_.local_endpoint().port(); }

 private:
  boost::asio::io_context context_{1};
  boost::asio::ssl::context tls_{boost::asio::ssl::context::tls_server};
  boost::asio::ip::tcp::acceptor acceptor_{context_};
  std::thread thread_;
};

}  // namespace sp

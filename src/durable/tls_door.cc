#include "durable/tls_door.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <memory>

#include "base/check.h"

namespace sp {
namespace {

namespace asio = boost::asio;
using asio::use_awaitable;
using tcp = asio::ip::tcp;

template <typename T, void (*Free)(T*)>
struct Freed {
  void operator()(T* object) const { Free(object); }
};

std::string Text(BIO* memory) {
  char* bytes = nullptr;
  const long size = BIO_get_mem_data(memory, &bytes);
  return {bytes, static_cast<size_t>(size)};
}

struct Passage {
  explicit Passage(tcp::socket outside, asio::ssl::context& tls) : front(std::move(outside), tls), back(front.get_executor()) {}
  asio::ssl::stream<tcp::socket> front;
  tcp::socket back;
};

// Until either side ends; then the other one is ended, too, so that the opposite direction ends as well.
template <typename From, typename To>
asio::awaitable<void> Pump(std::shared_ptr<Passage> passage, From& from, To& to) {
  std::array<char, 64 << 10> bytes;
  try {
    for (;;) {
      const size_t count = co_await from.async_read_some(asio::buffer(bytes), use_awaitable);
      co_await asio::async_write(to, asio::buffer(bytes, count), use_awaitable);
    }
  } catch (const boost::system::system_error&) {
    boost::system::error_code ignored;
    passage->front.next_layer().close(ignored);
    passage->back.close(ignored);
  }
}

asio::awaitable<void> Serve(std::shared_ptr<Passage> passage, tcp::endpoint behind) {
  try {
    co_await passage->front.async_handshake(asio::ssl::stream_base::server, use_awaitable);
    co_await passage->back.async_connect(behind, use_awaitable);
  } catch (const boost::system::system_error&) {
    co_return;  // The client did not like the certificate.
  }
  const auto executor = passage->front.get_executor();
  asio::co_spawn(executor, Pump(passage, passage->back, passage->front), asio::detached);
  co_await Pump(passage, passage->front, passage->back);
}

asio::awaitable<void> Accept(tcp::acceptor& acceptor, asio::ssl::context& tls, tcp::endpoint behind) {
  for (;;) {
    auto passage = std::make_shared<Passage>(co_await acceptor.async_accept(use_awaitable), tls);
    asio::co_spawn(acceptor.get_executor(), Serve(std::move(passage), behind), asio::detached);
  }
}

}  // namespace

SelfSigned MakeSelfSigned(const std::string& subject_alt_name, long seconds) {
  const std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY, EVP_PKEY_free>> key(EVP_EC_gen("P-256"));
  const std::unique_ptr<X509, Freed<X509, X509_free>> certificate(X509_new());
  X509* x = certificate.get();
  SP_CHECK(key && x);
  SP_CHECK(X509_set_version(x, 2) && ASN1_INTEGER_set(X509_get_serialNumber(x), 1));
  X509_gmtime_adj(X509_getm_notBefore(x), seconds < 0 ? 2 * seconds : 0);
  X509_gmtime_adj(X509_getm_notAfter(x), seconds);
  X509_NAME* name = X509_get_subject_name(x);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>("store"), -1, -1, 0);
  X509_set_issuer_name(x, name);
  X509_set_pubkey(x, key.get());
  for (const auto& [kind, value] : {std::pair<int, std::string>(NID_subject_alt_name, subject_alt_name), {NID_basic_constraints, "critical,CA:TRUE"}}) {
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, nullptr, kind, value.c_str());
    SP_CHECK(extension && X509_add_ext(x, extension, -1));
    X509_EXTENSION_free(extension);
  }
  SP_CHECK(X509_sign(x, key.get(), EVP_sha256()) > 0);
  const std::unique_ptr<BIO, Freed<BIO, BIO_free_all>> certificate_text(BIO_new(BIO_s_mem())), key_text(BIO_new(BIO_s_mem()));
  SP_CHECK(PEM_write_bio_X509(certificate_text.get(), x) && PEM_write_bio_PrivateKey(key_text.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr));
  return {Text(certificate_text.get()), Text(key_text.get())};
}

TlsDoor::TlsDoor(const SelfSigned& identity, uint16_t behind_port) {
  tls_.use_certificate_chain(asio::buffer(identity.certificate_pem));
  tls_.use_private_key(asio::buffer(identity.key_pem), asio::ssl::context::pem);
  acceptor_.open(tcp::v4());
  acceptor_.bind({asio::ip::address_v4::loopback(), 0});
  acceptor_.listen();
  asio::co_spawn(context_, Accept(acceptor_, tls_, {asio::ip::address_v4::loopback(), behind_port}), asio::detached);
  thread_ = std::thread([this] { context_.run(); });
}

TlsDoor::~TlsDoor() {
  context_.stop();
  thread_.join();
}

}  // namespace sp

// A small S3 server on loopback for tests: honest until told to lie. It keeps objects in memory, looks at checksums and conditions, and ignores
// signatures. A lie is asked before every request and may answer in its place. Thread-safe; one thread per connection, few connections.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/http.hpp>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace sp {

struct FakeRequest {
  std::string method, key;                    // Without the bucket.
  std::map<std::string, std::string> query;   // Decoded.
  std::map<std::string, std::string> headers; // Names in lower case.
  std::string body;

  bool Is(const std::string& wanted_method, const std::string& parameter = "") const {
    return method == wanted_method && (parameter.empty() || query.contains(parameter));
  }
};

struct FakeReply {
  unsigned status = 200;
  std::map<std::string, std::string> headers;
  std::string body;
  size_t missing_bytes = 0;  // Of the body, which the header announces all the same; then the connection is closed.
  bool drop = false;         // No reply: the connection is closed.
  bool hang = false;         // No end, until the server stops: of the body where bytes of it are missing, else of the wait for a reply.
  std::string raw;           // If not empty: these bytes instead of all that, then the connection is closed.
};

class FakeS3Server {
 public:
  struct Abilities {
    bool conditions = true, conditions_on_complete = true, checksums = true;
  };
  // Nothing: the honest answer. Called by one thread at a time; may call Answer.
  using Lie = std::function<std::optional<FakeReply>(const FakeRequest&)>;

  explicit FakeS3Server(Abilities abilities) : FakeS3Server(abilities, nullptr) {}
  explicit FakeS3Server(Lie lie = nullptr) : FakeS3Server(Abilities{}, std::move(lie)) {}
  FakeS3Server(Abilities abilities, Lie lie);
  ~FakeS3Server();

  uint16_t port() const { return acceptor_.local_endpoint().port(); }
  std::string endpoint() const;
  void SetLie(Lie lie);
  FakeReply Answer(const FakeRequest& request);  // The honest one.

  size_t requests() const { return requests_; }
  size_t Count(const std::string& method, const std::string& parameter = "") const;  // Requests of this kind so far.
  std::optional<std::string> Object(const std::string& key) const;
  void SetObject(const std::string& key, const std::string& content);
  size_t uploads() const;

 private:
  using Socket = boost::asio::ip::tcp::socket;
  struct Upload {
    std::string key;
    std::map<unsigned, std::string> parts;
  };

  void Accept();
  void Serve(Socket& socket);
  void HangUntilStopped();
  bool Reply(Socket& socket, const FakeRequest& request, const FakeReply& reply, bool keep_alive);
  FakeReply AnswerLocked(const FakeRequest& request);
  FakeReply AnswerUpload(const FakeRequest& request);
  FakeReply AnswerList(const FakeRequest& request);
  FakeReply AnswerGet(const FakeRequest& request);
  FakeReply Store(const FakeRequest& request, const std::string& content, bool conditions);

  const Abilities abilities_;
  boost::asio::io_context context_;
  boost::asio::ip::tcp::acceptor acceptor_{context_};
  std::atomic<size_t> requests_ = 0;
  std::atomic<bool> stopping_ = false;
  mutable std::recursive_mutex mutex_;  // Recursive: a lie may ask for the honest answer. Guards what follows.
  Lie lie_;
  std::map<std::string, std::string> objects_;
  std::map<std::string, Upload> uploads_;
  std::vector<FakeRequest> log_;  // Without bodies.
  unsigned last_upload_ = 0;
  std::condition_variable_any stopped_;
  std::vector<int> open_;  // Descriptors to shut down at the end.
  std::vector<std::thread> threads_;
  std::thread acceptor_thread_;
};

// <Error><Code>code</Code></Error>, as S3 answers.
FakeReply FakeError(unsigned status, const std::string& code);

}  // namespace sp

// One attempt of one request: signed, sent over a connection of the library's pool, its reply collected. Thread-safe.
//
// Memory that the request reads or fills belongs to the caller, who leaves it alone until `over` is called. What is sent is read from its source into
// the fragment that goes to the socket, on a network thread: no part of an object is ever held. What is received is written where it is wanted.
#pragma once

#include <aws/http/request_response.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "durable/s3_library.h"
#include "durable/s3_options.h"
#include "durable/s3_request.h"

struct aws_http_connection;
struct aws_signable;
struct aws_signing_result;

namespace sp {

class S3Exchange : public std::enable_shared_from_this<S3Exchange> {
 public:
  // `over` is called once, from any thread, perhaps before Start returns; the reply is complete then, and nothing of the request is touched any more.
  static std::shared_ptr<S3Exchange> Start(S3Library& library, const S3Options& options, const S3Request& request, std::function<void()> over);
  ~S3Exchange();

  // Ends it soon: at once where it waits for a connection or credentials, else with the connection.
  void Cancel();
  S3Reply TakeReply() { return std::move(reply_); }  // Once it is over.

 private:
  struct Callbacks;
  class SourceStream;
  enum class Stage { kBegun, kStreaming, kOver };  // kBegun: waiting for a connection, or being signed.

  S3Exchange(S3Library& library, const S3Options& options, const S3Request& request, std::function<void()> over);
  bool MakeMessage(const std::string& host);
  bool SetBody();
  void OnConnection(aws_http_connection* connection, int error);
  int Sign();
  void OnSigned(aws_signing_result* result, int error);
  int Send();
  void GiveUp(int error);
  bool IsOver();
  int OnHeaders(const aws_http_header* headers, size_t count);
  int OnHeadersDone(int status);
  int OnBody(ByteSpan body);
  void OnComplete(int error);
  void Finish(int error);
  int WrongContent();

  const S3Options& options_;
  const S3Request& request_;  // Until it is over.
  const S3Library::Provider provider_;
  // Not a reference: the library's end is what ends the waiting for a connection. A connection keeps its pool.
  aws_http_connection_manager* const connections_;
  aws_http_message* message_ = nullptr;
  aws_signable* signable_ = nullptr;
  SourceStream* stream_of_source_ = nullptr;  // Owned by the message.
  aws_http_connection* connection_ = nullptr;  // Ours from OnConnection to OnComplete or GiveUp.
  size_t kept_bytes_ = 0;  // Of headers and body.
  S3Reply reply_;

  std::mutex mutex_;
  Stage stage_ = Stage::kBegun;         // Under mutex_.
  aws_http_stream* stream_ = nullptr;   // Under mutex_.
  std::function<void()> over_;          // Under mutex_; empty once called.
};

}  // namespace sp

// The s3:// store without a daemon, for bench/durable.py: does what the lines of stdin ask for and answers each, in a line of stdout, with its seconds
// and its processor seconds.
//
//   s3_bench URL [MIB [KIB]]       the URL with a prefix; KIB: of a fragment, S3Options::fragment_bytes
//
//   raw_put1, raw_put8   upload of MIB, as one object or as eight at once, by aws-c-s3 alone: from a mapping, without checksums, 16 MiB parts
//   raw_get1, raw_get8   download into touched memory, one object by one reader or by eight, by aws-c-s3 alone. Both the yardsticks
//   put1, put8       the upload by the store, as a drain does it: read from the pool's file, compared with the sealed checksums, which it sends along
//   get1, get8       the download by the store
//   check1, check8   the same, every block compared, as a restore does it
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "aws_c_s3.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "durable/s3_client.h"
#include "durable/s3_store.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr size_t kObjects = 8;

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + 1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

void Must(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

std::vector<uint32_t> BlockCrcs(ByteSpan content) {
  std::vector<uint32_t> crcs;
  for (uint64_t at = 0; at < content.size(); at += kBlockBytes) {
    crcs.push_back(Crc32c(0, content.subspan(at, std::min<uint64_t>(kBlockBytes, content.size() - at))));
  }
  return crcs;
}

class Bench {
 public:
  Bench(const S3Options& options, uint64_t bytes) : options_(options), piece_(bytes / kObjects) {
    fd_ = ::memfd_create("data", MFD_CLOEXEC);  // As the pool's extents: not the client's private memory.
    SP_CHECK(fd_ >= 0 && ::ftruncate(fd_, static_cast<off_t>(bytes)) == 0);
    void* const mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, 0);
    SP_CHECK(mapped != MAP_FAILED);
    all_ = MutableByteSpan(static_cast<uint8_t*>(mapped), bytes);
    std::memset(all_.data(), 0, bytes);  // What a sink that discards sends back.
    crcs_ = BlockCrcs(all_);
    store_ = S3Store::Open(options, clock_).value();
    client_ = S3Client::Open(options, clock_).value();
    aws_ = std::make_unique<AwsCS3>(options, *client_);
  }

  // False: there is no such thing to do.
  bool Do(const std::string& what) {
    if (what.empty()) return true;  // Are you ready?
    if (what == "raw_put1") aws_->Upload(Key("raw"), all_);
    else if (what == "raw_put8") InEight([&](size_t i) { aws_->Upload(Key("raw" + std::to_string(i)), Piece(i)); });
    else if (what == "raw_get1") aws_->Download(Key("read"), 0, all_);
    else if (what == "raw_get8") InEight([&](size_t i) { aws_->Download(Key("read"), i * piece_, Piece(i)); });
    else if (what == "put1") Put("one", 0, all_.size());
    else if (what == "put8") InEight([&](size_t i) { Put(std::to_string(i), i * piece_, piece_); });
    else if (what == "get1") Get(0, all_);
    else if (what == "get8") InEight([&](size_t i) { Get(i * piece_, Piece(i)); });
    else if (what == "check1") Check(0, all_);
    else if (what == "check8") InEight([&](size_t i) { Check(i * piece_, Piece(i)); });
    else return false;
    return true;
  }

  // Nothing is overwritten: the next Put of these needs them gone. Not timed.
  void Forget(const std::string& what) {
    if (what == "put1") Must(store_->Delete("one", {}));
    for (size_t i = 0; what == "put8" && i < kObjects; ++i) Must(store_->Delete(std::to_string(i), {}));
  }

  // What is read.
  void Prepare() { aws_->Upload(Key("read"), all_); }

 private:
  std::string Key(const std::string& name) const { return options_.base + "/" + name; }
  MutableByteSpan Piece(size_t i) const { return all_.subspan(i * piece_, piece_); }

  static void InEight(const std::function<void(size_t)>& work) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kObjects; ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
  }

  void Put(const std::string& key, uint64_t begin, uint64_t size) {
    PutSource source;
    source.size_bytes = size;
    const auto first = crcs_.begin() + static_cast<ptrdiff_t>(begin / kBlockBytes);
    source.block_crcs.assign(first, first + static_cast<ptrdiff_t>((size + kBlockBytes - 1) / kBlockBytes));
    source.read = [this, begin](uint64_t offset, MutableByteSpan out) -> Status {
      SP_CHECK(::pread(fd_, out.data(), out.size(), static_cast<off_t>(begin + offset)) == static_cast<ssize_t>(out.size()));
      return {};
    };
    Must(store_->Put(key, source, {}));
  }

  void Get(uint64_t offset, MutableByteSpan into) { Must(store_->ReadRange("read", offset, into, {})); }

  void Check(uint64_t offset, MutableByteSpan into) {
    Get(offset, into);
    const std::vector<uint32_t> crcs = BlockCrcs(into);
    SP_CHECK(std::equal(crcs.begin(), crcs.end(), crcs_.begin() + static_cast<ptrdiff_t>(offset / kBlockBytes)));
  }

  const S3Options options_;
  const uint64_t piece_;
  const SteadyClock clock_;
  int fd_ = -1;
  MutableByteSpan all_;
  std::vector<uint32_t> crcs_;
  std::unique_ptr<ObjectStore> store_;
  std::unique_ptr<S3Client> client_;
  std::unique_ptr<AwsCS3> aws_;
};

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  auto options = sp::ParseS3Url(argc > 1 ? argv[1] : "");
  const uint64_t mib = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1024;
  if (!options) sp::Must(options.error());
  options->credentials = sp::S3Credentials{"key", "secret", ""};
  if (argc > 3) options->fragment_bytes = std::strtoull(argv[3], nullptr, 10) << 10;
  // A block is the least that a piece can have.
  sp::Bench bench(*options, sp::AlignUp(std::max<uint64_t>(mib, 1) << 20, sp::kObjects * sp::kBlockBytes));
  bench.Prepare();
  for (std::string what; std::getline(std::cin, what);) {
    const double cpu = sp::CpuSeconds();
    const auto begin = std::chrono::steady_clock::now();
    if (!bench.Do(what)) return std::fprintf(stderr, "s3_bench: what is '%s'?\n", what.c_str()), 2;
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%.6f %.6f\n", seconds, sp::CpuSeconds() - cpu);
    std::fflush(stdout);
    bench.Forget(what);
  }
}

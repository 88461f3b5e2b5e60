// For tests only: temporary directories, descriptor counts.
#pragma once

#include <dirent.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "base/status.h"

namespace sp {

// A fresh directory under /tmp, removed with everything in it at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = "/tmp/sp-test-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;  // What stays behind is in /tmp.
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Descriptors this process has open (the one of the listing itself not counted).
inline int CountOpenFds() {
  int count = 0;
  DIR* directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) std::abort();
  while (const dirent* entry = ::readdir(directory)) count += entry->d_name[0] != '.';
  ::closedir(directory);
  return count - 1;
}

}  // namespace sp

// gtest assertions on Status and Result<T>.
#define SP_ASSERT_OK(expr)                                                    \
  do {                                                                        \
    const ::sp::Status sp_test_status = ::sp::test::StatusOf(expr);           \
    ASSERT_TRUE(sp_test_status.ok()) << #expr << ": " << sp_test_status.ToString(); \
  } while (0)
#define SP_EXPECT_CODE(wanted, expr)                                          \
  do {                                                                        \
    const ::sp::Status sp_test_status = ::sp::test::StatusOf(expr);           \
    EXPECT_EQ(sp_test_status.code(), ::sp::StatusCode::wanted) << #expr << ": " << sp_test_status.ToString(); \
  } while (0)
// Result to value, or the test ends.
#define SP_ASSERT_OK_AND_ASSIGN(lhs, expr) SP_ASSERT_OK_AND_ASSIGN_(SP_CONCAT(sp_test_result_, __LINE__), lhs, expr)
#define SP_ASSERT_OK_AND_ASSIGN_(result, lhs, expr) \
  auto result = (expr);                             \
  ASSERT_TRUE(result.has_value()) << #expr << ": " << result.error().ToString(); \
  lhs = std::move(*result)

namespace sp::test {
inline Status StatusOf(const Status& status) { return status; }
template <typename T>
Status StatusOf(const Result<T>& result) {
  return result ? Status() : result.error();
}
}  // namespace sp::test

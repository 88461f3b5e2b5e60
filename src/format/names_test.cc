#include "format/names.h"

#include <gtest/gtest.h>

namespace sp {
namespace {

TEST(CheckNamespace, AllowsTheDocumentedCharacters) {
  EXPECT_TRUE(CheckNamespace("a").ok());
  EXPECT_TRUE(CheckNamespace("Az09_-").ok());
  EXPECT_TRUE(CheckNamespace(std::string(200, 'x')).ok());
}

TEST(CheckNamespace, RefusesEverythingElseAndNamesIt) {
  EXPECT_EQ(CheckNamespace("").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(CheckNamespace(std::string(201, 'x')).code(), StatusCode::kInvalidArgument);
  EXPECT_NE(CheckNamespace("run/3").message().find("'/' at position 3"), std::string::npos);
  EXPECT_NE(CheckNamespace(std::string_view("a\0b", 3)).message().find("byte 0x00 at position 1"), std::string::npos);
  EXPECT_NE(CheckNamespace("\xc3\xa4").message().find("byte 0xc3"), std::string::npos);
  const std::string allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";
  for (int c = 0; c < 256; ++c) {
    const std::string name(1, static_cast<char>(c));
    EXPECT_EQ(CheckNamespace(name).ok(), allowed.find(name) != std::string::npos) << c;
  }
}

}  // namespace
}  // namespace sp

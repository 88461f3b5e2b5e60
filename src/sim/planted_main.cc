// planted_tests [--plant=NAME]: the tests of the core, with one planted bug awake or with none.
#include <gtest/gtest.h>

#include <string_view>

#include "base/plant.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  constexpr std::string_view kFlag = "--plant=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (!argument.starts_with(kFlag)) return 2;
    sp::planted_bug = argument.substr(kFlag.size());
  }
  return RUN_ALL_TESTS();
}

// Beside libFuzzer's own main: `fuzz_x --write-seeds=FOLDER` writes the target's hand-made inputs, one file each, and ends. A corpus begins with
// them (docs/internals/fuzzing.md).
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>

#include "fuzz.h"

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  constexpr std::string_view kFlag = "--write-seeds=";
  for (int i = 1; i < *argc; ++i) {
    const std::string_view flag = (*argv)[i];
    if (!flag.starts_with(kFlag)) continue;
    const std::string folder(flag.substr(kFlag.size()));
    int number = 0;
    for (const sp::fuzz::Input& seed : sp::fuzz::Seeds()) {
      char name[32];
      std::snprintf(name, sizeof name, "/seed-%03d", number++);
      std::ofstream out(folder + name, std::ios::binary);
      out.write(reinterpret_cast<const char*>(seed.data()), static_cast<std::streamsize>(seed.size()));
      out.close();
      if (!out) {
        std::fprintf(stderr, "cannot write %s%s\n", folder.c_str(), name);
        std::exit(2);
      }
    }
    std::exit(0);
  }
  return 0;
}

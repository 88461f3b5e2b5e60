// Runs a fuzz target without libFuzzer: seeded mutations of its valid inputs. Usage: fuzz_x [--seed N] [--first RUN] [--runs N] [--seconds S] [FILE...]
//
// Run r of seed s is always the same input, so a failure is repeated by `--seed s --first r --runs 1`. Files are run as they are, once each.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "fuzz.h"

// Present when a sanitizer is linked in; it does not go through signals.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using sp::fuzz::Input;

unsigned long long seed = 1;
std::atomic<unsigned long long> run = 0;

void TellWhichRun() {
  char text[100];
  const int n = std::snprintf(text, sizeof text, "fuzz: failed at --seed %llu --first %llu --runs 1\n", seed, run.load());
  if (write(2, text, static_cast<size_t>(n)) < 0) _exit(1);
}
void OnSignal(int signal) {
  TellWhichRun();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void Mutate(Input& input, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  if (input.empty()) input.push_back(0);
  const size_t at = below(input.size());
  switch (random() % 8) {
    case 0: input[at] = static_cast<uint8_t>(random()); break;
    case 1: input[at] ^= static_cast<uint8_t>(1 << random() % 8); break;
    case 2: input.resize(at); break;
    case 3: input.erase(input.begin() + static_cast<std::ptrdiff_t>(at),
                        input.begin() + static_cast<std::ptrdiff_t>(at + below(std::min<size_t>(input.size() - at, 16) + 1)));
      break;
    case 4: input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(8), static_cast<uint8_t>(random())); break;
    case 5: {  // A stretch of the input once more, somewhere else.
      const size_t from = below(input.size());
      const Input part(input.begin() + static_cast<std::ptrdiff_t>(from),
                       input.begin() + static_cast<std::ptrdiff_t>(from + below(std::min<size_t>(input.size() - from, 64) + 1)));
      input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), part.begin(), part.end());
      break;
    }
    case 6: {  // A number at the edge of its range.
      static constexpr uint64_t kEdges[] = {0, 1, 0x7f, 0xff, 0xffff, 0x7fffffff, 0xffffffff, 0x7fffffffffffffff, 0xffffffffffffffff};
      const uint64_t edge = kEdges[random() % std::size(kEdges)];
      const size_t width = size_t{1} << random() % 4;
      for (size_t i = 0; i < width && at + i < input.size(); ++i) input[at + i] = static_cast<uint8_t>(edge >> (8 * i));
      break;
    }
    default: input[at] = static_cast<uint8_t>("0123456789-+.eE{}[]\",:\\u \n"[random() % 26]); break;
  }
}

Input MakeInput(const std::vector<Input>& seeds) {
  std::mt19937_64 random(seed * 0x9e3779b97f4a7c15u + run);
  if (seeds.empty() || random() % 16 == 0) {
    Input noise(random() % 600);
    for (uint8_t& b : noise) b = static_cast<uint8_t>(random());
    return noise;
  }
  Input input = seeds[random() % seeds.size()];
  for (uint64_t n = random() % 6; n > 0; --n) Mutate(input, random);
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  unsigned long long first = 0, runs = 1000000;
  double seconds = 1e9;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const bool has_value = i + 1 < argc;
    if (flag == "--seed" && has_value) seed = std::strtoull(argv[++i], nullptr, 10);
    else if (flag == "--first" && has_value) first = std::strtoull(argv[++i], nullptr, 10);
    else if (flag == "--runs" && has_value) runs = std::strtoull(argv[++i], nullptr, 10);
    else if (flag == "--seconds" && has_value) seconds = std::strtod(argv[++i], nullptr);
    else if (flag.starts_with("-")) return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
    else files.push_back(flag);
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(TellWhichRun);
  for (const int s : {SIGABRT, SIGFPE}) std::signal(s, OnSignal);
  if (!__sanitizer_set_death_callback) std::signal(SIGSEGV, OnSignal);

  for (const std::string& file : files) {
    std::ifstream in(file, std::ios::binary);
    if (!in) return std::fprintf(stderr, "cannot read %s\n", file.c_str()), 2;
    const Input input{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  if (!files.empty()) return 0;

  const std::vector<Input> seeds = sp::fuzz::Seeds();
  for (const Input& input : seeds) LLVMFuzzerTestOneInput(input.data(), input.size());
  const auto begin = std::chrono::steady_clock::now();
  for (run = first; run < first + runs; ++run) {
    if (run % 64 == 0 && std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > seconds) break;
    const Input input = MakeInput(seeds);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("fuzz: seed %llu, %llu runs\n", seed, run.load() - first);
  return 0;
}

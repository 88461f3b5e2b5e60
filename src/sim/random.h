// The simulator's only source of chance: one 64-bit seed decides everything. Pure.
#pragma once

#include <cstdint>

namespace sp::sim {

inline uint64_t Mix(uint64_t a, uint64_t b = 0) {  // SplitMix64's finaliser over both.
  uint64_t z = a * 0x9e3779b97f4a7c15 + b + 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() { return Mix(state_++); }
  uint64_t Below(uint64_t n) { return Next() % n; }  // n > 0; the bias of the remainder does not matter here.
  bool Percent(uint64_t p) { return Below(100) < p; }

 private:
  uint64_t state_;
};

}  // namespace sp::sim

// safepointd with one planted bug awake: the one that the environment variable BOUNDARY_PLANT names (src/base/plant.h).
#include <cstdlib>

#include "base/plant.h"

int SafepointdMain(int argc, char** argv);

int main(int argc, char** argv) {
  if (const char* name = std::getenv("BOUNDARY_PLANT")) sp::planted_bug = name;
  return SafepointdMain(argc, argv);
}

// Planted bugs: one-line sabotages that the tests must notice (docs/invariants.md, "Planted bugs"; tools/planted_bugs.py).
//
// Only a build with -DSP_PLANT_BUG=all contains them, and there each sleeps until a test program names it. In every other build SP_PLANTED is the
// constant false.
#pragma once

#ifdef SP_PLANT_BUG_all

#include <string_view>

namespace sp {
inline std::string_view planted_bug;  // Set once, before the first test.
}

#define SP_PLANTED(name) (::sp::planted_bug == #name)

#else

#define SP_PLANTED(name) false

#endif

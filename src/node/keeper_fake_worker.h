// For keeper_test only: a worker that does what a client of the keeper's listening socket tells it to, one command per
// connection.
#pragma once

#include <string_view>

namespace sp {

// The whole program. `mode` is "serve", "fail" (exit 1 at once), "refuse" (exit 78), or "wait-for:PATH" (exit 1 until
// PATH exists, then serve).
int FakeWorkerMain(std::string_view mode);

}  // namespace sp

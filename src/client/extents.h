// Descriptors of a slot's or shard's extents, fetched from the daemon. Thread-safe.
#pragma once

#include <vector>

#include "client/session.h"
#include "format/messages.h"
#include "os/fd.h"

namespace sp {

// All extents of what `request` names (its `first` is ignored), in acknowledged batches. Each was checked: sealed, and of the daemon's
// extent size. `origin`: where the request's ids are from. kProtocol: the daemon sent something else than it announced.
Result<std::vector<Fd>> FetchExtents(Session& session, FetchExtentsRequest request, uint32_t extents, const Origin& origin, Nanos deadline);

}  // namespace sp

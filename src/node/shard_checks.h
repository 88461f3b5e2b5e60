// What the daemon reads of a shard's bytes: its checksum list, its static part, single blocks. Thread-safe; reads each byte once, so that a
// client that changes them meanwhile cannot make two parts of one check see different bytes.
#pragma once

#include "node/core_types.h"
#include "node/extent_set.h"

namespace sp {

event::SealChecked RunCheckSeal(const action::CheckSeal& check, const ExtentSet& lease);
event::StructureRead RunReadStructure(const action::ReadStructure& read, const ExtentSet& lease);
event::BlockChecked RunCheckBlock(const action::CheckBlock& check, const ExtentSet& lease);

}  // namespace sp

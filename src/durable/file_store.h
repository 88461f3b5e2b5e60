// FileStore: objects as files of a directory, local or of a network file system. Thread-safe, and safe beside other processes and machines in the
// same directory. Steps of a Put and what a crash between them leaves: os/file_tree.h.
//
// Keys are paths below the base. What this asks beyond CheckKey (kInvalidArgument):
//   - no segment begins with ".safepoint-upload-": the temporary files, which nobody is to mistake for objects, nor they for litter;
//   - no segment is longer than the file system's names, mostly 255 bytes;
//   - no key is another key's folder: where `a` is an object, `a/b` cannot be.
//
// Files get mode 0666 and folders 0777, less the umask of the process, so the operator's umask decides who may read. Only a base that is made here is
// 0700 all the same: nobody else gets in until the operator lets him.
//
// Symbolic links below the base are not followed: kDenied. The base's own path may contain some.
#pragma once

#include <memory>
#include <string>

#include "base/clock.h"
#include "base/status.h"
#include "durable/object_store.h"

namespace sp {

class FileStore {
 public:
  // What to do where the base is missing. Making it is convenient; but a base that was there yesterday is missing because its file system is not
  // mounted, and what is then written to the empty mount point is on another disk than everybody thinks.
  enum class MissingBase { kMake, kRefuse };

  // `url` is "file:///absolute/path", %XX for bytes that a URL cannot have. kInvalidArgument for other schemes, hosts, relative paths, "." and "..",
  // queries and fragments. Of a missing path the last component is made (0700), if the rest is there; otherwise kNotFound. `clock` judges deadlines
  // and lives at least as long as the store.
  //
  // What the interface leaves open:
  //   Probe         never verifies_checksums: whoever writes reads back. A file system that cannot keep two writers apart is kInvalidArgument.
  //   Put           looks at cancel and deadline, and at the checksum, before each block; fsync cannot be interrupted.
  //                 Reports progress when the system has taken the bytes; on disk they are when it returns.
  //   List          reads the directories anew for every page. Files that are no key of ours, and links, are left out. So is `.safepoint-probe/`.
  //   Delete        also removes the folders that became empty: else every retired step would leave some for good. Put makes them again.
  //   ListUploads   temporary files whose writer is gone; one that is being written on this machine (or on another, where the file system shares
  //                 flock) is not reported, and not aborted: kUnavailable. Without locks all are reported, and the sweep has to go by age.
  //                 key: what was to be written; where it was too long for the name of the temporary file, the beginning of it.
  //                 id: the name of the temporary file. started: when it was last written to, because that is what files keep.
  static Result<std::unique_ptr<ObjectStore>> Open(const std::string& url, const Clock& clock, MissingBase missing_base = MissingBase::kMake);
};

}  // namespace sp

"""Folders on a file system that are there whole and verified, or not there at all.

How `publish` brings a folder into being, and what a crash (of the process, or of the machine) leaves after each step:

1. A partial folder, `.safepoint-partial-` and 16 hex digits, is made beside the target and locked. Crash, until step 4:
   no target, and a partial folder whose lock is free. No reader looks at its name; the next `publish` into the same
   parent removes it.
2. The caller writes into it.
3. Every file in it is read once for its checksum and fsynced; the checksums go into the file `CHECKSUMS`; then every
   folder in it is fsynced. From here a power failure cannot take any of its bytes.
4. It is renamed to the target. The kernel does that at once or not at all. After a process crash the target is there,
   whole; after a power failure, too, or it is still the partial folder.
5. The parent is fsynced: from here the target stays. Only now `publish` returns.

`check` reads a published folder against its checksums.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safepoint import _core
from safepoint.errors import Corrupt, InvalidArgument, NotFound, ProtocolError

_log = logging.getLogger("safepoint")

CHECKSUMS = "safepoint-checksums.json"
_VERSION = 1
_PARTIAL = re.compile(r"\.safepoint-partial-[0-9a-f]{16}")
_CHUNK = 1 << 20
_READ_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Gives a folder to write into; at the end of a `with` block that raised nothing, it is `target`, durably.

    `target` may exist as an empty folder, which is replaced. Its parents are made. After an error, of the block or of
    the file system, `target` is as it was, except that an OSError of the very last fsync leaves it in place, whole, but
    not yet safe from a power failure. Removes what dead writers left beside it. Threads and processes may publish
    into one parent at once; of two with the same target one gets InvalidArgument.

    Raises InvalidArgument: `target` is there and not an empty folder, or is the working directory (whose place the new
    folder would take under the feet of its users). OSError: the file system refused; nothing is retried.
    """
    target = target.resolve()
    _check_free(target)
    _make_folders(target.parent)
    sweep(target.parent)
    partial, lock = _new_partial(target.parent)
    try:
        try:
            yield partial
            _seal(partial)
            _check_free(target)
            try:
                os.rename(partial, target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise InvalidArgument(f"{target} was made by somebody else in the meantime") from error
                raise
        except BaseException:
            _remove(partial)
            raise
        _sync_folder(target.parent)
    finally:
        os.close(lock)


def sweep(parent: Path) -> None:
    """Removes partial folders in `parent` whose writers are dead.

    The writer's lock goes with its process, so a free lock is the proof. Where the file system has no locks for folders
    (NFS), nothing can be proved, and they stay: they cost room, and no reader takes them for anything.
    """
    with os.scandir(parent) as entries:
        found = [entry.path for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for path in found:
        try:
            lock = os.open(path, _READ_FOLDER)
        except FileNotFoundError:
            continue  # Its writer has just published or removed it.
        except OSError as error:
            _log.warning("cannot look at the leftover %s: %s", path, error.strerror)
            continue
        try:
            if _lock(lock) and _is_still(path, lock):
                _remove(Path(path))
        finally:
            os.close(lock)


def check(folder: Path) -> int:
    """Reads every file that was published in `folder` and compares it with its checksum; returns their bytes.

    NotFound: there is no list of checksums, so `publish` did not make this folder. Corrupt: a file is missing, or of
    another size or checksum, or the list itself is damaged. ProtocolError: the list is of another version. Files that
    were added later are not looked at.
    """
    total = 0
    for name, (size, crc) in _read_list(folder).items():
        path = folder / name
        try:
            found = _checksum(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Corrupt(f"{path} is missing") from error
        if found != (size, crc):
            raise Corrupt(f"{path}: {found[0]} bytes with CRC32C {found[1]:08x}, written were {size} with {crc:08x}")
        total += size
    return total


def _read_list(folder: Path) -> dict[str, tuple[int, int]]:
    path = folder / CHECKSUMS
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{folder} has no {CHECKSUMS}: it was not published by safepoint") from error
    try:
        document: Any = json.loads(content)
        if document["version"] != _VERSION:
            raise ProtocolError(f"{path} is of version {document['version']}, this safepoint reads {_VERSION}")
        files = {str(name): (int(e["bytes"]), int(e["crc32c"], 16)) for name, e in document["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{path} is damaged: {error!r}") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Corrupt(f"{path} is damaged: it names {name!r}, outside the folder")
    return files


def _check_free(target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.samefile(target, os.curdir):
            raise InvalidArgument(f"{target} is the working directory: name a new folder in it")
    if os.path.lexists(target):
        try:
            empty = not any(os.scandir(target))
        except NotADirectoryError:
            empty = False
        if not empty:
            raise InvalidArgument(f"{target} exists: name a new or an empty folder")


def _make_folders(folder: Path) -> None:
    """Makes `folder` and its parents, so that a power failure does not take a new one."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with contextlib.suppress(FileExistsError):  # Somebody else made it; a file in its place is told by the next.
            new.mkdir()
        _sync_folder(new.parent)


def _new_partial(parent: Path) -> tuple[Path, int]:
    while True:
        path = parent / f".safepoint-partial-{secrets.token_hex(8)}"
        path.mkdir()
        try:
            lock = os.open(path, _READ_FOLDER)
        except FileNotFoundError:
            continue  # A sweep saw it before it was locked.
        if _lock(lock) is not False and _is_still(path, lock):
            return path, lock
        os.close(lock)  # A sweep is about to remove it.


def _lock(folder: int) -> bool | None:
    """True: locked, until the descriptor is closed. False: somebody else holds it. None: no locks for folders here."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still(path: str | Path, folder: int) -> bool:
    """Whether the open folder still goes by that name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(folder))
    except FileNotFoundError:
        return False


def _seal(folder: Path) -> None:
    """Everything in it to disk, with the list of its checksums."""
    files: dict[str, dict[str, object]] = {}
    folders = [folder]
    for current in folders:  # Grows while it is walked: parents come before children.
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False):
                    size, crc = _checksum(path, sync=True)
                    files[path.relative_to(folder).as_posix()] = {"bytes": size, "crc32c": f"{crc:08x}"}
                else:
                    raise InvalidArgument(f"{path} is neither a file nor a folder and cannot be published")
    with (folder / CHECKSUMS).open("x") as file:
        json.dump({"version": _VERSION, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for current in reversed(folders):
        _sync_folder(current)


def _checksum(path: Path, *, sync: bool = False) -> tuple[int, int]:
    """Length and CRC32C; with `sync` the file's content is on disk afterwards."""
    size, crc = 0, 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = _core.crc32c(view[:count], crc)
            size += count
        if sync:
            os.fsync(file.fileno())
    return size, crc


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(partial: Path) -> None:
    """A leftover that cannot be removed is no failure of what was asked for: it is told, and the next sweep tries."""
    try:
        shutil.rmtree(partial)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("cannot remove the partial folder %s: %s", partial, error)

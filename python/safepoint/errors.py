"""Exceptions of safepoint: one class per thing a caller can act on.

The extension raises the class that stands for a status code of the daemon or the client library (one table, in the
binding). `NotPlain` and `Mismatch` come from the Python side only. The messages are for people: decide by class.
"""

from __future__ import annotations


class SafepointError(Exception):
    """Base of everything that safepoint raises on purpose."""


class InvalidArgument(SafepointError, ValueError):
    """The request itself is wrong; repeating it cannot help."""


class NotFound(SafepointError, LookupError):
    """Authoritative: whoever answered knows that it does not exist."""


class Unavailable(SafepointError):
    """Nobody who could know can be asked right now. Never means "absent"."""


class Incomplete(SafepointError):
    """Known, but not whole: some rank has not sealed its shard (yet)."""


class Corrupt(SafepointError):
    """Bytes do not match their checksums.

    `state_modified` is true when a restore had begun to change the caller's state; `rank` and `block` (1 MiB each,
    counted from 0) name the place where that is known.
    """

    state_modified: bool = False
    rank: int | None = None
    block: int | None = None


class Fenced(SafepointError):
    """A newer generation of this namespace exists: another launch of the job took over, this one must stop saving."""


class NoSpace(SafepointError):
    """Refused before any byte was accepted; the message has the numbers."""


class Denied(SafepointError, PermissionError):
    """This user may not do that."""


class Lost(SafepointError):
    """The namespace had complete steps and none is left."""


class DeadlineExceeded(SafepointError, TimeoutError):
    """Not within the deadline; what was asked for may still happen."""


class LimitExceeded(SafepointError):
    """A documented limit was reached."""


class ProtocolError(SafepointError):
    """The other side speaks another version, or what was read follows no known format."""


class Closed(SafepointError):
    """The attempt, lease or session was closed and will not come back."""


class InternalError(SafepointError):
    """A bug of safepoint itself."""


class NotPlain(SafepointError, TypeError):
    """A value that cannot be stored without pickle; the message names its path and type.

    Nothing was reserved or sent.
    """


class Mismatch(SafepointError):
    """The checkpoint does not fit the state given to `restore`; nothing was changed.

    `missing` names what the checkpoint does not have, `mismatched` describes tensors of another shape or dtype.
    """

    def __init__(self, message: str, missing: tuple[str, ...] = (), mismatched: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        self.mismatched = mismatched

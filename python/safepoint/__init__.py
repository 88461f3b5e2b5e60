"""Checkpoints of PyTorch training in the memory of the training cluster itself.

checkpointer = safepoint.Checkpointer("my-job")
info = checkpointer.restore(state)               # None: nothing was saved yet
for step in range(info.step + 1 if info else 0, steps):
    train(...)
    checkpointer.save(step, state)
"""

from safepoint._save import Save
from safepoint._state import PerRank
from safepoint._stored import load, load_into
from safepoint.api import Checkpointer, RestoreInfo
from safepoint.errors import (
    Closed,
    Corrupt,
    DeadlineExceeded,
    Denied,
    Fenced,
    Incomplete,
    InternalError,
    InvalidArgument,
    LimitExceeded,
    Lost,
    Mismatch,
    NoSpace,
    NotFound,
    NotPlain,
    ProtocolError,
    SafepointError,
    Unavailable,
)

__all__ = [
    "Checkpointer",
    "Closed",
    "Corrupt",
    "DeadlineExceeded",
    "Denied",
    "Fenced",
    "Incomplete",
    "InternalError",
    "InvalidArgument",
    "LimitExceeded",
    "Lost",
    "Mismatch",
    "NoSpace",
    "NotFound",
    "NotPlain",
    "PerRank",
    "ProtocolError",
    "RestoreInfo",
    "SafepointError",
    "Save",
    "Unavailable",
    "load",
    "load_into",
]

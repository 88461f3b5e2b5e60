"""Which of torch's background threads belongs to which staged save.

torch's `async_save` calls `stage` in the trainer's thread, then everything else in a thread that it makes for this
save: the two halves meet here. With a process group that thread runs collectives, and two of them at once on one group
hang (each rank may take them in another order): so the next `stage` waits for the end of the thread before.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed

from safepoint.errors import DeadlineExceeded

if TYPE_CHECKING:
    from safepoint._save import Save

_log = logging.getLogger("safepoint")

# From the end of `stage` to the first call in torch's thread: a millisecond, but for the first one of PROCESS mode,
# which starts a process.
_START_SECONDS = 120.0
_SLICE_SECONDS = 0.05  # Between two looks at whether anybody may still come.


class Upload:
    """One staged save on its way through torch. `save`: None where DCP plans and the copy is yet to be made."""

    def __init__(self, step: int, save: Save | None) -> None:
        self.step = step
        self.save = save
        # torch makes a thread for each call, after staging: none of those that are there now is this one's.
        self._before = frozenset(threading.enumerate())
        self._stager = threading.current_thread()
        self._begun = threading.Event()
        self._thread: threading.Thread | None = None

    def claim(self) -> bool:
        """Whether this thread is the one of this save: the first that comes and was not there when it was staged."""
        thread = threading.current_thread()
        if self._thread is None and thread not in self._before:
            self._thread = thread
            self._before = frozenset()
            self._begun.set()
        return self._thread is thread

    def wait_begun(self) -> bool:
        """Waits until torch's thread has come for it. False: it never did, and the save is given up."""
        end = time.monotonic() + _START_SECONDS
        while not self._begun.wait(_SLICE_SECONDS):
            if time.monotonic() >= end or (self._nobody_comes() and not self._begun.is_set()):
                break
        else:
            return True
        self.give_up("torch never came for it after staging")
        _log.warning("step %d was staged, but torch's async_save did not go on with it", self.step)
        return False

    def _nobody_comes(self) -> bool:
        """Whether no thread is left that may be torch's.

        The thread that staged is here again, so the call that staged has ended; torch starts its thread within that
        call, and the thread lives at least until it comes for the save, in PROCESS mode, too.
        """
        me = threading.current_thread()
        return me is self._stager and not (set(threading.enumerate()) - self._before - {me})

    def join(self, end: float) -> None:
        """Waits until torch's thread has ended, or until `end` (monotonic)."""
        assert self._thread is not None
        self._thread.join(max(0.0, end - time.monotonic()))

    def is_mine(self) -> bool:
        """Whether this is torch's thread of it."""
        return self._thread is threading.current_thread()

    def ended(self) -> bool:
        return self._thread is not None and not self._thread.is_alive()

    def give_up(self, reason: str) -> None:
        """Without effect on a save that was confirmed."""
        if self.save is not None:
            self.save.refuse(reason)


_lock = threading.Lock()
_open: dict[int, list[Upload]] = {}  # By process: a forked child has none of its parent's threads.


def wait_for_others(seconds: float) -> bool:
    """Before the next upload begins. False: another one still runs after that long.

    Without a process group only the start of each is waited for, which tells the threads of two saves apart.
    """
    end = time.monotonic() + seconds
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    with _lock:
        uploads = _open.setdefault(os.getpid(), [])
    for upload in tuple(uploads):
        if upload.is_mine():
            continue
        begun = upload.wait_begun()
        if begun and grouped:
            upload.join(end)
            if not upload.ended():
                return False
        if upload.ended():
            upload.give_up("torch's thread ended before it confirmed the save")
        if upload.ended() or not begun:
            with _lock:
                if upload in uploads:
                    uploads.remove(upload)
    return True


def wait_before_collectives(seconds: float, what: str) -> None:
    """Before torch's first collective of a synchronous save or a load, on every rank: uploads use the group, too.

    DeadlineExceeded: one still runs after that long.
    """
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped and not wait_for_others(seconds):
        raise DeadlineExceeded(f"an async_save before this {what} has not ended after {seconds:.0f} s")


def announce(upload: Upload) -> None:
    with _lock:
        _open.setdefault(os.getpid(), []).append(upload)

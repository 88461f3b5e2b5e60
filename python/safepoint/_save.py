"""A save in progress, and the registry of those whose memory must stay as it is."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from safepoint.errors import (
    Closed,
    Corrupt,
    DeadlineExceeded,
    Fenced,
    Incomplete,
    InvalidArgument,
    NotFound,
    SafepointError,
)

if TYPE_CHECKING:
    from safepoint._core import Client, Transfer
    from safepoint._cuda import DeviceTransfer

_log = logging.getLogger("safepoint")

LEVELS = ("memory", "replicated", "durable")

# Saves whose tensors a thread of the extension still reads. Module level: a Checkpointer and its Save may be dropped
# while it runs.
_lock = threading.Lock()
_copying: set[Save] = set()


def settle_all_copies() -> None:
    """Waits until no save of this process reads its state any more, whichever engine it is of: from then on the state
    may be changed. A copy's failure is logged, not raised.
    """
    with _lock:
        saves = tuple(_copying)
    for save in saves:
        save.settle_copy()


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise InvalidArgument(f"level must be one of {', '.join(LEVELS)}, not {level!r}")


class Save:
    """One attempt at saving one step. Thread-safe.

    Copying and sealing go on in the background, whether anybody waits or not; what goes wrong there is raised by the
    waiting methods and logged once, and never ends the training loop.
    """

    def __init__(
        self,
        client: Client,
        namespace: str,
        step: int,
        attempt: bytes,
        transfer: Transfer | DeviceTransfer,
        keep: Any,
        abort: Callable[[str], None] | None = None,
    ) -> None:
        """`keep`: what must live until the copy ended. `abort`: of the lease, where the seal is held."""
        self._client = client
        self._namespace = namespace
        self._step = step
        self._attempt = attempt
        self._transfer = transfer
        self._keep = keep
        self._abort = abort  # None: not held (any more).
        self._told = False
        self._ended = False
        with _lock:
            _copying.add(self)

    @property
    def step(self) -> int:
        return self._step

    @property
    def attempt(self) -> bytes:
        """16 bytes, the same on all ranks that take part."""
        return self._attempt

    @property
    def copy_seconds(self) -> float:
        """How long the copy took; 0 while it runs."""
        return self._transfer.copy_seconds

    @property
    def level(self) -> str:
        """The level reached by all ranks' shards together:

        "none" (not yet, or never, or not any more), "memory", "replicated" or "durable". Asks the daemon: raises
        Unavailable.
        """
        if not self._transfer.sealed:
            return "none"
        try:
            return self._client.wait(self._namespace, self._attempt, "memory", timeout=0.0)
        except (DeadlineExceeded, Incomplete, Closed, NotFound, Fenced, Corrupt):
            return "none"

    def wait_safe(self, timeout: float | None = None) -> None:
        """Returns when the state was copied: it may be changed from then on. Raises the copy's error (it may be changed
        then, too).

        DeadlineExceeded: still copying after `timeout` seconds.
        """
        try:
            self._transfer.wait_copied(timeout)
        except DeadlineExceeded:
            raise
        except SafepointError as error:
            self._release()
            self._tell(error)
            raise
        self._release()

    def wait(self, level: str = "memory", timeout: float | None = None) -> str:
        """Returns the level reached when this step is at least that safe: complete on all ranks. `timeout` in seconds;
        None: no limit.

        Raises what went wrong, here or on another rank: Closed, Fenced, Incomplete; DeadlineExceeded: not yet.
        """
        check_level(level)
        end = None if timeout is None else time.monotonic() + timeout
        self.wait_sealed(timeout)
        return self._client.wait(
            self._namespace, self._attempt, level, timeout=None if end is None else max(0.0, end - time.monotonic())
        )

    def wait_sealed(self, timeout: float | None = None) -> None:
        """Returns when this rank's own shard is sealed, whatever the others do. Raises as `wait`."""
        try:
            self._transfer.wait_sealed(timeout)
        except DeadlineExceeded:
            raise
        except SafepointError:
            self._told = self._ended = True  # Whoever waits is told by the exception.
            self._release()
            raise
        self._ended = True
        self._release()

    def __repr__(self) -> str:
        return f"<safepoint.Save step={self._step} attempt={self._attempt.hex()}>"

    # --- for the writer of safepoint.dcp: a held save is sealed only when confirmed

    def confirm(self) -> None:
        """Lets a held save be sealed."""
        with _lock:
            held, self._abort = self._abort is not None, None
        if held:
            self._transfer.release()

    def refuse(self, reason: str) -> None:
        """Gives a held save up: it will never count. Without effect on one that is not held (any more)."""
        with _lock:
            abort, self._abort = self._abort, None
        if abort is not None:
            self._told = True  # Whoever refuses knows.
            abort(reason)

    # --- for the engine

    def poll(self) -> bool:
        """Whether it has ended, one way or the other; logs its failure. Never waits."""
        return self.settle(0.0)

    def settle(self, timeout: float | None) -> bool:
        """Waits for the end for `timeout` seconds. False: it still runs."""
        if self._ended:
            return True
        try:
            self._transfer.wait_sealed(timeout)
        except DeadlineExceeded:
            if self._transfer.copied:
                self._release()
            return False
        except SafepointError as error:
            self._tell(error)
        self._ended = True
        self._release()
        return True

    def settle_copy(self) -> None:
        """Waits until the state may be changed; a failure is logged, not raised."""
        with contextlib.suppress(SafepointError):
            self.wait_safe()

    def _tell(self, error: SafepointError) -> None:
        if not self._told:
            self._told = True
            _log.error(
                "save of step %d in namespace %s failed: %s: %s",
                self._step,
                self._namespace,
                type(error).__name__,
                error,
            )

    def _release(self) -> None:
        self._keep = None
        with _lock:
            _copying.discard(self)

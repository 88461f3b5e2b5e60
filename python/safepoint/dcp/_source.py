"""Where a Reader finds its step: in the memory that a daemon knows of, or in a durable tier that it reads by itself."""

from __future__ import annotations

import hashlib
import itertools
import time
from typing import TYPE_CHECKING, Any, Protocol

from safepoint import _launch
from safepoint._save import settle_all_copies
from safepoint._stored import StepUrl, open_step, step_url
from safepoint.api import Checkpointer, restore_from
from safepoint.dcp._target import checkpointer_for
from safepoint.errors import InvalidArgument, SafepointError, Unavailable

if TYPE_CHECKING:
    from safepoint._objects import Decoder
    from safepoint._reads import Pin
    from safepoint.api import RestoreInfo

_AGREE_SECONDS = 600.0  # How long a rank waits until rank 0 has entered the load, too.


class Source(Protocol):
    """What a Reader needs of the place it reads from."""

    namespace: str | None  # None: of a durable tier, the only one it has.
    step: int | None  # That the target itself names.
    allow_pickle: bool

    def identify(self) -> tuple[int, int]:
        """Rank and world size."""

    def open(self, step: int | None) -> Pin | None:
        """Holds that step or the newest one, the same attempt on all ranks. None: there never was one."""

    def look(self, step: int | None, attempt: bytes | None) -> Pin:
        """Holds it for this rank alone."""

    def restore(self, state: Any, step: int | None, *, allow_missing: bool, decoder: Decoder) -> RestoreInfo | None:
        """As `Checkpointer.restore`; converts dtypes, as DCP does."""

    def loaded(self, pin: Pin) -> None:
        """A step that was asked for by number was loaded."""


class Memory:
    """The namespace of a Checkpointer."""

    step: int | None = None

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self._engine = checkpointer._engine
        self.namespace: str | None = checkpointer.namespace
        self.allow_pickle = self._engine.allow_pickle

    def identify(self) -> tuple[int, int]:
        return self._engine.identify()

    def open(self, step: int | None) -> Pin | None:
        with self._engine.lock:
            self._engine.check_usable()
            return self._engine.open_read(step)

    def look(self, step: int | None, attempt: bytes | None) -> Pin:
        return self._engine.client.open_read(self.checkpointer.namespace, step=step, attempt=attempt)

    def restore(self, state: Any, step: int | None, *, allow_missing: bool, decoder: Decoder) -> RestoreInfo | None:
        return self.checkpointer._restore(state, step, allow_missing=allow_missing, decoder=decoder, cast=True)

    def loaded(self, pin: Pin) -> None:
        """Saving goes on from there."""
        with self._engine.lock:
            self._engine.branch(pin.info.attempt, fresh=False)


class Durable:
    """Steps of a durable tier, read without a daemon: no session, no lineage, nothing is saved."""

    allow_pickle = False
    _loads = itertools.count()  # Of this process; the ranks tell their loads apart by it.

    def __init__(self, url: StepUrl, rank: int | None, world_size: int | None) -> None:
        self._url = url
        self.namespace: str | None = url.namespace
        self.step = url.step
        self._given = (rank, world_size)

    def identify(self) -> tuple[int, int]:
        return _launch.identify(*self._given)

    def open(self, step: int | None) -> Pin:
        """Rank 0 says which attempt it is, through the store of the process group, where there is one: a step may
        become durable, or be deleted, between two ranks' looks.
        """
        wanted = self._url._replace(step=step)
        rank, world_size = self.identify()
        store = _launch.store_for(rank, world_size)
        if store is None or wanted.attempt is not None:
            return open_step(wanted)
        about = hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]
        key = f"{_launch.restart_prefix()}/stored/{next(self._loads)}/{about}"
        try:
            if rank == 0:
                try:
                    pin = open_step(wanted)
                except SafepointError:
                    store.set(key, "")  # The others look by themselves, and are told why.
                    raise
                store.set(key, pin.info.attempt.hex())
                return pin
            _launch.wait_for(store, [key], _AGREE_SECONDS, "rank 0 has not begun the same load")
            chosen = store.get(key).decode()
        except RuntimeError as error:
            raise Unavailable(
                f"the process group's store cannot be asked which step all ranks load: {error}"
            ) from error
        return open_step(wanted._replace(attempt=bytes.fromhex(chosen) if chosen else None))

    def look(self, step: int | None, attempt: bytes | None) -> Pin:
        return open_step(self._url._replace(step=step, attempt=attempt or self._url.attempt))

    def restore(self, state: Any, step: int | None, *, allow_missing: bool, decoder: Decoder) -> RestoreInfo:
        settle_all_copies()  # Nothing that is being copied may change under the copy.
        begin = time.perf_counter()
        with self.open(step) as pin:
            return restore_from(
                pin, state, self.identify(), begin, allow_missing=allow_missing, decoder=decoder, cast=True
            )

    def loaded(self, pin: Pin) -> None:
        pass


def source_of(
    target: str | Checkpointer, *, namespace: str | None, rank: int | None, world_size: int | None
) -> Memory | Durable:
    """A target with "://" in it is the URL of a durable tier, or of a step in it."""
    if isinstance(target, str) and "://" in target:
        if (rank, world_size) != (None, None):
            _launch.identify(rank, world_size)  # A wrong pair is told here; the process group may come later.
        return Durable(step_url(target, namespace=namespace, step=None), rank, world_size)
    if namespace is not None:
        raise InvalidArgument("namespace= says where in a durable tier; without a URL the target is the namespace")
    return Memory(checkpointer_for(target, rank=rank, world_size=world_size))

"""safepoint.Checkpointer: save a training state into the memory of the cluster, and restore it. Semantics:
docs/SEMANTICS.md.
"""

from __future__ import annotations

import atexit
import logging
import operator
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safepoint._engine import Engine, Mode
from safepoint._objects import Decoder
from safepoint._restore import plan_restore
from safepoint._save import Save, check_level, settle_all_copies
from safepoint.errors import InvalidArgument, NotFound, SafepointError

if TYPE_CHECKING:
    from types import TracebackType

    from safepoint._core import AttemptInfo
    from safepoint._reads import Pin

_log = logging.getLogger("safepoint")

_EXIT_SECONDS = 10.0  # How long the end of the interpreter waits for saves in flight.
_STEP_MAX = 2**63 - 1
_SIZE_MAX = 1 << 40  # Of a shard: docs/operating/limits.md.

_live: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@dataclass(frozen=True)
class RestoreInfo:
    """What a restore read.

    `world_size` is the saved one; `source` is the tier: "memory", "durable", or "memory+durable" where memory did not
    have every shard; `bytes` counts this rank's tensor bytes.
    """

    step: int
    attempt: bytes
    generation: int
    source: str
    world_size: int
    seconds: float
    bytes: int


def restore_info(info: AttemptInfo, seconds: float, read: int, source: str) -> RestoreInfo:
    return RestoreInfo(
        step=info.step,
        attempt=info.attempt,
        generation=info.generation,
        source=source,
        world_size=info.world_size,
        seconds=seconds,
        bytes=read,
    )


def restore_from(
    pin: Pin,
    state: Any,
    place: tuple[int, int],
    begin: float,
    *,
    allow_missing: bool,
    decoder: Decoder,
    verify_first: bool = False,
    cast: bool = False,
) -> RestoreInfo:
    """Restores what is held. `place`: rank and world size; `begin`: when the restore began, by `time.perf_counter`."""
    plan, shards = plan_restore(pin, state, *place, allow_missing=allow_missing, decoder=decoder, cast=cast)
    if verify_first:
        plan.reads.verify(shards)
    plan.run(shards)
    return restore_info(pin.info, time.perf_counter() - begin, plan.reads.bytes, shards.source)


class Checkpointer:
    """Saves and restores the state of one job. One per process and namespace; every rank has one.

    `namespace`: identity of the job, 1 to 200 characters of A-Z a-z 0-9 _ -. `rank`, `world_size`: from the process
    group, torchrun or srun unless given. `mode`: "blocking" copies before `save` returns; "guarded" copies in the
    background the tensors of `optimizers` (their parameters and states; everything else is copied at once), and makes
    their `step()` wait for that. Change such a tensor by other means only after `wait_safe()`. `size_hint`: bytes that
    this rank saves; memory is made ready at once instead of in the first saves. `allow_pickle`: lets values that are
    not plain be saved with pickle, and be read, which can run code.

    Raises Unavailable when no daemon answers and none may be started. Thread-safe; not usable in a forked child.
    """

    def __init__(
        self,
        namespace: str,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        mode: Mode = "blocking",
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        size_hint: int | None = None,
        allow_pickle: bool = False,
    ) -> None:
        room = None if size_hint is None else as_size(size_hint)
        given = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self._engine = Engine(
            namespace, given=(rank, world_size), mode=mode, optimizers=given, allow_pickle=allow_pickle
        )
        _live.add(self)
        if room is not None:
            self._engine.prepare(room)

    @property
    def namespace(self) -> str:
        return self._engine.namespace

    @property
    def closed(self) -> bool:
        return self._engine.closed

    # --- saving

    def save(self, step: int, state: Any, *, durable: bool = False) -> Save:
        """Saves the state as of now under `step`. Every rank calls it with its own part.

        Blocking mode: returns when the state was copied and may be changed; the seal follows in the background. Raises
        NotPlain or InvalidArgument (naming the part) and Unavailable, Fenced, NoSpace, LimitExceeded before or instead
        of sending anything. `durable`: the daemon also brings it to the durable tier, in the background
        (`Save.wait("durable")`); Unavailable where it has none.
        """
        number = as_step(step)
        if durable:
            self._engine.check_durable()
        return self._engine.save(number, state, durable=durable)

    # --- restoring

    def restore(
        self,
        state: Any,
        *,
        step: int | None = None,
        allow_missing: bool = False,
        verify_first: bool = False,
        fresh: bool = False,
    ) -> RestoreInfo | None:
        """Restores into `state`, in place: tensors keep their memory, containers get the saved values, objects get
        `load_state_dict`.

        All ranks call it, and get the same attempt: the newest complete one, or that of `step`, from which saving then
        goes on. None: the namespace never had a complete step (or `fresh`: saving shall begin anew, whatever is there).
        NotFound: no such `step`. Lost: there were complete steps, none is left. Unavailable: nobody who could know can
        be asked. Mismatch: the checkpoint does not fit, nothing was changed; with `allow_missing`, what it does not
        have stays as it is. Corrupt: bytes do not match their checksums; says whether `state` was changed, which
        `verify_first` rules out at the price of a second pass over the bytes.
        """
        wanted = None if step is None else as_step(step)
        if fresh and step is not None:
            raise InvalidArgument("fresh=True restores nothing: do not give a step with it")
        engine = self._engine
        if fresh:
            with engine.lock:
                engine.check_usable()
                settle_all_copies()
                engine.branch(None, fresh=True)
            return None
        decoder = Decoder(engine.allow_pickle)
        return self._restore(state, wanted, allow_missing=allow_missing, decoder=decoder, verify_first=verify_first)

    def _restore(
        self,
        state: Any,
        step: int | None,
        *,
        allow_missing: bool,
        decoder: Decoder,
        verify_first: bool = False,
        cast: bool = False,
    ) -> RestoreInfo | None:
        """`cast`: tensors of another dtype are converted."""
        engine = self._engine
        with engine.lock:
            engine.check_usable()
            settle_all_copies()  # Nothing that is being copied may change under the copy.
            begin = time.perf_counter()
            pin = engine.open_read(step)
            if pin is None:
                return None
            with pin:
                info = restore_from(
                    pin,
                    state,
                    engine.identify(),
                    begin,
                    allow_missing=allow_missing,
                    decoder=decoder,
                    verify_first=verify_first,
                    cast=cast,
                )
            if step is not None:
                engine.branch(info.attempt, fresh=False)
            return info

    # --- looking

    def latest(self, level: str = "memory") -> AttemptInfo | None:
        """The newest complete attempt of at least that level; None: there never was one. Lost and Unavailable are
        raised.
        """
        check_level(level)
        self._engine.check_usable()
        try:
            return self._engine.client.latest(self.namespace, level)
        except NotFound:
            return None

    def steps(self) -> list[AttemptInfo]:
        """The complete attempts that are there, the newest first."""
        self._engine.check_usable()
        return [info for info in self._engine.steps() if info.state == "complete"]

    # --- ending

    def close(self) -> None:
        """Waits for the saves in flight (10 s at most), then ends the session; 5 s more where the daemon is silent.

        Steps stay where they are. Closing again does nothing.
        """
        self._engine.close(_EXIT_SECONDS)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def as_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError as error:
        raise InvalidArgument(f"step must be a whole number, not {step!r}") from error
    if not 0 <= number <= _STEP_MAX:
        raise InvalidArgument(f"step {number} is not between 0 and {_STEP_MAX}")
    return number


def as_size(hint: int) -> int:
    try:
        size = operator.index(hint)
    except TypeError as error:
        raise InvalidArgument(f"size_hint must be a number of bytes, not {hint!r}") from error
    if not 0 <= size <= _SIZE_MAX:
        raise InvalidArgument(f"size_hint {size} is not between 0 and {_SIZE_MAX} bytes")
    return size


def _close_all() -> None:
    """At interpreter exit: threads of the extension must not read tensors that are being torn down."""
    for checkpointer in list(_live):
        try:
            checkpointer._engine.close(_EXIT_SECONDS)
        except SafepointError as error:
            _log.warning("closing at exit: %s", error)


atexit.register(_close_all)

"""What saves and restores one rank's part of a job: launch, generation, plan, leases, slots. Behind `Checkpointer` and
`safepoint.dcp`, which is why what one saved the other restores.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch

from safepoint import _connect, _launch
from safepoint._copy import Guard, start_copy
from safepoint._objects import Encoder
from safepoint._pieces import compact, fingerprint
from safepoint._plan import SavePlan, make_plan, prepare
from safepoint._save import Save
from safepoint._shard import VERSION
from safepoint._state import Flat
from safepoint._urls import shown
from safepoint._walk import Addresses, walk
from safepoint.errors import Closed, InvalidArgument, NoSpace, NotFound, SafepointError, Unavailable

if TYPE_CHECKING:
    from safepoint._core import AttemptInfo, Lease, ReadPin

_log = logging.getLogger("safepoint")

CALL_SECONDS = 30.0  # Limit of one request to the daemon.
LAUNCH_SECONDS = 60.0  # Limit of what happens once per launch: the ranks' nonce and the comparison of their structures.
_TRIES_KEPT = 1 << 16
_SLOT_SLACK = 4 << 20  # Header and rounding, beside the tensors that a size hint counts.

Mode = Literal["blocking", "guarded"]


class _History:
    """What one rank has done in one namespace since its process began; a new engine goes on where one ended.

    The counts must be the same on all ranks of a launch: attempts, generations and restores are told apart by them.
    """

    def __init__(self) -> None:
        self.tries: dict[int, int] = {}  # By step, in the current generation.
        self.rollbacks = 0  # Generations that were left on purpose.
        self.restores = 0
        self.comparisons = 0
        self.opened = False  # Since the last rollback.
        self.parent: bytes | None = None  # What the next generation continues from; None: the daemon decides.
        self.fresh = False  # The next generation continues from nothing.


_histories: dict[tuple[int, str, int], _History] = {}  # (process, namespace, rank)
_histories_lock = threading.Lock()


def _history(namespace: str, rank: int) -> _History:
    with _histories_lock:
        return _histories.setdefault((os.getpid(), namespace, rank), _History())


class Engine:
    """Saves and restores for one rank in one namespace. One per process and namespace is enough.

    `given`: (rank, world size) or (None, None) for what the launch says. Thread-safe; not usable in a forked child.
    """

    def __init__(
        self,
        namespace: str,
        *,
        given: tuple[int | None, int | None],
        mode: Mode,
        optimizers: list[torch.optim.Optimizer],
        allow_pickle: bool,
    ) -> None:
        if mode not in ("blocking", "guarded"):
            raise InvalidArgument(f'mode must be "blocking" or "guarded", not {mode!r}')
        if mode == "guarded" and not optimizers:
            raise InvalidArgument('mode="guarded" needs the optimizers whose step() is to wait for the copy')
        if given != (None, None):
            _launch.identify(*given)  # A wrong pair is told here; the process group may come later.
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise InvalidArgument(f"optimizers must be torch optimizers, not {type(optimizer).__name__}")
        if not isinstance(namespace, str):
            raise InvalidArgument(f"namespace must be a text, not {type(namespace).__name__}")
        if "://" in namespace:
            raise InvalidArgument(
                f"{shown(namespace)} is a URL, not a namespace: name the job here; the URL of a durable tier is the "
                "daemon's setting store"
            )
        self.namespace = namespace
        self.allow_pickle = allow_pickle
        self._given = given
        self._mode = mode
        self._guard = Guard(optimizers) if mode == "guarded" else None
        self._pid = os.getpid()
        self.lock = threading.RLock()
        self.closed = False
        self._plan: SavePlan | None = None
        self._agreed: bytes | None = None  # Fingerprint that all ranks showed at the first save.
        self._compared = False
        self._generation: int | None = None
        self._nonce = b""  # Of the generation.
        self._rollbacks = 0  # When it was opened.
        self._in_flight: list[Save] = []
        self._ahead: int | None = None  # Saves after which memory is still made for the next one; None: not known yet.
        self._preparing: threading.Thread | None = None
        self._mappings: set[int] = set()  # Numbers of those that are registered with CUDA.
        self.client = _connect.open_client(f"checkpointer {namespace}"[:100], deadline=CALL_SECONDS)
        me = weakref.ref(self)
        guarded = optimizers if mode == "guarded" else []
        self._hooks = [optimizer.register_step_pre_hook(_step_hook(me)) for optimizer in guarded]

    def identify(self) -> tuple[int, int]:
        """Rank and world size."""
        return _launch.identify(*self._given)

    def prepare(self, size_hint: int) -> None:
        """Makes memory ready for saves of so many bytes, instead of in the first ones. Once, and before the first save;
        later it has no effect.
        """
        with self.lock:
            if self._ahead is not None:
                return
            self._ahead = 0
            self._make_slots(size_hint + _SLOT_SLACK, None)

    # --- saving

    def check_durable(self) -> None:
        """Unavailable: the daemon has no durable tier."""
        self.check_usable()
        if not self.client.daemon.store:
            raise Unavailable(
                f"the daemon at {self.client.socket_path} has no durable tier: start it with the setting store, or set "
                "SAFEPOINTD_STORE=file:///path before a private one starts"
            )

    def save(self, number: int, state: Any, *, hold: bool = False, durable: bool = False) -> Save:
        """Saves the state as of now under that step; see `Checkpointer.save`.

        `hold`: the shard is sealed only when `Save.confirm` was called; `Save.refuse` gives it up.
        """
        with self.lock:
            self.check_usable()
            self._poll()
            rank, world_size = self.identify()
            counts = _history(self.namespace, rank).tries
            tries = counts.pop(number, 0) + 1
            counts[number] = tries
            if len(counts) > _TRIES_KEPT:
                del counts[next(iter(counts))]
            asked = _history(self.namespace, rank).comparisons
            try:
                flat = walk(state, self._plan.snapshot.tokens if self._plan is not None else None)
                plan, addresses = self._plan_for(flat, rank, world_size)
                objects = self._encode_values(plan, flat)
            except Exception:
                self._excuse(rank, world_size, asked)
                raise
            self._open_generation(rank, world_size)
            place: dict[str, Any] = {
                "version": VERSION,
                "namespace": self.namespace,
                "step": number,
                "generation": self._generation,
            }
            # The attempt's id is not known yet, but its length is.
            plan.dynamic_part({**place, "attempt": "0" * 32, "rank": rank, "world_size": world_size}, objects)
            if self._preparing is not None:
                # The slot that this save needs is in the making; a small pool would refuse another one beside it.
                self._preparing.join()
                self._preparing = None
            lease = self._reserve(number, tries, rank, world_size, plan.length())
            try:
                if durable:
                    self.client.make_durable(self.namespace, lease.attempt)
                # A reopened generation may have another number.
                place.update(generation=self._generation, attempt=lease.attempt.hex(), rank=rank, world_size=world_size)
                dynamic, _ = plan.dynamic_part(place, objects)
                if plan.length() != lease.length:
                    raise InvalidArgument(f"the header grew from {lease.length} to {plan.length()} bytes")
                self._forget_unmapped()
                transfer, keep = start_copy(lease, plan, flat, addresses, plan.header(dynamic), self._guard, hold)
                if plan.device:
                    self._mappings.add(lease.mapping)
                abort = getattr(transfer, "abort", lease.abort)  # Devices have a transfer of their own.
                save = Save(self.client, self.namespace, number, lease.attempt, transfer, keep, abort if hold else None)
                self._in_flight.append(save)
            except BaseException as error:
                lease.abort(f"rank {rank}: {error}"[:400])
                raise
        if self._mode == "blocking":
            try:
                save.wait_safe()
            except SafepointError:
                raise  # The copy's own end.
            except BaseException as error:  # Ctrl-C, say: the caller goes on, and may change what is being copied.
                abort(f"rank {rank}: interrupted by {type(error).__name__}")
                raise
        with self.lock:
            if self._ahead is None:
                self._ahead = self.client.daemon.retain
            if self._ahead > 0 and self._preparing is None and not self.closed:
                # Only now, so that the copy need not share the machine with it; and one slot at a time, because the
                # next save may come before it is made, and waits. Not a daemon thread: the interpreter must not end
                # under a call into the extension.
                self._ahead -= 1
                self._preparing = threading.Thread(
                    target=self._make_slots, args=(lease.length, lease.attempt), name="safepoint-slots"
                )
                self._preparing.start()
        return save

    def _plan_for(self, flat: Flat, rank: int, world_size: int) -> tuple[SavePlan, Addresses]:
        plan = self._plan
        if plan is not None and self._compared and (addresses := plan.match(flat)) is not None:
            return plan, addresses
        names, pieces, snapshot = prepare(flat, rank)
        seen = fingerprint(pieces, names) if world_size > 1 else b""
        if not self._compared:
            store = _launch.store_for(rank, world_size)
            key = self._next_comparison(rank)
            same: bool | None = world_size == 1
            if store is not None:
                same = _launch.agree(store, key, rank, world_size, seen, LAUNCH_SECONDS)
            self._agreed = seen if same else None
            self._compared = same is not None  # Where a rank has failed, the next save compares again.
        room = plan.room if plan is not None else 0
        # Another structure than the one that was compared: this rank alone knows it, so it keeps everything it has.
        plan = make_plan(
            flat,
            names,
            pieces,
            snapshot,
            rank=rank,
            world_size=world_size,
            agreed=world_size > 1 and seen == self._agreed,
        )
        plan.room = room
        self._plan = plan
        return plan, snapshot.tensors.addresses

    def _next_comparison(self, rank: int) -> str:
        """Key of a comparison of structures in the store; all ranks make the same ones in the same order."""
        history = _history(self.namespace, rank)
        history.comparisons += 1
        return f"{_launch.restart_prefix()}/{self.namespace}/structure/{history.comparisons}"

    def _excuse(self, rank: int, world_size: int, asked: int) -> None:
        """After an error of this rank's own in its first save: the other ranks do not wait for what it did not say.

        `asked`: the comparisons before that save.
        """
        store = _launch.store_for(rank, world_size)
        if store is None:
            return
        if not self._compared and _history(self.namespace, rank).comparisons == asked:
            _launch.show_none(store, self._next_comparison(rank), rank)
        if rank == 0:  # It makes the nonce that the others wait for; it waits for nobody.
            with contextlib.suppress(SafepointError):
                _launch.launch_nonce(rank, world_size, LAUNCH_SECONDS)

    def _encode_values(self, plan: SavePlan, flat: Flat) -> str:
        encoder = Encoder(self.allow_pickle)
        leaves = plan.names.values
        rank = _launch.identify(*self._given)[0] if any(leaves[i].per_rank for i in plan.values) else 0
        for index, leaf in enumerate(leaves):
            if index not in plan.owned_values:
                encoder.encode(flat.values[index], leaf.name)  # What is not plain is an error on every rank.
        parts = []
        for index, path in zip(plan.values, plan.value_paths, strict=True):
            leaf = leaves[index]
            coded = compact(encoder.encode(flat.values[index], leaf.name))
            parts.append(f"[{path},{coded},{rank}]" if leaf.per_rank else f"[{path},{coded}]")
        return f"[{','.join(parts)}]"

    def _open_generation(self, rank: int, world_size: int) -> None:
        history = _history(self.namespace, rank)
        if self._generation is not None and self._rollbacks == history.rollbacks:
            return
        nonce = _launch.launch_nonce(rank, world_size, LAUNCH_SECONDS)
        if nonce is None:
            raise Unavailable(_launch.NO_IDENTITY)
        if history.rollbacks:
            # After going back on purpose within one launch, saving goes on in a generation of its own; all ranks make
            # the same nonce.
            nonce = hashlib.sha256(b"safepoint rollback %d " % history.rollbacks + nonce).digest()[:16]
        opened = self.client.open_generation(
            self.namespace, nonce, world_size, rank, parent=history.parent, fresh=history.fresh, deadline=CALL_SECONDS
        )
        self._generation, self._nonce, self._rollbacks = opened.generation, nonce, history.rollbacks
        history.opened = True

    def _reserve(self, step: int, tries: int, rank: int, world_size: int, length: int) -> Lease:
        def reserve() -> Lease:
            assert self._generation is not None
            return self.client.reserve(
                self.namespace,
                self._generation,
                self._nonce,
                step,
                tries,
                world_size,
                rank,
                length,
                deadline=CALL_SECONDS,
            )

        try:
            return reserve()
        except Closed:
            # Either this attempt is closed, or the daemon lost its memory and with it the generation. Opening again
            # does no harm to the former.
            self._generation = None
            self._open_generation(rank, world_size)
            return reserve()

    def _make_slots(self, length: int, after: bytes | None) -> None:
        """Has the daemon make memory for shards of that length, and maps it here, so that no later save pays for that:
        for all steps to come, or one slot for the save after the attempt `after`.

        In all, every retained step needs a slot, and the step that is being written one more. What is retained of an
        earlier launch has its memory already and leaves it to later steps. Asking for more than is missing would take
        it from the other ranks, without whom no step becomes complete and leaves anything.
        """
        try:
            retain = self.client.daemon.retain
            steps = [info for info in self.steps() if info.state == "complete" and not info.pinned]
            held = sum(info.attempt != after for info in steps)
            count = max(1, retain + 1 - held) if after is None else min(1, retain - held)
            if count > 0:
                self.client.prepare_slots(self.namespace, length, count, deadline=CALL_SECONDS)
        except NoSpace as error:
            _log.warning("namespace %s: %s", self.namespace, error)
        except SafepointError as error:
            _log.info("namespace %s: slots could not be made ready beforehand: %s", self.namespace, error)

    def steps(self) -> list[AttemptInfo]:
        """The attempts that the daemon knows; none in a namespace that it does not know."""
        try:
            return self.client.list_steps(self.namespace)
        except NotFound:
            return []

    # --- restoring

    def settle_copies(self) -> None:
        """Waits until no save reads the state any more: from then on it may be changed."""
        for save in tuple(self._in_flight):
            save.settle_copy()

    def open_read(self, step: int | None) -> ReadPin | None:
        """Holds the attempt to restore: that of `step`, or the newest; the same on all ranks of the launch.

        None: the namespace never had a complete step. NotFound: not that `step`.
        """
        rank, world_size = self.identify()
        nonce = _launch.launch_nonce(rank, world_size, LAUNCH_SECONDS)
        history = _history(self.namespace, rank)
        sequence = history.restores
        history.restores += 1
        try:
            return self.client.open_read(self.namespace, step=step, nonce=nonce, sequence=sequence)
        except NotFound:
            if step is None:
                return None
            raise

    def branch(self, parent: bytes | None, *, fresh: bool) -> None:
        """The next save continues from the attempt `parent`, or from nothing."""
        history = _history(self.namespace, self.identify()[0])
        history.parent, history.fresh = parent, fresh
        if history.opened:
            history.opened = False
            history.rollbacks += 1
            history.tries.clear()

    # --- ending

    def close(self, timeout: float) -> None:
        """Waits for the saves in flight, for `timeout` seconds at most, then ends the session."""
        if os.getpid() != self._pid:
            return  # A forked child has nothing to close: session, threads and mappings are its parent's.
        with self.lock:
            if self.closed:
                return
            self.closed = True
            for hook in self._hooks:
                hook.remove()
            end = time.monotonic() + timeout
            for save in self._in_flight:
                save.refuse("the trainer ended before the save was confirmed")
            running = [save for save in self._in_flight if not save.settle(max(0.0, end - time.monotonic()))]
            self._in_flight = []
            if running:
                _log.warning(
                    "namespace %s: %d saves were still running after %.0f s", self.namespace, len(running), timeout
                )
            if not running:  # A device may still write there; a later mapping at the same place lets go of it.
                self._unregister(self._mappings)
            self.client.close(timeout=max(0.0, end - time.monotonic()))

    def _forget_unmapped(self) -> None:
        """Slots that the daemon took back are not mapped any more, and nobody else tells CUDA so."""
        if self._mappings:
            self._unregister(self._mappings.difference(self.client.mappings))

    def _unregister(self, mappings: set[int]) -> None:
        if mappings:
            from safepoint._cuda import unregister_slots

            unregister_slots(mappings)
            self._mappings = self._mappings - mappings

    def check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise Unavailable(
                "this Checkpointer belongs to the process that made it, and this one was forked from it: "
                "make another one here"
            )
        if self.closed:
            raise Closed("this Checkpointer was closed")

    def _poll(self) -> None:
        self._in_flight = [save for save in self._in_flight if not save.poll()]

    def before_optimizer_step(self) -> None:
        """In guarded mode: parameters change now. Never raises: a failed save must not end the training."""
        if os.getpid() == self._pid:
            self.settle_copies()


def _step_hook(engine: weakref.ref[Engine]) -> Any:
    def wait_for_copies(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        alive = engine()
        if alive is not None:
            alive.before_optimizer_step()

    return wait_for_copies

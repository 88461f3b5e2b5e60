"""The StorageWriter of safepoint, which is its own stager: staging is the save."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Iterable
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, Literal

import torch
import torch.distributed
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from safepoint._engine import Mode
from safepoint._save import Save
from safepoint.api import Checkpointer, as_step
from safepoint.dcp import _confirm, _torch, _uploads
from safepoint.dcp._per_rank import PerRankNames
from safepoint.dcp._plans import planned_state, with_plain_bits
from safepoint.dcp._target import CheckpointId, agreed_step, checkpointer_for, is_ours
from safepoint.errors import DeadlineExceeded, InvalidArgument

_log = logging.getLogger("safepoint")

Planning = Literal["own", "dcp"]
_STEP = MetadataIndex("safepoint.step")  # Of the result by which a rank tells the coordinator its step.
_LISTED = 20  # Ranks in one error message.
NO_PROCESS = (
    'planning="dcp" saves from the process that trains, and torch\'s PROCESS mode from another: use THREAD, or '
    'planning="own"'
)


class _Call(threading.local):
    """What one thread of torch's is in the middle of."""

    upload: _uploads.Upload | None = None
    checkpoint_id: CheckpointId = None
    new_id: bool = False  # Told since the last `storage_meta`, which every save asks for.
    saved: Save | _confirm.RemoteSave | None = None


class Writer(StorageWriter, AsyncStager):
    """Saves what `torch.distributed.checkpoint` gives it into the memory of the cluster.

    For `torch.distributed.checkpoint.async_save` and `save`, and for `safepoint.dcp.async_save`, which spares torch's
    fixed costs. One writer may be used for many steps (`writer.step = n` before each), or a new one made for each.

    `target`: the namespace (this process keeps one session per namespace, whatever writers come and go), or a
    Checkpointer. `step`: the training step; needed for torch's `async_save`, which tells the checkpoint id only after
    staging. An id that ends in a number must name the same step. `per_rank`: names, with `*`, of what differs from rank
    to rank (see `PerRank`). `planning`: "own" plans without communication and copies inside `stage`; "dcp" leaves
    planning to DCP and to the `planner` given to it, at the price of a second copy in memory and of DCP's collectives.
    `mode`, `optimizers`, `size_hint`, `allow_pickle`, `rank`, `world_size`: as of `Checkpointer`, for a target that is
    a namespace. A hint has no effect once the session has one or has saved, so each new writer may be given it.
    `durable`: the daemon also brings every step (True), or every step that is a multiple of a number, to its durable
    tier, in the background; `writer.save.wait("durable")` waits for the step that was saved last. Where the daemon has
    no such tier, every save of such a writer raises Unavailable before anything is sent.
    `deadline`: seconds until a save that does not become complete (another rank failed) is an error.

    Errors are safepoint's own; `stage` raises them in the trainer's thread, before anything is sent where that is
    possible. With torch's `async_save` and a process group, `stage` first waits for the end of the upload before it.
    """

    def __init__(
        self,
        target: str | Checkpointer,
        *,
        step: int | None = None,
        per_rank: Iterable[str] = (),
        planning: Planning = "own",
        durable: bool | int = False,
        mode: Mode = "blocking",
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        size_hint: int | None = None,
        allow_pickle: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        deadline: float = 600.0,
    ) -> None:
        super().__init__()
        if planning not in ("own", "dcp"):
            raise InvalidArgument(f'planning must be "own" or "dcp", not {planning!r}')
        if planning == "dcp" and mode == "guarded":
            raise InvalidArgument('mode="guarded" copies in the background what planning="dcp" must stage at once')
        every = _durable_every(durable)
        self.checkpointer = checkpointer_for(
            target,
            rank=rank,
            world_size=world_size,
            mode=mode,
            optimizers=optimizers,
            size_hint=size_hint,
            allow_pickle=allow_pickle,
            use=_use(planning),
        )
        self._set_up(self.checkpointer.namespace, step, planning, per_rank, every, deadline)

    def _set_up(
        self,
        namespace: str,
        step: int | None,
        planning: Planning,
        per_rank: Iterable[str],
        every: int,
        deadline: float,
    ) -> None:
        self.namespace = namespace
        self.step = step
        self.planning: Planning = planning
        self._per_rank = PerRankNames(per_rank)
        self._durable_every = every
        self._deadline = deadline
        self._lock = threading.Lock()
        self._staged: list[_uploads.Upload] = []  # Those that torch's thread has not come for yet.
        self._save: Save | None = None
        self._call = _Call()
        self._unpickled = False
        self._ticket: _confirm.Ticket | None = None  # In torch's child process: of the save that the trainer staged.
        self._synchronize_after_execute = False  # `stage` has copied all that the trainer may change at once.

    # --- to torch's child process and back (PROCESS mode)

    def __getstate__(self) -> dict[str, Any]:
        self._claim()
        upload = self._call.upload
        if upload is not None and upload.save is None:
            raise InvalidArgument(NO_PROCESS)
        engine = self.checkpointer._engine
        rank, world_size = engine.identify()
        return {
            "namespace": self.namespace,
            "rank": rank,
            "world_size": world_size,
            "allow_pickle": engine.allow_pickle,
            "step": self.step if upload is None else upload.step,
            "planning": self.planning,
            "per_rank": self._per_rank.patterns,
            "durable_every": self._durable_every,
            "deadline": self._deadline,
            "ticket": None if upload is None or upload.save is None else _confirm.issue(upload.save),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = ("namespace", "step", "planning", "per_rank", "durable_every", "deadline")
        self._set_up(*(state[name] for name in names))
        self._unpickled, self._ticket = True, state["ticket"]
        if self._ticket is None:
            place = {name: state[name] for name in ("rank", "world_size", "allow_pickle")}
            self.checkpointer = checkpointer_for(self.namespace, use=_use(self.planning), **place)

    # --- for users

    @property
    def save(self) -> Save | None:
        """The save that was begun last, to wait for a level of it: `writer.save.wait("durable")`.

        With planning="dcp" it is begun in torch's thread: ask when the future has its result.
        """
        return self._save

    def metadata(self) -> Metadata:
        """DCP's metadata of the save that was begun last, once it is complete. DCP itself is handed an empty one."""
        from safepoint.dcp._reader import Reader

        if self._save is None:
            raise InvalidArgument("nothing was saved with this writer yet")
        self._save.wait("memory", timeout=self._deadline)
        return Reader(self.checkpointer, planning="dcp").metadata(self._save.attempt)

    def begin(self, state_dict: dict[str, Any], step: int | None = None, *, hold: bool = False) -> Save:
        """Saves with own planning, without torch; `stage` and `safepoint.dcp.async_save` are made of it."""
        number = self._known_step(self.step if step is None else step)
        self._check_durable()
        durable = self._durable_every > 0 and number % self._durable_every == 0
        engine = self.checkpointer._engine
        self._save = save = engine.save(number, self._per_rank.mark(state_dict), hold=hold, durable=durable)
        return save

    def _check_durable(self) -> None:
        """Unavailable: some steps are to be durable, and the daemon has no tier for it; told by the first save, whether
        it is one of them or not.
        """
        if self._durable_every:
            self.checkpointer._engine.check_durable()

    def _known_step(self, step: int | None) -> int:
        if step is None:
            raise InvalidArgument(
                "the step is not known: Writer(step=...) or writer.step = ... before the save, or a checkpoint id that "
                "ends in it (which torch's async_save tells only after staging)"
            )
        return as_step(step)

    def _announce(self, upload: _uploads.Upload) -> None:
        with self._lock:
            self._staged.append(upload)
        _uploads.announce(upload)

    def _claim(self) -> None:
        """In torch's thread: finds the staged save that this thread is for."""
        if self._call.upload is not None:
            return
        with self._lock:
            for upload in reversed(self._staged):  # One that was given up may still be there.
                if upload.claim():
                    self._call.upload = upload
                    self._staged.remove(upload)
                    return

    # --- AsyncStager, called in the trainer's thread

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies the state into this rank's shard and returns an empty dict: nothing is left to plan or to write.

        planning="dcp": returns a copy of the state, which DCP plans and this writer then saves.
        """
        if not _uploads.wait_for_others(self._deadline):
            raise DeadlineExceeded(f"the save before has not ended after {self._deadline:.0f} s; nothing was saved")
        if self.planning == "dcp":
            step = self._known_step(self.step)
            self._check_durable()
            stager = DefaultStager(StagingOptions(False, False, False, False))
            try:
                staged = stager.stage(with_plain_bits(state_dict))  # torch's stager forgets the bits.
            finally:
                stager.close()
            self._announce(_uploads.Upload(step, None))
            return staged.result() if isinstance(staged, ConcurrentFuture) else staged
        save = self.begin(state_dict, hold=True)
        self._announce(_uploads.Upload(save.step, save))
        return {}

    def synchronize_staging(self) -> None:
        """Returns when the trainer may change its tensors (at once, in blocking mode)."""
        if self._save is not None:
            self._save.wait_safe()

    def close(self) -> None:
        """Nothing to do: the session belongs to the Checkpointer, and what is in flight goes on."""

    # --- StorageWriter, called in torch's thread, in its child process, or by a synchronous save

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        self._claim()
        self._call.checkpoint_id, self._call.new_id = checkpoint_id, True

    def storage_meta(self) -> StorageMeta | None:
        self._claim()
        if not self._call.new_id:
            self._call.checkpoint_id = None  # Of a call that ended early.
        self._call.new_id = False
        if self._call.upload is None and self._ticket is None:  # A synchronous save.
            _uploads.wait_before_collectives(self._deadline, "save")
        return None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._claim()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Confirms what was staged, or saves now, where nothing was: in a synchronous save, or with planning="dcp"."""
        checkpoint_id, self._call.checkpoint_id = self._call.checkpoint_id, None
        upload, self._call.upload = self._call.upload, None
        step = self.step if upload is None else upload.step
        staged: Save | _confirm.RemoteSave | None = None if upload is None else upload.save
        if self._ticket is not None and step is not None:
            staged = _confirm.RemoteSave(self._ticket, step)
        try:
            if self.planning == "own" and not _torch.plans_by_default(planner):
                raise InvalidArgument(
                    f"the planner {type(planner).__qualname__} would not be asked: "
                    'Writer(planning="dcp") lets DCP and its planner decide what is saved'
                )
            step = agreed_step(step, checkpoint_id, self.namespace)
        except BaseException as error:
            if staged is not None:
                staged.refuse(str(error))
            raise
        if staged is None:
            state = planned_state(plan, planner, whole=self.planning == "own")
            if self.planning == "own" and not state and (self._staged or self._unpickled):
                # The empty dict that `stage` returned, most likely, and nobody knows which save it is of.
                raise InvalidArgument(f"step {step}: what was staged for it is not known here, or was given up")
            staged = self.begin(state, step)
        staged.confirm()
        staged.wait_sealed(timeout=self._deadline)
        self._call.saved = staged
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(_STEP, 0, staged.step)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Returns when the step is complete on all ranks. InvalidArgument: they saved different steps."""
        saved, self._call.saved = self._call.saved, None
        _check_steps(results)
        if saved is not None:
            saved.wait("memory", timeout=self._deadline)
            if isinstance(saved, _confirm.RemoteSave):
                saved.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return is_ours(checkpoint_id)


def _check_steps(results: list[list[WriteResult]]) -> None:
    """Steps that differ would never become complete; that would be told only at the deadline."""
    steps = {rank: result.storage_data for rank, of_rank in enumerate(results) for result in of_rank}
    if len(set(steps.values())) > 1:
        told = ", ".join(f"rank {rank} step {step}" for rank, step in list(steps.items())[:_LISTED])
        raise InvalidArgument(f"the ranks save different steps, which never become complete: {told}")


def _durable_every(durable: bool | int) -> int:
    """As a number of steps; 0: none."""
    if isinstance(durable, bool):
        return int(durable)
    try:
        every = operator.index(durable)
    except TypeError as error:
        raise InvalidArgument(f"durable must be True, False or a number of steps, not {durable!r}") from error
    if every < 1:
        raise InvalidArgument(f"durable={every}: a number of steps is at least 1, and False is never")
    return every


def _use(planning: Planning) -> str:
    """Saves with DCP's plans have another structure on every rank; they get an engine of their own."""
    return "dcp plans" if planning == "dcp" else ""

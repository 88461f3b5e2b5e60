"""The StorageReader of safepoint."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from safepoint._boxes import Box
from safepoint._objects import Decoder
from safepoint._reads import Reads, Shards, stored_dtype
from safepoint._restore import plan_from
from safepoint._save import settle_all_copies
from safepoint._shard import Checkpoint
from safepoint._state import build
from safepoint._torch import not_expanded, same_bits, strides_overlap
from safepoint._urls import shown
from safepoint.api import Checkpointer, RestoreInfo, restore_info
from safepoint.dcp import _torch, _uploads
from safepoint.dcp._metadata import make_metadata
from safepoint.dcp._source import Memory, source_of
from safepoint.dcp._target import CheckpointId, agreed_step, is_ours
from safepoint.dcp._writer import Planning
from safepoint.errors import Closed, InvalidArgument, Mismatch, NotFound, ProtocolError, SafepointError

if TYPE_CHECKING:
    from safepoint._reads import Pin

_UPLOAD_SECONDS = 600.0  # How long a load waits for the uploads before it: as long as a writer's default deadline.


class Reader(StorageReader):
    """Loads into what `torch.distributed.checkpoint.load` is given, from the memory of the cluster or a durable tier,
    verified.

    Every layout loads into every other one: other world sizes, meshes and placements; only the ranges that this rank
    needs are copied. All ranks load the same attempt.

    `target`: the namespace, or a Checkpointer; or the URL of a durable tier or of a step in it ("s3://bucket/base",
    "file:///mnt/checkpoints/run-3/step-40"), which is read without a daemon, as `safepoint.load` does, with `namespace`
    where the tier has several. `step`: None for the newest complete one; a checkpoint id that ends in a number names it
    as well. After a load from memory of a step by number saving goes on from there, as with `Checkpointer.restore`.
    `planning`: "own" reads straight into the state, without DCP's plan; "dcp" reads what DCP's planner asks for, item
    by item, which a planner of your own needs. `allow_pickle`: read what was saved with it.

    NotFound, Lost, Unavailable, Corrupt, Mismatch as in `Checkpointer.restore`, of a URL as in `safepoint.load`; torch
    wraps what `read_metadata` raises.
    """

    def __init__(
        self,
        target: str | Checkpointer,
        *,
        namespace: str | None = None,
        step: int | None = None,
        planning: Planning = "own",
        allow_pickle: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if planning not in ("own", "dcp"):
            raise InvalidArgument(f'planning must be "own" or "dcp", not {planning!r}')
        self._source = source_of(target, namespace=namespace, rank=rank, world_size=world_size)
        if step is not None and self._source.step is not None:
            raise InvalidArgument(f"{shown(target)} names a step: do not give another")
        self.step = self._source.step if step is None else step
        self.planning: Planning = planning
        self._allow_pickle = allow_pickle
        self._checkpoint_id: CheckpointId = None
        self._pin: Pin | None = None
        self._shards: Shards | None = None
        self._stored = Checkpoint()
        self._begin = 0.0
        self.info: RestoreInfo | None = None  # Of the last load.

    # --- for users

    @property
    def checkpointer(self) -> Checkpointer:
        """The Checkpointer that was given, or this process's of the namespace. InvalidArgument: a URL has none."""
        if not isinstance(self._source, Memory):
            raise InvalidArgument("a durable tier is read without a Checkpointer")
        return self._source.checkpointer

    def identify(self) -> tuple[int, int]:
        """Rank and world size."""
        return self._source.identify()

    def metadata(self, attempt: bytes | None = None) -> Metadata:
        """DCP's metadata of an attempt (None: of the step that a load would take), pieces included."""
        with self._source.look(None if attempt else self.step, attempt) as pin:
            return make_metadata(_merged(Shards(pin)), self._rank(), chunks=True)

    def read_into(self, state_dict: Any, *, allow_missing: bool = False) -> RestoreInfo:
        """Loads without torch: `safepoint.dcp.load` is made of it."""
        decoder = Decoder(self._allow_pickle or self._source.allow_pickle)
        info = self._source.restore(state_dict, self._wanted(), allow_missing=allow_missing, decoder=decoder)
        if info is None:
            raise self._never()
        self.info = info
        return info

    def _wanted(self) -> int | None:
        return agreed_step(self.step, self._checkpoint_id, self._source.namespace)

    def _never(self) -> NotFound:
        return NotFound(f"namespace {self._source.namespace} has no complete step")

    # --- StorageReader

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        self._close()
        self._checkpoint_id = checkpoint_id

    def read_metadata(self) -> Metadata:
        """Holds the attempt, the same on all ranks, and describes it.

        Without a parameter named kwargs, on purpose: torch would call a second time, with collectives switched off,
        where the first call failed.
        """
        try:
            _uploads.wait_before_collectives(_UPLOAD_SECONDS, "load")
            settle_all_copies()
            self._close()
            self._begin = time.perf_counter()
            self._pin = self._source.open(self._wanted())
            if self._pin is None:
                raise self._never()
            self._shards = Shards(self._pin)
            self._stored = _merged(self._shards)
            return make_metadata(self._stored, self._rank(), chunks=self.planning == "dcp")
        except SafepointError as error:
            # torch shows only the text of the error.
            raise type(error)(f"{type(error).__name__}: {error}") from error

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which attempt this rank reads. Own planning: what is left of the plan stays here."""
        attempt = self._opened()[0].info.attempt
        return LoadPlan(plan.items if self.planning == "dcp" else [], attempt, plan.planner_data)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        attempts = [plan.storage_data for plan in plans]
        for rank, attempt in enumerate(attempts):
            if attempt != attempts[0]:
                raise ProtocolError(
                    f"rank {rank} would read attempt {attempt.hex()}, rank 0 {attempts[0].hex()}: have all ranks make "
                    "the same restores and loads in the same order"
                )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        pin, shards = self._opened()
        try:
            read = (
                self._read_plan(plan, planner, shards) if self.planning == "dcp" else self._read_state(planner, shards)
            )
            if self._wanted() is not None:
                self._source.loaded(pin)
            self.info = restore_info(pin.info, time.perf_counter() - self._begin, read, shards.source)
        finally:
            self._close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        return is_ours(checkpoint_id)

    # --- inside

    def _opened(self) -> tuple[Pin, Shards]:
        if self._pin is None or self._shards is None:
            raise Closed("this load was ended, or read_metadata was never called")
        return self._pin, self._shards

    def _close(self) -> None:
        if self._pin is not None:
            self._pin.close()
        self._pin = self._shards = None
        self._stored = Checkpoint()

    def _read_state(self, planner: LoadPlanner, shards: Shards) -> int:
        """Returns the number of bytes read."""
        if not _torch.loads_by_default(planner):
            raise InvalidArgument(
                f"the planner {type(planner).__qualname__} would not be asked: "
                'Reader(planning="dcp") reads what it plans, item by item'
            )
        state: dict[str, Any] = planner.original_state_dict  # type: ignore[attr-defined]
        restore = plan_from(
            self._stored,
            state,
            self._rank(),
            shards.pin.info.world_size,
            allow_missing=planner.allow_partial_load,  # type: ignore[attr-defined]
            decoder=Decoder(self._allow_pickle),
        )
        restore.run(shards)
        return restore.reads.bytes

    def _read_plan(self, plan: LoadPlan, planner: LoadPlanner, shards: Shards) -> int:
        """Returns the number of bytes read."""
        reads = Reads(self._stored, Decoder(self._allow_pickle))
        values: list[tuple[ReadItem, Any]] = []
        targets: list[tuple[ReadItem, torch.Tensor]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                if (get := self._getter(name, reads)) is not None:
                    values.append((item, get))
                continue
            target = planner.resolve_tensor(item).detach()
            self._read_item(item, target, reads)
            targets.append((item, target))
        reads.run(shards)
        for item, target in targets:
            planner.commit_tensor(item, target)
        for item, get in values:
            value = get()
            if _torch.loads_bytes_by_default(planner):
                _torch.place_loaded(planner, item.dest_index.fqn, value)
            elif isinstance(value, io.BytesIO):  # What another planner made, back to it.
                planner.load_bytes(item, value)
            else:
                buffer = io.BytesIO()
                torch.save(value, buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
        return reads.bytes

    def _getter(self, name: str, reads: Reads) -> Callable[[], Any] | None:
        """How to get a value that DCP knows by that name, once it was read. None: another rank's own part."""
        stored = self._stored
        for own in (f"{name}@{self._rank()}", name):
            if own in stored.values or own in stored.pieces:
                return reads.getter(own, None)
        owned, rank = stored.owned(), self._rank()
        parts = [n for n in (*stored.pieces, *stored.values) if n.startswith(f"{name}.")]
        parts = [n for n in parts if n not in owned or owned[n][1] == rank]
        if parts:  # A container that DCP does not walk.
            depth = len(name.split("."))
            leaves = [(stored.full_path(n)[depth:], reads.getter(n, None)) for n in parts]
            return lambda: build([(path, get()) for path, get in leaves])
        above = name
        while above := above.rpartition(".")[0]:
            own = f"{above}@{rank}" if f"{above}@{rank}" in stored.values else above
            if own in stored.values:  # Part of a value that we do not walk.
                whole, keys = reads.getter(own, None), name[len(above) + 1 :].split(".")
                return lambda: _inside(whole(), keys)
        return None

    def _read_item(self, item: ReadItem, target: torch.Tensor, reads: Reads) -> None:
        name, offset = item.storage_index.fqn, item.storage_index.offset
        pieces = self._stored.pieces[next(n for n in (f"{name}@{self._rank()}", name) if n in self._stored.pieces)]
        piece = next(p for p in pieces if offset is None or _offsets(p) == tuple(offset))
        begin = tuple(a + b for a, b in zip(_offsets(piece), item.storage_offsets, strict=True))
        box = Box(tuple(target.shape), begin, piece.global_shape)
        dtype = stored_dtype(piece)
        if dtype is None or tuple(item.lengths) != box.shape:
            raise ProtocolError(f"{name}: the planner asks for {list(item.lengths)} into {list(target.shape)}")
        expanded = strides_overlap(target)
        buffer = target if dtype == target.dtype and not expanded else torch.empty(target.shape, dtype=dtype)
        problem = reads.into(buffer, name, [piece], box, in_place=buffer is target)
        if problem is not None:
            raise ProtocolError(problem)
        if expanded:
            values = not_expanded(buffer, target)
            reads.after.append(lambda: _check_repeated(name, values, buffer))
            reads.converted(not_expanded(target, target), values)
        elif buffer is not target:
            reads.converted(target, buffer)

    def _rank(self) -> int:
        return self._source.identify()[0]


def _offsets(piece: Any) -> tuple[int, ...]:
    return (0,) * len(piece.shape) if piece.offsets is None else tuple(piece.offsets)


def _check_repeated(name: str, values: torch.Tensor, read: torch.Tensor) -> None:
    if not same_bits(values.expand(read.shape), read):
        raise Mismatch(
            f"{name}: the tensor here repeats its elements, and those in the checkpoint differ; give it a tensor of "
            'its own memory, or load with planning="own", which puts another tensor in its place'
        )


def _inside(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else {str(k): v for k, v in value.items()}[key]
    return value


def _merged(shards: Shards) -> Checkpoint:
    stored = Checkpoint()
    for rank in range(shards.pin.info.world_size):
        stored.add(shards.parse(rank))
    return stored

"""A folder of torch.distributed.checkpoint, written by torch's own `dcp.save` and FileSystemWriter.

The state given to torch has stand-ins on the meta device; the planner reads the bytes of an item when the writer asks
for it. Tensors keep the pieces in which the ranks saved them. The writer holds what it has written until a file ends,
so it is given items in files of bounded size: memory is one file, or one piece where that is larger.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from safepoint._objects import Decoder, Json
from safepoint._state import build
from safepoint.errors import InvalidArgument, ProtocolError, SafepointError
from safepoint.interchange._arrays import make_array
from safepoint.interchange._source import StepSource, Tensor, origin

_FILE_BYTES = 256 << 20


class _Array:
    """Stands for an array or bytes until the planner reads it."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def write_dcp(source: StepSource, folder: Path, target: Path, allow_pickle: bool) -> list[str]:
    """Writes the files into `folder`, which will be known as `target`, and returns their names.

    NotPlain: a value was saved with pickle and `allow_pickle` is false. InvalidArgument: torch cannot have two parts by
    one name, or does not store a dtype.
    """
    stand_ins: dict[int, Tensor] = {}
    state = _skeleton(source, stand_ins, Decoder(allow_pickle))
    try:
        save(state, storage_writer=_Writer(folder, target), planner=_Planner(source, stand_ins), no_dist=True)
    except CheckpointException as error:
        for reason, _ in error.failures.values():
            if isinstance(reason, SafepointError | OSError):
                raise reason from error
        reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
        raise InvalidArgument(f"torch cannot store this step: {reasons:.300}") from error
    return sorted(path.name for path in folder.iterdir())


def _skeleton(source: StepSource, stand_ins: dict[int, Tensor], decoder: Decoder) -> dict[str, Any]:
    """The nested state, as dcp.save would have been given it. Per-rank parts stand at the top, by their full name."""
    leaves: list[tuple[list[Json], Any]] = []
    known: set[torch.dtype] = set()
    for tensor in source.tensors:
        dtype = tensor.torch_dtype
        if dtype is not None and dtype not in known:
            _check_dtype(dtype, tensor.name)
            known.add(dtype)
        value: Any = _Array(tensor) if dtype is None else torch.empty(tensor.shape, dtype=dtype, device="meta")
        stand_ins[id(value)] = tensor
        leaves.append(([tensor.name] if tensor.rank is not None else tensor.path, value))
    for stored in source.values:
        leaves.append(
            ([stored.name] if stored.rank is not None else stored.path, decoder.decode(stored.coded, stored.name))
        )
    if any(not path for path, _ in leaves):
        raise InvalidArgument("the state is one value without a name; torch's folders have names only")
    state = build(leaves)
    return {str(key): value for key, value in (state.items() if isinstance(state, dict) else enumerate(state))}


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    """InvalidArgument: torch has the dtype, but does not store it."""
    try:
        torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
    except (KeyError, RuntimeError, NotImplementedError) as error:
        raise InvalidArgument(f"torch cannot store {name}, of dtype {dtype}: {error}") from error


class _Planner(DefaultSavePlanner):
    """Names and flattens as torch does; tensors in their stored pieces, read when they are asked for."""

    def __init__(self, source: StepSource, stand_ins: dict[int, Tensor]) -> None:
        super().__init__()
        self._source = source
        self._stand_ins = stand_ins
        self._pieces: dict[tuple[str, tuple[int, ...]], int] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items: list[WriteItem] = []
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                items.append(item)
                continue
            tensor = self._stand_ins[id(self.state_dict[item.index.fqn])]
            dtype = tensor.torch_dtype
            if dtype is None:
                raise ProtocolError(f"{tensor.name}: an array where a tensor was planned")
            if len(tensor.pieces) == 1:
                items.append(item)
                continue
            for number, piece in enumerate(tensor.pieces):
                offsets = torch.Size(origin(piece))
                self._pieces[item.index.fqn, tuple(offsets)] = number
                data = TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, torch.Size(piece.shape)),
                    properties=TensorProperties(dtype=dtype),
                    size=torch.Size(tensor.shape),
                )
                items.append(WriteItem(MetadataIndex(item.index.fqn, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        found = self.state_dict[write_item.index.fqn]
        if write_item.type is WriteItemType.BYTE_IO:
            return self.transform_object(write_item, self._filled(found))  # type: ignore[no-any-return]
        number = self._pieces.get((write_item.index.fqn, tuple(write_item.index.offset or ())), 0)
        return self._read(self._stand_ins[id(found)], number)

    def _read(self, tensor: Tensor, number: int) -> torch.Tensor:
        piece = tensor.pieces[number]
        result = torch.empty(piece.shape, dtype=tensor.torch_dtype)
        self._source.read_piece(piece, result)
        return result

    def _filled(self, value: Any) -> Any:
        """A value that torch stores whole, with the bytes of what stands in it."""
        tensor = self._stand_ins.get(id(value))
        if tensor is not None:
            return self._array(tensor) if isinstance(value, _Array) else self._whole(tensor)
        if type(value) is dict:
            return {key: self._filled(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._filled(item) for item in value)
        return value

    def _whole(self, tensor: Tensor) -> torch.Tensor:
        result = torch.empty(tensor.shape, dtype=tensor.torch_dtype)
        target = result.reshape(-1).view(torch.uint8).numpy() if tensor.nbytes else np.empty(0, dtype=np.uint8)
        position = 0
        for chunk in self._source.chunks(tensor):
            target[position : position + len(chunk)] = chunk
            position += len(chunk)
        return result

    def _array(self, tensor: Tensor) -> Any:
        buffer = np.empty(tensor.nbytes, dtype=np.uint8)
        self._source.read_piece(tensor.pieces[0], buffer)
        return make_array(tensor.raw or "", tensor.shape, buffer)


class _Writer(FileSystemWriter):
    """torch's writer, asked to write several files of bounded size; the publisher of the folder does the fsync."""

    def __init__(self, folder: Path, target: Path) -> None:
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0, overwrite=False)
        self._target = target

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(dataclasses.replace(plan, items=items, storage_data=prefix), planner).wait()
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future

    def storage_meta(self) -> StorageMeta | None:
        meta = super().storage_meta()
        return None if meta is None else dataclasses.replace(meta, checkpoint_id=self._target)


def _files(items: list[WriteItem]) -> list[list[WriteItem]]:
    files: list[list[WriteItem]] = [[]]
    size = 0
    for item in items:
        data = item.tensor_data
        nbytes = 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if files[-1] and size + nbytes > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(item)
        size += nbytes
    return files

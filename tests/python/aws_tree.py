"""Trees as amzn-sagemaker-checkpointing 1.1.3 leaves them in S3, on a disk; for test_import_aws.

`Writer` writes what the package writes, byte for byte, without the package (which is not installed where most tests
run). Started by torchrun, `aws_tree.py own|package FOLDER` saves one state of several ranks in both layouts, with that
imitation or with the package's own writer, whose client of S3 is replaced by one that writes files.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

PACKAGE = "amzn_sagemaker_checkpointing"
MODULE = f"{PACKAGE}.checkpointing.filesystem.storage_info"
OLD_MODULE = f"{PACKAGE}.checkpointing.filesystem.filesystem"
STEP = 40


@dataclass
class _SageMakerStorageInfo:
    rank: int
    offset: int
    length: int


def pickled(metadata: Any, module: str = MODULE) -> bytes:
    """As the package pickles it, its class in that module."""
    kept = _SageMakerStorageInfo.__module__
    stand_ins = {name: types.ModuleType(name) for name in (PACKAGE, module)}
    stand_ins[module]._SageMakerStorageInfo = _SageMakerStorageInfo  # type: ignore[attr-defined]
    _SageMakerStorageInfo.__module__ = module
    sys.modules.update(stand_ins)
    try:
        return pickle.dumps(metadata, protocol=pickle.HIGHEST_PROTOCOL)
    finally:
        _SageMakerStorageInfo.__module__ = kept
        for name in stand_ins:
            del sys.modules[name]


def place(run: Path, layout: str, step: int, rank: int, file: str) -> Path:
    names = (f"rank_{rank}", f"step_{step}") if layout == "default" else (f"step_{step}", f"rank_{rank}")
    return run.joinpath(*names, file)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class Writer(StorageWriter):
    """What the package's writer does with its S3 tier."""

    def __init__(self, run: Path, layout: str, step: int, module: str = MODULE) -> None:
        self._place = lambda file: place(run, layout, step, self._rank, file)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._module = module

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        buffer = io.BytesIO()
        results = []
        for item in plan.items:
            offset = buffer.tell()
            data = planner.resolve_data(item)
            if item.type is WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                buffer.write(data.getbuffer())
            else:
                assert isinstance(data, torch.Tensor)
                torch.save(data.detach().contiguous().cpu(), buffer)
            length = buffer.tell() - offset
            results.append(WriteResult(item.index, length, _SageMakerStorageInfo(self._rank, offset, length)))
        put(self._place("checkpoint.pt"), buffer.getvalue())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = StorageMeta()
        put(self._place("metadata.metadata"), pickled(metadata, self._module))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def package_writer(folder: Path, namespace: str, layout: str, step: int) -> StorageWriter:
    """The package's own, without its daemon, its log file and S3: objects become files of `folder`/bucket/key."""
    from amzn_sagemaker_checkpointing.checkpointing.filesystem import checkpoint_helpers, storage_base
    from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import SageMakerTieredStorageWriter
    from amzn_sagemaker_checkpointing.config import s3_path_strategy
    from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import SageMakerCheckpointConfig
    from amzn_sagemaker_checkpointing.storage.clients.s3.s3_client_manager import S3ClientManager

    class Client:
        @contextlib.contextmanager
        def create_write_stream(self, s3_uri: str) -> Iterator[io.BytesIO]:
            stream = io.BytesIO()
            yield stream
            put(folder / s3_uri.removeprefix("s3://"), stream.getvalue())

    class Memory:
        def __init__(self, **_: Any) -> None:
            pass

        def get_or_create_namespace(self) -> None:
            pass

        def put_checkpoint(self, **_: Any) -> None:
            pass

    checkpoint_helpers.CheckpointHelpers.get_bucket_location = staticmethod(lambda s3_base_path: "us-east-1")
    storage_base.InMemoryCheckpointClient = Memory
    storage_base._TieredStorageBase._setup_logger = staticmethod(lambda *_: logging.getLogger("package"))
    S3ClientManager.get_client = lambda *_, **__: Client()
    S3ClientManager.get_client_stats = lambda _: {}
    strategies = {"default": s3_path_strategy.DefaultS3PathStrategy, "Ray": s3_path_strategy.RayS3PathStrategy}
    config = SageMakerCheckpointConfig(
        namespace=namespace,
        world_size=dist.get_world_size(),
        s3_path_strategy=strategies[layout]("s3://bucket/base"),
        save_to_s3=True,
    )
    return SageMakerTieredStorageWriter(config, step=step)  # type: ignore[no-any-return]


def main() -> None:
    from interchange_ranks import make, whole

    warnings.simplefilter("ignore")
    writer, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    state = make(1)
    for layout in ("default", "Ray"):
        if writer == "own":
            storage: StorageWriter = Writer(folder / "bucket" / "base" / layout, layout, STEP)
        else:
            storage = package_writer(folder, layout, layout, STEP)
        dcp.save(state, storage_writer=storage)
    expected = whole(state)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    from leaving import leave

    main()
    leave()

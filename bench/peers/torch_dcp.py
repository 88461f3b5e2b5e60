"""torch's own distributed checkpoint into tmpfs: `save`, and `async_save` with a reused staging buffer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bench.scenarios import State
from bench.system import System


class _Dcp(System):
    modules = ("torch.distributed.checkpoint", "torch.distributed.checkpoint.staging")

    def _path(self, step: int) -> Path:
        return Path(self.place.memory) / f"step{step}"

    def _writer(self, step: int) -> Any:
        from torch.distributed.checkpoint import FileSystemWriter

        threads = 2 if self.place.ranks == 1 else 1
        return FileSystemWriter(self._path(step), thread_count=threads, sync_files=False)

    def drop(self, step: int) -> None:
        if self.place.rank == 0:
            shutil.rmtree(self._path(step - self.retain), ignore_errors=True)

    def load(self, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        # The metadata file is written last; without it a step is not complete.
        found = Path(self.place.memory).glob("step*/.metadata")
        newest = max(int(file.parent.name.removeprefix("step")) for file in found)
        dcp.load(state.tree, storage_reader=dcp.FileSystemReader(self._path(newest)))


class Sync(_Dcp):
    name = "dcp-sync"
    title = "torch DCP save"

    def save(self, step: int, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(state.tree, storage_writer=self._writer(step))


class _Async(_Dcp):
    process = False

    def prepare(self, state: State) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # The best it can do on a machine without a GPU: a buffer that is kept, filled in the background.
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=self.process,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)

    def save(self, step: int, state: State) -> Any:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        return dcp.async_save(
            state.tree,
            storage_writer=self._writer(step),
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS if self.process else AsyncCheckpointerType.THREAD,
        )

    def wait_safe(self, handle: Any) -> None:
        handle.staging_completion.result()

    def wait_memory(self, handle: Any) -> None:
        handle.upload_completion.result()


class Thread(_Async):
    name = "dcp-thread"
    title = "torch DCP async_save, thread"


class Process(_Async):
    name = "dcp-process"
    title = "torch DCP async_save, process"
    process = True

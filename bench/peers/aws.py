"""Amazon SageMaker HyperPod's managed tiered checkpointing: its client library, unmodified, as torch's storage writer.

The service behind it is a stand-in (`memory_server`). The name and port that the library asks for lead there in the
rank's own process only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import missing
from bench.scenarios import State
from bench.system import ROOT, Place, Service, System

_HOST = "ai-toolkit-gossip-headless.aws-hyperpod.svc.cluster.local"


class Server(Service):
    """The stand-in; its port is also in the file `port` of `folder`."""

    def __init__(self, folder: Path) -> None:
        port = folder / "port"
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.peers.memory_server", str(port)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid
        while not port.exists():
            if self._process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text())
            time.sleep(0.02)
        self.port = int(port.read_text())

    def stop(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def lead_to(port: int) -> None:
    """From here on, in this process, the service's name and port are those of the stand-in."""
    real = socket.getaddrinfo

    def resolve(host: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        return real("127.0.0.1", port, *args, **kwargs) if host == _HOST else real(host, asked, *args, **kwargs)

    socket.getaddrinfo = resolve


class Aws(System):
    """`async_save` with its writer and torch's default stager, as its guide says."""

    name = "aws"
    title = "AWS tiered checkpointing, stand-in server"
    site = "aws"
    checksums = True
    modules = ("torch.distributed.checkpoint", "amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem")

    @classmethod
    def unavailable(cls) -> str | None:
        return missing(cls)

    @classmethod
    def services(cls, place: Place) -> list[Service]:
        return [Server(Path(place.folder))]

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        lead_to(int((Path(place.folder) / "port").read_text()))

    def _config(self) -> Any:
        from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import SageMakerCheckpointConfig

        return SageMakerCheckpointConfig(namespace=self.place.run, world_size=self.place.ranks)

    def save(self, step: int, state: State) -> Any:
        import torch.distributed.checkpoint as dcp
        from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import SageMakerTieredStorageWriter

        writer = SageMakerTieredStorageWriter(checkpoint_config=self._config(), step=step)
        return dcp.async_save(state.tree, storage_writer=writer)

    def wait_memory(self, handle: Any) -> None:
        handle.result()

    def load(self, state: State) -> None:
        import torch.distributed.checkpoint as dcp
        from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import SageMakerTieredStorageReader

        dcp.load(state.tree, storage_reader=SageMakerTieredStorageReader(checkpoint_config=self._config()))

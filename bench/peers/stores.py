"""Other ways to a disk or an S3 store, as contenders (bench/contender.py).

    python -m bench.peers.stores NAME PLACE SCALE [CHECK]

Each does what the lines ask for: `save` and `load` the state of bench/scenarios.py, torch's; `put1`, `put8`, `get1`,
`get8` the same number of bytes, obstore's. PLACE is a directory or a URL as `s3://bucket/prefix`, whose endpoint and
credentials are in the environment. What comes back is compared with what was stored; CHECK = 0: a store that sends
zeros for everything is given zeros.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from bench.scenarios import build, change, clear, digest, expected_bytes

MEMORY_SERVER = "BENCH_MEMORY_SERVER"  # In the environment of "aws": the port of bench/peers/memory_server.py.
_PIECES = 8
_PART_BYTES = 16 << 20  # As ours: what is compared is the client, not the size of its requests.


class _Dcp:
    """torch.distributed.checkpoint's blocking `save`, and `load`. A step is written where none was."""

    def __init__(self, place: str, scale: float, check: bool) -> None:
        import torch.distributed.checkpoint  # noqa: F401  # Before anything is timed.

        self.place, self._check = place, check
        self._state = build("large", 0, scale)
        self.step = 0

    def path(self) -> str:
        return f"{self.place}/step-{self.step}"

    def writer(self) -> Any:
        from torch.distributed.checkpoint import FileSystemWriter

        return FileSystemWriter(self.path(), thread_count=2, sync_files=True)

    def reader(self) -> Any:
        from torch.distributed.checkpoint import FileSystemReader

        return FileSystemReader(self.path())

    def do(self, what: str) -> Callable[[], object]:
        return {"save": self._save, "load": self._load}[what]

    def before(self, what: str) -> None:
        if what == "save":
            self.step += 1
            change(self._state, self.step)
            self._expected = digest(self._state)
        else:
            clear(self._state)

    def after(self, what: str) -> None:
        if what == "load" and self._check and digest(self._state) != self._expected:
            raise SystemExit("what was loaded is not what was saved")

    def _save(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state.tree, storage_writer=self.writer())

    def _load(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.load(self._state.tree, storage_reader=self.reader())


class _Connector(_Dcp):
    """The same with s3torchconnector's writer and reader. The endpoint is the environment's: they take none."""

    def writer(self) -> Any:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageWriter

        config = S3ClientConfig(force_path_style=True, part_size=_PART_BYTES)
        return S3StorageWriter("us-east-1", self.path(), s3client_config=config, thread_count=2)

    def reader(self) -> Any:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader

        return S3StorageReader("us-east-1", self.path(), s3client_config=S3ClientConfig(force_path_style=True))


class _Aws(_Dcp):
    """The AWS library's writer with `save_to_s3`: into the memory of its service, a stand-in here, and then into S3.

    It has no way to read from S3 what its memory has, so it only saves.
    """

    def __init__(self, place: str, scale: float, check: bool) -> None:
        from bench.peers.aws import lead_to

        lead_to(int(os.environ[MEMORY_SERVER]))
        super().__init__(place, scale, check)

    def writer(self) -> Any:
        from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import SageMakerTieredStorageWriter
        from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import SageMakerCheckpointConfig

        config = SageMakerCheckpointConfig(
            namespace="bench", world_size=1, s3_tier_base_path=self.place, save_to_s3=True
        )
        return SageMakerTieredStorageWriter(checkpoint_config=config, step=self.step)


class _Obstore:
    """One object of all bytes, or eight of an eighth at once, from memory and into buffers of its own."""

    def __init__(self, place: str, scale: float, check: bool) -> None:
        from obstore.store import S3Store

        size = expected_bytes("large", scale) // _PIECES * _PIECES
        self._data = mmap.mmap(-1, size)
        if check:
            for at in range(0, size - 1023, 1024):
                self._data[at : at + 1024] = os.urandom(1024)
        self._piece = size // _PIECES
        url = urlsplit(place)
        self._prefix = url.path.strip("/")
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        self._store = S3Store(
            url.netloc,
            endpoint=endpoint,
            region="us-east-1",
            virtual_hosted_style_request=False,
            unsigned_payload=True,  # Else it hashes everything with SHA-256. Nobody else here signs bodies, either.
            client_options={"allow_http": True, "allow_invalid_certificates": True},
        )
        self._pool = ThreadPoolExecutor(_PIECES)
        self._got: list[Any] = []

    def before(self, what: str) -> None:
        self._got = []

    def after(self, what: str) -> None:
        at = 0
        for part in self._got:
            if memoryview(part) != memoryview(self._data)[at : at + len(part)]:
                raise SystemExit("what came back is not what was put")
            at += len(part)

    def do(self, what: str) -> Callable[[], object]:
        import obstore

        def put(name: str, begin: int, size: int) -> None:
            data = memoryview(self._data)[begin : begin + size]
            obstore.put(self._store, f"{self._prefix}/{name}", data, chunk_size=_PART_BYTES, max_concurrency=16)

        def get(name: str) -> Any:
            return obstore.get(self._store, f"{self._prefix}/{name}").bytes()

        def get_one() -> None:
            self._got = [get("one")]

        def get_eight() -> None:
            self._got = list(self._pool.map(get, map(str, range(_PIECES))))

        return {
            "put1": lambda: put("one", 0, len(self._data)),
            "put8": lambda: list(self._pool.map(lambda i: put(str(i), i * self._piece, self._piece), range(_PIECES))),
            "get1": get_one,
            "get8": get_eight,
        }[what]


STORES: dict[str, Any] = {"dcp": _Dcp, "connector": _Connector, "aws": _Aws, "obstore": _Obstore}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints is no answer.
    name, place, scale, *check = sys.argv[1:]
    store = STORES[name](place, float(scale), check != ["0"])
    for line in sys.stdin:
        what = line.strip()
        if not what:  # Are you ready?
            print("0 0", file=answers, flush=True)
            continue
        store.before(what)
        work = store.do(what)
        cpu, began = time.process_time(), time.perf_counter()
        work()
        answer = f"{time.perf_counter() - began:.6f} {time.process_time() - cpu:.6f}"
        store.after(what)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()

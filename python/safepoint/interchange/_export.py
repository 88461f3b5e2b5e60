"""Writing one step into a folder that other tools read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safepoint import _connect, _files
from safepoint._urls import shown
from safepoint.errors import InvalidArgument
from safepoint.interchange._dcp_export import write_dcp
from safepoint.interchange._hf_export import write_hf
from safepoint.interchange._source import Progress, StepSource

if TYPE_CHECKING:
    from safepoint._reads import Pin

ExportFormat = Literal["safetensors", "hf", "dcp"]
STEP_FILE = "safepoint-step.json"
FILE_BYTES_MAX = 5_000_000_000  # Hugging Face's own default.
_CALL_SECONDS = 30.0


@dataclass(frozen=True)
class ExportInfo:
    """What an export wrote: `bytes` of tensors; names of `tensors` that stand there as plain bytes (see
    docs/interchange.md).
    """

    directory: Path
    format: str
    namespace: str
    step: int
    attempt: bytes
    files: tuple[str, ...]
    tensors: int
    values: int
    bytes: int
    as_bytes: tuple[str, ...]


def export_step(
    namespace: str,
    directory: str | Path,
    *,
    step: int | None = None,
    format: ExportFormat = "safetensors",
    prefix: str = "",
    max_file_bytes: int = FILE_BYTES_MAX,
    allow_pickle: bool = False,
    socket: str | None = None,
    progress: Progress | None = None,
) -> ExportInfo:
    """Writes a complete step into `directory`, which must be new or empty, and which is there whole or not at all.

    `step`: the newest one unless given. `format`: "safetensors", each rank's shard as it is, a valid safetensors file;
    "hf", whole tensors in the layout of Hugging Face, in files of at most `max_file_bytes` of tensors; "dcp", a folder
    of torch.distributed.checkpoint, the only one with pickles in it, which are torch's. docs/interchange.md has what
    each carries. `prefix`: only what lies below this name, without it ("model"; not with "safetensors").
    `allow_pickle`: values that were saved with pickle are unpickled for "dcp", which can run code. `socket`: of the
    daemon, else the usual one; none is started. `progress` is called with the bytes done and in all.

    Reads are verified against the sealed checksums, in bounded memory: "hf" holds at most one tensor, "dcp" 256 MiB or
    one piece of a tensor. Raises NotFound (no such step, nothing below the prefix), InvalidArgument, NotPlain (a value
    that only pickle reads), Corrupt, Unavailable; OSError from the file system.
    """
    from safepoint import _core

    target = local_folder(directory)
    client = (
        _connect.open_client("export", start=False, deadline=_CALL_SECONDS)
        if socket is None
        else _core.Client(socket, client_name="export", deadline=_CALL_SECONDS)
    )
    try:
        with client.open_read(namespace, step=step) as pin:
            return export_pinned(
                pin,
                namespace,
                target,
                format=format,
                prefix=prefix,
                max_file_bytes=max_file_bytes,
                allow_pickle=allow_pickle,
                progress=progress,
            )
    finally:
        client.close()


def local_folder(directory: str | Path) -> Path:
    """InvalidArgument: it is a URL; as a path it would become a folder of that name here."""
    text = str(directory)
    if "://" in text or re.match(r"[A-Za-z][\w+.-]+:/", text):  # A path has lost one slash.
        raise InvalidArgument(
            f"{shown(text)} is a URL, and an export writes to a local folder: name one. A step reaches a store when it "
            "is saved with durable=True and the daemon has the setting store"
        )
    return Path(directory)


def export_pinned(
    pin: Pin,
    namespace: str,
    directory: Path,
    *,
    format: str,
    prefix: str = "",
    max_file_bytes: int = FILE_BYTES_MAX,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExportInfo:
    """As `export_step`, of a step that is held already."""
    if format not in ("safetensors", "hf", "dcp"):
        raise InvalidArgument(f'format must be "safetensors", "hf" or "dcp", not {format!r}')
    if prefix and format == "safetensors":
        raise InvalidArgument('prefix: "safetensors" writes whole shards; use "hf" or "dcp" for a part of the state')
    if max_file_bytes < 1:
        raise InvalidArgument(f"max_file_bytes must be positive, not {max_file_bytes}")
    source = StepSource(pin, prefix.rstrip("."), progress or (lambda done, total: None))
    with _files.publish(directory) as folder:
        if format == "safetensors":
            files = _write_shards(pin, namespace, folder, progress)
        elif format == "hf":
            files = write_hf(source, folder, max_file_bytes)
        else:
            files = write_dcp(source, folder, directory.absolute(), allow_pickle)
    as_bytes = [t.name for t in source.tensors if t.raw is not None and t.dtype == "U8"]
    return ExportInfo(
        directory=directory,
        format=format,
        namespace=namespace,
        step=pin.info.step,
        attempt=pin.info.attempt,
        files=tuple(files),
        tensors=len(source.tensors),
        values=len(source.values),
        bytes=source.total,
        as_bytes=() if format == "dcp" else tuple(as_bytes),
    )


def _write_shards(pin: Pin, namespace: str, folder: Path, progress: Progress | None) -> list[str]:
    """The sealed bytes of every shard, and what is known about them beside."""
    shards: list[dict[str, Any]] = []
    done = 0
    for rank in range(pin.info.world_size):
        reader = pin.shard(rank)
        name = f"rank-{rank}.safetensors"
        with (folder / name).open("xb") as file:
            reader.copy_to_file(file.fileno())
        done += reader.length
        if progress is not None:
            progress(done, pin.info.bytes)
        shards.append(
            {
                "rank": rank,
                "file": name,
                "bytes": reader.length,
                "seal_record": reader.record.hex(),
                "structure": reader.structure.hex(),
            }
        )
    document = {
        "version": 1,
        "namespace": namespace,
        "step": pin.info.step,
        "generation": pin.info.generation,
        "attempt": pin.info.attempt.hex(),
        "world_size": pin.info.world_size,
        "shards": shards,
    }
    (folder / STEP_FILE).write_text(json.dumps(document, indent=1) + "\n")
    return [*(shard["file"] for shard in shards), STEP_FILE]

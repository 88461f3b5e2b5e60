"""The Hugging Face layout: whole tensors in `model-00001-of-0000N.safetensors` and an index. Written as a stream.

Each file's `__metadata__` has, besides `format`, what safepoint needs to read everything back, in the form of
docs/formats/shard.md: `safepoint` (version, path, raw), and in the first file `safepoint.objects` (the plain values).
Other readers skip it.
"""

from __future__ import annotations

import json
from pathlib import Path

from safepoint._objects import Json
from safepoint._pieces import compact
from safepoint.errors import InvalidArgument
from safepoint.interchange._source import StepSource, Tensor

INDEX = "model.safetensors.index.json"
_ALIGN = 64
_HEADER_MAX = 100_000_000  # What the safetensors library reads.


def write_hf(source: StepSource, folder: Path, max_file_bytes: int) -> list[str]:
    """Writes the files into `folder` and returns their names. A tensor above `max_file_bytes` has a file of its own."""
    files = _split(source.tensors, max_file_bytes)
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for number, (name, tensors) in enumerate(zip(names, files, strict=True)):
        with (folder / name).open("xb") as file:
            file.write(_header(source, tensors, with_values=number == 0))
            for tensor in tensors:
                for chunk in source.chunks(tensor):
                    file.write(chunk)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in source.tensors)},
        "weight_map": {t.name: name for name, tensors in zip(names, files, strict=True) for t in tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*names, INDEX]


def _split(tensors: list[Tensor], bound: int) -> list[list[Tensor]]:
    """Files in the order of the state; in each by falling element size, so that everything is aligned to it."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.nbytes > bound:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.nbytes
    return [sorted(file, key=lambda t: -_alignment(t)) for file in files]


def _alignment(tensor: Tensor) -> int:
    return 1 if tensor.dtype == "U8" else tensor.item


def _header(source: StepSource, tensors: list[Tensor], with_values: bool) -> bytes:
    entries: dict[str, Json] = {}
    about: dict[str, dict[str, Json]] = {"path": {}, "raw": {}}
    begin = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.file_shape,
            "data_offsets": [begin, begin + tensor.nbytes],
        }
        begin += tensor.nbytes
        if tensor.path != tensor.name.split("."):
            about["path"][tensor.name] = tensor.path
        if tensor.raw is not None:
            about["raw"][tensor.name] = {"dtype": tensor.raw, "shape": tensor.shape}
    metadata = {
        "format": "pt",
        "safepoint": compact({"version": 1, **{key: value for key, value in about.items() if value}}),
    }
    if with_values and source.values:
        metadata["safepoint.objects"] = compact(
            [[v.path, v.coded] if v.rank is None else [v.path, v.coded, v.rank] for v in source.values]
        )
    text = compact({"__metadata__": metadata, **entries}).encode("ascii")
    padded = text.ljust(-(-(8 + len(text)) // _ALIGN) * _ALIGN - 8)
    if len(padded) > _HEADER_MAX:
        raise InvalidArgument(
            f"a header of {len(padded)} bytes, for {len(tensors)} tensors and {len(source.values)} values; "
            f"safetensors reads {_HEADER_MAX}: use --prefix, or smaller files"
        )
    return len(padded).to_bytes(8, "little") + padded

"""The tensors and values of a torch.distributed.checkpoint, from wherever its files are.

All are archives of torch.save, and go through `torch.load(weights_only=True)`, one by one. A value that it refuses is
not plain.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from safepoint.errors import Corrupt, NotPlain
from safepoint.interchange._dcp_metadata import Files, Metadata, Place, TensorEntry
from safepoint.interchange._source import Progress
from safepoint.interchange._state import Loaded, Values

_REFUSED_NAME = re.compile(r"GLOBAL (\S{1,100})")


def load_items(metadata: Metadata, files: Files, values: Values, progress: Progress) -> Loaded:
    """The state that the metadata tell of, in memory.

    Corrupt: an item is damaged, or not what the metadata say. NotPlain: a value that only an unrestricted unpickler
    reads; `values` decides whether it is left out or unpickled instead.
    """
    loaded = Loaded()
    total = sum(place.length for place in metadata.stored.values())
    done = 0

    def advance(place: Place) -> None:
        nonlocal done
        done += place.length
        progress(done, total)

    for name, entry in metadata.entries.items():
        path = metadata.paths.get(name, [name])
        if entry is not None:
            loaded.add(name, path, _tensor(files, name, entry, metadata.stored, advance))
            continue
        place = metadata.stored[name, None]
        try:
            value = _value(files.read(place), name, values)
            values.check(value, name)
        except NotPlain as error:
            values.refuse(name, error)
            # A list keeps its length: what is left out of one is None.
            if isinstance(path[-1], list):
                loaded.add(name, path, None)
        else:
            loaded.add(name, path, value)
        advance(place)
    return loaded


def _archive(data: bytes, name: str) -> io.BytesIO:
    """The bytes as a file for torch.load. Corrupt: no archive of torch.save, or one that would grow when unpacked."""
    stream = io.BytesIO(data)
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
    except (
        zipfile.BadZipFile,
        ArithmeticError,
        EOFError,
        LookupError,
        NotImplementedError,
        OSError,
        ValueError,
        struct.error,
    ) as error:
        raise Corrupt(f"{name}: no archive of torch.save: {error}") from error
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise Corrupt(f"{name}: a compressed archive, which torch.save never writes")
    if sum(part.file_size for part in parts) > len(data):
        raise Corrupt(f"{name}: parts of its archive share their bytes")
    stream.seek(0)
    return stream


def _torch_load(data: bytes, name: str, *, weights_only: bool) -> Any:
    stream = _archive(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its advice is about torch.load, which the user did not call.
        return torch.load(stream, map_location="cpu", weights_only=weights_only)


def _tensor(
    files: Files, name: str, entry: TensorEntry, stored: dict[Any, Place], advance: Callable[[Place], None]
) -> torch.Tensor:
    result = torch.empty(entry.shape, dtype=entry.dtype)
    for offsets, sizes in entry.chunks:
        place = stored[name, offsets]
        data = files.read(place)
        try:
            piece = _torch_load(data, name, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
            raise Corrupt(f"{name}: its piece at {list(offsets)} is no tensor of torch.save: {error}") from error
        plain = type(piece) is torch.Tensor and piece.layout == torch.strided and not piece.is_quantized
        if not plain or piece.dtype != entry.dtype or tuple(piece.shape) != sizes:
            raise Corrupt(f"{name}: its piece at {list(offsets)} is not the tensor that the metadata tell of")
        if sizes == entry.shape:
            advance(place)
            # A view was stored with all of its storage by writers that save it as it is.
            alone = piece.is_contiguous() and piece.untyped_storage().nbytes() == piece.nbytes
            return piece if alone else piece.clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        _units(result)[box] = _units(piece.contiguous())
        advance(place)
    return result


def _units(tensor: torch.Tensor) -> Any:
    """A view of the elements as opaque bytes: some dtypes of torch cannot be copied in part."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"V{tensor.element_size()}").reshape(tuple(tensor.shape))


def _value(data: bytes, name: str, values: Values) -> Any:
    try:
        return _torch_load(data, name, weights_only=True)
    except pickle.UnpicklingError as error:
        if not values.allow_pickle:
            found = _REFUSED_NAME.search(str(error))
            reason = f"names {found[1]}" if found else "is more than plain data"
            raise NotPlain(
                f"{name}: its pickle {reason}; leave such values out (--skip-not-plain), or unpickle them "
                "(--allow-pickle), which can run code"
            ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError) as error:
        raise Corrupt(f"{name}: a damaged value: {error}") from error
    try:
        return _torch_load(data, name, weights_only=False)
    except Exception as error:  # Whatever the pickled classes raise.
        raise NotPlain(f"{name}: cannot be unpickled here: {error!r}") from error

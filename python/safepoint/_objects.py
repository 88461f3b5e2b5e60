"""Plain Python values <-> tagged JSON. No pickle, unless the caller asked for it on both sides.

JSON's own types stand for themselves: None, bool, int (64 bits), str, finite float, list, dict with string keys.
Everything else is an object with the key "!" (the tag). Decoding follows this fixed table and refuses all else.
"""

from __future__ import annotations

import base64
import collections
import datetime
import io
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from safepoint import _torch
from safepoint.errors import NotPlain, ProtocolError

Json: TypeAlias = Any  # None | bool | int | float | str | list[Json] | dict[str, Json]

DEPTH_MAX = 100
_INT_MAX = 2**63
_SCALARS = frozenset({bool, int, str, type(None)})


def _b64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def array_dtype_name(dtype: np.dtype[Any]) -> str | None:
    """numpy's own name of a dtype that this name alone gives back; None for objects, structures and extension types."""
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or np.dtype(dtype.str) != dtype:
        return None
    return dtype.str


def array_dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name. ProtocolError for a name that `array_dtype_name` never gives."""
    try:
        dtype = np.dtype(name)
    except TypeError as error:
        raise ProtocolError(f"unknown array dtype {name!r}") from error
    if array_dtype_name(dtype) != name:
        raise ProtocolError(f"unknown array dtype {name!r}")
    return dtype


class Encoder:
    """Encodes values of one save. `where` in the calls is the path of the value, for the error."""

    def __init__(self, allow_pickle: bool = False) -> None:
        self._allow_pickle = allow_pickle

    def encode(self, value: object, where: str, depth: int = 0) -> Json:
        """JSON of the value. NotPlain names the path and the type of the part that has none."""
        kind = type(value)
        if kind is int:
            return value if -_INT_MAX <= value < _INT_MAX else {"!": "int", "v": hex(value)}  # type: ignore[operator,arg-type]
        if kind in _SCALARS:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"!": "float", "v": repr(value)}  # type: ignore[arg-type]
        if depth > DEPTH_MAX:
            raise NotPlain(f"{where}: nested deeper than {DEPTH_MAX} levels")
        encode = _ENCODERS.get(kind)
        if encode is None and isinstance(value, np.generic):
            encode = _encode_numpy_scalar
        coded = encode(self, value, where, depth) if encode is not None else None
        if coded is not None:
            return coded
        if self._allow_pickle:
            import pickle

            try:
                return {"!": "pickle", "v": _b64(pickle.dumps(value))}
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise NotPlain(f"{where}: {_type_name(value)} cannot be pickled: {error}") from error
        raise NotPlain(
            f"{where}: {_type_name(value)} is not a plain value; store plain values or tensors, give the object "
            "state_dict() and load_state_dict(), or use Checkpointer(allow_pickle=True)"
        )

    def items(self, values: Any, where: str, depth: int) -> list[Json]:
        return [self.encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(values)]

    def pairs(self, value: dict[Any, Any], where: str, depth: int) -> list[Json]:
        return [
            [self.encode(k, f"{where} key {k!r}", depth + 1), self.encode(v, f"{where}[{k!r}]", depth + 1)]
            for k, v in value.items()
        ]


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _encode_list(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    if set(map(type, value)) <= _SCALARS and not any(type(v) is int and not -_INT_MAX <= v < _INT_MAX for v in value):
        return value
    return coder.items(value, where, depth)


def _encode_dict(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    if all(type(k) is str and not k.startswith("!") for k in value):
        return {k: coder.encode(v, f"{where}[{k!r}]", depth + 1) for k, v in value.items()}
    return {"!": "dict", "v": coder.pairs(value, where, depth)}


def _encode_numpy_scalar(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    name = array_dtype_name(value.dtype)
    return None if name is None else {"!": "np.scalar", "dtype": name, "v": _b64(value.tobytes())}


def _encode_array(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    name = array_dtype_name(value.dtype)
    if name is None:
        return None
    return {
        "!": "np.array",
        "dtype": name,
        "shape": list(value.shape),
        "v": _b64(np.ascontiguousarray(value).tobytes()),
    }


def _encode_dtype(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    name = str(value).removeprefix("torch.")
    return {"!": "torch.dtype", "v": name} if name in _torch.ALL_DTYPES else None


def _encode_datetime(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    # A named time zone has rules that an offset does not carry.
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        return None
    return {"!": type(value).__name__, "v": value.isoformat(), "fold": value.fold}


def _encode_bytesio(coder: Encoder, value: Any, where: str, depth: int) -> Json:
    return {"!": "BytesIO", "v": _b64(value.getvalue()), "position": value.tell()}


def _encode_sequence(tag: str) -> Callable[[Encoder, Any, str, int], Json]:
    return lambda coder, value, where, depth: {"!": tag, "v": coder.items(value, where, depth)}


def _encode_pairs(tag: str) -> Callable[[Encoder, Any, str, int], Json]:
    return lambda coder, value, where, depth: {"!": tag, "v": coder.pairs(value, where, depth)}


_ENCODERS: dict[type, Callable[[Encoder, Any, str, int], Json]] = {
    list: _encode_list,
    dict: _encode_dict,
    tuple: _encode_sequence("tuple"),
    set: _encode_sequence("set"),
    frozenset: _encode_sequence("frozenset"),
    torch.Size: _encode_sequence("torch.Size"),
    collections.OrderedDict: _encode_pairs("OrderedDict"),
    collections.Counter: _encode_pairs("Counter"),
    collections.deque: lambda coder, v, where, depth: {
        "!": "deque",
        "v": coder.items(v, where, depth),
        "maxlen": v.maxlen,
    },
    bytes: lambda coder, v, where, depth: {"!": "bytes", "v": _b64(v)},
    bytearray: lambda coder, v, where, depth: {"!": "bytearray", "v": _b64(v)},
    complex: lambda coder, v, where, depth: {"!": "complex", "v": [repr(v.real), repr(v.imag)]},
    range: lambda coder, v, where, depth: {"!": "range", "v": [v.start, v.stop, v.step]},
    torch.dtype: _encode_dtype,
    torch.device: lambda coder, v, where, depth: {"!": "torch.device", "v": str(v)},
    np.ndarray: _encode_array,
    datetime.datetime: _encode_datetime,
    datetime.time: _encode_datetime,
    datetime.date: lambda coder, v, where, depth: {"!": "date", "v": v.isoformat()},
    datetime.timedelta: lambda coder, v, where, depth: {"!": "timedelta", "v": [v.days, v.seconds, v.microseconds]},
    io.BytesIO: _encode_bytesio,
}


class Decoder:
    """Decodes the values of one restore. ProtocolError for text that no encoder wrote."""

    def __init__(self, allow_pickle: bool = False) -> None:
        self._allow_pickle = allow_pickle

    def decode(self, coded: Json, where: str) -> Any:
        try:
            return self._decode(coded, where)
        except (NotPlain, ProtocolError):
            raise
        except (KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
            raise ProtocolError(f"{where}: stored value follows no known form: {error}") from error

    def _decode(self, coded: Json, where: str) -> Any:
        if isinstance(coded, list):
            return [self._decode(item, where) for item in coded]
        if not isinstance(coded, dict):
            return coded
        if "!" not in coded:
            return {key: self._decode(item, where) for key, item in coded.items()}
        tag = coded["!"]
        if tag == "pickle":
            if not self._allow_pickle:
                raise NotPlain(
                    f"{where}: stored with pickle, which can run code; Checkpointer(allow_pickle=True) reads it"
                )
            import pickle

            return pickle.loads(_unb64(coded["v"]))
        decode = _DECODERS.get(tag)
        if decode is None:
            raise ProtocolError(f"{where}: unknown kind of value {tag!r}")
        return decode(self, coded, where)

    def items(self, coded: Json, where: str) -> list[Any]:
        return [self._decode(item, where) for item in coded["v"]]

    def pairs(self, coded: Json, where: str) -> list[tuple[Any, Any]]:
        return [(self._decode(k, where), self._decode(v, where)) for k, v in coded["v"]]


def _decode_array(coder: Decoder, coded: Json, where: str) -> Any:
    flat = np.frombuffer(bytearray(_unb64(coded["v"])), dtype=array_dtype(coded["dtype"]))
    return flat.reshape(coded["shape"])


def _decode_numpy_scalar(coder: Decoder, coded: Json, where: str) -> Any:
    return np.frombuffer(_unb64(coded["v"]), dtype=array_dtype(coded["dtype"]))[0]


def _decode_bytesio(coder: Decoder, coded: Json, where: str) -> Any:
    stream = io.BytesIO(_unb64(coded["v"]))
    stream.seek(coded["position"])
    return stream


_DECODERS: dict[str, Callable[[Decoder, Json, str], Any]] = {
    "tuple": lambda d, c, w: tuple(d.items(c, w)),
    "set": lambda d, c, w: set(d.items(c, w)),
    "frozenset": lambda d, c, w: frozenset(d.items(c, w)),
    "torch.Size": lambda d, c, w: torch.Size(d.items(c, w)),
    "dict": lambda d, c, w: dict(d.pairs(c, w)),
    "OrderedDict": lambda d, c, w: collections.OrderedDict(d.pairs(c, w)),
    "Counter": lambda d, c, w: collections.Counter(dict(d.pairs(c, w))),
    "deque": lambda d, c, w: collections.deque(d.items(c, w), maxlen=c["maxlen"]),
    "bytes": lambda d, c, w: _unb64(c["v"]),
    "bytearray": lambda d, c, w: bytearray(_unb64(c["v"])),
    "complex": lambda d, c, w: complex(float(c["v"][0]), float(c["v"][1])),
    "float": lambda d, c, w: float(c["v"]),
    "int": lambda d, c, w: int(c["v"], 16),
    "range": lambda d, c, w: range(*c["v"]),
    "torch.dtype": lambda d, c, w: _torch.ALL_DTYPES[c["v"]],
    "torch.device": lambda d, c, w: torch.device(c["v"]),
    "np.array": _decode_array,
    "np.scalar": _decode_numpy_scalar,
    "datetime": lambda d, c, w: datetime.datetime.fromisoformat(c["v"]).replace(fold=c["fold"]),
    "time": lambda d, c, w: datetime.time.fromisoformat(c["v"]).replace(fold=c["fold"]),
    "date": lambda d, c, w: datetime.date.fromisoformat(c["v"]),
    "timedelta": lambda d, c, w: datetime.timedelta(*c["v"]),
    "BytesIO": _decode_bytesio,
}

"""T-6, I-39, I-40: whatever a header says, reading it ends in a plan or in safepoint's own exception and runs nothing.

Headers go through parse_shard, merging and restore planning, as `restore` does it before it changes anything. An audit
hook sees what they make the interpreter do. The profile is deterministic; HYPOTHESIS_EXAMPLES=N searches longer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import sys
from typing import Any

import pytest
import torch
from fake_core import Client, FakeDaemon
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import safepoint
from safepoint import _connect, _engine, errors
from safepoint._objects import Decoder
from safepoint._restore import plan_restore
from safepoint._shard import parse_shard

_FORBIDDEN = (
    "import",
    "open",
    "socket",
    "subprocess",
    "os.",
    "exec",
    "compile",
    "pickle",
    "marshal",
    "ctypes",
    "shutil",
)
_watching = False
_seen: list[tuple[str, str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(_FORBIDDEN):
        _seen.append((event, repr(arguments)[:200]))


sys.addaudithook(_audit)  # Cannot be taken away again; `_watching` says when it counts.

PROFILE = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "250")),
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _state() -> dict[str, Any]:
    return {
        "w": torch.arange(6.0).reshape(2, 3),
        "c": torch.ones(2, dtype=torch.complex128),
        "o": {"lr": 0.1, "betas": (0.9, 0.999), "name": "adam", "none": None, 3: [1, 2]},
    }


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """A real header as JSON, its embedded texts parsed too."""
    daemon = FakeDaemon()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_connect, "open_client", lambda name, **_: Client(daemon))
        patch.setattr(_engine, "_histories", {})
        checkpointer = safepoint.Checkpointer("job", rank=0, world_size=1)
        save = checkpointer.save(5, _state())
        save.wait()
        data = daemon.space("job").shards[(save.attempt, 0)]
        checkpointer.close()
    parsed: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    for key in ("safepoint", "safepoint.step", "safepoint.objects", "DCP_SHARDING_INFO"):
        parsed["__metadata__"][key] = json.loads(parsed["__metadata__"][key])
    _plan(_header(parsed))  # Whatever is imported late is imported before anybody watches.
    return parsed


def _static_offset(header: bytes) -> int:
    """Where a header of our own writer has its static part, so that its quick reader is fed, too."""
    return max(0, header.find(b',"format":"pt"'))


class _Reader:
    def __init__(self, header: bytes) -> None:
        self._header = header
        self.static_offset = _static_offset(header)

    def header(self) -> bytes:
        return self._header


class _Pin:
    """As much of a ReadPin as planning needs."""

    def __init__(self, header: bytes) -> None:
        self._header = header
        try:
            step = json.loads(json.loads(header[8:].decode())["__metadata__"]["safepoint.step"])
            self._attempt, self.step = bytes.fromhex(step["attempt"]), int(step["step"])
        except Exception:  # A header that says nothing of the kind: planning does not come so far.
            self._attempt, self.step = bytes(16), 0
        self.world_size = 1

    @property
    def info(self) -> Any:
        return self

    @property
    def attempt(self) -> bytes:
        return self._attempt

    def shard(self, rank: int) -> _Reader:
        return _Reader(self._header)

    def report_corrupt(self, rank: int, block: int) -> None:
        raise AssertionError("nothing here is corrupt: headers are verified before they are parsed")


def _framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _header(parsed: dict[str, Any]) -> bytes:
    whole = dict(parsed)
    metadata = whole.get("__metadata__")
    if isinstance(metadata, dict):
        whole["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    return _framed(json.dumps(whole).encode())


def _plan(header: bytes) -> None:
    plan_restore(_Pin(header), _state(), 0, 1, allow_missing=True, decoder=Decoder())  # type: ignore[arg-type]


def _feed(header: bytes) -> None:
    """What the invariant says of one header."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        for run in (
            lambda: parse_shard(header, 0),
            lambda: parse_shard(header, 0, _static_offset(header)),
            lambda: _plan(header),
        ):
            with contextlib.suppress(errors.SafepointError):
                run()
    finally:
        _watching = False
    assert _seen == []


_BIG = [2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1, -(2**63)]
_NAMES = ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "\x00", "__class__", "__reduce__", "w", "o.lr", "é" * 300]
_PICKLE = pickle.dumps(print).decode("latin-1")
_CODED: list[Any] = [
    {"!": "pickle", "v": _PICKLE},
    {"!": "type", "v": "os.system"},
    {"!": "tuple", "v": {"!": "tuple", "v": 3}},
    {"!": []},
    {"!": "bytes", "v": "=" * 9},
    {"!": "numpy", "dtype": "O", "shape": [2**62, 2**62], "v": "AA=="},
    {"!": "dtype", "v": "torch.load"},
]
_numbers = st.one_of(st.integers(-3, 30), st.sampled_from(_BIG), st.floats(allow_nan=True))
_scalars = st.one_of(st.none(), st.booleans(), _numbers, st.sampled_from(_NAMES), st.text(max_size=5))
_hostile = st.recursive(
    st.one_of(_scalars, st.sampled_from(_CODED), st.lists(_numbers, max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from([*_NAMES, "!", "v", "shape", "dtype"]), inner, max_size=4),
    ),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += _places(inner, (*path, index))
    return found


@PROFILE
@given(data=st.data())
def test_changed_values_and_keys(template: dict[str, Any], data: st.DataObject) -> None:
    # What is drawn may be drawn again, the very same object: changed in place it could come to hold itself.
    parsed = json.loads(json.dumps(template))
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(parsed)
        path = data.draw(st.sampled_from(places))
        holder = parsed
        for key in path[:-1]:
            holder = holder[key]
        kind = data.draw(st.sampled_from(["replace", "number", "delete", "rename", "add"]))
        if kind == "replace":
            holder[path[-1]] = copy.deepcopy(data.draw(_hostile))
        elif kind == "number":
            holder[path[-1]] = data.draw(_numbers)
        elif kind == "delete":
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(data.draw(_hostile)))
        elif kind == "rename":
            holder[data.draw(st.sampled_from(_NAMES))] = holder.pop(path[-1])
        else:
            holder[data.draw(st.sampled_from(_NAMES))] = copy.deepcopy(data.draw(_hostile))
        if not isinstance(parsed.get("__metadata__"), dict):
            break
    _feed(_header(parsed))


@PROFILE
@given(data=st.data())
def test_changed_bytes(template: dict[str, Any], data: st.DataObject) -> None:
    text = bytearray(_header(template)[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(text) - 1)))
        kind = data.draw(st.sampled_from(["set", "insert", "cut", "repeat"]))
        if kind == "set" and text:
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            text[at:at] = data.draw(st.binary(max_size=6))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, 40))]
        else:
            text[at:at] = text[at : at + data.draw(st.integers(1, 60))]
    length = data.draw(st.sampled_from([None, 0, 2**63, 2**64 - 1]))
    _feed(_framed(bytes(text)) if length is None else length.to_bytes(8, "little") + bytes(text))


@PROFILE
@given(st.binary(max_size=300))
@example(b"")
@example(b"\x00" * 7)
@example(pickle.dumps({"__metadata__": {}}))
@example(_framed(pickle.dumps(os.getcwd)))
@example(_framed(b"[" * 100_000))
@example(_framed(b'{"a":' * 100_000))
@example(_framed(b'{"__metadata__":{"safepoint":"' + b"[" * 100_000 + b'"}}'))
@example(_framed(b'{"a":' + b"9" * 10_000 + b"}"))
@example(_framed(b'{"a":1,"a":2,"__metadata__":{},"__metadata__":{}}'))
@example(_framed(b"PK\x03\x04" + b"\x00" * 40))
@example(_framed(b"\xff\xfe{}"))
def test_other_bytes(header: bytes) -> None:
    _feed(header)


def test_the_hook_sees_what_it_should() -> None:
    """A watcher that cannot see proves nothing."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        pickle.loads(pickle.dumps(os.getcwd))
        with open(os.devnull):
            pass
    finally:
        _watching = False
    assert {event for event, _ in _seen} >= {"pickle.find_class", "open"}

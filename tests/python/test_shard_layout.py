"""The bytes of a shard: other tools must be able to open them (docs/formats/shard.md)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from fake_core import FakeDaemon
from states import DTYPES, bits, random_tensor

import safepoint
from safepoint import errors
from safepoint._shard import Shard, parse_shard


def shard_of(fake: FakeDaemon, state: Any, **kwargs: Any) -> bytes:
    c = safepoint.Checkpointer("job", rank=0, world_size=1, **kwargs)
    save = c.save(5, state)
    save.wait()
    return fake.space("job").shards[(save.attempt, 0)]


def parsed(header: bytes) -> Shard:
    return parse_shard(header, 0, header.index(b',"format":"pt"') if b',"format":"pt"' in header else 0)


def test_safetensors_opens_it(fake: FakeDaemon, tmp_path: Any) -> None:
    skipped = {torch.complex32, torch.complex128, torch.float4_e2m1fn_x2}
    state = {str(d): random_tensor((3, 5), d) for d in DTYPES} | {
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }
    path = tmp_path / "rank-0.safetensors"
    path.write_bytes(shard_of(fake, {"m": state, "plain": [1, (2,)]}))
    loaded = safetensors.torch.load_file(path)
    for name, tensor in state.items():
        if tensor.dtype not in skipped:
            assert loaded[f"m.{name}"].dtype == tensor.dtype and bits(loaded[f"m.{name}"]) == bits(tensor), name
        else:
            assert bits(loaded[f"m.{name}"]) == bits(tensor), name
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["DCP_VERSION"] == "1.0"
    assert set(json.loads(metadata["DCP_SHARDING_INFO"])) == set(loaded)
    step = json.loads(metadata["safepoint.step"])
    assert (step["step"], step["rank"], step["world_size"], step["namespace"]) == (5, 0, 1, "job")


def test_without_tensors_it_is_a_safetensors_file_too(fake: FakeDaemon) -> None:
    assert safetensors.torch.load(shard_of(fake, {"a": 1})) == {}


def test_alignment_and_order(fake: FakeDaemon) -> None:
    data = shard_of(fake, {f"{d} {n}": random_tensor((n,), d) for d in DTYPES for n in (1, 7, 64, 65)})
    shard = parsed(data[: 8 + int.from_bytes(data[:8], "little")])
    pieces = sorted((p for pieces in shard.pieces.values() for p in pieces), key=lambda p: p.begin)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 4096 == 0
    end = start
    for name, (piece,) in shard.pieces.items():
        item = torch.empty((), dtype=getattr(torch, name.split()[0].removeprefix("torch."))).element_size()
        assert piece.begin % item == 0, name
    for piece in pieces:
        assert piece.begin == end
        end += piece.nbytes
    assert end == len(data)


def test_static_part_depends_on_the_structure_only(fake: FakeDaemon) -> None:
    c = safepoint.Checkpointer("job", rank=0, world_size=1)
    saves = [c.save(n, {"x": torch.full((3,), n), "v": "long" * n * 1000, "w": n}) for n in range(3)]
    for save in saves:
        save.wait()
    found = {fake.space("job").structures[(s.attempt, 0)][1] for s in saves}
    offsets = [fake.space("job").structures[(s.attempt, 0)][0] for s in saves]
    assert len(found) == 1 and offsets[0] % 4096 == 0 and offsets[2] > offsets[0]
    data = fake.space("job").shards[(saves[0].attempt, 0)]
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert (len(header) - offsets[0]) % 4096 == 0 and hashlib.sha256(header[offsets[0] :]).digest() in found
    assert header[offsets[0] :].startswith(b',"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":')


def test_paths_keep_key_types(fake: FakeDaemon) -> None:
    state = {
        "o": {0: torch.zeros(1), "0x": {(1, 2): torch.zeros(1)}},
        "l": [torch.zeros(1), (torch.zeros(1), 1)],
        "plain": torch.zeros(1),
    }
    data = shard_of(fake, state)
    text = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["safepoint"])
    assert text["path"] == {
        "o.0": ["o", 0],
        "o.0x.(1, 2)": ["o", "0x", {"!": "tuple", "v": [1, 2]}],
        "l.0": ["l", [0]],
        "l.1.0": ["l", [1], [0, 2]],
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda h: h[:-1],
        lambda h: h.replace(b'"safepoint"', b'"safepoinT"'),
        lambda h: h.replace(b'\\"version\\":1', b'\\"version\\":2'),
        lambda h: h[:8] + b"[" + h[9:],
        lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":{0:'),
        lambda h: h.replace(b'\\"rank\\":0', b'\\"rank\\":1'),
    ],
)
def test_what_follows_no_known_form_is_a_protocol_error(fake: FakeDaemon, damage: Any) -> None:
    data = shard_of(fake, {"x": torch.zeros(3)})
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    parsed(header)
    with pytest.raises(errors.ProtocolError):
        parsed(damage(header))


def test_numpy_arrays_keep_their_natural_type(fake: FakeDaemon) -> None:
    data = shard_of(fake, {"a": np.arange(2000.0), "big-endian": np.arange(2000, dtype=">i4")})
    loaded = safetensors.torch.load(data)
    assert (
        torch.equal(loaded["a"], torch.arange(2000.0, dtype=torch.float64))
        and loaded["big-endian"].dtype == torch.uint8
    )

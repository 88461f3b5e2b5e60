"""Every dtype and form of tensor through `safepoint.dcp.async_save` and a daemon: bit-equal after each way to load, and
in the shard as plain safetensors opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed.checkpoint as torch_dcp
from states import random_tensor
from test_states import PLAIN, raw_bytes

import safepoint
from safepoint import dcp
from safepoint._torch import DTYPE_NAMES
from safepoint.interchange import export_step

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:ComplexHalf")

Forms = dict[str, torch.Tensor]


def forms(dtype: torch.dtype, seed: int) -> Forms:
    whole = random_tensor((6, 4), dtype, seed)
    result = {
        "whole": whole,
        "tied": whole,
        "view": whole[2:5],
        "scalar": random_tensor((), dtype, seed),
        "empty": random_tensor((0, 3), dtype, seed),
        "transposed": random_tensor((5, 3), dtype, seed).t(),
        "strided": random_tensor((8, 6), dtype, seed)[::2, 1::3],
        "odd": random_tensor((7,), dtype, seed),
    }
    if dtype.is_complex:
        result["conjugate"] = random_tensor((3, 2), dtype, seed).conj()
    return result


def state(seed: int) -> dict[str, dict[str, Forms]]:
    return {"m": {str(dtype).removeprefix("torch."): forms(dtype, seed) for dtype in PLAIN}}


def leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}.{key}" if path else key).items()}


def check(loaded: Any, saved: Any) -> None:
    found, expected = leaves(loaded), leaves(saved)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


@pytest.fixture
def saved(namespace: str) -> dict[str, dict[str, Forms]]:
    value = state(1)
    dcp.async_save(value, storage_writer=dcp.Writer(namespace, step=1)).result(60)
    assert len(PLAIN) > 35 and {"complex128", "float4_e2m1fn_x2", "int1", "bits16"} <= set(value["m"])
    return value


def test_every_dtype_and_form_loads_by_every_door(namespace: str, saved: dict[str, dict[str, Forms]]) -> None:
    target = state(2)
    dcp.load(target, storage_reader=dcp.Reader(namespace))
    check(target, saved)
    for planning in ("own", "dcp"):
        target = state(2)
        torch_dcp.load(target, storage_reader=dcp.Reader(namespace, planning=planning))  # type: ignore[arg-type]
        check(target, saved)
    target = state(2)
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as checkpointer:
        assert checkpointer.restore(target) is not None
    check(target, saved)


def test_every_shard_opens_in_safetensors(namespace: str, saved: dict[str, dict[str, Forms]], tmp_path: Path) -> None:
    """What safetensors has a dtype for, as that; everything else as bytes. A tied tensor is there once."""
    export_step(namespace, tmp_path / "out")
    expected = leaves(saved)
    with safetensors.safe_open(tmp_path / "out" / "rank-0.safetensors", "pt") as shard:
        names = set(shard.keys())
        tied = {name for name in expected if name.rpartition(".")[2] in ("whole", "tied")}
        assert names <= set(expected) and set(expected) - names <= tied
        assert len(names) == len(expected) - len(PLAIN)
        for name in names:
            found, tensor = shard.get_tensor(name), expected[name]
            if tensor.dtype in DTYPE_NAMES:
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            else:
                assert found.dtype == torch.uint8, name
            assert raw_bytes(found) == raw_bytes(tensor), name

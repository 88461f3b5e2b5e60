"""What safepoint takes from torch beyond its documented API: safepoint/_torch.py and safepoint/dcp/_torch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

from safepoint import _torch


@pytest.fixture
def group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_store_of_the_default_group(group: None) -> None:
    store = _torch.store_of_group()
    assert store is not None
    assert store.compare_set("k", "", "first") == b"first" and store.compare_set("k", "", "second") == b"first"
    assert store.check(["k"]) and not store.check(["none"]) and store.get("k") == b"first"
    assert store.has_extended_api() in (True, False)


def test_no_group_has_no_store() -> None:
    assert _torch.store_of_group() is None


def test_layouts_of_dtensors(group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(0)])
    assert _torch.is_dtensor(sharded) and _torch.is_wrapper(sharded) and not _torch.is_wrapper(torch.zeros(1))
    assert _torch.local_tensor(sharded).shape == (3, 5) and not _torch.is_dtensor(_torch.local_tensor(sharded))
    layout = _torch.dtensor_layout(sharded)
    assert layout == _torch.dtensor_layout(sharded) and hash(layout) == hash(_torch.dtensor_layout(sharded))
    other = distribute_tensor(torch.zeros(3, 5), mesh, [Shard(1)])
    assert layout != _torch.dtensor_layout(other)
    assert _torch.placements_of(layout) == [(0, 1)] and _torch.mesh_place(layout) == ((1,), (0,))
    assert _torch.stated_order(layout) == {0: (0,)}
    again = _torch.dtensor_from_local(torch.ones(3, 5), sharded)
    assert again.placements == sharded.placements and again.shape == sharded.shape
    strided = DTensor(
        torch.zeros(3, 5),
        DTensorSpec(mesh, (_StridedShard(0, split_factor=2),), TensorMeta(torch.Size([3, 5]), (5, 1), torch.float32)),
        requires_grad=False,
    )
    layout = _torch.dtensor_layout(strided)
    assert _torch.placements_of(layout) == [(0, 2)] and layout.factors_are_order
    partial = DTensor.from_local(torch.zeros(3), mesh, [Partial()])
    assert "Partial" in str(_torch.placements_of(_torch.dtensor_layout(partial)))


def test_versions_are_bumped() -> None:
    tensor = torch.zeros(2, requires_grad=True)
    squared = tensor.square().sum()
    with torch.inference_mode():
        frozen = torch.zeros(2)
    _torch.bump_versions([tensor, frozen])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_when_copying_is_all_that_loading_does() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    assert _torch.loads_by_copy(plain, plain.state_dict())
    assert not _torch.loads_by_copy(plain, {k: v.clone() for k, v in plain.state_dict().items()})
    plain[0].register_load_state_dict_post_hook(lambda module, keys: None)
    assert not _torch.loads_by_copy(plain, plain.state_dict())
    cell = torch.nn.Linear(2, 2)
    cell.register_state_dict_post_hook(lambda *args: None)
    assert not _torch.loads_by_copy(cell, cell.state_dict())


def test_dtypes() -> None:
    assert len(set(_torch.DTYPE_NAMES.values())) == len(_torch.DTYPE_NAMES)
    assert _torch.ALL_DTYPES["float32"] is torch.float32 and _torch.ALL_DTYPES["complex128"] is torch.complex128


def test_what_dcp_takes_from_torch() -> None:
    """safepoint/dcp/_torch.py: the planners' methods that decide what is read, and the setter of nested elements."""
    from torch.distributed.checkpoint._traverse import set_element
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

    from safepoint.dcp import _torch as dcp_torch

    assert all(callable(getattr(DefaultLoadPlanner, name)) for name in dcp_torch._LOAD_METHODS)
    made: dict[str, object] = {}
    set_element(made, ("a", 1, "b"), 3)
    assert made == {"a": [None, {"b": 3}]}
    save = DefaultSavePlanner()
    save.set_up_planner({"a": [{"b": torch.ones(2)}]})
    assert list(save.state_dict) == ["a.0.b"] and save.mappings == {"a.0.b": ("a", 0, "b")}
    load = DefaultLoadPlanner()
    state = {"a": [{"b": 1}]}
    load.set_up_planner(state)
    assert load.original_state_dict is state and load.mappings == {"a.0.b": ("a", 0, "b")}
    dcp_torch.place_loaded(load, "a.0.b", 5)
    assert state == {"a": [{"b": 5}]}


def test_a_planner_of_ones_own_is_told_apart() -> None:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

    from safepoint.dcp import _torch as dcp_torch

    for name in (*dcp_torch._LOAD_METHODS, "set_up_planner"):
        changed = type("Changed", (DefaultLoadPlanner,), {name: lambda self, *args: None})
        assert not dcp_torch.loads_by_default(changed()), name
    assert dcp_torch.loads_by_default(DefaultLoadPlanner()) and dcp_torch.plans_by_default(DefaultSavePlanner())
    assert not dcp_torch.plans_by_default(type("Changed", (DefaultSavePlanner,), {})())

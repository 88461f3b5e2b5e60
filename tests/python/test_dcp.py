"""safepoint.dcp in one process, with the real extension and daemon: what torch calls, and what comes of it."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from states import DTYPES, bits, random_tensor, same
from test_checkpointer import everything, model_and_optimizer, train_step
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import safepoint
from safepoint import _core, dcp, errors

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": {
            "w": torch.randn(33, 7),
            "b": torch.randn(5).to(torch.bfloat16),
            "0": {"x": torch.arange(seed + 5)[:5]},
        },
        "lr": 0.1 * seed,
        "name": f"run {seed}",
        "pair": (seed, torch.full((3,), float(seed))),
        "groups": [{"lr": seed, "betas": (0.9, seed)}, {"lr": 2}],
        "array": np.arange(3000) * seed,
    }


TOLD = (errors.SafepointError, CheckpointException)  # The latter is what torch makes of the former in its own steps.


def save(writer: dcp.Writer, value: dict[str, Any], how: str, **options: Any) -> None:
    """Saves with one of the front doors and waits until it is complete."""
    if how == "ours":
        dcp.async_save(value, storage_writer=writer, **options).result(30)
    elif how == "torch":
        torch_dcp.async_save(value, storage_writer=writer, **options).result(30)
    else:
        torch_dcp.save(value, storage_writer=writer, **options)


def load(namespace: str, value: dict[str, Any], how: str, **options: Any) -> None:
    if how == "native":
        with safepoint.Checkpointer(namespace, rank=0, world_size=1) as checkpointer:
            assert checkpointer.restore(value) is not None
        return
    reader = dcp.Reader(namespace, planning="dcp" if how == "torch, its plan" else "own", **options)
    (dcp.load if how == "ours" else torch_dcp.load)(value, storage_reader=reader)


@pytest.mark.parametrize("planning", ["own", "dcp"])
def test_a_writer_that_knows_the_size_makes_memory_ready(daemon: str, namespace: str, planning: Any) -> None:
    """Three slots before the first save, and no more for further writers or later saves; a reader may come before."""

    def slots() -> int:
        with contextlib.closing(_core.Client(daemon)) as client:
            pool = json.loads(client.status())["pool"]
        return int(pool["bytes"] - pool["free"] - pool["creating"])

    dcp.Reader(namespace)
    assert slots() == 0
    size = 8 << 20
    value = {"x": torch.ones(size // 4)}
    for step in range(1, 5):
        writer = dcp.Writer(namespace, step=step, planning=planning, size_hint=size)
        assert 3 * size <= slots() < 3 * (size + (6 << 20))
        save(writer, value, "torch")
    assert slots() < 3 * (size + (6 << 20))


@pytest.mark.parametrize("wrong", [-1, "1GB", 1 << 50])
def test_size_hints_that_are_none(wrong: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="size_hint"):
        dcp.Writer("hints", size_hint=wrong)


def test_a_size_hint_is_the_given_checkpointers(namespace: str) -> None:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as made:
        with pytest.raises(errors.InvalidArgument, match="size_hint"):
            dcp.Writer(made, size_hint=1000)


@pytest.mark.parametrize("saved", ["ours", "torch", "sync", "torch, its plan", "sync, its plan"])
@pytest.mark.parametrize("loaded", ["ours", "torch", "torch, its plan", "native"])
def test_every_door_in_and_out(namespace: str, saved: str, loaded: str) -> None:
    """One format: what one front end saved, the other loads, bit for bit, with the same types."""
    how, _, plan = saved.partition(",")
    save(dcp.Writer(namespace, step=3, planning="dcp" if plan else "own"), state(1), how)
    target = state(2)
    load(namespace, target, loaded)
    same(state(1), target)


def test_native_save_loads_through_dcp(namespace: str) -> None:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as checkpointer:
        checkpointer.save(1, state(1)).wait(timeout=30)
    for loaded in ("ours", "torch", "torch, its plan"):
        target = state(2)
        load(namespace, target, loaded)
        same(state(1), target)


def test_poisoned_unpickler(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-34: neither saving nor loading unpickles anything, with torch's own functions either."""

    def poison(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the unpickler was used")

    monkeypatch.setattr(torch, "load", poison)
    monkeypatch.setattr(pickle, "Unpickler", poison)
    for how in ("ours", "torch", "sync"):
        save(dcp.Writer(namespace, step=1), state(1), how)
        for loaded in ("ours", "torch"):
            target = state(2)
            load(namespace, target, loaded)
            same(state(1), target)


def test_stage_is_the_save(namespace: str) -> None:
    """torch sees an empty dict; the state may change as soon as `async_save` has returned (I-9)."""
    writer = dcp.Writer(namespace, step=1)
    assert isinstance(writer, AsyncStager) and not writer.should_synchronize_after_execute
    value = state(1)
    future = torch_dcp.async_save(value, storage_writer=writer)
    value["model"]["w"].zero_()
    assert future.result(30).state_dict_metadata == {}
    target = state(2)
    load(namespace, target, "torch")
    same(state(1), target)


def test_statefuls(namespace: str) -> None:
    """Objects with state_dict and load_state_dict at the top, as torch.distributed.checkpoint takes them."""
    for step, (saved, loaded) in enumerate([("ours", "ours"), ("torch", "ours"), ("ours", "torch")], 1):
        model, optimizer, scheduler = model_and_optimizer(1, 3)
        save(dcp.Writer(namespace, step=step), {"model": model, "optim": optimizer, "sched": scheduler}, saved)
        other = model_and_optimizer(2, 3)
        load(namespace, dict(zip(("model", "optim", "sched"), other, strict=True)), loaded)
        for i in range(3, 5):
            train_step(model, optimizer, scheduler, i)
            train_step(*other, i)
        same(model, other[0])
        same(optimizer.state_dict(), other[1].state_dict())


def test_every_kind_of_state(namespace: str) -> None:
    save(dcp.Writer(namespace, step=1), everything(1), "ours")
    target = everything(2)
    load(namespace, target, "ours")
    same(everything(1), target)


class Renaming(DefaultSavePlanner):
    """Drops a key, and saves every floating tensor in half precision."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner({k: v for k, v in state_dict.items() if k != "dropped"}, *args, **kwargs)
        self.state_dict = {k: v.half() if torch.is_tensor(v) else v for k, v in self.state_dict.items()}


@pytest.mark.parametrize("how", ["ours", "torch", "sync"])
def test_custom_planner_needs_dcps_planning(namespace: str, how: str) -> None:
    value = {"w": torch.ones(5), "dropped": torch.ones(3), "n": 7}
    writer = dcp.Writer(namespace, step=1)
    with pytest.raises(TOLD, match=r'planner Renaming would not be asked.*planning="dcp"'):
        save(writer, value, how, planner=Renaming())
    with pytest.raises(errors.NotFound):
        dcp.load({"w": torch.zeros(5)}, storage_reader=dcp.Reader(namespace))
    save(dcp.Writer(namespace, step=2, planning="dcp"), value, how, planner=Renaming())
    metadata = dcp.Reader(namespace).metadata()
    assert sorted(metadata.state_dict_metadata) == ["n", "w"]
    target = {"w": torch.zeros(5, dtype=torch.half), "n": 0}
    torch_dcp.load(target, storage_reader=dcp.Reader(namespace))
    assert target["n"] == 7 and torch.equal(target["w"], torch.ones(5, dtype=torch.half))


class Doubling(DefaultLoadPlanner):
    """Loads into a buffer of its own and doubles what was read."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        self.buffers = getattr(self, "buffers", {})
        self.buffers[read_item.dest_index] = torch.empty(tuple(read_item.lengths))
        return self.buffers[read_item.dest_index]

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor * 2)


def test_custom_load_planner(namespace: str) -> None:
    save(dcp.Writer(namespace, step=1), {"w": torch.arange(6.0).view(2, 3)}, "ours")
    target = {"w": torch.zeros(2, 3)}
    with pytest.raises(TOLD, match=r'planner Doubling would not be asked.*planning="dcp"'):
        torch_dcp.load(target, storage_reader=dcp.Reader(namespace), planner=Doubling())
    assert not target["w"].any()
    for function in (torch_dcp.load, dcp.load):
        function(target, storage_reader=dcp.Reader(namespace, planning="dcp"), planner=Doubling())
        assert torch.equal(target["w"], torch.arange(6.0).view(2, 3) * 2)


def test_partial_load_reads_only_its_bytes(namespace: str) -> None:
    value = {"model": {"w": torch.randn(1 << 20)}, "optim": {"m": torch.randn(1 << 22)}}
    save(dcp.Writer(namespace, step=1), value, "ours")
    target = {"model": {"w": torch.zeros(1 << 20)}}
    reader = dcp.Reader(namespace)
    dcp.load(target, storage_reader=reader)
    assert reader.info is not None and reader.info.bytes == 4 << 20
    assert bits(target["model"]["w"]) == bits(value["model"]["w"])
    missing = {"model": {"w": torch.zeros(1 << 20)}, "extra": torch.full((2,), 5.0)}
    with pytest.raises(TOLD, match="extra"):
        torch_dcp.load(missing, storage_reader=dcp.Reader(namespace))
    assert not missing["model"]["w"].any()
    torch_dcp.load(missing, storage_reader=dcp.Reader(namespace), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert bits(missing["model"]["w"]) == bits(value["model"]["w"]) and missing["extra"].tolist() == [5.0, 5.0]


def test_other_dtypes_are_converted_as_dcp_does(namespace: str) -> None:
    value = {"w": torch.randn(5, 3), "n": torch.arange(4)}
    save(dcp.Writer(namespace, step=1), value, "ours")
    for planning in ("own", "dcp"):
        target = {"w": torch.zeros(5, 3, dtype=torch.bfloat16), "n": torch.zeros(4)}
        torch_dcp.load(target, storage_reader=dcp.Reader(namespace, planning=planning))  # type: ignore[arg-type]
        same({"w": value["w"].bfloat16(), "n": value["n"].float()}, target)


def test_steps_and_ids(namespace: str) -> None:
    """A writer whose step and id disagree: an error, and nothing is sealed."""
    writer = dcp.Writer(namespace)
    with pytest.raises(errors.InvalidArgument, match="the step is not known"):
        torch_dcp.async_save(state(1), checkpoint_id="run/step-4", storage_writer=writer)
    dcp.async_save(state(1), checkpoint_id="run/step-4", storage_writer=writer).result(30)
    torch_dcp.save(state(1), checkpoint_id="run/5", storage_writer=writer)
    writer.step = 6
    for function in (torch_dcp.async_save, dcp.async_save):
        with pytest.raises(TOLD, match="names step 7, but step 6 is set"):
            function(state(1), checkpoint_id="step-7", storage_writer=writer).result(30)
    with pytest.raises(TOLD, match="names step 7, but step 6 is set"):
        torch_dcp.save(state(1), checkpoint_id="step-7", storage_writer=writer)
    for wrong in ("safepoint://other/step-6", "safepoint://nonsense"):
        with pytest.raises(TOLD):
            torch_dcp.async_save(state(1), checkpoint_id=wrong, storage_writer=writer).result(30)
    torch_dcp.async_save(state(6), checkpoint_id=f"safepoint://{namespace}/step-6", storage_writer=writer).result(30)
    torch_dcp.async_save(state(6), checkpoint_id="some/folder", storage_writer=writer).result(30)
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as checkpointer:
        assert [info.step for info in checkpointer.steps()] == [6, 5]
    target = state(2)
    torch_dcp.load(target, checkpoint_id="step-6", storage_reader=dcp.Reader(namespace))
    same(state(6), target)
    with pytest.raises(TOLD, match="NotFound"):
        torch_dcp.load(target, checkpoint_id="step-9", storage_reader=dcp.Reader(namespace))
    with pytest.raises(errors.InvalidArgument, match="names step 5, but step 6 is set"):
        dcp.load(target, checkpoint_id="step-5", storage_reader=dcp.Reader(namespace, step=6))


def test_load_by_number_rolls_back(namespace: str) -> None:
    """I-6: after a load of an older step by number, saving goes on from there, whichever writer saves."""
    writer = dcp.Writer(namespace)
    for step in (1, 2):
        dcp.async_save(state(step), checkpoint_id=f"step-{step}", storage_writer=writer).result(30)
    for how in ("ours", "torch"):
        target = state(9)
        load(namespace, target, how, step=1)
        same(state(1), target)
        dcp.async_save(state(3), checkpoint_id="step-1", storage_writer=writer).result(30)
        latest = writer.checkpointer.latest()
        assert latest is not None and latest.step == 1
        dcp.async_save(state(1), checkpoint_id="step-1", storage_writer=writer).result(30)


def test_changed_structure_between_steps(namespace: str) -> None:
    writer = dcp.Writer(namespace)
    for step in range(1, 4):
        value = state(step)
        value["model"] |= {f"late{i}": torch.full((i + 1,), float(step)) for i in range(step)}
        dcp.async_save(value, checkpoint_id=f"step-{step}", storage_writer=writer).result(30)
        target = state(9)
        target["model"] |= {f"late{i}": torch.zeros(i + 1) for i in range(step)}
        load(namespace, target, "torch")
        same(value, target)


def test_not_plain_is_refused_in_stage(namespace: str) -> None:
    for how in ("ours", "torch", "sync"):
        with pytest.raises(TOLD, match=r"bad\.lock"):
            save(dcp.Writer(namespace, step=1), {"bad": {"lock": threading.Lock()}}, how)


def test_metadata(namespace: str) -> None:
    writer = dcp.Writer(namespace, step=1)
    with pytest.raises(errors.InvalidArgument):
        writer.metadata()
    dcp.async_save(state(1), storage_writer=writer)
    entries = writer.metadata().state_dict_metadata
    weight = entries["model.w"]
    assert isinstance(weight, TensorStorageMetadata) and weight.size == torch.Size([33, 7])
    assert weight.properties.dtype == torch.float32 and [c.sizes for c in weight.chunks] == [torch.Size([33, 7])]
    assert isinstance(entries["lr"], BytesStorageMetadata) and isinstance(entries["array"], BytesStorageMetadata)
    assert isinstance(entries["pair"], BytesStorageMetadata) and "pair" not in list(entries)
    assert "nothing" not in entries
    with pytest.raises(KeyError):
        entries["nothing"]


def test_whole_checkpoint_without_a_state(namespace: str) -> None:
    """torch's own ways to read everything that is there: from the metadata alone."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    save(dcp.Writer(namespace, step=1), {"model": {"w": torch.ones(3)}, "list": [{"lr": 3}], "n": 4}, "ours")
    whole: dict[str, Any] = {}
    _load_state_dict(whole, dcp.Reader(namespace), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    same({"model": {"w": torch.ones(3)}, "n": 4, "list": [{"lr": 3}]}, whole)


def test_two_saves_in_flight(namespace: str) -> None:
    """One writer, many saves: each thread of torch's finds its own."""
    for mode in ("ours", "torch"):
        writer = dcp.Writer(namespace)
        futures = []
        for step in range(1, 21):
            writer.step = step
            function = dcp.async_save if mode == "ours" else torch_dcp.async_save
            futures.append(function(state(step), checkpoint_id=f"x/step-{step}", storage_writer=writer))
        for future in futures:
            with contextlib.suppress(errors.Closed):  # Retired before it was asked for.
                future.result(60)
        target = state(99)
        load(namespace, target, "ours")
        same(state(20), target)


def test_guarded(namespace: str) -> None:
    """I-9: `step()` waits for the copy; what the optimizer does not own was copied before the call returned."""
    parameters = [torch.nn.Parameter(torch.randn(1 << 18)) for _ in range(20)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for p in parameters:
        p.grad = torch.ones_like(p)
    writer = dcp.Writer(namespace, mode="guarded", optimizers=optimizer)
    loose = torch.randn(1 << 16)
    for step, function in enumerate((dcp.async_save, torch_dcp.async_save) * 2, 1):
        writer.step = step
        expected = [p.detach().clone() for p in parameters], loose.clone()
        future = function({"p": list(parameters), "loose": loose}, storage_writer=writer)
        loose.add_(1)
        optimizer.step()
        future.result(30)
        target = {"p": [torch.zeros(1 << 18) for _ in parameters], "loose": torch.zeros(1 << 16)}
        dcp.load(target, storage_reader=dcp.Reader(namespace))
        assert [bits(t) for t in target["p"]] == [bits(t) for t in expected[0]]
        assert bits(target["loose"]) == bits(expected[1])


def per_rank_state(fill: int) -> dict[str, Any]:
    return {
        "rng": torch.full((4,), fill),
        "data": {"pos": fill, "seen": [fill, 2]},
        "model": {"bn.running_var": torch.full((3,), float(fill))},
        "n": fill,
    }


def test_per_rank_names(namespace: str) -> None:
    writer = dcp.Writer(namespace, step=1, per_rank=["rng", "data.*", "*.running_var"])
    dcp.async_save(per_rank_state(1), storage_writer=writer).result(30)
    names = list(dcp.Reader(namespace).metadata().state_dict_metadata)
    assert sorted(names) == ["data.pos", "data.seen", "model.bn.running_var", "n", "rng"]
    for how in ("ours", "torch", "torch, its plan", "native"):
        target = per_rank_state(0)
        load(namespace, target, how)
        same(per_rank_state(1), target)
    # A rank that did not exist at save time keeps what it has.
    for planning in ("own", "dcp"):
        target = per_rank_state(9)
        reader = dcp.Reader(namespace, rank=3, world_size=4, planning=planning)  # type: ignore[arg-type]
        torch_dcp.load(target, storage_reader=reader)
        same({**per_rank_state(9), "n": 1}, target)


def test_pickle_only_where_both_sides_allow_it(namespace: str) -> None:
    value = {"x": io.StringIO}
    with pytest.raises(errors.NotPlain):
        dcp.async_save(value, storage_writer=dcp.Writer(namespace, step=1))
    dcp.async_save(value, storage_writer=dcp.Writer(namespace, step=1, allow_pickle=True)).result(30)
    with pytest.raises(errors.NotPlain):
        dcp.load({"x": None}, storage_reader=dcp.Reader(namespace))
    target = {"x": None}
    dcp.load(target, storage_reader=dcp.Reader(namespace, allow_pickle=True))
    assert target["x"] is io.StringIO


def test_wrong_use_is_told(namespace: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="planning"):
        dcp.Writer(namespace, planning="mine")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="planning"):
        dcp.Reader(namespace, planning="mine")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match=r"FileSystemWriter.*torch\.distributed\.checkpoint\.async_save"):
        dcp.async_save({}, storage_writer=torch_dcp.FileSystemWriter(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="colour"):
        dcp.async_save({}, storage_writer=dcp.Writer(namespace, step=1), colour="red")
    with pytest.raises(errors.InvalidArgument, match="async_stager"):
        writer = dcp.Writer(namespace, step=1)
        dcp.async_save({}, storage_writer=writer, async_stager=writer)
    with pytest.raises(errors.NotFound, match="no complete step"):
        dcp.load({}, storage_reader=dcp.Reader(namespace))
    with pytest.raises(errors.Closed):
        dcp.Reader(namespace).read_data(None, DefaultLoadPlanner())  # type: ignore[arg-type]


def test_a_staged_save_that_torch_forgets_is_given_up(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from safepoint.dcp import _uploads

    monkeypatch.setattr(_uploads, "_START_SECONDS", 0.05)
    writer = dcp.Writer(namespace, step=1)
    assert writer.stage(state(1)) == {}
    forgotten = writer.save
    writer.step = 2
    torch_dcp.async_save(state(2), storage_writer=writer).result(30)
    assert forgotten is not None
    with pytest.raises(errors.Closed, match="torch never came"):
        forgotten.wait(timeout=30)


def test_overlap_does_not_depend_on_the_length_of_uploads(namespace: str) -> None:
    """Without a process group nothing is waited for but torch's threads' beginning."""
    writer = dcp.Writer(namespace, step=1)
    begin = time.monotonic()
    for step in range(1, 6):
        writer.step = step
        torch_dcp.async_save({"x": torch.ones(3)}, storage_writer=writer)
    assert time.monotonic() - begin < 20
    writer.checkpointer._engine.close(30)


class Part:
    """A Stateful that is no module: a data loader, say."""

    def __init__(self, fill: int) -> None:
        self.fill = fill

    def state_dict(self) -> dict[str, Any]:
        return {"pos": self.fill, "seen": torch.full((2,), self.fill), "pair": (self.fill, torch.full((1,), self.fill))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["seen"].tolist() == [state_dict["pos"]] * 2 and state_dict["pair"][0] == state_dict["pos"]
        self.fill = state_dict["pos"]


def two_ranks(fill: int) -> dict[str, Any]:
    model = torch.nn.BatchNorm1d(3)
    assert model.running_var is not None
    model.running_var.fill_(fill)
    counter = collections.Counter({"a": fill})
    return {"loader": Part(fill), "model": model, "rng": (torch.full((2,), fill), fill), "count": counter, "lr@2": 7}


def test_every_rank_gets_its_own_parts_back(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of objects, tuples and counters, by patterns; loaded by every door, into states that do not say PerRank."""
    monkeypatch.setenv("SAFEPOINT_LAUNCH_ID", namespace)
    patterns = ["loader", "*.running_var", "rng", "count"]
    futures = []
    for rank in (0, 1):
        writer = dcp.Writer(namespace, step=1, per_rank=patterns, rank=rank, world_size=2)
        futures.append(dcp.async_save(two_ranks(10 + rank), storage_writer=writer))
    for future in futures:
        future.result(30)
    for rank in (0, 1):
        for how in ("ours", "torch", "torch, its plan"):
            target = two_ranks(99)
            load(namespace, target, how, rank=rank, world_size=2)
            assert target["loader"].fill == 10 + rank, how
            assert target["model"].running_var.tolist() == [10.0 + rank] * 3, how
            same((torch.full((2,), 10 + rank), 10 + rank), target["rng"])
            assert target["count"]["a"] == 10 + rank and target["lr@2"] == 7, how
    # A rank that did not exist keeps its own.
    target = two_ranks(99)
    dcp.load(target, storage_reader=dcp.Reader(namespace, rank=2, world_size=3))
    assert target["loader"].fill == 99 and target["rng"][1] == 99 and target["lr@2"] == 7
    # An empty place gets all that there is for this rank.
    empty: dict[str, Any] = {"loader": {}}
    dcp.load(empty, storage_reader=dcp.Reader(namespace, rank=1, world_size=2))
    assert empty["loader"]["pos"] == 11


def test_a_load_waits_for_a_guarded_copy(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-9: whichever engine copies, a load into the same tensors comes after it."""
    parameters = [torch.nn.Parameter(torch.full((1 << 20,), 1.0)) for _ in range(8)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    plain, guarded = (
        dcp.Writer(namespace),
        dcp.Writer(namespace, mode="guarded", optimizers=optimizer),
    )
    dcp.async_save({"p": list(parameters)}, checkpoint_id="1", storage_writer=plain).result(30)
    for step in range(2, 6):
        with torch.no_grad():
            for p in parameters:
                p.fill_(step)
        future = dcp.async_save({"p": list(parameters)}, checkpoint_id=f"{step}", storage_writer=guarded)
        dcp.load({"p": list(parameters)}, storage_reader=dcp.Reader(namespace))
        future.result(30)
        target = {"p": [torch.zeros(1 << 20) for _ in parameters]}
        dcp.load(target, storage_reader=dcp.Reader(namespace))
        assert all(bool((t == step).all()) for t in target["p"])


class Other(DefaultLoadPlanner):
    """Loads what is named otherwise in the checkpoint."""

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner({"w": state_dict["other"]}, *args, **kwargs)


def test_a_planner_that_renames_is_not_passed_over(namespace: str) -> None:
    save(dcp.Writer(namespace, step=1), {"w": torch.arange(3)}, "ours")
    target = {"other": torch.zeros(3, dtype=torch.long)}
    for function in (torch_dcp.load, dcp.load):
        with pytest.raises(TOLD, match="planner Other would not be asked"):
            function(target, storage_reader=dcp.Reader(namespace), planner=Other())
        function(target, storage_reader=dcp.Reader(namespace, planning="dcp"), planner=Other())
        assert target["other"].tolist() == [0, 1, 2]
        target["other"].zero_()


class Failing(DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        raise RuntimeError("no plan today")


def test_a_staged_save_whose_upload_failed_is_given_up(namespace: str) -> None:
    writer = dcp.Writer(namespace, step=1)
    future = torch_dcp.async_save(state(1), storage_writer=writer, planner=Failing())
    with pytest.raises(TOLD, match="no plan today"):
        future.result(30)
    failed = writer.save
    assert failed is not None
    writer.step = 2
    torch_dcp.async_save(state(2), storage_writer=writer).result(30)
    writer.step = 3
    torch_dcp.async_save(state(3), storage_writer=writer).result(30)
    with pytest.raises(errors.Closed):
        failed.wait(timeout=30)


def test_an_id_of_a_failed_save_is_not_that_of_the_next(namespace: str) -> None:
    writer = dcp.Writer(namespace)
    with pytest.raises(TOLD, match="no plan today"):
        torch_dcp.save(state(1), checkpoint_id="step-5", storage_writer=writer, planner=Failing())
    with pytest.raises(TOLD, match="the step is not known"):
        torch_dcp.save(state(1), storage_writer=writer)


def test_who_has_no_key_confirms_nothing(namespace: str) -> None:
    """Another process may try; those that hold a ticket are served as before."""
    from multiprocessing import AuthenticationError
    from multiprocessing.connection import Client

    from safepoint.dcp import _confirm

    writer = dcp.Writer(namespace, step=1)
    held = writer.checkpointer._engine.save(1, state(1), hold=True)
    ticket = _confirm.issue(held)
    with pytest.raises(AuthenticationError):
        Client(ticket.address, "AF_UNIX", authkey=b"x" * 32)
    with pytest.raises(errors.DeadlineExceeded):
        held.wait(timeout=0.2)
    remote = _confirm.RemoteSave(ticket, 1)
    remote.confirm()
    assert remote.wait("memory", timeout=30) == "memory"
    unknown = _confirm.RemoteSave(ticket._replace(number=999), 1)
    with pytest.raises(errors.NotFound):
        unknown.confirm()
    remote.close()
    unknown.close()


def test_lists_shared_by_ranks_have_no_made_up_elements() -> None:
    """DCP spreads the values of one list over ranks: what another rank writes is no None of this one."""
    from safepoint._boxes import Chunks
    from safepoint.dcp._torch import nested

    made = nested({"l.1": 7, "x": None}, {"l.1": ("l", 1), "x": ("x",)}, lambda: Chunks((0,), []))
    assert type(made["l"][0]) is Chunks and made["l"][1] == 7 and made["x"] is None


BY_TORCHS_PLANNER = ["sync", "torch, its plan", "sync, its plan"]


def save_planned(namespace: str, value: dict[str, Any], saved: str, step: int = 1) -> None:
    how, _, plan = saved.partition(",")
    save(dcp.Writer(namespace, step=step, planning="dcp" if plan else "own"), value, how)


class Idle:
    def step(self) -> None:
        pass


@pytest.mark.parametrize("saved", BY_TORCHS_PLANNER)
@pytest.mark.parametrize("loaded", ["ours", "torch", "native"])
def test_a_fresh_optimizer_gets_the_state_that_torchs_planner_has_flattened(
    namespace: str, saved: str, loaded: str
) -> None:
    """torch's planner makes texts of the parameters' numbers; under a text an optimizer finds no parameter."""
    model, optimizer, _ = model_and_optimizer(1, 3)
    save_planned(namespace, {"model": model, "optim": optimizer}, saved)
    other, fresh, _ = model_and_optimizer(2, 0)
    load(namespace, {"model": other, "optim": fresh}, loaded)
    assert set(fresh.state) == {p for group in fresh.param_groups for p in group["params"]}
    for number, moments in optimizer.state_dict()["state"].items():
        same(dict(sorted(moments.items())), dict(sorted(fresh.state_dict()["state"][number].items())))
    for trained, with_it in ((model, optimizer), (other, fresh)):
        train_step(trained, with_it, Idle(), 3)
    same(model, other)
    # A state dict by itself, of which nobody sees whose it is.
    plain = {"optim": model_and_optimizer(2, 0)[1].state_dict()}
    load(namespace, plain, loaded)
    assert list(plain["optim"]["state"]) == list(range(6))


def test_only_an_optimizers_numbers_become_numbers(namespace: str) -> None:
    """Names of parameters that look like numbers stay names, and so does what merely looks like an optimizer."""
    value = {
        "named": {"state": {"0": {"m": torch.ones(2)}}, "param_groups": [{"params": ["0"]}]},
        "machine": {"state": {"0": {"m": 1}, "7": {"m": torch.ones(1)}}},
        "other": {"state": {"3": {"m": torch.ones(1)}, "007": {"m": 2}}, "param_groups": [{"params": [0, 7]}]},
    }
    save_planned(namespace, value, "sync")
    target: dict[str, Any] = {"named": {}, "machine": {}, "other": {}}
    load(namespace, target, "ours")
    assert list(target["named"]["state"]) == ["0"]
    assert sorted(target["machine"]["state"]) == ["0", "7"] and sorted(target["other"]["state"]) == ["007", "3"]


@pytest.mark.parametrize("saved", BY_TORCHS_PLANNER)
@pytest.mark.parametrize("loaded", ["ours", "torch", "torch, its plan", "native"])
def test_empty_dicts_that_torchs_planner_drops(
    namespace: str, saved: str, loaded: str, caplog: pytest.LogCaptureFixture
) -> None:
    def value() -> dict[str, Any]:
        return {"e": {}, "o": {"state": {}, "lr": 1}, "l": [], "deep": {"x": collections.OrderedDict()}, "n": 3}

    save_planned(namespace, value(), saved)
    target = value()
    load(namespace, target, loaded)
    same(value(), target)
    if loaded != "torch, its plan":
        assert "nothing for e, which is empty here" in caplog.text
    # An optimizer that has not stepped yet, into one that has.
    save_planned(namespace, {"optim": model_and_optimizer(1, 0)[1]}, saved, step=2)
    for steps in (0, 2) if loaded in ("ours", "native") else (0,):
        optimizer = model_and_optimizer(2, steps)[1]
        load(namespace, {"optim": optimizer}, loaded)
        assert not optimizer.state


@pytest.mark.parametrize("saved", BY_TORCHS_PLANNER)
@pytest.mark.parametrize("loaded", ["ours", "torch", "torch, its plan", "native"])
def test_counters_and_numbers_as_keys_through_torchs_planner(namespace: str, saved: str, loaded: str) -> None:
    """A scheduler whose milestones have become texts never changes the learning rate again."""

    def value(counted: int) -> dict[str, Any]:
        parameter = torch.nn.Parameter(torch.ones(1))
        scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=1.0), [1, 30, 80])
        counter = collections.Counter({"a": counted, "b": 2})
        return {"sched": scheduler, "count": counter, "epochs": {3: 0.5 * counted, 4: torch.full((2,), counted)}}

    save_planned(namespace, value(1), saved)
    target = value(9)
    load(namespace, target, loaded)
    same(value(1), target)
    assert target["sched"].milestones == collections.Counter([1, 30, 80])


def odd_tensors(seed: int) -> dict[str, Any]:
    base = random_tensor((8, 4), torch.float32, seed)
    scaler = torch.amp.GradScaler("cpu", init_scale=float(seed))
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    return {
        **{str(dtype).removeprefix("torch."): random_tensor((3, 6), dtype, seed) for dtype in DTYPES},
        "conjugate": random_tensor((3, 3), torch.complex64, seed).conj(),
        "negative": torch.full((3, 3), complex(1, seed)).conj().imag,
        "both": [torch.full((2,), complex(1, seed)).conj(), (torch.full((2,), complex(1, seed)).conj().imag, 1)],
        "expanded": torch.full((1, 3), float(seed)).expand(4, 3),
        "shared": {"whole": base, "part": base[2:4], "turned": base.t()},
        "scaler": scaler,
        "average": average,
    }


@pytest.mark.parametrize("saved", ["ours", "torch", *BY_TORCHS_PLANNER])
@pytest.mark.parametrize("loaded", ["ours", "torch", "torch, its plan", "native"])
def test_tensors_of_every_sort(namespace: str, saved: str, loaded: str) -> None:
    """Bit by bit; torch's stager forgets the conjugate and the negative bit, so they are resolved before it."""
    save_planned(namespace, odd_tensors(1), saved)
    target = odd_tensors(2)
    load(namespace, target, loaded)
    same(odd_tensors(1), target)


def test_what_an_expanded_tensor_cannot_hold(namespace: str) -> None:
    save(dcp.Writer(namespace, step=1), {"x": torch.arange(6.0).view(2, 3)}, "ours")
    target = {"x": torch.zeros(1, 3).expand(2, 3)}
    with pytest.raises(TOLD, match="x: the tensor here repeats its elements"):
        load(namespace, target, "torch, its plan")
    load(namespace, target, "torch")
    same({"x": torch.arange(6.0).view(2, 3)}, target)


@pytest.mark.parametrize("saved", ["ours", "torch", *BY_TORCHS_PLANNER])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_are_refused_by_name(namespace: str, saved: str) -> None:
    value = {"model": {"q": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}}
    with pytest.raises(TOLD, match=r"model\.q: quantised tensors are not supported"):
        save_planned(namespace, value, saved)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_version_of_the_step_text_is_refused(
    namespace: str, monkeypatch: pytest.MonkeyPatch, version: Any
) -> None:
    with monkeypatch.context() as other:
        other.setattr("safepoint._engine.VERSION", version)
        save(dcp.Writer(namespace, step=1), {"x": torch.ones(3)}, "ours")
    target = {"x": torch.zeros(3)}
    for loaded in ("ours", "torch", "torch, its plan", "native"):
        with pytest.raises(TOLD) as told:
            load(namespace, target, loaded)
        assert "ProtocolError" in f"{told.type.__name__} {told.value}"
        assert f"version {version!r}, and this safepoint knows version 1: read it with" in str(told.value)
    assert not target["x"].any()


@pytest.mark.parametrize("how", ["ours", "torch", "sync"])
def test_ids_that_are_numbers_and_ids_that_are_none(namespace: str, how: str) -> None:
    writer = dcp.Writer(namespace, step=7)
    save(writer, {"x": torch.ones(3)}, how, checkpoint_id=7)
    for wrong in (b"run/step-7", 7.0, True, object()):
        with pytest.raises(TOLD, match="a checkpoint id is a text, a path or a step's number, not"):
            save(writer, {"x": torch.ones(3)}, how, checkpoint_id=wrong)
        if how == "torch":
            assert writer.save is not None
            with pytest.raises(errors.Closed):  # Refused, so that nobody waits for it.
                writer.save.wait(timeout=30)
    with pytest.raises(TOLD, match="names step 8, but step 7 is set"):
        save(writer, {"x": torch.ones(3)}, how, checkpoint_id=8)
    target = {"x": torch.zeros(3)}
    torch_dcp.load(target, checkpoint_id=7, storage_reader=dcp.Reader(namespace))  # type: ignore[arg-type]
    assert target["x"].all()


@pytest.mark.parametrize("saved", ["ours", "torch", *BY_TORCHS_PLANNER])
def test_an_empty_state(namespace: str, saved: str) -> None:
    save_planned(namespace, {}, saved)
    assert dcp.Reader(namespace).checkpointer.latest() is not None
    for loaded in ("ours", "torch", "torch, its plan"):
        load(namespace, {}, loaded)


def test_a_stage_that_nobody_follows_holds_nobody_up(namespace: str) -> None:
    """The thread that staged is back, and no thread was made since: torch never came for it, and never will."""
    writer = dcp.Writer(namespace, step=1)
    begin = time.monotonic()
    writer.stage(state(1))
    forgotten = writer.save
    writer.step = 2
    torch_dcp.async_save(state(2), storage_writer=writer).result(30)
    assert time.monotonic() - begin < 20 and forgotten is not None
    with pytest.raises(errors.Closed, match="torch never came"):
        forgotten.wait(timeout=30)


def test_process_mode_with_dcps_planning_is_refused(namespace: str) -> None:
    writer = dcp.Writer(namespace, step=1, planning="dcp")
    with pytest.raises(errors.InvalidArgument, match="use THREAD"):
        dcp.async_save({}, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS)

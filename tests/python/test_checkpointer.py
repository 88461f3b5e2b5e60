"""Checkpointer against the in-process stand-in for daemon and extension."""

from __future__ import annotations

import collections
import dataclasses
import io
import logging
import os
import pickle
import random
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fake_core import FakeDaemon
from states import DTYPES, bits, random_tensor, same

import safepoint
from safepoint import _engine, errors


def checkpointer(name: str = "job", **kwargs: Any) -> safepoint.Checkpointer:
    return safepoint.Checkpointer(name, rank=kwargs.pop("rank", 0), world_size=kwargs.pop("world_size", 1), **kwargs)


def round_trip(state: Any, target: Any, **kwargs: Any) -> safepoint.RestoreInfo:
    c = checkpointer(**kwargs)
    c.save(7, state).wait()
    info = c.restore(target)
    assert info is not None and info.step == 7 and info.source == "memory"
    return info


@dataclasses.dataclass
class Counters:
    seen: int
    weights: torch.Tensor
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Frozen:
    seen: int
    weights: torch.Tensor


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


def everything(seed: int) -> dict[Any, Any]:
    def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return random_tensor(shape, dtype, seed)

    base = t(4, 6)
    rng = random.Random(seed)
    return {
        **{str(dtype): t(3, 5, dtype=dtype) for dtype in DTYPES},
        **{f"scalar {dtype}": t(dtype=dtype) for dtype in DTYPES},
        "empty": torch.empty(0, 3),
        "transposed": t(5, 4).t(),
        "channels_last": t(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "strided": t(10, 10)[::2, 1::3],
        "conjugate": t(3, 3, dtype=torch.complex64).conj(),
        "negative": t(3, 3, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(t(3, 3)),
        "views": [base, base[1:3]],
        "nested": {"list": [t(2), {"deeper": (t(3), 5 + seed, "text")}], 3: {"int key": t(1), None: 2.5 * seed}},
        "ordered": collections.OrderedDict(b=t(2), a=1),
        "dataclass": Counters(seed, t(2, 2)),
        "frozen": Frozen(seed, t(2, 2)),
        "named tuple": Pair(t(2), seed),
        "values": [1, 2.5, None, True, "é\ud800", float("inf"), -0.0, 2**70, [1, [2]], (1, (2, 3))],
        "more": (
            {1, 2},
            frozenset({3}),
            b"bytes",
            bytearray(b"x"),
            1 + 2j,
            range(3),
            torch.Size([1, 2]),
            torch.float16,
            torch.device("cpu"),
        ),
        "counter": collections.Counter("abca"),
        "queue": collections.deque([1, 2], maxlen=5),
        "numpy": [np.float32(seed), np.arange(5) * seed, np.array(["a", "b"])],
        "random": rng.getstate(),
        "numpy random": np.random.RandomState(seed).get_state(),
        "generator": np.random.default_rng(seed).bit_generator.state,
        "torch random": torch.Generator().manual_seed(seed).get_state(),
        "large array": np.random.default_rng(seed).standard_normal((40, 50)),
        "large strings": np.array([f"{i}{seed}" * 10 for i in range(200)]),
        "large bytes": bytes([seed]) * 10_000,
        "large bytearray": bytearray([seed]) * 10_000,
        "empty dict": {},
        "empty list": [],
        "empty tuple": (),
    }


def test_every_state_kind_comes_back(fake: FakeDaemon) -> None:
    saved, target = everything(1), everything(2)
    kept = target["torch.float32"], target["transposed"], target["nested"], target["large array"]
    round_trip(saved, target)
    same(saved, target)
    assert kept[0] is target["torch.float32"] and kept[1] is target["transposed"] and not kept[1].is_contiguous()
    assert kept[2] is target["nested"] and kept[3] is target["large array"]


def test_no_unpickler_is_used(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an unpickler was used")

    class Poisoned(pickle.Unpickler):
        find_class = poison
        load = poison

    for name in ("loads", "load", "dumps", "dump"):
        monkeypatch.setattr(pickle, name, poison)
    monkeypatch.setattr(pickle, "Unpickler", Poisoned)
    saved, target = everything(1), everything(2)
    round_trip(saved, target)
    same(saved, target)


def model_and_optimizer(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50)
    for i in range(steps):
        train_step(model, optimizer, scheduler, i)
    return model, optimizer, scheduler


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, i: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 4, generator=torch.Generator().manual_seed(i))).square().sum().backward()
    optimizer.step()
    scheduler.step()


def test_training_goes_on_as_if_nothing_had_happened(fake: FakeDaemon) -> None:
    """I-34, with an optimizer that has no state yet when it is restored."""
    model, optimizer, scheduler = model_and_optimizer(1, 3)
    c = checkpointer()
    c.save(3, {"model": model, "optim": optimizer, "sched": scheduler}).wait()
    for i in range(3, 6):
        train_step(model, optimizer, scheduler, i)
    other = model_and_optimizer(2, 0)
    weight = other[0][0].weight
    address = weight.data_ptr()
    assert c.restore(dict(zip(("model", "optim", "sched"), other, strict=True)))
    assert other[0][0].weight is weight and weight.data_ptr() == address
    for i in range(3, 6):
        train_step(*other, i)
    same(model, other[0])
    same(optimizer.state_dict(), other[1].state_dict())
    same(scheduler.state_dict(), other[2].state_dict())


def test_stepped_optimizer_goes_back_to_one_without_state(fake: FakeDaemon) -> None:
    model, optimizer, _ = model_and_optimizer(1, 0)
    c = checkpointer()
    c.save(0, {"model": model, "optim": optimizer}).wait()
    model2, optimizer2, _ = model_and_optimizer(2, 2)
    assert optimizer2.state_dict()["state"]
    c.restore({"model": model2, "optim": optimizer2})
    assert optimizer2.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 5]),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
)
def test_schedulers(fake: FakeDaemon, make: Any) -> None:
    def fresh() -> Any:
        return make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5))

    first, second = fresh(), fresh()
    for _ in range(4):
        first.optimizer.step()
        first.step(0.5) if isinstance(first, torch.optim.lr_scheduler.ReduceLROnPlateau) else first.step()
    round_trip({"scheduler": first}, {"scheduler": second})
    # The entry for functions is None in a state dict; what is left is plain.
    same(first.state_dict(), second.state_dict())


def test_ties_are_written_once(fake: FakeDaemon) -> None:
    shared = torch.randn(64, 64)
    c = checkpointer()
    c.save(1, {"a": shared, "b": shared}).wait()
    (shard,) = fake.space("job").shards.values()
    assert len(shard) < 2 * shared.nbytes + 8192 and shard.count(bits(shared)) == 1
    a, b = torch.zeros(64, 64), torch.zeros(64, 64)
    c.restore({"a": a, "b": b})
    assert torch.equal(a, shared) and torch.equal(b, shared)
    # Once they are no longer tied, each is written.
    c.save(2, {"a": shared, "b": shared + 1}).wait()
    c.restore({"a": a, "b": b})
    assert torch.equal(a, shared) and torch.equal(b, shared + 1)


def test_steady_saves_follow_the_state(fake: FakeDaemon) -> None:
    """The cached plan must never hide a change of values, strides, dtype, shape, conjugation or keys."""
    c = checkpointer()
    x = torch.randn(4, 4, dtype=torch.complex64)
    variants: list[dict[str, Any]] = [
        {"x": x, "v": 1},
        {"x": x.clone(), "v": 2},
        {"x": x.t(), "v": 2},
        {"x": x.conj(), "v": 2},
        {"x": x.conj().t(), "v": 2},
        {"x": x.to(torch.complex128), "v": 2},
        {"x": x[:2], "v": 2},
        {"x": x, "v": "text"},
        {"x": x, "w": 1},
        {"x": x, "v": "long" * 5000},  # The header grows past its room.
        {"x": x, "v": 1},
    ]
    for step, state in enumerate(variants):
        c.save(step, state).wait()
        target = {key: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for key, v in state.items()}
        c.restore(target)
        same({k: v for k, v in state.items() if k != "x"}, {k: v for k, v in target.items() if k != "x"})
        assert bits(state["x"]) == bits(target["x"]), step


class Opaque:
    pass


@pytest.mark.parametrize(
    ("state", "path", "kind"),
    [
        ({"a": {"b": Opaque()}}, "a.b", "Opaque"),
        ({"a": [1, (2, Opaque())]}, "a[1][1]", "Opaque"),
        ({"a": [torch.zeros(1), lambda: 0]}, "a.1", "function"),
        ({"t": torch.eye(3).to_sparse()}, "t", "sparse"),
        ({"t": torch.zeros(2, device="meta")}, "t", "meta"),
        ({"q": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}, "q", "quantised"),
        ({"o": np.array([Opaque()], dtype=object)}, "o", "ndarray"),
        ({"p": torch.nn.parameter.UninitializedParameter()}, "p", "UninitializedParameter"),
        ({Opaque: 1}, "key", "type"),
    ],
)
def test_what_is_not_plain_is_named_before_anything_is_reserved(
    fake: FakeDaemon, state: Any, path: str, kind: str
) -> None:
    with pytest.raises(errors.NotPlain) as caught:
        checkpointer().save(1, state)
    assert path in str(caught.value) and kind in str(caught.value)
    assert fake.requests == 0 and isinstance(caught.value, TypeError)


def test_pickle_needs_consent_on_both_sides(fake: FakeDaemon) -> None:
    class_value = collections.UserString("x")
    checkpointer(allow_pickle=True).save(1, {"v": class_value}).wait()
    with pytest.raises(errors.NotPlain, match=r"v: .*allow_pickle"):
        checkpointer().restore({"v": None})
    target: dict[str, Any] = {"v": None}
    checkpointer(allow_pickle=True).restore(target)
    assert target["v"] == class_value


def test_names_that_collide_are_both_named(fake: FakeDaemon) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"'a\.b'.*\['a\.b'\].*\['a', 'b'\]"):
        checkpointer().save(1, {"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(errors.InvalidArgument, match="1025 bytes"):
        checkpointer().save(1, {"x" * 1025: torch.zeros(1)})
    with pytest.raises(errors.InvalidArgument, match="file format"):
        checkpointer().save(1, {"__metadata__": torch.zeros(1)})
    with pytest.raises(errors.InvalidArgument, match="must be a dict"):
        checkpointer().save(1, torch.zeros(1))


def test_mismatch_lists_everything_and_changes_nothing(fake: FakeDaemon) -> None:
    c = checkpointer()
    c.save(1, {"same": torch.ones(2), "shape": torch.ones(3), "dtype": torch.ones(2), "n": 5}).wait()
    target = {
        "same": torch.zeros(2),
        "shape": torch.zeros(4),
        "dtype": torch.zeros(2).long(),
        "gone": torch.zeros(1),
        "n": 0,
        "m": 3,
    }
    with pytest.raises(errors.Mismatch) as caught:
        c.restore(target)
    assert caught.value.missing == ("gone", "m") and len(caught.value.mismatched) == 2
    for text in ("gone", "shape (shape [3] in the checkpoint, [4] here)", "dtype (dtype F32"):
        assert text in str(caught.value)
    assert target["same"].sum() == 0 and target["n"] == 0
    del target["shape"], target["dtype"]
    assert c.restore(target, allow_missing=True) is not None
    assert target["same"].sum() == 2 and target["n"] == 5 and target["m"] == 3


def test_longer_list_is_not_cut_without_a_word(fake: FakeDaemon) -> None:
    c = checkpointer()
    c.save(1, {"l": [{"x": 1}, {"x": 2}]}).wait()
    with pytest.raises(errors.Mismatch, match="more elements"):
        c.restore({"l": [{"x": 0}]})
    target: dict[str, Any] = {"l": []}
    c.restore(target)
    assert target == {"l": [{"x": 1}, {"x": 2}]}


def test_five_outcomes(fake: FakeDaemon) -> None:
    """I-31: what is not known never looks like what is not there."""
    c = checkpointer()
    state = {"x": torch.zeros(2)}
    assert c.restore(state) is None and c.latest() is None and c.steps() == []
    with pytest.raises(errors.NotFound):
        c.restore(state, step=3)
    c.save(3, {"x": torch.ones(2)}).wait()
    info = c.restore(state)
    assert info is not None and info.step == 3 and info.bytes == 8 and state["x"].sum() == 2
    assert [i.step for i in c.steps()] == [3]
    for a in fake.space("job").attempts.values():
        a.state = "retired"
    with pytest.raises(errors.Lost):
        c.restore(state)
    fake.complete = lambda ns: (_ for _ in ()).throw(errors.Unavailable("nobody"))  # type: ignore[method-assign, assignment]
    with pytest.raises(errors.Unavailable):
        c.restore(state)
    with pytest.raises(errors.Unavailable):
        c.latest()


def test_fresh_and_rollback_make_new_lineages(fake: FakeDaemon) -> None:
    c = checkpointer()
    state = {"x": torch.zeros(2)}
    for step in (1, 2, 3):
        c.save(step, {"x": torch.full((2,), float(step))}).wait()
    first = fake.space("job").generations
    assert len(first) == 1
    info = c.restore(state, step=1)
    assert info is not None and state["x"][0] == 1 and len(first) == 1
    c.save(2, state).wait()
    assert len(first) == 2 and first[1].parent == info.attempt and first[1].parent_step == 1
    assert c.restore(state, fresh=True) is None
    c.save(0, state).wait()
    assert len(first) == 3 and first[2].parent is None and first[2].fresh
    with pytest.raises(errors.InvalidArgument):
        c.restore(state, fresh=True, step=1)


def test_reading_never_opens_a_generation(fake: FakeDaemon) -> None:
    c = checkpointer()
    c.restore({"x": torch.zeros(1)})
    c.latest()
    assert fake.space("job").generations == []


def test_saving_one_step_again_is_another_attempt(fake: FakeDaemon) -> None:
    c = checkpointer()
    a, b = c.save(1, {"x": 1}), c.save(1, {"x": 2})
    assert a.attempt != b.attempt
    a.wait()
    b.wait()
    target = {"x": 0}
    c.restore(target)
    assert target == {"x": 2}


def test_lost_generation_is_opened_again(fake: FakeDaemon) -> None:
    c = checkpointer()
    c.save(1, {"x": 1}).wait()
    fake.spaces.clear()
    fake.fail_reserve = [errors.Closed("no open generation: this daemon lost its memory")]
    c.save(2, {"x": 1}).wait()
    assert len(fake.space("job").generations) == 1


def test_durable_is_refused_before_anything_is_copied(fake: FakeDaemon) -> None:
    with pytest.raises(errors.Unavailable, match="no durable tier"):
        checkpointer().save(1, {"x": Opaque()}, durable=True)
    save = checkpointer().save(1, {"x": 1})
    with pytest.raises(errors.Unavailable):
        save.wait("durable")
    with pytest.raises(errors.InvalidArgument):
        save.wait("somewhere")


@pytest.mark.parametrize("step", [-1, 2**63, 1.5, "1", None])
def test_bad_steps(fake: FakeDaemon, step: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        checkpointer().save(step, {"x": 1})


def test_no_space_is_refused_and_training_goes_on(fake: FakeDaemon) -> None:
    c = checkpointer()
    c.save(1, {"x": 1}).wait()
    fake.pool_bytes = 100
    with pytest.raises(errors.NoSpace, match="100"):
        c.save(2, {"x": 1})
    fake.pool_bytes = 1 << 30
    assert c.save(3, {"x": 1}).wait() == "memory"
    assert [i.step for i in c.steps()] == [3, 1]


def test_failed_seal_is_told_once_and_kills_nothing(fake: FakeDaemon, caplog: pytest.LogCaptureFixture) -> None:
    """I-29."""
    c = checkpointer()
    fake.fail_seal = errors.Unavailable("the worker died")
    save = c.save(1, {"x": torch.ones(3)})
    with pytest.raises(errors.Unavailable, match="worker died"):
        save.wait()
    assert save.level == "none"
    dropped = c.save(2, {"x": torch.ones(3)})
    dropped._transfer._thread.join()
    with caplog.at_level(logging.ERROR, logger="safepoint"):
        fake.fail_seal = None
        c.save(3, {"x": torch.ones(3)}).wait()
        c.save(4, {"x": torch.ones(3)}).wait()
    assert sum("step 2" in r.message for r in caplog.records) == 1 and not any(
        "step 1" in r.message for r in caplog.records
    )


def test_failed_copy_is_raised_by_save(fake: FakeDaemon) -> None:
    fake.fail_copy = errors.Closed("lease lost")
    with pytest.raises(errors.Closed, match="lease lost"):
        checkpointer().save(1, {"x": torch.ones(3)})


def test_failure_after_reserving_gives_the_lease_back(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    c = checkpointer()
    monkeypatch.setattr(_engine, "start_copy", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        c.save(1, {"x": torch.ones(3)})
    assert len(fake.aborted) == 1


def test_guarded_copies_are_isolated_from_what_comes_next(fake: FakeDaemon) -> None:
    """I-9: everything is changed at once, and optimizer.step() waits for the copy."""
    model, optimizer, scheduler = model_and_optimizer(1, 2)
    loose = torch.randn(5)
    array = np.arange(2000.0)
    state = {
        "model": model,
        "optim": optimizer,
        "loose": loose,
        "transposed": model[0].weight.detach().t(),
        "array": array,
    }
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    c = checkpointer(mode="guarded", optimizers=optimizer)
    fake.hold = threading.Event()
    save = c.save(1, state)
    assert not save._transfer.copied
    for name, buffer in model.named_buffers():
        assert name
        buffer.zero_()
    before = loose.clone()
    loose.zero_()
    array[:] = 0
    stepped = threading.Event()

    def step() -> None:
        train_step(model, optimizer, scheduler, 9)
        stepped.set()

    # The forward pass changes BatchNorm's buffers, too; the parameters change in optimizer.step() only.
    thread = threading.Thread(target=step)
    thread.start()
    assert not stepped.wait(0.2), "optimizer.step() did not wait for the copy"
    fake.hold.set()
    thread.join()
    save.wait()
    target = model_and_optimizer(2, 2)
    got = {
        "model": target[0],
        "optim": target[1],
        "loose": torch.zeros(5),
        "transposed": torch.zeros(4, 8),
        "array": np.zeros(2000),
    }
    c.restore(got)
    same(dict(target[0].state_dict()), expected)
    assert bits(target[1].state_dict()["state"][0]["exp_avg"]) == bits(moments)
    assert torch.equal(got["loose"], before) and bits(got["transposed"]) == bits(expected["0.weight"].t())
    assert np.array_equal(got["array"], np.arange(2000.0))


def test_guarded_view_into_larger_memory_is_not_taken_for_guarded(fake: FakeDaemon) -> None:
    flat = torch.arange(10.0)
    parameter = torch.nn.Parameter(flat[:4])
    c = checkpointer(mode="guarded", optimizers=[torch.optim.SGD([parameter], lr=1.0)])
    fake.hold = threading.Event()
    save = c.save(1, {"flat": flat})
    flat.zero_()
    fake.hold.set()
    save.wait()
    target = {"flat": torch.zeros(10)}
    c.restore(target)
    assert torch.equal(target["flat"], torch.arange(10.0))


def test_guarded_needs_optimizers_and_its_hooks_go_with_it(fake: FakeDaemon) -> None:
    with pytest.raises(errors.InvalidArgument):
        checkpointer(mode="guarded")
    with pytest.raises(errors.InvalidArgument):
        checkpointer(mode="strict")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    c = checkpointer(mode="guarded", optimizers=optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    c.close()
    assert not optimizer._optimizer_step_pre_hooks


def test_several_saves_in_flight(fake: FakeDaemon) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    c = checkpointer(mode="guarded", optimizers=optimizer)
    fake.hold = threading.Event()
    saves = [c.save(step, {"p": parameter, "step": step}) for step in range(5)]
    assert len({s.attempt for s in saves}) == 5 and all(s.level == "none" for s in saves)
    with pytest.raises(errors.DeadlineExceeded):
        saves[0].wait_safe(timeout=0.01)
    with pytest.raises(errors.DeadlineExceeded):
        saves[0].wait(timeout=0.01)
    fake.hold.set()
    assert [s.wait() for s in saves] == ["memory"] * 5


def test_memory_of_a_dropped_save_is_kept_until_it_is_copied(fake: FakeDaemon) -> None:
    import gc

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.full((100_000,), 3.0))], lr=1.0)
    c = checkpointer(mode="guarded", optimizers=optimizer)
    fake.hold = threading.Event()
    save = c.save(1, {"p": optimizer.param_groups[0]["params"][0]})
    transfer = save._transfer
    del save
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.zeros(1))
    gc.collect()
    junk = [torch.full((100_000,), float(i)) for i in range(20)]
    fake.hold.set()
    transfer.wait_sealed(None)
    target = {"p": torch.zeros(100_000)}
    c.restore(target)
    assert torch.equal(target["p"], torch.full((100_000,), 3.0)) and junk


def test_corrupt_says_what_happened_to_the_state(fake: FakeDaemon) -> None:
    """I-8, I-31."""
    c = checkpointer()
    c.save(1, {"a": torch.ones(1 << 20), "b": 5}).wait()
    target = {"a": torch.zeros(1 << 20), "b": 0}
    fake.corrupt = {(0, 2)}
    with pytest.raises(errors.Corrupt) as caught:
        c.restore(target, verify_first=True)
    assert not caught.value.state_modified and (caught.value.rank, caught.value.block) == (0, 2)
    assert target["b"] == 0 and target["a"].sum() == 0 and fake.reported == [(0, 2)]
    with pytest.raises(errors.Corrupt) as caught:
        c.restore(target)
    assert caught.value.state_modified and target["b"] == 0 and fake.reported == [(0, 2)] * 2
    # Into memory that is not the caller's: nothing of the state was changed.
    with pytest.raises(errors.Corrupt) as caught:
        c.restore({"a": torch.zeros(1).expand(1 << 20), "b": 0})
    assert not caught.value.state_modified
    fake.corrupt = {(0, 0)}
    with pytest.raises(errors.Corrupt) as caught:
        c.restore(target)
    assert not caught.value.state_modified


def test_meta_targets_become_real(fake: FakeDaemon) -> None:
    model = torch.nn.Linear(3, 2)
    c = checkpointer()
    c.save(1, {"model": model, "t": torch.ones(3)}).wait()
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
        target = {"model": empty, "t": torch.zeros(3)}
    c.restore(target)
    same(dict(model.state_dict()), dict(empty.state_dict()))
    assert isinstance(empty.weight, torch.nn.Parameter) and torch.equal(target["t"], torch.ones(3))


def test_module_with_hooks_gets_load_state_dict(fake: FakeDaemon) -> None:
    class Extra(torch.nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return {"extra": self.extra}

        def set_extra_state(self, state: Any) -> None:
            self.extra = state["extra"]

    first, second = Extra(2, 2), Extra(2, 2)
    first.extra = 5
    round_trip({"m": first}, {"m": second})
    same(first.weight.detach(), second.weight.detach())
    assert second.extra == 5


def test_stateful_roots_and_user_classes(fake: FakeDaemon) -> None:
    class Loader:
        def __init__(self, position: int) -> None:
            self.position = position

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position, "seen": torch.full((3,), self.position)} if self.position else {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.position = state["position"] if state else -1

    c = checkpointer()
    loader = Loader(0)
    c.save(1, Loader(4)).wait()
    c.restore(loader)
    assert loader.position == 4
    c.save(2, {"l": Loader(0)}).wait()
    c.restore({"l": loader})
    assert loader.position == -1


def test_prepares_slots_once(fake: FakeDaemon) -> None:
    c = checkpointer(size_hint=1000)
    assert fake.prepared and fake.prepared[0][0] >= 1000 and fake.prepared[0][1] == 3
    c.save(1, {"x": 1}).wait()
    c.save(2, {"x": 1}).wait()
    assert len(fake.prepared) == 1
    other = checkpointer("other")
    for step in range(1, 6):
        other.save(step, {"x": 1}).wait()
    # Each of the first saves has one of its own, and leaves one to the next: that one waits for no more than it needs.
    assert [count for _, count in fake.prepared[1:]] == [1, 1]


def test_slots_for_steps_that_are_there_are_not_prepared_again(fake: FakeDaemon) -> None:
    """After a restart: asking for all of them would take the other ranks' memory."""
    first = checkpointer(size_hint=1000)
    for step in (1, 2, 3):
        first.save(step, {"x": step}).wait()
    first.close()
    del fake.prepared[:]
    fake.space("job").attempts.pop(fake.complete("job")[-1].attempt)  # Retired.
    hinted = checkpointer(size_hint=1000)
    assert [count for _, count in fake.prepared] == [1]
    hinted.close()
    unhinted = checkpointer()
    for step in (4, 5):
        unhinted.save(step, {"x": step}).wait()
    unhinted.close()
    assert len(fake.prepared) == 1


def test_closed_and_forked_checkpointers_refuse(fake: FakeDaemon) -> None:
    c = checkpointer()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            c.save(1, {"x": 1})
            os.write(write, b"saved")
        except errors.Unavailable as error:
            os.write(write, str(error).encode())
        finally:
            c.close()  # Does nothing here.
            os._exit(0)
    os.waitpid(child, 0)
    assert b"forked" in os.read(read, 1000)
    os.close(read)
    os.close(write)
    c.save(1, {"x": 1}).wait()
    c.close()
    c.close()
    for call in (lambda: c.save(2, {"x": 1}), lambda: c.restore({}), c.latest, c.steps):
        with pytest.raises(errors.Closed):
            call()


def test_restore_into_bytes_io_state(fake: FakeDaemon) -> None:
    stream = io.BytesIO(b"abc")
    stream.seek(1)
    target: dict[str, Any] = {"s": None}
    round_trip({"s": stream}, target)
    assert target["s"].getvalue() == b"abc" and target["s"].tell() == 1

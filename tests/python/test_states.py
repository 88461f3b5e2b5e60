"""Every state that a training job has comes back bit by bit, with the same types; or is refused by name."""

from __future__ import annotations

import datetime
import io
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from fake_core import FakeDaemon
from states import random_tensor, same
from test_ranks import launch, on_ranks

import safepoint
from safepoint import errors
from safepoint._shard import parse_shard

__all__ = ["launch"]  # A fixture.
from safepoint._state import LONG_MIN

ALL_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


def made(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(1, dtype=dtype)


QUANTISED = [d for d in ALL_DTYPES if made(d).is_quantized]
PLAIN = [d for d in ALL_DTYPES if d not in QUANTISED]


def round_trip(state: Any, target: Any, **arguments: Any) -> Any:
    with safepoint.Checkpointer("job", rank=0, world_size=1, **arguments) as c:
        c.save(1, state).wait(timeout=20)
        c.restore(target)
    return target


def header(fake: FakeDaemon) -> bytes:
    """Of the newest shard of rank 0."""
    data = fake.space("job").shards[fake.complete("job")[0].attempt, 0]
    return data[: 8 + int.from_bytes(data[:8], "little")]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Row-major values of any dtype, also of those on which torch has no operations."""
    item = tensor.element_size()
    if item > 1 or tensor.is_conj() or tensor.is_neg():
        plain = tensor.resolve_conj().resolve_neg().contiguous()
        return bytes(plain.flatten().view(torch.uint8).numpy().tobytes())
    return bytes(tensor.view(torch.uint8).contiguous().numpy().tobytes())


@pytest.mark.parametrize("mode", ["blocking", "guarded"])
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_every_dtype_that_torch_can_make(fake: FakeDaemon, dtype: torch.dtype, mode: str) -> None:
    """I-8: whole, scalar, empty, transposed, sliced; any bits, into any memory."""

    def state(seed: int) -> dict[str, torch.Tensor]:
        whole = random_tensor((6, 4), dtype, seed)
        return {
            "whole": random_tensor((3, 5), dtype, seed),
            "scalar": random_tensor((), dtype, seed),
            "empty": random_tensor((0, 3), dtype, seed),
            "transposed": random_tensor((6, 4), dtype, seed).t(),
            "sliced": whole[1::2, ::3],
        }

    arguments: dict[str, Any] = {}
    if mode == "guarded":
        arguments = {"mode": mode, "optimizers": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])}
    saved, target = state(1), state(2)
    round_trip(saved, target, **arguments)
    for name in saved:
        assert target[name].dtype == dtype and raw_bytes(target[name]) == raw_bytes(saved[name]), name
    swapped = {"whole": target["whole"], "transposed": torch.empty(0)} | {"transposed": random_tensor((4, 6), dtype)}
    with safepoint.Checkpointer("job", rank=0, world_size=1) as c:
        c.restore(swapped)  # Into a contiguous one what was saved from a transposed one.
    assert raw_bytes(swapped["transposed"]) == raw_bytes(saved["transposed"])


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantised_tensors_are_refused_by_name(fake: FakeDaemon, dtype: torch.dtype) -> None:
    with pytest.raises(errors.NotPlain, match=r"m\.q: quantised"):
        round_trip({"m": {"q": made(dtype), "w": torch.zeros(1)}}, {})


def test_every_dtype_of_torch_is_a_value(fake: FakeDaemon) -> None:
    target = round_trip({"dtypes": list(ALL_DTYPES)}, {"dtypes": []})
    assert target["dtypes"] == ALL_DTYPES


def test_views_of_one_storage(fake: FakeDaemon) -> None:
    """Overlapping views of different shapes come back as they were, and still share their memory."""

    def state(seed: int) -> dict[str, torch.Tensor]:
        base = random_tensor((4, 6), torch.float32, seed)
        return {"all": base, "rows": base[1:3], "column": base[:, 2], "flat": base.view(-1), "same": base[:]}

    saved, target = state(1), state(2)
    round_trip(saved, target)
    same(saved, target)
    target["flat"][0] = 5
    assert target["all"][0, 0] == 5 and target["same"][0, 0] == 5


def test_expanded_views(fake: FakeDaemon) -> None:
    """Saved as what they show. An expanded target stays one where the values repeat as it does."""
    base = torch.tensor([1.0, 2.0, 3.0])
    saved = {"rows": base.expand(4, 3), "scalar": torch.tensor(7).expand(2, 2), "differ": torch.arange(4.0).view(2, 2)}
    into = torch.zeros(3)
    target = {
        "rows": into.expand(4, 3),
        "scalar": torch.zeros(2, 2, dtype=torch.int64),
        "differ": torch.zeros(2).expand(2, 2),
    }
    rows = target["rows"]
    round_trip(saved, target)
    same(saved, target)
    assert target["rows"] is rows and rows.stride() == (0, 1) and into.tolist() == [1, 2, 3]
    assert target["differ"].stride() == (2, 1)


def test_conjugate_and_negative_views_of_a_conjugate(fake: FakeDaemon) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        z = random_tensor((3, 4), torch.complex128, seed)
        return {"conjugate": z.conj(), "imaginary": z.conj().imag, "both": z.t().conj(), "real": torch.view_as_real(z)}

    saved = state(1)
    saved["imaginary"], saved["real"] = saved["imaginary"].clone(), saved["real"].clone()
    target = {k: v.clone() if k in ("imaginary", "real") else v for k, v in state(2).items()}
    expected = {name: raw_bytes(value) for name, value in saved.items()}
    round_trip(saved, target)
    assert {name: raw_bytes(value) for name, value in target.items()} == expected


class Loader:
    """Like a stateful data loader: nested lists, bytes, generator states."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.state: dict[str, Any] = {
            "epoch": seed,
            "indices": rng.integers(0, 1 << 40, 5000).tolist(),
            "workers": [{"at": [seed, [seed]], "buffer": bytes([seed]) * 6000, "rng": rng.bit_generator.state}] * 2,
            "python": random.Random(seed).getstate(),
            "numpy": np.random.RandomState(seed).get_state(),
            "when": datetime.datetime(2026, 1, seed, tzinfo=datetime.timezone.utc),
            "for": datetime.timedelta(seconds=seed),
            "blob": io.BytesIO(b"state" * seed),
            "nothing": None,
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def job(seed: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    warm = torch.optim.lr_scheduler.LinearLR(optimizer)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)], [2]
    )
    for _ in range(steps):
        scaler.scale(model(torch.randn(8, 4)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        average.update_parameters(model)
        optimizer.zero_grad()
    return {
        "model": model,
        "optimizer": optimizer,
        "scaler": scaler,
        "ema": average,
        "scheduler": scheduler,
        "loader": Loader(seed),
    }


def test_a_whole_job(fake: FakeDaemon) -> None:
    """Modules, EMA copies, GradScaler, schedulers, data loader state; into fresh objects and into used ones."""
    saved = job(1, 5)
    blob = saved["loader"].state["blob"].getvalue()
    for steps in (0, 3):
        target = round_trip(saved, job(2, steps))
        assert target["loader"].state.pop("blob").getvalue() == blob
        expected = {k: v.state_dict() for k, v in saved.items()}
        expected["loader"] = {k: v for k, v in expected["loader"].items() if k != "blob"}
        same(expected, {k: v.state_dict() for k, v in target.items()})


PLAIN_ARRAYS = [np.dtype(c) for c in "?bBhHiIlLqQefdFDSUmM" if np.dtype(c).itemsize] + [
    np.dtype(name) for name in (">i4", "S7", "U3", "M8[ns]", "m8[s]", "V5", "g")
]  # fmt: skip


@pytest.mark.parametrize("dtype", PLAIN_ARRAYS, ids=str)
def test_numpy_arrays(fake: FakeDaemon, dtype: np.dtype[Any]) -> None:
    """Small ones are values, large ones pieces; as they lie in memory or not."""

    def state(seed: int) -> dict[str, np.ndarray[Any, Any]]:
        def array(*shape: int) -> np.ndarray[Any, Any]:
            raw = np.random.default_rng(seed).integers(
                0, 2 if dtype.kind == "b" else 100, (*shape, dtype.itemsize), np.uint8
            )
            if dtype.kind == "U":
                raw[..., 1::4] = raw[..., 2::4] = raw[..., 3::4] = 0  # Code points.
            return np.ascontiguousarray(raw).view(dtype).reshape(shape)

        large = array(100, 100)
        return {"small": array(3, 2), "large": large, "turned": array(90, 110).T, "part": array(200, 100)[::2, ::3],
                "scalar": array(), "empty": array(0, 4), "fortran": np.asfortranarray(large)}  # fmt: skip

    saved = state(1)
    target = round_trip(saved, state(2))
    for name, value in saved.items():
        assert (target[name].dtype, target[name].shape) == (value.dtype, value.shape), name
        assert target[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("array", [np.array([None, 1]), np.zeros(2, dtype=[("a", "i4")])])
def test_arrays_without_a_plain_form_are_refused(fake: FakeDaemon, array: Any) -> None:
    with pytest.raises(errors.NotPlain, match=r"a\.b: "):
        round_trip({"a": {"b": array}}, {})


LONG: dict[str, Any] = {
    "ints": list(range(-5, 5000)),
    "largest": [2**63 - 1, -(2**63)] * 1000,
    "floats": [0.1, -0.0, float("inf"), float("nan"), 5e-324] * 1000,
    "bools": [True, False, True] * 1000,
    "tuple": tuple(range(2000)),
    "tuple of floats": (1.5,) * 2000,
    "nested": [[1] * 2000, (2.5,) * 1500, {"deep": [False] * 1001}],
    # These stay JSON.
    "too large for 64 bits": [2**63] * 1500,
    "mixed": [1, 2.0] * 1000,
    "bool and int": [1, True] * 1000,
    "text": ["a"] * 2000,
    "with none": [None, 1] * 1000,
    "short": list(range(LONG_MIN - 1)),
    "empty": [],
}  # fmt: skip


def test_long_lists_keep_types_and_bits(fake: FakeDaemon) -> None:
    same(LONG, round_trip(LONG, {name: None for name in LONG}))
    # And where the state has one already, of any length and kind.
    same(LONG, round_trip(LONG, {**{name: [7] * 1200 for name in LONG}, "nested": [[3] * 1300, (), {"deep": []}]}))
    info = json.loads(json.loads(header(fake)[8:])["__metadata__"]["safepoint"])
    assert {name: about["dtype"] for name, about in info["raw"].items()} == {
        "ints": "list:<i8", "largest": "list:<i8", "floats": "list:<f8", "bools": "list:|b1", "tuple": "tuple:<i8",
        "tuple of floats": "tuple:<f8", "nested.0": "list:<i8", "nested.1": "tuple:<f8", "nested.2.deep": "list:|b1",
    }  # fmt: skip


def test_a_million_numbers_do_not_bloat_the_header(fake: FakeDaemon) -> None:
    saved = {"losses": [i / 7 for i in range(1_000_000)], "seen": list(range(1_000_000))}
    target = round_trip(saved, {"losses": None, "seen": None})
    assert target == saved and type(target["seen"]) is list and type(target["seen"][5]) is int
    assert len(header(fake)) <= 16384


def test_a_list_that_grows_from_save_to_save(fake: FakeDaemon) -> None:
    """Past the length at which it becomes a piece, and back; with another type in between."""
    losses: Any = [0.5] * (LONG_MIN - 2)
    weights = torch.zeros(3)
    with safepoint.Checkpointer("job", rank=0, world_size=1) as c:
        for step in range(8):
            losses = {4: [7] * 2000, 5: [True] * 2000, 6: (1,) * 2000, 7: np.arange(2000)}.get(
                step, [*losses, float(step)]
            )
            c.save(step, {"losses": losses, "w": weights.fill_(step)}).wait(timeout=20)
            target: dict[str, Any] = {"losses": None, "w": torch.zeros(3)}
            c.restore(target)
            same(target, {"losses": losses, "w": weights})


@pytest.mark.parametrize(
    "change",
    [
        (b'\\"list:<i8\\"', b'\\"list:<i9\\"'),
        (b'\\"list:<i8\\"', b'\\"list:<O8\\"'),
        (b'\\"list:<i8\\"', b'\\"lisp:<i8\\"'),
        (b'\\"shape\\":[2000]', b'\\"shape\\":[9000]'),
    ],
)
def test_a_long_list_that_is_none_is_refused(fake: FakeDaemon, change: tuple[bytes, bytes]) -> None:
    with safepoint.Checkpointer("job", rank=0, world_size=1) as c:
        attempt = (save := c.save(1, {"l": [1] * 2000})).attempt
        save.wait(timeout=20)
        data = fake.space("job").shards[attempt, 0]
        assert change[0] in data
        fake.space("job").shards[attempt, 0] = data.replace(*change)
        with pytest.raises(errors.ProtocolError):
            c.restore({"l": None})


def test_lists_of_other_lengths_on_other_ranks(fake: FakeDaemon, launch: Any) -> None:
    """A growing history changes nothing about who saves what: it is rank 0's, whatever its length on the others."""

    def state(rank: int, step: int) -> dict[str, Any]:
        tensors = {f"t{i}": torch.full((100 + i,), float(step)) for i in range(9)}
        return {**tensors, "losses": [float(step)] * (LONG_MIN - 2 + step + rank)}

    def work(rank: int, c: safepoint.Checkpointer) -> None:
        for step in range(4):
            c.save(step, state(rank, step)).wait(timeout=20)

    on_ranks(2, work)
    for info in fake.complete("job"):
        shards = [fake.space("job").shards[info.attempt, rank] for rank in range(2)]
        headers = [data[: 8 + int.from_bytes(data[:8], "little")] for data in shards]
        parsed = [parse_shard(data, rank) for rank, data in enumerate(headers)]
        names = [set(shard.pieces) - {"losses"} for shard in parsed]
        assert names[0] | names[1] == {f"t{i}" for i in range(9)} and not names[0] & names[1]
        assert not {"losses"} & ({*parsed[1].pieces} | {*parsed[1].values})
    launch()

    def load(rank: int, c: safepoint.Checkpointer) -> None:
        target: dict[str, Any] = {**{f"t{i}": torch.zeros(100 + i) for i in range(9)}, "losses": []}
        c.restore(target)
        same(target, {**state(0, 3), "losses": state(0, 3)["losses"]})

    on_ranks(3, load)

"""Exports read by the other party's own reader, and imports of what the other party wrote, friendly or hostile.

Bit identity (I-34), any number of ranks (I-18), no mixing (I-4), data is not code (I-39), bounded inputs (I-40).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from fake_core import AttemptInfo, FakeDaemon, ReadPin
from states import DTYPES, bits, random_tensor, same
from test_checkpointer import everything
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import safepoint
from safepoint import _connect, _core, _files, errors
from safepoint._pieces import compact
from safepoint._torch import DTYPE_NAMES
from safepoint.interchange import _boxes, _dcp_export, _dcp_import, _dcp_metadata, _source, export_step, import_folder
from safepoint.interchange._export import export_pinned
from safepoint.interchange._safetensors_import import load_safetensors
from safepoint.interchange._state import Values

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-W", "ignore", "-c", "from safepoint.cli import main; main()"]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.distributed is", "ignore:The given buffer")

NATIVE = [dtype for dtype in DTYPES if dtype in DTYPE_NAMES]
RAW = [dtype for dtype in DTYPES if dtype not in DTYPE_NAMES]
# safetensors reads and writes F8_E8M0, but the table that torch's reader asks it for lacks it.
FOR_HF_READER = [dtype for dtype in NATIVE if dtype != torch.float8_e8m0fnu]


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon for all tests of this file; every test has namespaces of its own."""
    folder = tmp_path_factory.mktemp("daemon")
    path = str(folder / "s.sock")
    (folder / "state").mkdir(mode=0o700)
    settings = {"--socket": path, "--state-dir": str(folder / "state"), "--pool": "512MiB", "--extent": "1MiB"}
    words = [word for pair in settings.items() for word in pair]
    process = subprocess.Popen([_connect.daemon_path({}), *words, "--http", "off", "--log-file", str(folder / "log")])
    while True:
        try:
            _core.Client(path).close()
            break
        except errors.Unavailable:
            assert process.poll() is None, (folder / "log").read_text()
    yield path
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def namespace(socket: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("SAFEPOINT_SOCKET", socket)
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:80]


def save(state: Any, namespace: str, step: int = 3, **options: Any) -> None:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1, **options) as checkpointer:
        checkpointer.save(step, state).wait("memory", timeout=60)


def restore(state: Any, namespace: str, **options: Any) -> Any:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1, **options) as checkpointer:
        assert checkpointer.restore(state) is not None
    return state


def tensors_of(dtypes: list[torch.dtype], seed: int) -> dict[str, torch.Tensor]:
    result = {}
    for dtype in dtypes:
        result[f"matrix {dtype}"] = random_tensor((5, 6), dtype, seed)
        result[f"scalar {dtype}"] = random_tensor((), dtype, seed)
        result[f"empty {dtype}"] = torch.empty(0, 3, dtype=dtype)
    return result


# --- round trips


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_every_state_kind_comes_back_through_our_files(namespace: str, tmp_path: Path, format: Any) -> None:
    """I-34, I-39: tensors, arrays, values and containers of every kind, bit for bit; no pickle on the way."""
    save(everything(1), namespace)
    info = export_step(namespace, tmp_path / "out", format=format)
    assert _files.check(tmp_path / "out") > info.bytes and info.values > 20
    assert f"scalar {torch.complex128}" in info.as_bytes and "torch.float32" not in info.as_bytes
    back = import_folder(tmp_path / "out", f"{namespace}-back", 9)
    assert back.verified and not back.skipped and back.parts == info.tensors + info.values and back.format == format
    same(restore(everything(2), f"{namespace}-back"), everything(1))


def test_dcp_folder_of_ours_comes_back(namespace: str, tmp_path: Path) -> None:
    """Tensors and plain values by the restricted unpickler; what it refuses only when that was asked for."""
    state = {
        "model": tensors_of(DTYPES, 1),
        "list": [torch.ones(2), {"lr": 0.5}, 3],
        "tuple": (1, torch.ones(3)),
        "long": [list(range(2000)), tuple(x / 3 for x in range(1500)), [True, False] * 600],
        "plain": [1, 2.5, None, True, "é", float("inf"), (1, 2), {1}, 1 + 2j, b"b"],
        "numpy": np.arange(3.0),
    }
    save(state, namespace)
    info = export_step(namespace, tmp_path / "out", format="dcp")
    assert not info.as_bytes
    with pytest.raises(errors.NotPlain, match=r"numpy: its pickle names numpy\S+; leave such values out"):
        import_folder(tmp_path / "out", f"{namespace}-1", 9)
    skipping = import_folder(tmp_path / "out", f"{namespace}-1", 9, skip_not_plain=True)
    assert skipping.skipped == ("numpy",) and skipping.format == "dcp" and skipping.verified
    import_folder(tmp_path / "out", f"{namespace}-2", 9, allow_pickle=True)
    target = {
        "model": tensors_of(DTYPES, 2),
        "list": [torch.zeros(2), {"lr": 0.0}, 0],
        "tuple": (0, torch.zeros(3)),
        "long": [[], (), []],
        "plain": [],
        "numpy": np.zeros(3),
    }
    same(restore(target, f"{namespace}-2"), state)
    target = {**target, "model": tensors_of(DTYPES, 2), "numpy": 5}
    with safepoint.Checkpointer(f"{namespace}-1", rank=0, world_size=1) as checkpointer:
        checkpointer.restore(target, allow_missing=True)
    same(target, {**state, "numpy": 5})


def test_ties_values_and_per_rank_parts(namespace: str, tmp_path: Path) -> None:
    """What each format carries, as docs/interchange.md has it; per-rank parts go by the name with the rank."""
    weight = torch.randn(4, 4)
    state = {
        "model": {"a": weight, "tied": weight},
        "rng": safepoint.PerRank(torch.arange(4)),
        "nested": {"place": safepoint.PerRank({"at": 7})},
        "lr": 0.5,
    }
    save(state, namespace)
    for format in ("safetensors", "hf", "dcp"):
        out, back = tmp_path / format, f"{namespace}-{format}"
        info = export_step(namespace, out, format=format)  # type: ignore[arg-type]
        assert (info.tensors, info.values) == (3, 2)
        import_folder(out, back, 1)
        target: Any = {
            "model": {"a": torch.zeros(4, 4), "tied": torch.zeros(4, 4)},
            "rng": safepoint.PerRank(torch.zeros(4, dtype=torch.int64)),
            "nested": {"place": safepoint.PerRank({"at": 0})},
            "lr": 0.0,
        }
        restore(target, back)
        assert torch.equal(target["model"]["a"], weight) and torch.equal(target["model"]["tied"], weight)
        assert torch.equal(target["rng"].value, torch.arange(4)), format
        assert target["nested"]["place"].value == {"at": 7} and target["lr"] == 0.5
    # Rank shards have a tied tensor once, under one name; the other formats have it under both.
    assert "model.tied" not in safetensors.torch.load_file(tmp_path / "safetensors" / "rank-0.safetensors")
    whole = safetensors.torch.load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert torch.equal(whole["model.tied"], weight) and torch.equal(whole["rng@0"], torch.arange(4))
    loaded: Any = {"model": {"tied": torch.zeros(4, 4)}, "rng@0": torch.zeros(4, dtype=torch.int64), "lr": None}
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(loaded["model"]["tied"], weight) and loaded["rng@0"][3] == 3 and loaded["lr"] == 0.5


# --- the other party's own readers


def test_safetensors_reads_every_dtype_it_has(namespace: str, tmp_path: Path) -> None:
    state = tensors_of(NATIVE, 1)
    save(state, namespace)
    for format in ("safetensors", "hf"):
        export_step(namespace, tmp_path / format, format=format)  # type: ignore[arg-type]
        [file] = (tmp_path / format).glob("*.safetensors")
        loaded = safetensors.torch.load_file(file)
        assert set(loaded) == set(state)
        for name, tensor in state.items():
            same(loaded[name], tensor, name)


def test_torchs_hugging_face_reader_reads_every_dtype_it_knows(namespace: str, tmp_path: Path) -> None:
    state = tensors_of(FOR_HF_READER, 1)
    save(state, namespace)
    for format in ("safetensors", "hf"):
        export_step(namespace, tmp_path / format, format=format)  # type: ignore[arg-type]
        target = tensors_of(FOR_HF_READER, 2)
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / format)), no_dist=True)
        same(target, state)


def test_torchs_file_system_reader_reads_every_dtype(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain dcp.load into a nested state: tensors bit-equal, values as DCP stores them, in several files."""
    monkeypatch.setattr(_dcp_export, "_FILE_BYTES", 300)
    state = {
        "model": tensors_of(DTYPES, 1),
        "optim": {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.99)}], "state": {"0": {"step": torch.tensor(3.0)}}},
        "array": np.arange(2000.0),
        "bytes": b"x" * 5000,
        "tuple": (1, torch.arange(3)),
        "epoch": 7,
    }
    save(state, namespace)
    info = export_step(namespace, tmp_path / "out", format="dcp")
    assert len(info.files) > 5
    target: Any = {
        "model": tensors_of(DTYPES, 2),
        "optim": {"param_groups": [{"lr": 0.0, "betas": 0}], "state": {"0": {"step": torch.tensor(0.0)}}},
        "array": None,
        "bytes": None,
        "tuple": None,
        "epoch": 0,
    }
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    same(target, state)
    dcp_to_torch_save(tmp_path / "out", tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=False)
    same(in_order(found, state), state)


def in_order(found: Any, like: Any) -> Any:
    """The same with the keys of its dicts in the order of another state."""
    if not isinstance(like, dict):
        return found
    assert set(found) == set(like)
    return {key: in_order(found[key], like[key]) for key in like}


def test_prefix_gives_the_weights_alone(namespace: str, tmp_path: Path) -> None:
    """Names without the prefix: what `from_pretrained` and `load_state_dict` expect, and what comes back below it."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    save({"model": model, "optim": {"lr": 0.1, "model": torch.ones(2)}, "models": torch.ones(1)}, namespace)
    info = export_step(namespace, tmp_path / "hf", format="hf", prefix="model")
    assert (info.tensors, info.values) == (len(model.state_dict()), 0)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors"))
    same(other, model)
    export_step(namespace, tmp_path / "dcp", format="dcp", prefix="model")
    for folder in ("hf", "dcp"):
        import_folder(tmp_path / folder, f"{namespace}-{folder}", 0, prefix="model")
        other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        restore({"model": other}, f"{namespace}-{folder}")
        same(other, model)
    # A prefix may end inside a key with dots, as a module's keys are.
    assert export_step(namespace, tmp_path / "part", format="hf", prefix="model.0").tensors == 2
    with pytest.raises(errors.NotFound, match="nothing below 'mod'"):
        export_step(namespace, tmp_path / "none", format="hf", prefix="mod")
    with pytest.raises(errors.InvalidArgument, match="whole shards"):
        export_step(namespace, tmp_path / "none", prefix="model")
    assert not (tmp_path / "none").exists()


def test_size_bound_and_index(namespace: str, tmp_path: Path) -> None:
    state = {f"t{i}": random_tensor((i, 10), torch.float32, i) for i in range(1, 12)}
    save(state, namespace)
    info = export_step(namespace, tmp_path / "out", format="hf", max_file_bytes=1000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == info.bytes == sum(t.nbytes for t in state.values())
    found = {}
    for file in files:
        loaded = safetensors.torch.load_file(file)
        assert len(loaded) == 1 or sum(t.nbytes for t in loaded.values()) <= 1000
        assert {name for name, of in index["weight_map"].items() if of == file.name} == set(loaded)
        found.update(loaded)
    same({name: found[name] for name in state}, state)
    same(
        restore({name: torch.zeros_like(t) for name, t in state.items()}, imported(tmp_path / "out", namespace)), state
    )


def imported(folder: Path, namespace: str, **options: Any) -> str:
    name = f"{namespace}-imported"
    import_folder(folder, name, 1, **options)
    return name


# --- several ranks


@pytest.fixture(scope="module")
def two_ranks(socket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what two ranks wrote by torch's own means, the whole tensors, and their safepoint namespace."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("save", folder, "ranks", socket)
    return folder, "ranks"


def torchrun(mode: str, folder: Path, namespace: str, socket: str, ranks: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {
        **os.environ,
        "SAFEPOINT_SOCKET": socket,
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    words = [*command, str(HERE / "interchange_ranks.py"), mode, str(folder), namespace]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    problems = [(folder / f"result-{mode}-{rank}").read_text() for rank in range(ranks)]
    assert problems == [""] * ranks


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def blank(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def test_two_ranks_shards_are_whole_tensors_to_torch(
    two_ranks: tuple[Path, str], namespace: str, tmp_path: Path
) -> None:
    """I-18: sharded by rows, by columns and replicated, FSDP2 and AdamW; every format, its own reader."""
    folder, saved = two_ranks
    expected = torch.load(folder / "expected.pt", weights_only=False)
    tensors = {name: value for name, value in leaves(expected).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 15
    for format in ("safetensors", "hf"):
        info = export_step(saved, tmp_path / format, format=format)  # type: ignore[arg-type]
        target = blank(tensors)
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / format)), no_dist=True)
        same(target, tensors)
        import_folder(tmp_path / format, f"{namespace}-{format}", 1)
        same(restore(blank(expected), f"{namespace}-{format}"), expected)
    assert len([f for f in os.listdir(tmp_path / "safetensors") if f.startswith("rank-")]) == 2
    assert info.values > 3
    export_step(saved, tmp_path / "dcp", format="dcp")
    target = {**blank(expected), "rng@1": torch.zeros(4, dtype=torch.int64), "place.at@1": None}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert target.pop("rng@1")[0] == 1 and target.pop("place.at@1") == 1
    same(target, expected)


def test_per_rank_parts_of_two_ranks_come_back_by_rank(
    two_ranks: tuple[Path, str], namespace: str, tmp_path: Path
) -> None:
    """An import is a step of one rank; each rank of a job finds its own part by the name with its rank."""
    for format in ("safetensors", "hf", "dcp"):
        export_step(two_ranks[1], tmp_path / format, format=format)  # type: ignore[arg-type]
        import_folder(tmp_path / format, f"{namespace}-{format}", 1)
        for rank in range(2):
            with safepoint.Checkpointer(f"{namespace}-{format}", rank=rank, world_size=2) as checkpointer:
                target: Any = {"rng": safepoint.PerRank(torch.zeros(4, dtype=torch.int64)),
                               "place": safepoint.PerRank({"at": -1})}  # fmt: skip
                os.environ["SAFEPOINT_LAUNCH_ID"] = f"{namespace}-{format}"
                try:
                    checkpointer.restore(target)
                finally:
                    del os.environ["SAFEPOINT_LAUNCH_ID"]
            assert torch.equal(target["rng"].value, torch.full((4,), rank)) and target["place"].value == {"at": rank}


def test_dcp_folder_of_two_ranks_is_imported(two_ranks: tuple[Path, str], namespace: str, socket: str) -> None:
    """I-18: written by torch with FSDP2 and DTensors; restored whole by one rank, and into shards by two."""
    folder, _ = two_ranks
    expected = torch.load(folder / "expected.pt", weights_only=False)
    info = import_folder(folder / "dcp", namespace, 12)
    assert info.format == "dcp" and not info.verified and not info.skipped
    same(restore(blank(expected), namespace), expected)
    torchrun("restore", folder, namespace, socket)


def test_sharded_files_of_torchs_hugging_face_writer(two_ranks: tuple[Path, str], namespace: str) -> None:
    """They state offsets, but no global shapes: those are the least that hold all pieces."""
    folder, _ = two_ranks
    expected = torch.load(folder / "expected.pt", weights_only=False)
    assert import_folder(folder / "torch-hf", namespace, 12).format == "safetensors"
    tensors = {**expected["model"], **expected["sharded"]}
    same(restore(blank(tensors), namespace), tensors)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torchs_folder_gives_a_fresh_optimizer_its_state(namespace: str, tmp_path: Path) -> None:
    """torch's planner makes texts of the parameters' numbers, and an optimizer finds no parameter under a text."""

    def made(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = made(3)
    torch.distributed.checkpoint.save({"model": model, "optim": optimizer}, checkpoint_id=tmp_path / "dcp")
    import_folder(tmp_path / "dcp", namespace, 3)
    other, fresh = made(0)
    restore({"model": other, "optim": fresh}, namespace)
    same(optimizer.state_dict()["param_groups"], fresh.state_dict()["param_groups"])
    for ours, its in zip(model.parameters(), other.parameters(), strict=True):
        same(dict(sorted(optimizer.state[ours].items())), dict(sorted(fresh.state[its].items())))


# --- pieces


def shard_bytes(
    rank: int, world: int, parts: list[tuple[str, np.ndarray[Any, Any], tuple[int, ...]]], shape: Any
) -> bytes:
    """A shard with several pieces of tensor `w`; keys w, w@1, w@2, ..."""
    entries, sharding, names, data = {}, {}, {}, b""
    for number, (_, array, offsets) in enumerate(parts):
        key = f"w@{number}" if number else "w"
        entries[key] = {"dtype": "I32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        sharding[key] = {"saved_offsets": offsets}
        if number:
            names[key] = "w"
        data += np.ascontiguousarray(array).tobytes()
    ours = {"version": 1, "global": dict.fromkeys(entries, shape), "name": names}
    step = {"attempt": "00" * 16, "step": 4, "world_size": world, "rank": rank, "version": 1}
    metadata = {"safepoint.step": compact(step), "safepoint.objects": "[]", "DCP_SHARDING_INFO": compact(sharding),
                "safepoint": compact(ours)}  # fmt: skip
    header = compact({"__metadata__": metadata, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


def cut(shape: tuple[int, ...], rng: random.Random) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random boxes that fill the shape."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(rng.randrange(8)):
        at, sizes = boxes.pop(rng.randrange(len(boxes)))
        d = rng.randrange(len(shape))
        if sizes[d] < 2:
            boxes.append((at, sizes))
            continue
        low = rng.randrange(1, sizes[d])
        boxes.append((at, (*sizes[:d], low, *sizes[d + 1 :])))
        boxes.append(((*at[:d], at[d] + low, *at[d + 1 :]), (*sizes[:d], sizes[d] - low, *sizes[d + 1 :])))
    return boxes


@pytest.mark.parametrize("seed", range(25))
def test_any_pieces_make_the_whole_tensor(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces per rank, repeated within and across ranks, through buffers of any size; and back."""
    rng = random.Random(seed)
    monkeypatch.setattr(_source, "BUFFER", rng.choice([4, 12, 64, 8 << 20]))
    shape = tuple(rng.randrange(1, 7) for _ in range(rng.randrange(1, 4)))
    whole = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    boxes = cut(shape, rng)
    boxes += rng.sample(boxes, rng.randrange(len(boxes) + 1))
    world = rng.randrange(1, 4)
    ranks: list[list[Any]] = [[] for _ in range(world)]
    for at, sizes in boxes:
        ranks[rng.randrange(world)].append(
            ("w", whole[tuple(map(slice, at, map(sum, zip(at, sizes, strict=True))))], at)
        )
    node = FakeDaemon()
    info = AttemptInfo(bytes(16), b"", 1, 4, 1, world, state="complete")
    for rank, parts in enumerate(ranks):
        node.space("job").shards[info.attempt, rank] = shard_bytes(rank, world, parts, shape)
        node.space("job").structures[info.attempt, rank] = (0, b"")
    with ReadPin(node, "job", info) as pin:
        export_pinned(pin, "job", tmp_path / "hf", format="hf")  # type: ignore[arg-type]
        export_pinned(pin, "job", tmp_path / "dcp", format="dcp")  # type: ignore[arg-type]
    loaded = safetensors.torch.load_file(tmp_path / "hf" / "model-00001-of-00001.safetensors")
    assert np.array_equal(loaded["w"].numpy(), whole)
    target = {"w": torch.zeros(shape, dtype=torch.int32)}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert np.array_equal(target["w"].numpy(), whole)
    # Pieces that leave a gap, or overlap, are no tensor.
    ranks[-1] = [p for p in ranks[-1] if p[2] != boxes[0][0]] if world == 1 else [("w", whole, (0,) * len(shape))]
    node.space("job").shards[info.attempt, world - 1] = shard_bytes(world - 1, world, ranks[-1], shape)
    if len(set(boxes)) > 1 and any(ranks[:-1]):
        with ReadPin(node, "job", info) as pin, pytest.raises(errors.ProtocolError, match=r"elements|overlap"):
            export_pinned(pin, "job", tmp_path / "bad", format="hf")  # type: ignore[arg-type]
        assert not (tmp_path / "bad").exists()


def test_boxes() -> None:
    for shape, limit in itertools.product([(4, 3, 2), (1,), (7,), (2, 1, 5)], (1, 2, 3, 5, 100)):
        numbers = np.arange(math.prod(shape)).reshape(shape)
        parts = []
        for offsets, sizes in _boxes.slabs(shape, limit):
            assert math.prod(sizes) <= max(limit, 1)
            part = numbers[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            assert _boxes.linear(offsets, shape) == part.flat[0]
            parts.append(part.reshape(-1))
        assert np.array_equal(np.concatenate(parts), np.arange(math.prod(shape)))
    assert _boxes.fill_problem([((), ())], ()) is None
    assert _boxes.fill_problem([], (0, 3)) is None
    assert "elements" in str(_boxes.fill_problem([((0,), (2,))], (3,)))
    crossing = [((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))]
    assert "overlap" in str(_boxes.fill_problem(crossing, (3, 3)))
    assert "overlap" in str(_boxes.fill_problem([((0,), (2,)), ((1,), (1,))], (3,)))
    assert "inside" in str(_boxes.fill_problem([((2,), (2,))], (3,)))


def test_memory_stays_bounded(namespace: str, tmp_path: Path, socket: str) -> None:
    """One tensor and a buffer for hf, one file for dcp: never the checkpoint. Anonymous memory, as it goes."""
    code = """
        import sys
        from pathlib import Path
        import torch, safepoint
        from safepoint.interchange import _dcp_export, export_step
        namespace, folder = sys.argv[1], Path(sys.argv[2])
        _dcp_export._FILE_BYTES = 16 << 20
        tensors = {str(i): torch.full((2 << 20,), float(i)) for i in range(16)}  # 8 MiB each
        with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
            c.save(1, tensors).wait(timeout=60)
        del tensors
        def anonymous():
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) << 10
        result = []
        for format in ("hf", "dcp"):
            export_step(namespace, folder / ("warm" + format), format=format)
            begin = anonymous()
            seen = [begin]
            export_step(namespace, folder / format, format=format, progress=lambda *_: seen.append(anonymous()))
            result.append(str(max(seen) - begin))
        (folder / "result").write_text(" ".join(result))
    """
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "\n".join(line[8:] for line in code.splitlines()),
            namespace,
            str(tmp_path),
        ],
        env={**os.environ, "SAFEPOINT_SOCKET": socket},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hf, dcp_ = map(int, (tmp_path / "result").read_text().split())
    assert hf <= 24 << 20 and dcp_ <= 48 << 20, (hf, dcp_)


# --- what is not carried, and failures


def test_values_saved_with_pickle_need_consent(namespace: str, tmp_path: Path) -> None:
    """I-39: in the export, in the import, and again in the restore."""
    state = {"w": torch.ones(2), "odd": SimpleNamespace(a=1)}
    save(state, namespace, allow_pickle=True)
    with pytest.raises(errors.NotPlain, match="odd"):
        export_step(namespace, tmp_path / "dcp", format="dcp")
    assert os.listdir(tmp_path) == []
    export_step(namespace, tmp_path / "dcp", format="dcp", allow_pickle=True)
    export_step(namespace, tmp_path / "hf", format="hf")
    for folder in ("dcp", "hf"):
        with pytest.raises(errors.NotPlain, match="odd"):
            import_folder(tmp_path / folder, f"{namespace}-{folder}", 1)
        assert import_folder(tmp_path / folder, f"{namespace}-{folder}", 1, skip_not_plain=True).skipped == ("odd",)
        import_folder(tmp_path / folder, f"{namespace}-{folder}-all", 1, allow_pickle=True)
        target = {"w": torch.zeros(2), "odd": None}
        restore(target, f"{namespace}-{folder}-all", allow_pickle=True)
        assert target["odd"] == SimpleNamespace(a=1)
    with pytest.raises(errors.InvalidArgument, match="exclude"):
        import_folder(tmp_path / "hf", "x", 1, skip_not_plain=True, allow_pickle=True)


def test_dtypes_that_torch_does_not_store_are_named(namespace: str, tmp_path: Path) -> None:
    """torch has them as shells only; our own files carry their bits."""
    state = {"w": torch.ones(3), "shell": torch.arange(4, dtype=torch.uint8).view(torch.int4)}
    save(state, namespace)
    with pytest.raises(errors.InvalidArgument, match=r"torch cannot store shell, of dtype torch\.int4"):
        export_step(namespace, tmp_path / "dcp", format="dcp")
    assert os.listdir(tmp_path) == []
    assert export_step(namespace, tmp_path / "hf", format="hf").as_bytes == ("shell",)
    import_folder(tmp_path / "hf", f"{namespace}-2", 1)
    target = {"w": torch.zeros(3), "shell": torch.zeros(4, dtype=torch.uint8).view(torch.int4)}
    restore(target, f"{namespace}-2")
    assert torch.equal(target["shell"].view(torch.uint8), torch.arange(4, dtype=torch.uint8))


def test_what_is_left_out_of_a_list_is_none(namespace: str, tmp_path: Path) -> None:
    dcp.save({"l": [torch.ones(1), SimpleNamespace(), 3]}, checkpoint_id=tmp_path / "d", no_dist=True)
    assert import_folder(tmp_path / "d", namespace, 1, skip_not_plain=True).skipped == ("l.1",)
    target: Any = {"l": [torch.zeros(1), 0, 0]}
    assert restore(target, namespace)["l"][1:] == [None, 3]


def test_existing_namespace_is_taken_over_only_on_request(namespace: str, tmp_path: Path) -> None:
    """I-21: a job that still saves there would be fenced."""
    save({"w": torch.ones(2)}, namespace)
    export_step(namespace, tmp_path / "out")
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as job:
        job.save(4, {"w": torch.ones(2)}).wait("memory", timeout=30)
        with pytest.raises(errors.InvalidArgument, match="existing"):
            import_folder(tmp_path / "out", namespace, 9)
        job.save(5, {"w": torch.ones(2)}).wait("memory", timeout=30)
        import_folder(tmp_path / "out", namespace, 9, existing=True)
        latest = job.latest()
        assert latest is not None and latest.step == 9


def test_a_failed_export_leaves_nothing(namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-8: a block that does not match ends every format's export, through torch's writer, too."""
    save({"w": torch.ones(1000), "v": torch.ones(1000)}, namespace)
    read = _source.StepSource._read

    def corrupt(self: Any, piece: Any, *rest: Any) -> None:
        if self._done:
            raise errors.Corrupt("planted")
        read(self, piece, *rest)

    monkeypatch.setattr(_source.StepSource, "_read", corrupt)
    for format in ("hf", "dcp"):
        with pytest.raises(errors.Corrupt, match="planted"):
            export_step(namespace, tmp_path / "out", format=format)  # type: ignore[arg-type]
        assert os.listdir(tmp_path) == []


def test_wrong_arguments(namespace: str, tmp_path: Path) -> None:
    save({"w": torch.ones(2)}, namespace)
    with pytest.raises(errors.NotFound):
        export_step(namespace, tmp_path / "x", step=77)
    with pytest.raises(errors.InvalidArgument, match="format"):
        export_step(namespace, tmp_path / "x", format="npz")  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(errors.InvalidArgument, match="exists"):
        export_step(namespace, tmp_path / "full", format="hf")
    with pytest.raises(errors.NotFound, match="safetensors"):
        import_folder(tmp_path / "full", f"{namespace}-2", 1)
    with pytest.raises(errors.NotFound, match="no folder"):
        import_folder(tmp_path / "nowhere", f"{namespace}-2", 1)
    export_step(namespace, tmp_path / "hf", format="hf")
    with pytest.raises(errors.InvalidArgument, match="format hf"):
        import_folder(tmp_path / "hf", f"{namespace}-2", 1, format="dcp")


# --- safetensors files of others


def test_foreign_safetensors_files(namespace: str, tmp_path: Path) -> None:
    """No metadata of ours, no index, a file that was not aligned by its writer."""
    tensors = {"layers.0.weight": torch.randn(3, 4), "layers.0.bias": torch.randn(3).to(torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    odd = torch.randn(5)
    header = compact({"o": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                      "odd": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]}}).encode()  # fmt: skip
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\7" + bits(odd))
    loaded = load_safetensors(tmp_path, Values(skip=False, allow_pickle=False))
    assert all(value.data_ptr() % value.element_size() == 0 for _, value in loaded.leaves)
    import_folder(tmp_path, namespace, 1, prefix="model")
    target: Any = {"model": blank(tensors) | {"odd": torch.zeros(5), "o": torch.zeros(1, dtype=torch.uint8)}}
    restore(target, namespace)
    same(target["model"], tensors | {"odd": odd, "o": torch.tensor([7], dtype=torch.uint8)})


def test_packed_and_unknown_dtypes(namespace: str, tmp_path: Path) -> None:
    """F4 is torch's packed type; what torch has no dtype for is named, and left out only on request."""
    packed = random_tensor((3, 4), torch.float4_e2m1fn_x2, 1)
    (tmp_path / "f4").mkdir()
    header = compact({"p": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]},
                      "six": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [12, 15]}}).encode()  # fmt: skip
    data = struct.pack("<Q", len(header)) + header + bits(packed) + b"abc"
    (tmp_path / "f4" / "x.safetensors").write_bytes(data)
    with pytest.raises(errors.NotPlain, match="six: torch has no dtype F6_E2M3"):
        import_folder(tmp_path / "f4", namespace, 1)
    assert import_folder(tmp_path / "f4", namespace, 1, skip_not_plain=True).skipped == ("six",)
    target = {"p": random_tensor((3, 4), torch.float4_e2m1fn_x2, 2)}
    same(restore(target, namespace), {"p": packed})


def good(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = {"a": torch.arange(100.0), "b": torch.ones(3, dtype=torch.int64)}
    safetensors.torch.save_file(tensors, folder / "m.safetensors")
    return tensors


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "m.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / "m.safetensors").write_bytes(change((folder / "m.safetensors").read_bytes()))  # type: ignore[return-value]


def index(weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))  # type: ignore[return-value]


def fifo(folder: Path) -> None:
    (folder / "m.safetensors").unlink()
    os.mkfifo(folder / "m.safetensors")


def metadata(**texts: Any) -> Callable[[Path], None]:
    return rewritten(lambda h: h.update(__metadata__={k.replace("_dot_", "."): v for k, v in texts.items()}))


OURS = {"version": 1}
BYTES = dcp.metadata.BytesStorageMetadata()


def offsets(**of: list[int]) -> Callable[[Path], None]:
    return metadata(DCP_SHARDING_INFO=json.dumps({key: {"saved_offsets": value} for key, value in of.items()}))


def with_step(step: Any) -> Callable[[Path], None]:
    return metadata(safepoint=json.dumps(OURS), safepoint_dot_step=json.dumps(step))


def with_objects(objects: Any) -> Callable[[Path], None]:
    return metadata(safepoint=json.dumps(OURS), safepoint_dot_objects=json.dumps(objects))


HOSTILE_SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "truncated data": with_bytes(lambda b: b[:-1]),
    "truncated header": with_bytes(lambda b: b[:20]),
    "empty": with_bytes(lambda b: b""),
    "seven bytes": with_bytes(lambda b: b[:7]),
    "trailing byte": with_bytes(lambda b: b + b"x"),
    "header of 2^63": with_bytes(lambda b: struct.pack("<Q", 1 << 63) + b[8:]),
    "not JSON": rewritten(lambda h: "{" * 50),
    "deep JSON": rewritten(lambda h: "[" * 100_000),
    "a list": rewritten(lambda h: "[]"),
    "a key twice": rewritten(lambda h: json.dumps(h)[:-1] + "," + json.dumps(h)[1:]),
    "offset beyond": rewritten(lambda h: h["a"].update(data_offsets=[0, 1 << 40])),
    "negative offset": rewritten(lambda h: h["a"].update(data_offsets=[-400, 0])),
    "offset as text": rewritten(lambda h: h["a"].update(data_offsets=["0", "400"])),
    "offset as float": rewritten(lambda h: h["a"].update(data_offsets=[0.0, 400.0])),
    "offset as bool": rewritten(lambda h: h["a"].update(data_offsets=[False, 400])),
    "overlap": rewritten(lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"], shape=[50])),
    "huge shape": rewritten(lambda h: h["a"].update(shape=[1 << 62, 1 << 62])),
    "shape that lies": rewritten(lambda h: h["a"].update(shape=[101])),
    "shape as number": rewritten(lambda h: h["a"].update(shape=100)),
    "no shape": rewritten(lambda h: h["a"].pop("shape") and None),
    "unknown dtype": rewritten(lambda h: h["a"].update(dtype="OBJECT")),
    "unknown field": rewritten(lambda h: h["a"].update(more=1)),
    "metadata no text": rewritten(lambda h: h.update(__metadata__={"x": 1})),
    "index outside": index({"a": "../outside.safetensors"}),
    "index absolute": index({"a": "/etc/passwd"}),
    "index no text": index({"a": 5}),
    "index no object": index(["a"]),
    "index of a missing file": index({"a": "other.safetensors"}),
    "index of a missing tensor": index({"c": "m.safetensors"}),
    "index of itself": index({"a": "model.safetensors.index.json"}),
    "index of the folder": index({"a": "."}),
    "fifo": fifo,
    "sharding without a key": offsets(a=[0]),
    "sharding of other dimensions": offsets(a=[0, 0], b=[0]),
    "sharding with a gap": offsets(a=[7], b=[0]),
    "sharding at 2^62": offsets(a=[1 << 62], b=[0]),
    "raw that lies": metadata(safepoint='{"version":1,"raw":{"b":{"dtype":"complex128","shape":[9]}}}'),
    "raw of an object": metadata(safepoint='{"version":1,"raw":{"b":{"dtype":"numpy:|O","shape":[3]}}}'),
    "alias of nothing": metadata(safepoint='{"version":1,"alias":{"c":"nothing"}}'),
    "path no list": metadata(safepoint='{"version":1,"path":{"a":"x"}}'),
    "path below a leaf": metadata(safepoint='{"version":1,"path":{"a":["b","c"]}}'),
    "path of mixed kinds": metadata(safepoint='{"version":1,"path":{"a":[[0]],"b":["x"]}}'),
    "a value without a path": with_objects([["x", {"!": "tuple", "v": []}]]),
    "objects no list": with_objects(5),
    "objects of an unknown tag": with_objects([[["x"], {"!": "eval"}]]),
    "objects of a time beyond": with_objects([[["x"], {"!": "timedelta", "v": [1 << 62, 0, 0]}]]),
    "one shard of two": with_step({"attempt": "0", "rank": 0, "world_size": 2}),
    "step unreadable": with_step([]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_folder(case: str, namespace: str, tmp_path: Path) -> None:
    """I-40: one clear error, before anything is saved."""
    good(tmp_path / "x")
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "x" / "m.safetensors").read_bytes())
    HOSTILE_SAFETENSORS[case](tmp_path / "x")
    with pytest.raises(errors.Corrupt):
        import_folder(tmp_path / "x", namespace, 1)
    assert_nothing_saved(namespace)


@pytest.mark.parametrize("name", ["safepoint", "safepoint.step"])
def test_shards_of_another_version_are_refused(name: str, namespace: str, tmp_path: Path) -> None:
    """Not damaged, and not to be guessed at: the error says what to do."""
    good(tmp_path / "x")
    metadata(**{name: '{"version":2}'})(tmp_path / "x")
    with pytest.raises(errors.ProtocolError, match=rf"{name} text has version 2, and this safepoint knows version 1"):
        import_folder(tmp_path / "x", namespace, 1)
    assert_nothing_saved(namespace)


def assert_nothing_saved(namespace: str) -> None:
    client = _connect.open_client("test")
    assert namespace not in [n.ns for n in client.list_namespaces()]
    client.close()


def test_shards_of_two_steps_are_never_mixed(namespace: str, tmp_path: Path) -> None:
    """I-4."""
    for step in (1, 2):
        save({"w": torch.full((3,), float(step))}, namespace, step)
        export_step(namespace, tmp_path / str(step))
    (tmp_path / "1" / "rank-0.safetensors").rename(tmp_path / "2" / "rank-1.safetensors")
    with pytest.raises(errors.Corrupt, match="2 attempts"):
        import_folder(tmp_path / "2", f"{namespace}-2", 1)


def test_a_flipped_bit_in_our_export_is_found(namespace: str, tmp_path: Path) -> None:
    """I-8: the checksums that were written with the folder are compared."""
    save({"w": torch.ones(1000)}, namespace)
    for format in ("safetensors", "hf", "dcp"):
        export_step(namespace, tmp_path / format, format=format)  # type: ignore[arg-type]
        path = max((tmp_path / format).iterdir(), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[-2500] ^= 1
        path.write_bytes(content)
        with pytest.raises(errors.Corrupt, match=path.name):
            import_folder(tmp_path / format, f"{namespace}-2", 1)


# --- hostile DCP folders


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small DCP folder of torch's own writer."""
    state = {"model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}, "lr": 0.5, "steps": [1, 2]}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def change_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))


def place_of(found: Any, name: str) -> Any:
    return next(info for index, info in found.storage_data.items() if index.fqn == name)


def test_folder_of_torchs_own_writer(folder: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-39: no unpickler of Python's own runs in an import."""

    def poison(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an unrestricted unpickler was used")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, poison)
    import_folder(folder, namespace, 1)
    target = {"model": {"w": torch.zeros(3, 4), "b": torch.zeros(2)}, "lr": 0.0, "steps": [0, 0]}
    restore(target, namespace)
    assert torch.equal(target["model"]["w"], torch.arange(12.0).reshape(3, 4)) and target["lr"] == 0.5  # type: ignore[index]
    assert target["steps"] == [1, 2]


def test_metadata_that_runs_code_runs_none(folder: Path, namespace: str, tmp_path: Path) -> None:
    """I-39: neither as the whole, nor anywhere inside; consent to pickle in values is none for the metadata."""
    mark = tmp_path / "ran"
    whole = pickle.loads((folder / ".metadata").read_bytes())
    whole.planner_data["x"] = Bomb(mark)
    for evil in (Bomb(mark), whole, {"state_dict_metadata": Bomb(mark)}):
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
        for consent in (False, True):
            with pytest.raises(errors.Corrupt, match=r"posix\.system, which is none of torch's metadata classes"):
                import_folder(folder, namespace, 1, allow_pickle=consent)
    assert not mark.exists()


def raw(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations) + b"."


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


META = "torch.distributed.checkpoint.metadata"
MANY = b"(" + b"N" * 10_000 + b"t\x94"  # A tuple, kept under the next number.
HOSTILE_PICKLES = {
    "empty": b"",
    "not a pickle": b"hello",
    "cut short": pickle.dumps({"a": 1})[:-3],
    "builtins.eval": raw(name("builtins", "eval"), b"(Vprint(1)\ntR"),
    "builtins.getattr": raw(name("builtins", "getattr"), b"(Vx\ntR"),
    "a torch function": raw(name("torch", "load"), b"(V/etc/passwd\ntR"),
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0aos.system.x\x93.",
    "torch's own reader": raw(name("torch.distributed.checkpoint.filesystem", "FileSystemReader"), b"(Vx\ntR"),
    "codec": raw(name("_codecs", "encode"), b"(Vx\ntR"),
    "an extension code": raw(b"\x82\x01"),
    "a persistent id": raw(b"Px\n"),
    "too deep": raw(b"(" * 10 + b"]" * 200_000),
    "a memo of 2^32": raw(b"N", b"r\xff\xff\xff\xff", b"0N"),
    "bytes of 2^62": raw(b"\x8e" + struct.pack("<Q", 1 << 62) + b"x"),
    "a frame of 2^62": raw(b"\x95" + struct.pack("<Q", 1 << 62) + b"N"),
    "a byte array of 2^28": raw(b"\x96" + struct.pack("<Q", 1 << 28)),
    "a list that becomes many sizes": raw(
        name("torch", "Size"), b"\x94(", b"N" * 10_000, b"l\x94", b"h\0h\1\x85R" * 2000
    ),
    "many arguments, often": raw(name(META, "Metadata"), b"\x94", MANY, b"h\0h\1R" * 2000),
    "many arguments of a new one": raw(name(META, "Metadata"), b"\x94", MANY, b"h\0h\1\x81" * 2000),
    "a text of 2^24 tuples": raw(
        name(META, "Metadata"),
        b")\x81}Vstate_dict_metadata\n)" + b"2\x86" * 24 + b"\x94sVstorage_data\nh\0sb",
    ),
    "a key of 2^100 tuples": raw(b"})" + b"2\x86" * 100 + b"Ns"),
    "keys of 2^100 tuples": raw(b"}()" + b"2\x86" * 100 + b"Nu"),
    "a dictionary of 2^100 tuples": raw(b"()" + b"2\x86" * 100 + b"Nd"),
    "a set of 2^100 tuples": raw(b"\x8f()" + b"2\x86" * 100 + b"\x90"),
    "a frozen set of 2^100 tuples": raw(b"()" + b"2\x86" * 100 + b"\x91"),
    "a dtype called": raw(name("torch", "float32"), b")R"),
    "a class alone": raw(name(META, "Metadata")),
    "no Metadata": pickle.dumps({"a": 1}),
    "an attribute of a class": raw(name(META, "Metadata"), b"}Vkind\nVevil\nsb"),
    "a class as its own key": raw(name(META, "Metadata"), b")\x81}(Vstate_dict_metadata\n}Vx\nNsub"),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_metadata_pickle(case: str, folder: Path, namespace: str) -> None:
    """I-39, I-40: a clear error, in bounded memory; torch's classes and the records' own stay as they were."""
    before = {key: value for key, value in vars(_dcp_metadata.Record).items() if key != "__doc__"}
    (folder / ".metadata").write_bytes(HOSTILE_PICKLES[case])
    with little_memory(), pytest.raises(errors.Corrupt, match=r"\.metadata"):
        import_folder(folder, namespace, 1)
    assert before == {key: value for key, value in vars(_dcp_metadata.Record).items() if key != "__doc__"}
    assert not hasattr(dcp.metadata.Metadata, "kind")
    assert_nothing_saved(namespace)


def test_metadata_import_no_module_that_they_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-39: torch has modules that are imported when somebody asks torch for them."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    for attribute in ("_inductor", "onnx", "export", "float33"):
        before = set(sys.modules)
        with pytest.raises(errors.Corrupt, match=f"torch.{attribute}, which is none of torch's metadata classes"):
            _dcp_metadata.read_metadata(raw(name("torch", attribute)), "it", _dcp_import._Folder(folder))
        assert set(sys.modules) == before
    assert not asked


def lie(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: change_metadata(folder, change)


def storage(name_: str, **fields: Any) -> Callable[[Path], None]:
    return lie(lambda m: vars(place_of(m, name_)).update(fields))


def entry(**fields: Any) -> Callable[[Path], None]:
    return lie(lambda m: vars(m.state_dict_metadata["model.w"]).update(fields))


def chunk(offsets: list[int], sizes: list[int]) -> Any:
    return dcp.metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def shorten(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(name_: str, content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    """Other bytes for one entry, in a file of their own."""

    def apply(folder: Path) -> None:
        data = content(folder)
        (folder / "evil").write_bytes(data)
        storage(name_, relative_path="evil", offset=0, length=len(data))(folder)

    return apply


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def compressed(folder: Path) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(torch.zeros(3, 4)))) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return stream.getvalue()  # fmt: skip


def twin(found: Any) -> None:
    """A second tensor of the same bytes: many of them would make much out of a small file."""
    found.state_dict_metadata["twin"] = found.state_dict_metadata["model.w"]
    found.storage_data[dcp.metadata.MetadataIndex("twin", [0, 0])] = place_of(found, "model.w")


def many_of_many(found: Any) -> None:
    """Many tensors, all of one list of many pieces: few bytes, for the pickle holds each piece but once."""
    tensor = dcp.metadata.TensorStorageMetadata(
        dcp.metadata.TensorProperties(torch.float32), torch.Size([1000]), [chunk([at], [1]) for at in range(1000)]
    )
    found.state_dict_metadata.update({str(number): tensor for number in range(1000)})


HOSTILE_DCP: dict[str, Callable[[Path], None]] = {
    "outside": storage("model.w", relative_path="../secret"),
    "absolute": storage("model.w", relative_path="/etc/passwd"),
    "no file name": storage("model.w", relative_path=None),
    "a missing file": storage("model.w", relative_path="__9_9.distcp"),
    "the folder itself": storage("model.w", relative_path="."),
    "truncated file": shorten,
    "offset beyond": storage("model.w", offset=1 << 50),
    "negative offset": storage("model.w", offset=-1),
    "offset as text": storage("model.w", offset="0"),
    "length beyond": storage("model.b", length=1 << 50),
    "length too short": storage("model.w", length=10),
    "bytes of another entry": storage("model.w", offset=0),
    "bytes of another that would do": lie(twin),
    "no storage": lie(lambda m: m.storage_data.clear()),
    "storage no mapping": lie(lambda m: vars(m).update(storage_data=[1])),
    "another size": entry(size=torch.Size([3, 5])),
    "a huge size": entry(size=torch.Size([1 << 60, 4]), chunks=[chunk([0, 0], [1 << 60, 4])]),
    "a negative size": entry(size=(-3, 4)),
    "no elements, and strides beyond": entry(size=(0, (1 << 63) - 1, (1 << 63) - 1), chunks=[]),
    "many tensors of the same many pieces": lie(many_of_many),
    "a chunk outside": entry(chunks=[chunk([1, 0], [3, 4])]),
    "chunks that overlap": entry(chunks=[chunk([0, 0], [2, 4]), chunk([1, 0], [1, 4])]),
    "chunks no list": entry(chunks=None),
    "another dtype": entry(properties=dcp.metadata.TensorProperties(dtype=torch.float64)),
    "an equal-sized dtype": entry(properties=dcp.metadata.TensorProperties(dtype=torch.int32)),
    "a value where a tensor is": lie(lambda m: m.state_dict_metadata.update({"model.w": BYTES})),
    "a key that is no text": lie(lambda m: m.state_dict_metadata.update({5: BYTES})),
    "paths that collide": lie(lambda m: m.planner_data.update({"model.b": ("lr", "x")})),
    "two of one path": lie(lambda m: m.planner_data.update({"model.b": ("model", "w")})),
    "an index of 2^40": lie(lambda m: m.planner_data.update({"lr": ("l", 1 << 40)})),
    "a path of numbers": lie(lambda m: m.planner_data.update({"lr": (1.5,)})),
    "no archive": overwrite("model.w", lambda f: b"PK" + b"x" * 100),
    "another tensor": overwrite("model.w", lambda f: saved(torch.zeros(4, 3))),
    "no tensor": overwrite("model.w", lambda f: saved([1] * 50)),
    "a parameter": overwrite("model.w", lambda f: saved(torch.nn.Parameter(torch.zeros(3, 4)))),
    "a tensor that runs code": overwrite("model.w", lambda f: saved(Bomb(f / "ran"))),
    "a compressed archive": overwrite("model.w", compressed),
    "a damaged value": overwrite("lr", lambda f: saved(0.5)[:-30]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_DCP)
def test_hostile_dcp_folder(case: str, folder: Path, namespace: str) -> None:
    """I-40: one clear error, before anything is saved."""
    (folder.parent / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    HOSTILE_DCP[case](folder)
    with little_memory(), pytest.raises(errors.Corrupt):
        import_folder(folder, namespace, 1)
    assert not (folder / "ran").exists()
    assert_nothing_saved(namespace)


def test_values_that_run_code_run_none_without_consent(folder: Path, namespace: str) -> None:
    """I-39: refused by name; left out on request; run only when that was asked for in so many words."""
    overwrite("lr", lambda f: saved(Bomb(f / "ran")))(folder)
    with pytest.raises(errors.NotPlain, match=r"lr: its pickle names posix\.system"):
        import_folder(folder, namespace, 1)
    assert import_folder(folder, namespace, 1, skip_not_plain=True).skipped == ("lr",)
    assert not (folder / "ran").exists()
    import_folder(folder, f"{namespace}-2", 1, allow_pickle=True)
    assert (folder / "ran").exists()


def test_transformed_bytes_are_named(folder: Path, namespace: str) -> None:
    storage("model.w", transform_descriptors=["zstd"])(folder)
    with pytest.raises(errors.NotPlain, match=r"model\.w: its bytes were transformed"):
        import_folder(folder, namespace, 1)


def test_folder_without_collectives(folder: Path, namespace: str) -> None:
    (folder / ".metadata").rename(folder / "__0.metadata")
    with pytest.raises(errors.InvalidArgument, match="without collectives"):
        import_folder(folder, namespace, 1)


# --- the command


def command(socket: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*COMMAND, *words, "--socket", socket], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("target", ["s3://key:secret@bucket/x", "file:///tmp/x", Path("s3://key:secret@bucket/x")])
def test_an_export_to_a_url_is_refused(target: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path it would be a folder named "s3:" here, and the step nowhere else."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.InvalidArgument, match="durable=True") as caught:
        export_step("any", target)
    told = command("nobody", "export", str(target), code=2).stderr
    assert "setting store" in told and not list(tmp_path.iterdir())
    assert "secret" not in told + str(caught.value)


def test_the_command_exports_and_imports(socket: str, namespace: str, tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(6.0)}, "odd": torch.ones(2, dtype=torch.complex128), "lr": 0.5}
    save(state, namespace)
    for format in ("safetensors", "hf", "dcp"):
        out = tmp_path / format
        told = json.loads(command(socket, "export", str(out), "-n", namespace, "--format", format, "--json").stdout)
        assert told["format"] == format and told["step"] == 3 and told["tensors"] == 2 and told["values"] == 1
        assert all(Path(file).is_file() for file in told["files"])
        assert told["as_bytes"] == ([] if format == "dcp" else ["odd"])
        back = f"{namespace}-{format}"
        told = json.loads(command(socket, "import", str(out), "-n", back, "--step", "5", "--json").stdout)
        assert (told["step"], told["parts"], told["verified"], told["skipped"]) == (5, 3, True, [])
        listed = json.loads(command(socket, "ls", "-n", back, "--json").stdout)
        assert [(s["step"], s["state"], s["level"]) for s in listed] == [(5, "complete", "memory")]
        assert "checksum" in command(socket, "verify", "-n", back).stdout
    # The human output, refusals and their exit codes.
    done = command(socket, "export", str(tmp_path / "m"), "-n", namespace, "--format", "hf", "--prefix", "model")
    assert "1 tensors" in done.stdout and str(tmp_path / "m") in done.stdout
    assert "odd" in command(socket, "export", str(tmp_path / "n"), "-n", namespace, "--format", "hf").stderr
    assert "exists" in command(socket, "export", str(tmp_path / "m"), "-n", namespace, code=2).stderr
    assert "existing" in command(socket, "import", str(tmp_path / "m"), "-n", namespace, "--step", "9", code=2).stderr
    assert "no folder" in command(socket, "import", str(tmp_path / "no"), "-n", "new", "--step", "9", code=1).stderr
    shorten_largest(tmp_path / "dcp")
    assert "Corrupt" in command(socket, "import", str(tmp_path / "dcp"), "-n", "new", "--step", "9", code=1).stderr
    (tmp_path / "file").touch()
    assert command(socket, "export", str(tmp_path / "file" / "x"), "-n", namespace, code=1).stderr
    nobody = str(tmp_path / "nobody")
    assert "nobody" in command(nobody, "import", str(tmp_path / "m"), "-n", "new", "--step", "1", code=3).stderr


def shorten_largest(folder: Path) -> None:
    path = max(folder.iterdir(), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])

"""What of the demos needs no processes: their arguments, the store that goes away, the picture. `make demo` and
`make demo-durable` are the rest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))
import durable
import train


def test_arguments() -> None:
    args = durable.parse([])
    assert (args.steps, args.save_every, args.durable_every, args.s3) == (200, 10, 50, False)
    assert durable.parse(["--s3"]).steps == 300
    assert durable.parse(["--durable-every=20", "--steps=100"]).steps == 100


@pytest.mark.parametrize(
    "words", [["--durable-every=25"], ["--save-every=0"], ["--steps=150"], ["--steps=210"], ["--seed=1"]]
)
def test_arguments_that_would_prove_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        durable.parse(words)


def test_the_folder_goes_away_with_all_it_holds_and_comes_back(tmp_path: Path) -> None:
    store = durable.FolderStore(tmp_path)
    (store.base / "demo").mkdir()
    (store.base / "demo" / "shard").write_text("bytes")
    store.down()
    assert not store.base.exists()
    store.up()
    assert (store.base / "demo" / "shard").read_text() == "bytes"
    assert durable.whole_steps(store) == []


def test_fingerprints_see_every_bit() -> None:
    torch.manual_seed(0)
    model, optimizer = train.new_state()
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    ballast, rng = torch.zeros(9, dtype=torch.uint8), {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}
    first = train.fingerprints(model, optimizer, ballast, rng)
    moment = next(iter(optimizer.state.values()))["exp_avg"].view(torch.int32)
    moment.view(-1)[5] ^= 1
    ballast[8] = 1
    second = train.fingerprints(model, optimizer, ballast, {**rng, "python": (3, (1, 3), None)})
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"optimizer.token.weight.exp_avg", "ballast", "rng"}
    assert any(name.startswith("model.blocks.3.") for name in first)


def attempt(step: int, memory: float, until: float, durable: float | None = None) -> dict[str, object]:
    told = {"step": step, "memory": memory, "memory_until": until, "wished": durable is not None}
    return told if durable is None else {**told, "durable": durable}


def test_picture_of_what_was_recorded(tmp_path: Path) -> None:
    """Durable while in memory, durable after memory let go of it, wished and lost: every kind of bar."""
    pytest.importorskip("matplotlib")
    lost = {**attempt(40, 4.0, 4.5), "wished": True}
    told = {
        "begin": 0.0,
        "end": 9.0,
        "training": [(0.1 * i, i if i < 45 else i - 20) for i in range(90)],
        "attempts": [attempt(10, 1.0, 3.0), attempt(20, 2.0, 4.5, 3.0), attempt(30, 3.0, 3.5, 4.0), lost],
        "outage": (2.1, 2.9),
        "worker_killed": 3.2,
        "all_killed": 4.45,
        "resumed": 20,
        "store": "file",
    }
    path = tmp_path / "picture.png"
    durable.picture(path, json.loads(json.dumps(told)))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000

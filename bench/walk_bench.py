"""What a save and a restore do besides copying, in microseconds per tensor: walk, plan, header, parsing of it.

    python bench/walk_bench.py [--tensors N] [--rounds N] [--json]

No daemon. Every figure is the least processor time of the rounds, over the number of tensors; `python` is the walk and
the reading of tensors with SAFEPOINT_WALK=python. Between rounds 64 MB are written, so that caches are as cold as
after a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from safepoint import _walk
from safepoint._objects import Decoder
from safepoint._pieces import fingerprint
from safepoint._plan import SavePlan, make_plan, prepare
from safepoint._restore import RestorePlan
from safepoint._shard import Checkpoint, Shard, parse_shard
from safepoint._state import Flat, check_names


def flat_state(count: int) -> dict[str, Any]:
    return {"model": {f"layer{i}.weight": torch.zeros(16) for i in range(count)}}


def optimizer_state(count: int) -> dict[str, Any]:
    entries = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(16), "exp_avg_sq": torch.zeros(16)}
        for i in range(count // 3)
    }
    groups = [{"lr": 1e-3, "betas": (0.9, 0.99), "params": list(range(count // 3))}]
    return {"optim": {"state": entries, "param_groups": groups}}


STATES = {"flat dict": flat_state, "optimizer": optimizer_state}
TRASH = torch.zeros(8 << 20, dtype=torch.float64)


class Timer:
    def __init__(self, rounds: int, count: int) -> None:
        self.rounds, self.count = rounds, count
        self.figures: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        times = []
        for _ in range(self.rounds):
            TRASH.fill_(len(times))
            with _walk.paused_collector():
                began = time.process_time()
                result = work()
                times.append(time.process_time() - began)
        self.figures[name] = min(times) / self.count * 1e6
        return result


def match(plan: SavePlan, state: Any) -> Flat:
    flat = _walk.walk(state, plan.snapshot.tokens)
    if plan.match(flat) is None:
        raise RuntimeError("the state does not match its own plan")
    return flat


def measure(state: dict[str, Any], rounds: int, count: int) -> dict[str, float]:
    timer = Timer(rounds, count)
    flat: Flat = timer("walk, first", lambda: _walk.walk(state))
    names, pieces, snapshot = timer("prepare", lambda: prepare(flat, 0))
    timer("fingerprint", lambda: fingerprint(pieces, names))

    def planned() -> SavePlan:
        return make_plan(flat, names, pieces, snapshot, rank=0, world_size=1, agreed=False)

    plan: SavePlan = timer("plan and header", planned)
    timer("walk, known structure", lambda: _walk.walk(state, plan.snapshot.tokens))
    timer("walk and addresses, known", lambda: match(plan, state))
    _walk.native = False
    try:
        slow = prepare(_walk.walk(state), 0)
        slow_plan = make_plan(flat, *slow, rank=0, world_size=1, agreed=False)
        timer("walk and addresses, known, python", lambda: match(slow_plan, state))
    finally:
        _walk.native = True
    step = {"version": 1, "namespace": "bench", "step": 1, "rank": 0, "world_size": 1, "attempt": "0" * 32}
    dynamic, static_offset = plan.dynamic_part(step, "[]")
    header = plan.header(dynamic)
    shard: Shard = timer("parse", lambda: parse_shard(header, 0, static_offset))
    stored = Checkpoint()
    stored.add(shard)

    def restored() -> RestorePlan:
        check_names(_walk.describe(flat.tokens))
        missing = {"allow_missing": True, "decoder": Decoder()}  # Values were not stored above.
        return RestorePlan(flat, names, stored, rank=0, world_size=1, **missing)  # type: ignore[arg-type]

    timer("restore plan", restored)
    return timer.figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {name: measure(make(args.tensors), args.rounds, args.tensors) for name, make in STATES.items()}
    if args.json:
        print(json.dumps({"tensors": args.tensors, "torch": torch.__version__, "microseconds_per_tensor": results}))
        return
    table = Table("us per tensor", *results, title=f"{args.tensors} tensors, torch {torch.__version__}")
    for figure in next(iter(results.values())):
        table.add_row(figure, *(f"{figures[figure]:.2f}" for figures in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

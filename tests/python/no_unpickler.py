"""Saves and loads with an unpickler that kills, for test_dcp_unpickler: `no_unpickler.py NAMESPACE DOOR...`.

A process of its own, because what is installed here cannot be taken away again.
"""

from __future__ import annotations

import _pickle
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from states import same
from test_checkpointer import everything, model_and_optimizer
from test_dcp import state

import safepoint
from safepoint import dcp

attempts: list[str] = []


class Unpickled(BaseException):
    """Nobody who catches exceptions in passing catches this."""


def told(what: str) -> Unpickled:
    attempts.append(what + "\n" + "".join(traceback.format_stack(limit=12)))
    return Unpickled(what)


def poison() -> None:
    """Every way in: find_class, in Python and in C, for what names a class; and the functions, for what names none."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            raise told(f"find_class {args}")

    def refuse(name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            raise told(name)

        return function

    class Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise told("Unpickler")

    sys.addaudithook(hook)
    for module in (pickle, _pickle):
        for name in ("load", "loads"):
            setattr(module, name, refuse(f"{module.__name__}.{name}"))
        module.Unpickler = Unpickler  # type: ignore[misc]
    pickle._Unpickler.find_class = refuse("find_class")  # type: ignore[attr-defined]
    torch.load = torch.serialization.load = refuse("torch.load")


def statefuls(seed: int) -> dict[str, Any]:
    return dict(zip(("model", "optim", "sched"), model_and_optimizer(seed, 3), strict=True))


def native(namespace: str) -> None:
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as checkpointer:
        for step, make in enumerate((everything, statefuls), 1):
            checkpointer.save(step, make(1)).wait(timeout=60)
            target = make(2)
            assert checkpointer.restore(target) is not None
            same(make(1), target)


def ours(namespace: str) -> None:
    for step, make in enumerate((everything, statefuls, state), 1):
        dcp.async_save(make(1), storage_writer=dcp.Writer(namespace, step=step)).result(60)
        target = make(2)
        dcp.load(target, storage_reader=dcp.Reader(namespace))
        same(make(1), target)


def torchs(namespace: str, planning: Any = "own") -> None:
    """torch's own functions, without a process group, and told so by no_dist."""
    step = 0
    for no_dist in (False, True):
        for make in (state, statefuls):
            for function in (torch_dcp.async_save, torch_dcp.save):
                step += 1
                saving = function(make(1), storage_writer=dcp.Writer(namespace, step=step), no_dist=no_dist)
                if function is torch_dcp.async_save:
                    saving.result(60)
                target = make(2)
                torch_dcp.load(target, storage_reader=dcp.Reader(namespace, planning=planning), no_dist=no_dist)
                same(make(1), target)


def planned(namespace: str) -> None:
    """With a reader that goes item by item: values get into torch's default planner by another way."""
    torchs(namespace, "dcp")


def grouped(namespace: str) -> None:
    """With a process group, which torch's own functions would send pickles through, even to themselves."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    native(namespace)
    ours(f"{namespace}-ours")
    torch.distributed.destroy_process_group()


DOORS: dict[str, Callable[[str], None]] = {f.__name__: f for f in (native, ours, torchs, planned, grouped)}


def main() -> None:
    held = _pickle.loads  # As somebody holds it who imported it before.
    poison()
    for try_it in (lambda: pickle.loads(b"N."), lambda: held(b"cbuiltins\nlist\n."), lambda: torch.load("nothing")):
        try:
            try_it()
            raise SystemExit("the unpickler is not poisoned")
        except Unpickled:
            attempts.pop()
    for name in sys.argv[2:]:
        DOORS[name](f"{sys.argv[1]}-{name}")
        print(name, len(attempts), *attempts, flush=True)
    if attempts:
        raise SystemExit("something was unpickled")


if __name__ == "__main__":
    main()

"""What a writer or reader works on: a namespace with its Checkpointer, and the step that a checkpoint id names."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable

import torch

from safepoint._engine import Mode
from safepoint._urls import shown
from safepoint.api import Checkpointer, as_size, as_step
from safepoint.errors import InvalidArgument

CheckpointId = str | os.PathLike[str] | int | None

_lock = threading.Lock()
# A writer is often made anew for every step; what is dear (the session, the mapped slots, the plan) outlives it here.
_shared: dict[tuple[object, ...], Checkpointer] = {}

_URL = re.compile(r"safepoint:/+(?P<namespace>[^/]+)/step-(?P<step>\d+)/?")
_NUMBERED = re.compile(r"(?:.*(?:step|checkpoint|ckpt)[-_=.]?)?(\d+)", re.IGNORECASE)


def checkpointer_for(
    target: str | Checkpointer,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    mode: Mode = "blocking",
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    size_hint: int | None = None,
    allow_pickle: bool = False,
    use: str = "",
) -> Checkpointer:
    """The Checkpointer itself, or this process's shared one of the namespace. `use` keeps those apart that
    must not share a plan. `size_hint` counts for one that has saved nothing and was given none."""
    if isinstance(target, Checkpointer):
        if (rank, world_size) != (None, None):
            raise InvalidArgument("rank and world_size are those of the Checkpointer that was given")
        if mode != "blocking" or optimizers != () or size_hint is not None or allow_pickle:
            raise InvalidArgument(
                "mode, optimizers, size_hint and allow_pickle are those of the Checkpointer that was given"
            )
        return target
    room = None if size_hint is None else as_size(size_hint)
    guarded = (optimizers,) if isinstance(optimizers, torch.optim.Optimizer) else tuple(optimizers)
    key = (os.getpid(), target, rank, world_size, mode, tuple(map(id, guarded)), allow_pickle, use)
    with _lock:
        found = _shared.get(key)
        if found is None or found.closed:
            found = _shared[key] = Checkpointer(
                target, rank=rank, world_size=world_size, mode=mode, optimizers=guarded, allow_pickle=allow_pickle
            )
    if room is not None:
        found._engine.prepare(room)
    return found


def is_ours(checkpoint_id: object) -> bool:
    return isinstance(checkpoint_id, str | os.PathLike) and str(checkpoint_id).startswith("safepoint:")


def step_of_id(checkpoint_id: CheckpointId, namespace: str | None) -> int | None:
    """The step that a checkpoint id names; None when it names none.

    `safepoint://NAMESPACE/step-N`, or a path whose last part is a number, alone or behind the word step, checkpoint or
    ckpt; or the number itself. InvalidArgument: it names another namespace, or is neither text, path nor number.
    """
    if checkpoint_id is None:
        return None
    if isinstance(checkpoint_id, int) and not isinstance(checkpoint_id, bool):
        return as_step(checkpoint_id)
    path = os.fspath(checkpoint_id) if isinstance(checkpoint_id, str | os.PathLike) else None
    if not isinstance(path, str):
        raise InvalidArgument(f"a checkpoint id is a text, a path or a step's number, not {checkpoint_id!r:.100}")
    text = path.strip()
    told = shown(text)
    if url := _URL.fullmatch(text):
        if namespace is None:
            raise InvalidArgument(f"checkpoint id {told!r} names a namespace: give it to the Reader, as namespace=")
        if url["namespace"] != namespace:
            raise InvalidArgument(f"checkpoint id {told!r} is not of namespace {namespace!r}")
        return as_step(int(url["step"]))
    if text.startswith("safepoint:"):
        raise InvalidArgument(f"checkpoint id {told!r} is not of the form safepoint://NAMESPACE/step-N")
    last = text.rstrip("/").rpartition("/")[2]
    found = _NUMBERED.fullmatch(last)
    return as_step(int(found[1])) if found else None


def agreed_step(step: int | None, checkpoint_id: CheckpointId, namespace: str | None) -> int | None:
    """The step that was set, or that the id names. InvalidArgument: they disagree."""
    named = step_of_id(checkpoint_id, namespace)
    if step is not None and named is not None and step != named:
        raise InvalidArgument(f"checkpoint id {shown(checkpoint_id)!r} names step {named}, but step {step} is set")
    return named if step is None else step

"""Who this process is: rank, world size, and the identity of the launch that all its ranks share.

The launch's nonce decides the generation (all ranks of one launch open the same one, a restarted job opens the next),
so it must be equal on all ranks and never be used by another launch. Nothing here is called after the first save or
restore of a process.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import secrets
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch

from safepoint import _torch
from safepoint._torch import Store
from safepoint.errors import DeadlineExceeded, InvalidArgument, Unavailable

_lock = threading.Lock()
_nonces: dict[
    tuple[int, bool], bytes
] = {}  # (process, more than one rank) -> nonce. A forked child is another process.


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InvalidArgument(f"environment variable {name}={text!r} is no number") from error


def identify(rank: int | None, world_size: int | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world size: as given, else of the process group, else as torchrun or srun say, else 0 of 1.

    InvalidArgument: only one of them is given, or the rank is not below the world size.
    """
    if (rank is None) != (world_size is None):
        raise InvalidArgument("give rank and world_size together, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            # srun sets the second pair for the tasks of a step; sbatch alone does not, and runs one process.
            for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
                found = (_number(environment, names[0]), _number(environment, names[1]))
                if found[0] is not None and found[1] is not None:
                    rank, world_size = found[0], found[1]
                    break
            else:
                rank, world_size = 0, 1
    try:
        rank, world_size = operator.index(rank), operator.index(world_size)
    except TypeError as error:
        raise InvalidArgument(f"rank {rank!r} of {world_size!r}: both must be whole numbers") from error
    if world_size < 1 or not 0 <= rank < world_size:
        raise InvalidArgument(f"rank {rank} is not in a world of {world_size}")
    return rank, world_size


def store_for(rank: int, world_size: int) -> Store | None:
    """The process group's store, if the group is the very world that is saved."""
    if world_size == 1:
        return None
    store = _torch.store_of_group()
    if store is None or (torch.distributed.get_rank(), torch.distributed.get_world_size()) != (rank, world_size):
        return None
    return store


def scheduler_identity(environment: Mapping[str, str]) -> str | None:
    """Text that all ranks of one launch have and no other has, from whoever started them; None: nobody says."""
    own = environment.get("SAFEPOINT_LAUNCH_ID")
    if own:
        return f"own/{own}"
    run = environment.get("TORCHELASTIC_RUN_ID")
    if run and run != "none":  # "none" is torchrun's default: the same for every launch.
        parts = [environment.get(n, "") for n in ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")]
        return "/".join(["torchelastic", run, *parts])
    job = environment.get("SLURM_JOB_ID")
    if job:
        # A job can start several steps after one another; each is a launch.
        return "/".join(
            ["slurm", job, environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")]
        )
    return None


def launch_nonce(
    rank: int, world_size: int, deadline: float, environment: Mapping[str, str] = os.environ
) -> bytes | None:
    """16 bytes that identify this launch; None when its ranks have nothing in common to make them from.

    DeadlineExceeded: rank 0 did not put its nonce into the store within `deadline` seconds. Unavailable: the store is
    gone.
    """
    key = (os.getpid(), world_size > 1)
    with _lock:
        known = _nonces.get(key)
    if known is not None:
        return known
    # Not under the lock: it can wait for another rank. Two threads get the same one from the store, and one of two
    # otherwise.
    nonce = _new_nonce(rank, world_size, deadline, environment)
    if nonce is None:
        return None
    with _lock:
        return _nonces.setdefault(key, nonce)


def _new_nonce(rank: int, world_size: int, deadline: float, environment: Mapping[str, str]) -> bytes | None:
    if world_size == 1:
        return secrets.token_bytes(16)
    store = store_for(rank, world_size)
    if store is not None:
        return _nonce_from_store(store, rank, deadline, restart_prefix(environment))
    identity = scheduler_identity(environment)
    return None if identity is None else hashlib.sha256(f"safepoint launch {identity}".encode()).digest()[:16]


def restart_prefix(environment: Mapping[str, str] = os.environ) -> str:
    """Begins every key of ours in the process group's store.

    torchrun's agent keeps one store for all restarts of a job, and torch 2.13 does not tell them apart in it: what
    an earlier launch has put there is still there. These variables are equal on all ranks and differ between restarts.
    """
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "WORLD_SIZE")
    return "safepoint/" + "/".join(environment.get(name, "") for name in names)


def _nonce_from_store(store: Store, rank: int, deadline: float, prefix: str) -> bytes:
    key = f"{prefix}/nonce"
    try:
        if rank == 0:
            # Sets it only where nothing is yet: all who ask get the first one. Set once more, because torch's store
            # without libuv (USE_LIBUV=0) wakes nobody who waits when compare_set makes a key.
            text = store.compare_set(key, "", secrets.token_hex(16)).decode()
            store.set(key, text)
            return bytes.fromhex(text)
        wait_for(store, [key], deadline, "rank 0 has entered neither save nor restore")
        return bytes.fromhex(store.get(key).decode())
    except RuntimeError as error:
        raise Unavailable(f"the process group's store cannot be asked for the launch's identity: {error}") from error


def wait_for(store: Store, keys: list[str], deadline: float, meaning: str) -> None:
    """Waits for keys of the store. DeadlineExceeded says what it means that they are not there."""
    try:
        store.wait(keys, timedelta(seconds=deadline))
    except RuntimeError as error:
        if not store.check(keys):
            raise DeadlineExceeded(f"{meaning} within {deadline:.0f} s") from error
        # They came in the meantime.


_NONE = "none"  # Shown by a rank that failed before it had a fingerprint.


def agree(store: Store, key: str, rank: int, world_size: int, fingerprint: bytes, deadline: float) -> bool | None:
    """Whether all ranks show the same fingerprint: one set, one wait and one read. False also when a rank did not
    answer in time; None: one has none to show this time.
    """
    keys = [f"{key}/{r}" for r in range(world_size)]
    try:
        store.set(keys[rank], fingerprint.hex())
        wait_for(store, keys, deadline, "not all ranks have entered their first save")
        answers = store.multi_get(keys) if store.has_extended_api() else [store.get(k) for k in keys]
    except (RuntimeError, DeadlineExceeded):
        return False  # Everybody then saves what it has: more bytes, never fewer.
    texts = {answer.decode() for answer in answers}
    return None if _NONE in texts else texts == {fingerprint.hex()}


def show_none(store: Store, key: str, rank: int) -> None:
    """In the place of `agree`, for a rank that has failed: the others need not wait for it."""
    with contextlib.suppress(RuntimeError):  # They wait, then.
        store.set(f"{key}/{rank}", _NONE)


NO_IDENTITY = (
    "the ranks of this launch have nothing in common to tell it from an earlier one: call "
    "torch.distributed.init_process_group first, or set SAFEPOINT_LAUNCH_ID to the same text on all ranks, another for "
    "every launch and restart"
)

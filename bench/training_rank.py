"""Rank side of `bench/training.py`: the same training steps with and without a save beside them, in turns."""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from bench.scenarios import State, build
from bench.yardstick import Yardstick

if TYPE_CHECKING:
    from bench.rank import Rank

# Width, depth and batch of a stack of linear layers; threads (0: one per core).
LOOPS = {
    "python": (64, 24, 16, 1),  # Many small operations: feels whoever holds the GIL.
    "matmul": (1_024, 4, 256, 0),  # Every core busy: feels every byte that is moved.
}


class Loop:
    """A training loop of plain torch, and the saves of a state that it does not change."""

    def __init__(self, rank: Rank, state: State, shape: tuple[int, int, int, int], cores: int) -> None:
        width, depth, batch, threads = shape
        torch.set_num_threads(threads or cores)
        layers = [m for _ in range(depth) for m in (torch.nn.Linear(width, width), torch.nn.GELU())]
        self._model = torch.nn.Sequential(*layers)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._input = torch.randn(batch, width)
        self._rank = rank
        self._state = state

    def steps(self, count: int) -> float:
        """Seconds of `count` steps without a save."""
        began = time.perf_counter()
        for _ in range(count):
            self._step(None)
        return time.perf_counter() - began

    def steps_with_save(self, count: int, number: int) -> tuple[float, int, float]:
        """Seconds and steps: `count`, and more until the save has reached memory. And how many of the seconds the loop
        stood still: in `save`, and where the optimizer waits.

        The optimizer waits until the saved tensors could change, as it would if they were its own.
        """
        system = self._rank.system
        errors: list[BaseException] = []

        def finish(handle: Any) -> None:
            try:
                system.wait_memory(handle)
            except BaseException as error:
                errors.append(error)

        began = time.perf_counter()
        handle = system.save(number, self._state)
        stood = time.perf_counter() - began
        waiter = threading.Thread(target=finish, args=(handle,))
        waiter.start()
        stood += self._step(handle)
        done = 1
        while done < count or waiter.is_alive():
            self._step(None)
            done += 1
        took = time.perf_counter() - began
        waiter.join()
        if errors:
            raise errors[0]
        system.drop(number)
        return took, done, stood

    def _step(self, handle: Any) -> float:
        """Seconds that the optimizer waited for the save."""
        self._optimizer.zero_grad()
        self._model(self._input).square().mean().backward()
        began = time.perf_counter()
        if handle is not None:
            self._rank.system.wait_safe(handle)
        waited = time.perf_counter() - began
        self._optimizer.step()
        return waited


def run(rank: Rank) -> None:
    config = rank.config
    state = build("large", rank.place.rank, config["scale"])
    yardstick = Yardstick(rank.place.bytes)
    memcpy = statistics.median(yardstick() for _ in range(5))
    rank.system.prepare(state)
    number = 0
    loops = {}
    for name, shape in LOOPS.items():
        loop = Loop(rank, state, shape, config["threads"])
        loop.steps(20)
        for _ in range(2):  # The first save, and what becomes warm with the second one, do not count.
            number += 1
            loop.steps_with_save(1, number)
        count = max(5, round(config["segment"] / (loop.steps(20) / 20)))
        base = [loop.steps(count) / count]
        lost, stood = [], []
        for _ in range(config["pairs"]):
            number += 1
            took, done, still = loop.steps_with_save(count, number)
            base.append(loop.steps(count) / count)
            stood.append(still)
            lost.append(took - done * (base[-2] + base[-1]) / 2)
        # What the same arithmetic says about segments without any save: how far one figure can be trusted.
        noise = [count * (b - (a + c) / 2) for a, b, c in zip(base, base[1:], base[2:], strict=False)]
        loops[name] = {"lost": lost, "stood": stood, "noise": noise, "step": statistics.median(base), "steps": count}
    rank.tell("trained", {"memcpy": memcpy, "loops": loops})

"""Tensors on a GPU. Skipped where torch finds none: there is nothing to copy from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from states import DTYPES, bits, random_tensor

import safepoint
from safepoint import _cuda

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False on this machine"
)


class FakeRuntime:
    """CUDA's own rule: a range is registered once, and stays so whatever becomes of the mapping."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}

    def cudart(self) -> FakeRuntime:
        return self

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if any(a < address + size and address < a + s for a, s in self.ranges.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.ranges[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.ranges[address]
        return 0


def test_a_new_mapping_at_an_old_address_is_registered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the mapping before would be written by the device, and checksums taken of others."""
    runtime = FakeRuntime()
    monkeypatch.setattr(_cuda, "_untyped_cuda", lambda: runtime)
    monkeypatch.setattr(_cuda, "_registered", {})
    calls: list[tuple[str, int]] = []
    for name in ("cudaHostRegister", "cudaHostUnregister"):
        true = getattr(runtime, name)

        def counted(address: int, *rest: int, _name: str = name, _true: Any = true) -> int:
            calls.append((_name, address))
            return int(_true(address, *rest))

        monkeypatch.setattr(runtime, name, counted)
    _cuda.register_slot(1, 0x1000, 0x1000)
    _cuda.register_slot(1, 0x1000, 0x1000)  # The next save into the same mapping.
    assert calls == [("cudaHostRegister", 0x1000)]
    _cuda.register_slot(2, 0x1000, 0x1000)  # Another mapping at that address.
    assert calls[1:] == [("cudaHostUnregister", 0x1000), ("cudaHostRegister", 0x1000)]
    _cuda.register_slot(3, 0x800, 0x1000)  # One that overlaps it.
    assert runtime.ranges == {0x800: 0x1000} and list(_cuda._registered) == [3]
    _cuda.unregister_slots({1, 2, 3})
    assert not runtime.ranges and not _cuda._registered


def test_mappings_have_numbers_that_go_with_them(namespace: str) -> None:
    """What the engine unregisters by: slots that the daemon took back are not among the client's mappings."""
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
        client = c._engine.client
        seen: list[set[int]] = []
        for step, size in enumerate((1 << 10, 1 << 10, 1 << 22, 1 << 22, 1 << 22, 1 << 22)):
            c.save(step, {"w": torch.zeros(size)}).wait(timeout=60)
            seen.append(set(client.mappings))
        assert seen[0] & seen[1], "a steady state keeps its mappings"
        assert seen[-1] and not seen[-1] & seen[0], "slots of another size have mappings of their own"


@needs_gpu
def test_a_growing_state_comes_back(namespace: str) -> None:
    """Slots are replaced by larger ones, often at the same addresses."""
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
        for step in range(12):
            state = {"w": torch.randn(1 << (14 + step), device="cuda")}
            c.save(step, state).wait(timeout=60)
            target = {"w": torch.zeros_like(state["w"])}
            c.restore(target)
            assert bits(target["w"]) == bits(state["w"])


@needs_gpu
def test_device_and_host_tensors_come_back(namespace: str) -> None:
    state = {str(d): random_tensor((33, 7), d).cuda() for d in DTYPES if d != torch.float4_e2m1fn_x2}
    state |= {"host": torch.randn(100), "transposed": torch.randn(5, 6).cuda().t()}
    with safepoint.Checkpointer(namespace, rank=0, world_size=1) as c:
        for step in range(5):
            c.save(step, state).wait(timeout=60)
        assert _cuda._registered, "no slot was registered as pinned memory"
        target = {name: torch.zeros_like(value) for name, value in state.items()}
        c.restore(target)
        assert all(bits(target[name]) == bits(state[name]) for name in state)
    assert not _cuda._registered


@needs_gpu
def test_guarded_device_copy_is_isolated(namespace: str) -> None:
    """I-9, with kernels that are queued right behind the save."""
    parameter = torch.nn.Parameter(torch.randn(1 << 22, device="cuda"))
    loose = torch.randn(1 << 20, device="cuda")
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    with safepoint.Checkpointer(namespace, rank=0, world_size=1, mode="guarded", optimizers=optimizer) as c:
        for step in range(5):
            expected = bits(parameter), bits(loose)
            save = c.save(step, {"p": parameter, "loose": loose})
            loose.add_(1)
            optimizer.step()
            save.wait(timeout=60)
            target = {"p": torch.zeros(1 << 22), "loose": torch.zeros(1 << 20)}
            c.restore(target)
            assert (bits(target["p"]), bits(target["loose"])) == expected

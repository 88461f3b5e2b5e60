"""Two ranks train a small GPT on the text that every Python carries, and save into safepoint's memory tier every few
steps; some of these steps, if asked, go on to the durable tier.

Run by ``run.py`` and ``durable.py`` under torchrun. Everything a bit-identical resume needs is in one state: weights,
AdamW moments, the learning-rate schedule, the step, and each rank's own random number generators (dropout and the
choice of data draw from them).
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import os
import pydoc_data.topics
import random
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

VOCABULARY = 256  # Bytes.
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(self.norm_attention(x))
            .view(batch, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """3.3 million parameters with the defaults."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight  # Tied: one tensor under two names.
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


class Events:
    """One JSON line an event, flushed at once: what the runner judges a killed process by."""

    def __init__(self, path: Path, rank: int) -> None:
        self.file = path.open("a", buffering=1)
        self.rank = rank
        self.lock = threading.Lock()

    def write(self, event: str, **fields: object) -> None:
        line = {"time": time.time(), "event": event, "rank": self.rank, "pid": os.getpid(), **fields}
        with self.lock:
            self.file.write(json.dumps(line) + "\n")


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 over every bit of the weights and of the optimizer's moments."""
    h = hashlib.sha256()
    for tensor in model.state_dict().values():
        h.update(tensor.detach().contiguous().numpy().tobytes())
    for parameter in model.parameters():
        for _, value in sorted(optimizer.state[parameter].items()):
            h.update(value.detach().contiguous().numpy().tobytes())
    return h.hexdigest()


def new_state() -> tuple[GPT, torch.optim.AdamW]:
    model = GPT()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def fingerprints(
    model: nn.Module, optimizer: torch.optim.Optimizer, ballast: torch.Tensor, rng: dict[str, object]
) -> dict[str, str]:
    """SHA-256 of each tensor of the state, and of this rank's random number generators."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors["ballast"] = ballast
    found = {name: hashlib.sha256(t.detach().contiguous().numpy()).hexdigest() for name, t in tensors.items()}
    return found | {"rng": hashlib.sha256(repr((rng["torch"].tolist(), rng["python"])).encode()).hexdigest()}  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="folder for event logs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=4, help="0: never save (the uninterrupted reference)")
    parser.add_argument("--durable-every", type=int, default=0, help="0: no step goes to the durable tier")
    parser.add_argument("--ballast-mib", type=int, default=0, help="this much more state, which training leaves alone")
    parser.add_argument("--namespace", default="demo")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    events = Events(args.out / f"events-rank{rank}.jsonl", rank)
    events.write("start", restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    text = "\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    torch.manual_seed(0)  # Equal weights on all ranks ...
    model, optimizer = new_state()
    torch.manual_seed(1000 + rank)  # ... then each rank draws its own dropout masks and data.
    random.seed(1000 + rank)
    ballast = torch.zeros(args.ballast_mib << 20, dtype=torch.uint8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    trainer = nn.parallel.DistributedDataParallel(model)
    step = 0
    checkpointer = None

    def generators() -> dict[str, object]:
        return {"torch": torch.get_rng_state(), "python": random.getstate()}

    def state() -> dict[str, object]:
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": schedule,
            "step": step,
            "ballast": ballast,
            "rng": safepoint.PerRank(generators()),
        }

    if args.save_every:
        import safepoint

        checkpointer = safepoint.Checkpointer(args.namespace)
        target = state()
        began = time.perf_counter()
        info = checkpointer.restore(target)
        if info is not None:
            step = int(target["step"])  # type: ignore[call-overload]
            rng = target["rng"].value  # type: ignore[attr-defined]
            torch.set_rng_state(rng["torch"])
            random.setstate(rng["python"])
            events.write("resume", step=info.step, source=info.source, seconds=time.perf_counter() - began)
        else:
            ballast.random_(generator=torch.Generator().manual_seed(0))
            events.write("fresh")

    waiters: list[threading.Thread] = []

    def acknowledge(save: object, at: int, began: float, durable: bool) -> None:
        """The save is acknowledged when its level is reached, not when the call returned."""
        try:
            save.wait("memory", timeout=30.0)  # type: ignore[attr-defined]
            events.write("acknowledged", step=at, seconds=time.perf_counter() - began)
            if durable:
                save.wait("durable", timeout=120.0)  # type: ignore[attr-defined]
                events.write("durable", step=at, seconds=time.perf_counter() - began)
        except safepoint.SafepointError as error:
            events.write("save_failed", step=at, error=f"{type(error).__name__}: {error}")

    while step < args.steps:
        at = [random.randrange(len(data) - CONTEXT - 1) for _ in range(args.batch)]
        tokens = torch.stack([data[i : i + CONTEXT] for i in at]).long()
        targets = torch.stack([data[i + 1 : i + CONTEXT + 1] for i in at]).long()
        loss = trainer(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        events.write("step", step=step, loss=loss.item())
        if checkpointer is not None and step % args.save_every == 0:
            durable = args.durable_every > 0 and step % args.durable_every == 0
            if durable:
                prints = fingerprints(model, optimizer, ballast, generators())
                events.write("state", step=step, fingerprints=prints)
            began = time.perf_counter()
            try:
                save = checkpointer.save(step, state(), durable=durable)
            except safepoint.SafepointError as error:  # A failed save is reported; training goes on (I-29).
                events.write("save_failed", step=step, error=f"{type(error).__name__}: {error}")
                continue
            events.write("saved", step=step, blocked=time.perf_counter() - began)
            waiters.append(threading.Thread(target=acknowledge, args=(save, step, began, durable), daemon=True))
            waiters[-1].start()
    for waiter in waiters:
        waiter.join(timeout=150.0)
    events.write("done", step=step, digest=digest(model, optimizer))
    if checkpointer is not None:
        checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # A thread of torch's gloo may still let go of the last collective's tensors. Where the interpreter is torn down
    # meanwhile, that aborts the process, and torchrun would start a job again that has ended well. So: the exit
    # handlers, and then the end.
    atexit._run_exitfuncs()
    os._exit(0)

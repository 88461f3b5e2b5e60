"""Verbs of the command ``safepoint``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from safepoint import errors
from safepoint.cli import _durable, _gc, _interchange
from safepoint.cli._common import (
    EXIT_BAD_NEWS,
    AsJson,
    Namespace,
    Socket,
    Unreadable,
    attempt_json,
    connect,
    console,
    human_bytes,
    print_json,
    progress_of_bytes,
    reported,
    stderr,
    the_namespace,
)
from safepoint.cli._places import Listed, Store, StorePlace, place

if TYPE_CHECKING:
    from safepoint._reads import Pin

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Checkpoints in the memory of the training cluster.",
    pretty_exceptions_enable=False,
)

VERIFY_BLOCKS = 16  # Blocks (MiB) per call, so that the progress bar moves.


@app.command()
def status(socket: Socket = None, as_json: AsJson = False) -> None:
    """The daemon, its pool, and what is being written."""
    with reported():
        client = connect(socket)
        text = client.status()
        state = json.loads(text)
        if as_json:
            return print_json(state)
        pool = state["pool"]
        console.print(
            f"daemon {state['version']} at {client.socket_path}: pid {state['pid']}, worker no. {state['incarnation']}"
            + (", private" if state["private"] else ""),
            highlight=False,
        )
        table = Table("pool", *(k for k in ("total", "sealed", "leased", "idle", "free", "zombie")))
        table.add_row(
            human_bytes(pool["bytes_max"]),
            *(human_bytes(pool[k]) for k in ("bytes", "sealed", "leased", "idle", "free", "zombie")),
        )
        console.print(table)
        table = Table("namespace", "generation", "world size", "complete steps", "open attempts", "latest step")
        for n in state["namespaces"]:
            latest = "-" if n["latest_step"] is None else str(n["latest_step"])
            table.add_row(
                n["namespace"],
                str(n["generation"]),
                str(n["world_size"]),
                str(n["complete_steps"]),
                str(n["open_attempts"]),
                latest,
            )
        console.print(table)
        if state["durable"] is not None:
            _print_durable(state)
        for lease in state["leases"]:
            console.print(
                f"being written: {lease['namespace']} step {lease['step']} rank {lease['rank']} by pid {lease['pid']}",
                highlight=False,
            )


def _print_durable(state: dict[str, Any]) -> None:
    durable = state["durable"]
    if not state["drains"]:
        console.print(f"durable tier {durable['store']}: nothing on its way", highlight=False, soft_wrap=True)
    else:
        table = Table("to be durable", "step", "there", "of", "rate", "time left", "trouble")
        for drain in state["drains"]:
            rate = drain["bytes_done"] / drain["seconds"] if drain["seconds"] > 0 else 0.0
            left = f"{(drain['bytes'] - drain['bytes_done']) / rate:.0f} s" if rate > 0 else "-"
            table.add_row(
                drain["namespace"],
                str(drain["step"]),
                human_bytes(drain["bytes_done"]),
                human_bytes(drain["bytes"]),
                f"{human_bytes(int(rate))}/s",
                left,
                drain["trouble"],
            )
        console.print(table)
        console.print(f"durable tier {durable['store']}", highlight=False, soft_wrap=True)
    for listing in state["not_listed"]:
        stderr.print(
            f"not listed: {listing['namespace']}: {listing['why']}", style="red", highlight=False, soft_wrap=True
        )


@app.command(name="ls")
def list_steps(
    namespace: Namespace = None, socket: Socket = None, store: Store = None, as_json: AsJson = False
) -> None:
    """Steps of a namespace (newest of the lineage first), or all namespaces."""
    with reported():
        there = place(socket, store)
        if isinstance(there, StorePlace):
            return _print_steps(there.all_steps(namespace), as_json)
        client = connect(socket)
        if namespace is None:
            spaces = client.list_namespaces()
            if as_json and len(spaces) != 1:
                return print_json(
                    [
                        {
                            "namespace": n.ns,
                            "generation": n.generation,
                            "bytes": n.bytes,
                            "complete_steps": n.complete_steps,
                        }
                        for n in spaces
                    ]
                )
            if len(spaces) != 1:
                table = Table("namespace", "generation", "complete steps", "size")
                for n in spaces:
                    table.add_row(n.ns, str(n.generation), str(n.complete_steps), human_bytes(n.bytes))
                return console.print(table)
        name = the_namespace(client, namespace)
        _print_steps({name: [*client.list_steps(name)]}, as_json)


def _print_steps(spaces: dict[str, list[Listed]], as_json: bool) -> None:
    """The steps of each namespace, in one table."""
    rows = [(name, i) for name, steps in spaces.items() for i in steps]
    if as_json:
        return print_json([{"namespace": name, **attempt_json(i)} for name, i in rows])
    several = len(spaces) > 1
    columns = ("step", "state", "level", "ranks", "size", "launch", "note")
    if several:
        table = Table("namespace", *columns)
    else:
        table = Table(*columns, title=next(iter(spaces)), title_justify="left")
    for name, i in rows:
        if isinstance(i, Unreadable):
            ranks, size, launch = "?", "?", "?"
        else:
            ranks, size, launch = f"{i.sealed_ranks}/{i.world_size}", human_bytes(i.bytes), str(i.generation)
        note = "pinned" if i.pinned else i.reason
        table.add_row(*([name] if several else []), str(i.step), i.state, i.level, ranks, size, launch, note)
    console.print(table, markup=False)


@app.command()
def show(
    step: Annotated[int, typer.Argument(min=0)],
    namespace: Namespace = None,
    socket: Socket = None,
    store: Store = None,
    as_json: AsJson = False,
    tensors: Annotated[bool, typer.Option(help="List every tensor.")] = False,
) -> None:
    """One complete step: its shards, and what is in them."""
    with reported():
        there = place(socket, store)
        name = there.namespace(namespace)
        with there.open(name, step=step) as pin:
            shards = []
            for rank in range(pin.info.world_size):
                reader = pin.shard(rank)
                header = json.loads(reader.header()[8:])
                header.pop("__metadata__")
                shards.append((reader, header))
            if as_json:
                return print_json(
                    {
                        **attempt_json(pin.info),
                        "shards": [
                            {
                                "rank": r.rank,
                                "bytes": r.length,
                                "record": r.record.hex(),
                                "structure": r.structure.hex(),
                                "blocks": r.blocks,
                                "tensors": h if tensors else len(h),
                            }
                            for r, h in shards
                        ],
                    }
                )
            console.print(
                f"{name} step {step}: {pin.info.state}, level {pin.info.level}, generation {pin.info.generation}, "
                f"attempt {pin.info.attempt.hex()}",
                highlight=False,
            )
            table = Table("rank", "size", "tensors", "blocks", "seal record", "structure")
            for r, h in shards:
                table.add_row(
                    str(r.rank),
                    human_bytes(r.length),
                    str(len(h)),
                    str(r.blocks),
                    r.record.hex()[:16],
                    r.structure.hex()[:16],
                )
            console.print(table)
            if tensors:
                table = Table("rank", "tensor", "dtype", "shape", "size")
                for r, h in shards:
                    for key, entry in h.items():
                        begin, end = entry["data_offsets"]
                        table.add_row(str(r.rank), key, entry["dtype"], str(entry["shape"]), human_bytes(end - begin))
                console.print(table)


@app.command()
def verify(
    step: Annotated[int | None, typer.Argument(min=0, help="Default: every complete step.")] = None,
    namespace: Namespace = None,
    socket: Socket = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Re-read and check every byte. Exit 1 if a shard is corrupt (the daemon is told, and lists the step no more), or a
    step of a durable tier cannot be read; the others are checked all the same.
    """
    with reported():
        there = place(socket, store)
        name = there.namespace(namespace)
        known = there.steps(name, step)
        steps = [i for i in known if not isinstance(i, Unreadable) and i.state == "complete"]
        corrupt: list[dict[str, object]] = [
            {"step": i.step, "rank": None, "block": None, "state": i.state, "note": i.reason}
            for i in known
            if isinstance(i, Unreadable) or i.state == "corrupt"
        ]
        if not steps and not corrupt:
            raise errors.NotFound(f"namespace {name} has no complete step" + ("" if step is None else f" {step}"))
        total = sum(i.bytes for i in steps)
        with progress_of_bytes(disable=as_json) as progress:
            task = progress.add_task("verify", total=total)
            for info in list(steps):
                try:
                    reading = there.open(name, attempt=info.attempt)
                except errors.NotFound:  # A running job went on, and the daemon let it go meanwhile.
                    steps.remove(info)
                    total -= info.bytes
                    progress.update(task, total=total)
                    continue
                with reading as pin:
                    for rank in range(info.world_size):
                        progress.update(task, description=f"step {info.step} rank {rank}")
                        corrupt += _verify_shard(pin, rank, progress, task)
            if not steps and not corrupt:
                raise errors.NotFound(f"namespace {name}: newer steps took the place of all that were there")
        if as_json:
            print_json({"namespace": name, "steps": [i.step for i in steps], "bytes": total, "corrupt": corrupt})
        for c in corrupt:
            where = "" if c["rank"] is None else f" rank {c['rank']} block {c['block']}"
            told = f"{str(c['state']).upper()}: step {c['step']}{where}: {c['note']}"
            stderr.print(told, style="red", markup=False, highlight=False, soft_wrap=True)
        if corrupt:
            raise SystemExit(EXIT_BAD_NEWS)
        if not as_json:
            console.print(f"{name}: {len(steps)} step(s), {human_bytes(total)}, every block matches its checksum")


def _verify_shard(pin: Pin, rank: int, progress: Progress, task: object) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    try:
        reader = pin.shard(rank)
        for first in range(0, reader.blocks, VERIFY_BLOCKS):
            count = min(VERIFY_BLOCKS, reader.blocks - first)
            for block in reader.verify(first, count):
                confirmed = pin.report_corrupt(rank, block)
                found.append(
                    {
                        "step": pin.info.step,
                        "rank": rank,
                        "block": block,
                        "state": "corrupt",
                        "note": "the daemon found it, too: the step is not listed any more"
                        if confirmed
                        else "the durable tier's copy"
                        if reader.from_store
                        else "the daemon read it well",
                    }
                )
            progress.update(task, advance=min(reader.length, (first + count) << 20) - (first << 20))  # type: ignore[arg-type]
    except errors.Corrupt as error:  # Its checksum list or header; the daemon checks the list together with any block.
        pin.report_corrupt(rank, error.block or 0)
        found.append(
            {"step": pin.info.step, "rank": rank, "block": error.block, "state": "corrupt", "note": str(error)}
        )
    except errors.Incomplete as error:  # An object of the durable tier is gone.
        found.append({"step": pin.info.step, "rank": rank, "block": None, "state": "corrupt", "note": str(error)})
    return found


@app.command()
def pin(
    step: Annotated[int, typer.Argument(min=0)],
    namespace: Namespace = None,
    socket: Socket = None,
    off: Annotated[bool, typer.Option("--off", help="Take the pin off.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a complete step although newer ones come."""
    with reported():
        client = connect(socket)
        name = the_namespace(client, namespace)
        with client.open_read(name, step=step) as reading:
            client.pin_step(name, reading.info.attempt, not off)
            if as_json:
                return print_json({"namespace": name, "step": step, "pinned": not off})
            console.print(f"{name} step {step}: {'not pinned any more' if off else 'pinned'}")


app.command(name="make-durable")(_durable.make_durable)
app.command()(_interchange.export)
app.command()(_gc.gc)
app.command(name="import")(_interchange.import_)


def main() -> None:
    """Entry point of the command."""
    app()

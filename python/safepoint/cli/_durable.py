"""``safepoint make-durable``: a step that memory has reaches the durable tier although nobody asked for it in time."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from safepoint import errors
from safepoint.cli._common import (
    AsJson,
    Namespace,
    Socket,
    connect,
    console,
    print_json,
    progress_of_bytes,
    reported,
    the_namespace,
)

_LOOK_SECONDS = 0.5  # Between two looks at how far it is.


def make_durable(
    step: Annotated[int, typer.Argument(min=0)],
    namespace: Namespace = None,
    socket: Socket = None,
    wait: Annotated[bool, typer.Option(help="Return only when the step is durable.")] = True,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a complete step that memory has to the daemon's durable tier."""
    with reported():
        client = connect(socket)
        name = the_namespace(client, namespace)
        with client.open_read(name, step=step) as reading:
            attempt, size = reading.info.attempt, reading.info.bytes
            level = "durable" if reading.info.level == "durable" else "requested"
            client.make_durable(name, attempt)  # Holds it from here on.
        until = None if timeout is None else time.monotonic() + timeout
        with progress_of_bytes(disable=as_json or not wait) as progress:
            task = progress.add_task(f"step {step}", total=size)
            while wait and level != "durable":
                left = _LOOK_SECONDS if until is None else min(_LOOK_SECONDS, until - time.monotonic())
                try:
                    level = client.wait(name, attempt, "durable", timeout=max(left, 0.0))
                except errors.DeadlineExceeded as error:
                    drains = {d["attempt"]: d for d in json.loads(client.status())["drains"]}
                    drain = drains.get(attempt.hex(), {})
                    told = f"step {step} {drain.get('trouble', '')}".strip()
                    progress.update(task, description=told, completed=drain.get("bytes_done", 0))
                    if until is not None and time.monotonic() >= until:
                        trouble = (
                            drain.get("trouble") or f"{drain.get('bytes_done', 0)} of {size} bytes are in the store"
                        )
                        raise errors.DeadlineExceeded(
                            f"step {step} is not durable yet: {trouble}; the daemon goes on"
                        ) from error
                    continue
                if level == "none":
                    raise errors.Closed(f"step {step} went away before it was durable")
        if as_json:
            return print_json({"namespace": name, "step": step, "attempt": attempt.hex(), "level": level})
        console.print(f"{name} step {step}: {'durable' if level == 'durable' else 'on its way'}")

"""The verbs `export` and `import`: thin callers of safepoint.interchange."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from safepoint import errors
from safepoint._urls import shown
from safepoint.cli._common import (
    EXIT_BAD_NEWS,
    AsJson,
    Namespace,
    Socket,
    attempt_json,
    connect,
    console,
    human_bytes,
    print_json,
    reported,
    stderr,
)
from safepoint.cli._places import Store, place

_LISTED = 5  # Names in one line.


@contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=stderr, disable=quiet) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _files_reported(directory: Path | str) -> Iterator[None]:
    """What the file system refuses, as one line and an exit code."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.SafepointError):
            raise
        stderr.print(
            f"{error.filename or shown(directory)}: {error.strerror or error}",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(EXIT_BAD_NEWS) from error


def _tell(text: str, style: str) -> None:
    stderr.print(text, style=style, highlight=False, soft_wrap=True)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def export(
    directory: Annotated[
        str, typer.Argument(help="New or empty, no URL; it is there whole in the end, or not at all.")
    ],
    step: Annotated[int | None, typer.Option(min=0, help="Default: the latest.")] = None,
    format: Annotated[
        Literal["safetensors", "hf", "dcp"],
        typer.Option(help="Each rank's shard as it is; Hugging Face's layout; torch.distributed.checkpoint."),
    ] = "safetensors",
    prefix: Annotated[str, typer.Option(help='Only what is below this name, without it: "model". hf and dcp.')] = "",
    max_file_bytes: Annotated[int, typer.Option(min=1, help="hf: tensors' bytes per file.")] = 5_000_000_000,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="dcp: unpickle values that were saved with pickle; can run code.")
    ] = False,
    namespace: Namespace = None,
    socket: Socket = None,
    store: Store = None,
    as_json: AsJson = False,
) -> None:
    """Write one step to DIRECTORY for other tools, every byte verified (docs/interchange.md has the formats)."""
    from safepoint.interchange._export import export_pinned, local_folder

    with reported():
        target = local_folder(directory)
        there = place(socket, store)
        name = there.namespace(namespace)
        with there.open(name, step=step) as pin:
            with _files_reported(target), _bar(f"step {pin.info.step}", as_json) as progress:
                info = export_pinned(
                    pin,
                    name,
                    target,
                    format=format,
                    prefix=prefix,
                    max_file_bytes=max_file_bytes,
                    allow_pickle=allow_pickle,
                    progress=progress,
                )
            if as_json:
                return print_json(
                    {
                        "namespace": name,
                        **attempt_json(pin.info),
                        "format": info.format,
                        "files": [str(target / file) for file in info.files],
                        "tensors": info.tensors,
                        "values": info.values,
                        "tensor_bytes": info.bytes,
                        "as_bytes": list(info.as_bytes),
                    }
                )
        if info.as_bytes:
            _tell(f"as plain bytes, for which safetensors has no dtype: {_listed(info.as_bytes)}", "yellow")
        console.print(
            f"{name} step {info.step}: {len(info.files)} file(s), {info.tensors} tensors of "
            f"{human_bytes(info.bytes)}, {info.values} values, in {target}",
            highlight=False,
            soft_wrap=True,
        )


def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIRECTORY|URL",
            help="A DCP folder, one of safetensors files, a durable tier or step in it; or what --format aws reads.",
        ),
    ],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Where the step goes.")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Default: the number of a durable step; aws: the newest whole.")
    ] = None,
    format: Annotated[
        Literal["dcp", "safetensors", "hf", "aws"] | None,
        typer.Option(
            help="Default: what the folder looks like. aws: what amzn-sagemaker-checkpointing wrote to S3, there or in "
            "a copy; --step is then one of its steps."
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help='Put everything below this name: "model".')] = "",
    skip_not_plain: Annotated[
        bool, typer.Option("--skip-not-plain", help="Leave out values that only pickle reads.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Unpickle such values, which can run code, and save them so.")
    ] = False,
    existing: Annotated[
        bool, typer.Option("--existing", help="The namespace may exist; a job that still saves there is fenced.")
    ] = False,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Save what a folder or a durable step (file:///path, s3://bucket/base/run-3/step-40) holds as an ordinary step in
    memory. Nothing in a folder is trusted; no unrestricted unpickling.
    """
    from safepoint.interchange import ImportInfo, import_aws, import_folder, import_stored

    def bring(progress: Callable[[int, int], None]) -> ImportInfo:
        choices: dict[str, Any] = {
            "prefix": prefix,
            "skip_not_plain": skip_not_plain,
            "allow_pickle": allow_pickle,
            "existing": existing,
        }
        if format == "aws":
            return import_aws(source, namespace, step, progress=progress, **choices)
        if "://" in source:
            if format is not None:
                raise errors.InvalidArgument(f"--format {format} is a folder's; a durable step has one format only")
            return import_stored(source, namespace, step, **choices)
        if step is None:
            raise errors.InvalidArgument("a folder does not say which step it is: --step")
        return import_folder(source, namespace, step, format=format, progress=progress, **choices)

    with reported():
        client = connect(socket)  # Only a daemon that is there: an imported step is for others to use.
        os.environ["SAFEPOINT_SOCKET"] = client.socket_path
        with _files_reported(source), _bar("import", as_json) as progress:
            info = bring(progress)
        if as_json:
            return print_json(
                {
                    "namespace": namespace,
                    "step": info.step,
                    "attempt": info.attempt.hex(),
                    "format": info.format,
                    "parts": info.parts,
                    "skipped": list(info.skipped),
                    "verified": info.verified,
                    "passed_over": list(info.passed_over),
                }
            )
        if info.passed_over:
            _tell(f"passed over, not whole: {_listed(info.passed_over)}", "yellow")
        if info.skipped:
            _tell(f"left out, not plain: {_listed(info.skipped)}", "yellow")
        console.print(
            f"{namespace} step {info.step}: {info.parts} parts of {info.source} ({info.format}), level memory"
            + (", checksums match" if info.verified else ""),
            highlight=False,
            soft_wrap=True,
        )

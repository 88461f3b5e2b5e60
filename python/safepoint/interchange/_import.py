"""Bringing a folder of another tool's, or a step of a durable tier, into memory as an ordinary step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safepoint import _connect, _files
from safepoint._objects import Decoder
from safepoint._stored import open_step, read_parts, step_url
from safepoint._urls import shown
from safepoint.api import Checkpointer
from safepoint.errors import InvalidArgument, NotFound
from safepoint.interchange._aws_import import find_aws
from safepoint.interchange._dcp_import import METADATA, load_dcp
from safepoint.interchange._hf_export import INDEX
from safepoint.interchange._safetensors_import import load_safetensors
from safepoint.interchange._source import Progress
from safepoint.interchange._state import Loaded, Values

ImportFormat = Literal["dcp", "safetensors", "hf"]
_SAVE_SECONDS = 600.0


@dataclass(frozen=True)
class ImportInfo:
    """What an import saved; `skipped` names what was left out as not plain."""

    source: str  # The folder, or the URL.
    format: str  # "store" for a step of a durable tier.
    namespace: str
    step: int
    attempt: bytes
    parts: int
    skipped: tuple[str, ...]
    verified: bool  # There were checksums of ours, and every byte matches.
    passed_over: tuple[str, ...] = ()  # Of "aws": newer steps that are not whole, and why.


def detect_format(directory: Path) -> ImportFormat:
    """NotFound: no such folder, or nothing in it that is known."""
    if not directory.is_dir():
        raise NotFound(f"{shown(directory)} is no folder")
    if (directory / METADATA).exists() or any(directory.glob("__*.metadata")):
        return "dcp"
    if (directory / INDEX).exists():
        return "hf"
    if any(directory.glob("*.safetensors")):
        return "safetensors"
    raise NotFound(f"{directory} has neither {METADATA} nor safetensors files")


def import_folder(
    directory: str | Path,
    namespace: str,
    step: int,
    *,
    format: ImportFormat | None = None,
    prefix: str = "",
    skip_not_plain: bool = False,
    allow_pickle: bool = False,
    existing: bool = False,
    progress: Progress | None = None,
) -> ImportInfo:
    """Saves what a folder holds as `step` of `namespace`, by one rank, so that it is an ordinary step afterwards.

    Reads folders of torch.distributed.checkpoint ("dcp") and of safetensors files, safepoint's own exports, Hugging
    Face's and torch's ("safetensors", "hf": both read either, by the index if there is one). `format`: detected unless
    given. `prefix`: everything goes below this name ("model"), keys joined by dots. `existing`: the namespace may be
    there already; the import then begins a new generation of it, and a job that is still saving there is fenced.

    Nothing in the folder is trusted: no unrestricted unpickler runs, names must stay inside, offsets and sizes are
    checked, and checksums that safepoint left there are compared. A value that is not plain raises NotPlain with its
    name; `skip_not_plain` leaves such values out, `allow_pickle` unpickles them, which can run code, and saves with
    pickle what has no plain form.

    Returns when the step is complete in memory. Raises NotFound (no folder, or nothing known in it), Corrupt (damaged,
    or lying about itself), NotPlain, InvalidArgument, and what `Checkpointer.save` raises. A DCP folder's tensors are
    held in memory once beside the save; safetensors files are mapped.
    """
    directory = Path(directory)
    found = detect_format(directory)
    chosen = format or found
    if chosen not in ("dcp", "safetensors", "hf"):
        raise InvalidArgument(f'format must be "dcp", "safetensors" or "hf", not {format!r}')
    if (chosen == "dcp") != (found == "dcp"):
        raise InvalidArgument(f"{directory} is a folder of format {found}, not {chosen}")
    values = _values(namespace, skip_not_plain, allow_pickle, existing)
    try:
        _files.check(directory)
        verified = True
    except NotFound:
        verified = False
    if chosen == "dcp":
        loaded = load_dcp(directory, values, progress or (lambda done, total: None))
    else:
        loaded = load_safetensors(directory, values)
    info = ImportInfo(str(directory), chosen, namespace, step, b"", len(loaded.leaves), (), verified)
    return _save(info, loaded.state(prefix), values)


def import_stored(
    url: str,
    namespace: str,
    step: int | None = None,
    *,
    prefix: str = "",
    skip_not_plain: bool = False,
    allow_pickle: bool = False,
    existing: bool = False,
) -> ImportInfo:
    """Saves a durable step in memory as `step` of `namespace` (None: under its own number), by one rank.

    `url`: of a durable tier, whose newest step it is, or of one step in it, as in `safepoint.load`; several namespaces
    need the latter. Parts that were each rank's own are kept, each for its rank. `prefix`, `skip_not_plain`,
    `allow_pickle`, `existing` and errors as in `import_folder`, and those of `safepoint.load`. The whole state is held
    in memory once beside the save.
    """
    values = _values(namespace, skip_not_plain, allow_pickle, existing)
    loaded = Loaded()
    with open_step(step_url(url, namespace=None, step=None)) as pin:
        for part in read_parts(pin, Decoder(allow_pickle), None, values.refuse):
            loaded.add(part.name, part.path, part.value, per_rank=part.owner is not None)
        number = pin.info.step if step is None else step
    info = ImportInfo(url, "store", namespace, number, b"", len(loaded.leaves), (), True)
    return _save(info, loaded.state(prefix), values)


def import_aws(
    source: str | Path,
    namespace: str,
    step: int | None = None,
    *,
    prefix: str = "",
    skip_not_plain: bool = False,
    allow_pickle: bool = False,
    existing: bool = False,
    progress: Progress | None = None,
) -> ImportInfo:
    """Saves a step that Amazon's amzn-sagemaker-checkpointing wrote to S3, in its default layout or Ray's, as the step
    of the same number of `namespace`, by one rank.

    `source`: a URL ("s3://bucket/base/run"), or a directory with a copy of what is there; of one run, of a base path
    with one run below it, or of one step of Ray's layout. `step`: None for the newest that is whole; those newer that
    are not are told in the result. `prefix`, `skip_not_plain`, `allow_pickle` and `existing` as in `import_folder`,
    and nothing in the source is trusted more than there.

    Raises NotFound (nothing of the kind there, or no such step), Incomplete (metadata or a blob are missing or cut
    short), Corrupt, NotPlain, InvalidArgument (several runs), what a store raises, and what `Checkpointer.save` raises.
    The state is held in memory once beside the save, and the largest part of it once more.
    """
    values = _values(namespace, skip_not_plain, allow_pickle, existing)
    found = find_aws(str(source), step)
    loaded = found.load(values, progress or (lambda done, total: None))
    info = ImportInfo(str(source), "aws", namespace, found.step, b"", len(loaded.leaves), (), False, found.passed_over)
    return _save(info, loaded.state(prefix), values)


def _values(namespace: str, skip_not_plain: bool, allow_pickle: bool, existing: bool) -> Values:
    """The choice for what is not plain. InvalidArgument: there is none, or the namespace may not be imported into."""
    if skip_not_plain and allow_pickle:
        raise InvalidArgument("skip_not_plain and allow_pickle exclude each other")
    if not existing:
        _check_new(namespace)
    return Values(skip=skip_not_plain, allow_pickle=allow_pickle)


def _save(info: ImportInfo, state: Any, values: Values) -> ImportInfo:
    """Returns it with what is known when the step is complete in memory."""
    with Checkpointer(info.namespace, rank=0, world_size=1, allow_pickle=values.allow_pickle) as checkpointer:
        save = checkpointer.save(info.step, state)
        save.wait("memory", timeout=_SAVE_SECONDS)
        return dataclasses.replace(info, attempt=save.attempt, skipped=tuple(values.skipped))


def _check_new(namespace: str) -> None:
    """InvalidArgument: the namespace is there, and a job may be saving in it."""
    client = _connect.open_client("import")
    try:
        if any(known.ns == namespace for known in client.list_namespaces()):
            raise InvalidArgument(
                f"namespace {namespace} is there: importing into it begins a new generation and fences a job that "
                "still saves in it; choose another, or say existing=True (--existing)"
            )
    finally:
        client.close()

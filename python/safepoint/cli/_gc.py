"""The verb `gc`: deletes steps of a durable tier by a rule, and says what and why before it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from safepoint import _core, errors
from safepoint._stored import open_each, url_of
from safepoint.cli._common import (
    EXIT_BAD_NEWS,
    AsJson,
    Namespace,
    console,
    human_bytes,
    print_json,
    reported,
    stderr,
)
from safepoint.cli._places import newest_first

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 24 * 3600}


def _seconds(text: str) -> int:
    """Of "12h"; InvalidArgument for what is no duration."""
    if (match := re.fullmatch(r"(\d{1,9})(s|min|h|d)", text)) is None or int(match[1]) == 0:
        raise errors.InvalidArgument(
            f"{text!r} is no duration: write a whole number with its unit s, min, h or d, as 7d"
        )
    return int(match[1]) * _UNITS[match[2]]


class _Row(NamedTuple):
    """A step, or what is left of one (`uid` and `bytes` are not known then)."""

    name: _core.StepName
    uid: int | None
    bytes: int | None
    stays: bool
    why: str


def _judged(store: _core.Store, namespace: str, last: int, every: int, for_seconds: int) -> Iterator[_Row]:
    """Of one namespace, or of all (""). Each user's steps by themselves, the newest first: each one's newest stays."""
    steps, remains = store.listing(namespace)
    of_whom: dict[tuple[str, int], list[tuple[_core.StepName, _core.StoredPin]]] = {}
    for name, found in open_each(store, steps):
        if isinstance(found, errors.SafepointError):
            yield _Row(name, None, None, True, f"cannot be read: {found}")
        else:
            of_whom.setdefault((name.ns, found.uid), []).append((name, found))
    for (_, uid), own in sorted(of_whom.items()):
        own.sort(key=lambda step: newest_first(step[1]))
        dated = [(name.step, name.modified) for name, _ in own]
        judged = _core.judge_retention(dated, last, every, for_seconds)
        for (name, pin), (stays, why) in zip(own, judged, strict=True):
            yield _Row(name, uid, pin.info.bytes, stays, why)
    for name, why in remains:
        yield _Row(name, None, None, False, why)


def gc(
    url: Annotated[str, typer.Argument(help="The durable tier: file:///path, s3://bucket/prefix.", metavar="URL")],
    keep_last: Annotated[int | None, typer.Option(min=1, help="The newest steps stay, so many.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Steps that are a multiple of this stay, too.")] = None,
    keep_for: Annotated[
        str | None, typer.Option(help="And those made so long before the newest one: 12h, 7d.", metavar="TIME")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why the rest stays.")] = False,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> None:
    """Delete old steps of a durable tier, each manifest first. Never the newest step, never an object that is not ours.

    Steps that a daemon has not finished yet have no manifest, and stay; unless nobody has finished them in a week, or
    they are what a deletion left that was cut short. A daemon does the same by itself with the settings
    durable_keep_last, durable_keep_every and durable_keep_for.
    """
    with reported():
        if keep_last is None and keep_for is None:
            raise errors.InvalidArgument("say what stays: --keep-last N, --keep-for TIME, or both")
        rule = (keep_last or 0, keep_every or 0, 0 if keep_for is None else _seconds(keep_for))
        store = _core.Store(url)
        rows: list[dict[str, object]] = []
        table = Table("namespace", "step", "size", "what", "why")
        freed = 0
        failures: list[str] = []
        for row in _judged(store, namespace or "", *rule):
            what, why = "stays" if row.stays else "would go" if dry_run else "deleted", row.why
            if what == "deleted":
                try:
                    store.delete(row.name)
                except errors.SafepointError as error:  # The others may go all the same.
                    what, why = "failed", str(error)
                    failures.append(f"{url_of(store.url, row.name)}: {type(error).__name__}: {error}")
            if what in ("would go", "deleted"):
                freed += row.bytes or 0
            rows.append(
                {
                    "namespace": row.name.ns,
                    "step": row.name.step,
                    "attempt": row.name.attempt.hex(),
                    "uid": row.uid,
                    "bytes": row.bytes,
                    "what": what,
                    "why": why,
                }
            )
            size = "?" if row.bytes is None else human_bytes(row.bytes)
            table.add_row(row.name.ns, str(row.name.step), size, what, why)
        if not rows:
            of = "" if namespace is None else f" in namespace {namespace}"
            raise errors.NotFound(
                f"{store.url} has no step{of}, and nothing left of one: give the URL of the durable tier itself, that "
                "of the daemon's setting store"
            )
        if as_json:
            print_json({"url": url, "dry_run": dry_run, "bytes": freed, "steps": rows})
        else:
            console.print(table, markup=False)
            verb = "would be freed" if dry_run else "freed"
            console.print(f"{url}: {human_bytes(freed)} {verb}", highlight=False)
        for failure in failures:
            told = f"not deleted, or not all of it: {failure}"
            stderr.print(told, style="red", markup=False, highlight=False, soft_wrap=True)
        if failures:
            stderr.print("gc finishes what was begun when it is run again", highlight=False)
            raise SystemExit(EXIT_BAD_NEWS)

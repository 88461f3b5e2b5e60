"""No message shows what stands before an "@" in the authority of a URL, or its parameters."""

from __future__ import annotations

import pytest

import safepoint
from safepoint import dcp, interchange
from safepoint._urls import shown
from safepoint.dcp._target import agreed_step

SECRET = "wJalr/UtnF+EMI"
URL = f"s3://AKIA:{SECRET}@bucket/base/run-3/step-4"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (URL, "s3://bucket/base/run-3/step-4"),
        ("s3://AKIA:a@b@bucket/x@y", "s3://bucket/x@y"),
        ("s3://token@bucket", "s3://bucket"),
        ("s3:/AKIA:secret@bucket/x", "s3:/bucket/x"),
        ("s3://bucket/x?endpoint=http://user:secret@host", "s3://bucket/x?..."),
        ("s3://bucket/a@b/c:d@e", "s3://bucket/a@b/c:d@e"),
        ("file:///mnt/a@b/c:d@e", "file:///mnt/a@b/c:d@e"),
        ("run@2/step-4", "run@2/step-4"),
    ],
)
def test_what_is_shown_of_a_url(url: str, told: str) -> None:
    assert shown(url) == told


def test_no_message_has_the_secret_of_a_url() -> None:
    for call in (
        lambda: safepoint.load(URL, step=4),
        lambda: safepoint.load_into(URL, {}, namespace="run-3", rank=0, world_size=1),
        lambda: dcp.Reader(URL, step=4),
        lambda: dcp.Reader(URL, namespace="run-3"),
        lambda: dcp.Writer(URL),
        lambda: safepoint.Checkpointer(URL, rank=0, world_size=1),
        lambda: agreed_step(5, URL, None),
        lambda: agreed_step(None, f"safepoint://AKIA:{SECRET}@bucket", "run-3"),
        lambda: interchange.export_step("run-3", URL),
        lambda: interchange.import_folder(URL, "run-3", 4),
    ):
        with pytest.raises(safepoint.SafepointError) as caught:
            call()  # type: ignore[no-untyped-call]
        assert "bucket" in str(caught.value) and "AKIA" not in str(caught.value), caught.value
        assert not any(part in str(caught.value) for part in SECRET.split("/"))

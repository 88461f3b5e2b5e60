"""The durable tier in an object store, with the real daemon and a real S3 gateway: tests/gateway/ceph_gateway.sh.

What `durable` means is in test_durable.py; here is what only a store over HTTP can do wrong. I-22 to I-24, F64, F65.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import torch
from conftest import Daemon, eventually
from test_durable import Job, Start, cli, equal, state

import safepoint
from safepoint import dcp

SCRIPT = Path(__file__).parents[1] / "gateway" / "ceph_gateway.sh"
KEY, SECRET = "testkey", "testsecret"  # Of the user that the script makes.
WRONG_SECRET = "another-secret"


class Gateway:
    """One gateway for all tests of this file; every test has a bucket of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = self.call("start", str(os.getpid()))

    def call(self, verb: str, *more: str) -> str:
        words = ["bash", str(SCRIPT), verb, str(self.folder), *more]
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout.strip()

    def make_bucket(self) -> str:
        """Its name. One signed request (AWS Signature Version 4), because no S3 client of Python's is needed else."""
        name = f"bucket-{os.urandom(4).hex()}"
        host = urlsplit(self.endpoint).netloc
        now = datetime.datetime.now(datetime.UTC)
        day, time = now.strftime("%Y%m%d"), now.strftime("%Y%m%dT%H%M%SZ")
        empty = hashlib.sha256(b"").hexdigest()
        signed = {"host": host, "x-amz-content-sha256": empty, "x-amz-date": time}
        names = ";".join(signed)
        headers = "".join(f"{key}:{value}\n" for key, value in signed.items())
        request = f"PUT\n/{name}\n\n{headers}\n{names}\n{empty}"
        scope = f"{day}/us-east-1/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        key = f"AWS4{SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        signed["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("PUT", f"/{name}", headers=signed)
        assert connection.getresponse().status == 200
        connection.close()
        return name

    def url(self, bucket: str) -> str:
        return f"s3://{bucket}/base?endpoint={quote(self.endpoint, safe=':/')}&region=us-east-1"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    if subprocess.run(["bash", str(SCRIPT), "check"], check=False).returncode:
        pytest.skip("the programs of Ceph are not installed (ceph-mon ceph-osd radosgw ceph-common)")
    made = Gateway(tmp_path_factory.mktemp("s3") / "ceph")
    yield made
    made.call("stop")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this process, of the commands, and of daemons that are given no others."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def url(gateway: Gateway) -> str:
    return gateway.url(gateway.make_bucket())


def with_step(url: str, step: str) -> str:
    place, _, parameters = url.partition("?")
    return f"{place}/{step}?{parameters}"


def tells_no_secret(daemon: Daemon) -> bool:
    told = daemon.log.read_text() + (daemon.folder / "stderr").read_text() + json.dumps(daemon.status())
    return not any(secret in told for secret in (SECRET, WRONG_SECRET, KEY))


def test_a_job_resumes_from_the_bucket_when_all_memory_is_lost(start_daemon: Start, url: str, open_job: Job) -> None:
    daemon = start_daemon(f"--store={url}")
    job = open_job(daemon, "train")
    for step in (10, 20, 30):
        job.save(step, state(step), durable=step != 30).wait("durable" if step != 30 else "memory", timeout=60)
    assert tells_no_secret(daemon)
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait()
    job.close()

    daemon = start_daemon(f"--store={url}")
    again = open_job(daemon, "train")
    found = state(0)
    info = again.restore(found)
    assert info is not None and (info.step, info.source) == (20, "durable")
    assert equal(found, state(20))
    assert again.save(21, state(21), durable=True).wait("durable", timeout=60) == "durable"
    assert [i.step for i in again.steps()] == [21, 20, 10]
    assert tells_no_secret(daemon)


def test_readers_and_commands_without_a_daemon(
    start_daemon: Start, url: str, open_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(f"--store={url}")
    job = open_job(daemon, "train")
    for step in range(1, 6):
        job.save(step, state(step), durable=True).wait("durable", timeout=60)
    job.close()
    daemon.stop()
    monkeypatch.setenv("SAFEPOINT_SOCKET", "/nonexistent/socket")
    assert equal(safepoint.load(url), state(5))
    assert equal(safepoint.load(with_step(url, "train/step-2")), state(2))
    found = state(0)
    assert safepoint.load_into(url, found, step=3, rank=1, world_size=2, verify_first=True).source == "durable"
    assert equal(found, state(3))
    found = state(0)
    dcp.load(found, storage_reader=dcp.Reader(url, step=4))
    assert equal(found, state(4))
    cli("verify", "--store", url)
    other = start_daemon()
    cli("import", with_step(url, "train/step-3"), "--namespace", "again", "--socket", other.socket)
    again = state(0)
    info = open_job(other, "again").restore(again)
    assert info is not None and (info.step, info.source) == (3, "memory") and equal(again, state(3))
    cli("gc", url, "--keep-last", "1", "--keep-every", "2")
    assert [s["step"] for s in json.loads(cli("ls", "--store", url, "--json"))] == [5, 4, 2]
    with pytest.raises(safepoint.NotFound, match="whole steps: 2, 4, 5"):
        safepoint.load(url, step=3)


def large(value: float) -> dict[str, Any]:
    return {"w": torch.full((24 << 18,), value), "epoch": int(value)}  # 24 MiB: several parts.


def test_f64_steps_wait_for_a_store_that_is_out_of_reach(
    gateway: Gateway, start_daemon: Start, url: str, open_job: Job
) -> None:
    daemon = start_daemon(f"--store={url}", "--pool=512MiB")
    job = open_job(daemon, "train")
    job.save(1, large(1), durable=True).wait("durable", timeout=60)
    waiting = job.save(2, large(2), durable=True)
    waiting.wait(timeout=30)
    gateway.call("down")
    try:
        eventually(lambda: any(d["failures"] > 0 for d in daemon.status()["drains"]), "trouble is shown", 60)
        for step in (3, 4, 5):
            job.save(step, large(step)).wait(timeout=30)
        assert "s3://" in cli("status", "--socket", daemon.socket)
        with pytest.raises(safepoint.Unavailable, match="s3://"):
            safepoint.load(url)
    finally:
        gateway.call("up")
    assert waiting.wait("durable", timeout=120) == "durable"
    assert daemon.events("drain_in_trouble")
    assert safepoint.load(url, step=2)["w"].eq(2).all()
    eventually(lambda: not daemon.status()["drains"], "nothing waits any more")
    cli("verify", "--store", url)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("secret", r"403 SignatureDoesNotMatch .*; check the credentials"), ("bucket", "404 NoSuchBucket")],
)
def test_what_is_wrong_is_said_in_one_line(
    gateway: Gateway,
    start_daemon: Start,
    url: str,
    open_job: Job,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    said: str,
) -> None:
    """To the job, to readers, to the operator, in the log: the place and what it answers; and never a credential."""
    if wrong == "bucket":
        url = gateway.url("no-such-bucket")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG_SECRET)
    daemon = start_daemon(f"--store={url}")
    with pytest.raises(safepoint.Unavailable) as told:
        open_job(daemon, "train").save(1, state(1), durable=True)
    with pytest.raises(safepoint.Denied if wrong == "secret" else safepoint.NotFound) as read:
        safepoint.load(url)
    (logged, *_) = daemon.events("store_not_listed")
    lines = [str(told.value), str(read.value), cli("ls", "--store", url, code=1).strip(), logged["why"]]
    for line in lines:
        assert url.partition("?")[0] in line and re.search(said, line) and "\n" not in line, line
    lines.append(cli("status", "--socket", daemon.socket))
    assert not any(secret in "".join(lines) for secret in (SECRET, WRONG_SECRET, KEY))
    assert tells_no_secret(daemon)


def with_credentials(gateway: Gateway) -> list[str]:
    place = gateway.url("bucket").partition("://")[2]
    return [f"s3://{KEY}:{SECRET}@{place}", f"s3://{place}&secret_access_key={SECRET}"]


def test_a_reader_refuses_credentials_in_a_url(gateway: Gateway) -> None:
    for url in with_credentials(gateway):
        with pytest.raises(safepoint.InvalidArgument) as told:
            safepoint.load(url)
        assert SECRET not in str(told.value)


def test_a_daemon_refuses_credentials_in_a_url_without_repeating_them(start_daemon: Start, gateway: Gateway) -> None:
    for url in with_credentials(gateway):
        with pytest.raises(AssertionError) as told:
            start_daemon(f"--store={url}")
        assert SECRET not in str(told.value)


def test_a_missing_bucket_names_its_cure(gateway: Gateway) -> None:
    with pytest.raises(safepoint.NotFound, match="make the bucket"):
        safepoint.load(gateway.url("no-such-bucket"))

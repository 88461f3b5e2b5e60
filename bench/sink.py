"""The S3 server on loopback that bench/s3_sink.cc is, from its start to its end."""

from __future__ import annotations

import http.client
import re
import ssl
import subprocess
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

from bench.launch import Failed
from bench.system import ROOT, Service

PROGRAMS = ROOT / "build" / "bench" / "bench"  # Of the preset `bench`.
BUCKET = "bucket"
# Any do: it looks at no signature. The second line keeps clients from asking a cloud for others.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def not_built() -> str | None:
    """Why there is no sink here; None: there is one."""
    found = all((PROGRAMS / name).is_file() for name in ("s3_bench", "s3_sink"))
    return None if found else "not built: cmake --preset bench && cmake --build --preset bench"


class Sink(Service):
    """`size`: bytes that it can hold. With `discard` it holds none, and sends zeros."""

    def __init__(self, folder: Path, size: int, *, discard: bool = False, tls: bool = False) -> None:
        folder.mkdir()
        port, log = folder / "port", folder / "log"
        self._certificate = _make_certificate(folder) if tls else None
        command = [str(PROGRAMS / "s3_sink"), f"--port-file={port}", f"--mib={size >> 20}"]
        if discard:
            command.append("--discard")
        if self._certificate:
            command += [f"--tls-cert={self._certificate}", f"--tls-key={folder / 'key.pem'}"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log.open("wb"))
        self.pid = self._process.pid
        while not port.exists():
            if self._process.poll() is not None:
                raise Failed(log.read_text())
            time.sleep(0.02)
        # For an address s3torchconnector leaves the bucket out of the host name unasked; a certificate has a name.
        self.endpoint = f"{'https://localhost' if tls else 'http://127.0.0.1'}:{port.read_text()}"

    def url(self, prefix: str) -> str:
        """For us. Others find the endpoint in the environment."""
        more = f"&ca_file={quote(str(self._certificate))}" if self._certificate else ""
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}&region=us-east-1{more}"

    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def clear(self, prefix: str) -> None:
        """Deletes what lies under it, so that there is room for more."""
        place = urlsplit(self.endpoint).netloc
        connection: http.client.HTTPConnection = (
            http.client.HTTPSConnection(place, context=ssl.create_default_context(cafile=self._certificate))
            if self._certificate
            else http.client.HTTPConnection(place)
        )
        connection.request("GET", f"/{BUCKET}/?list-type=2&prefix={quote(prefix)}")
        for key in re.findall("<Key>(.*?)</Key>", connection.getresponse().read().decode()):
            connection.request("DELETE", f"/{BUCKET}/{quote(key)}")
            connection.getresponse().read()
        connection.close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _make_certificate(folder: Path) -> Path:
    """Its own authority, for `localhost`, which is what a client compares it with."""
    path = folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path

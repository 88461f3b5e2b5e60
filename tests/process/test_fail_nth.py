"""F50, F51 (I-5, I-8, I-28, I-29, I-31): the N-th call fails, or all from the N-th on, and nobody is killed, fooled or
spoilt by it. A sample of tests/faults/fail_nth.py, which runs every N (`make faults`), and every case that found a bug.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
import fail_nth
from fail_nth import ERRORS, ROLES, SCENARIOS, Campaign, Case

# What a daemon or a trainer calls, can fail, and is not made to fail, with the reason.
NOT_FAILED = {
    "freopen": "of stderr, at start",
    "pipe": "Asio's, where eventfd does not exist",
    "epoll_create": "Asio's, where epoll_create1 does not exist",
    "select": "Asio's, for waits without a loop, which nothing here makes",
    "recv": "of the HTTP server, whose connections no scenario uses",
    "shutdown": "its failure means that the connection has gone",
    "getsockname": "fails for programming errors only",
    "sigprocmask": "fails for programming errors only",
    "pthread_sigmask": "fails for programming errors only",
    **dict.fromkeys(
        ("openat", "fstatat", "mkdirat", "unlinkat", "renameat2", "rmdir"),
        "of the file store: src/durable/file_store_faults_test.cc makes its calls fail",
    ),
    **dict.fromkeys(("fopen", "send", "sendfile"), "of the S3 client, which no scenario uses"),
    "nanosleep": "waits",
    "clock_nanosleep": "waits",
}
# System calls that can fail in daily life, whoever uses them.
FAILING = re.compile(
    r"^(memfd_create|f?truncate|fallocate|mmap|munmap|madvise|mlock|fcntl|socket|socketpair|connect|bind|listen|accept4?|"
    r"sendmsg|sendto|send|recvmsg|recvfrom|recv|p?readv?|p?writev?|epoll_\w+|p?poll|p?select|eventfd|signalfd|timerfd_\w+|"
    r"syscall|open(at)?(64)?|freopen|fopen(64)?|close|fsync|fdatasync|f?chmod|[fl]?stat|fstatat|statx|rename(at2?)?|unlink(at)?|"
    r"mkdir(at)?|rmdir|flock|v?fork|posix_spawnp?|execvp?e?|waitpid|waitid|kill|dup[23]?|pipe2?|setsid|prctl|"
    r"pthread_create|getrandom|[gs]etsockopt|[gs]etrlimit|ioctl|sched_getaffinity|sendfile|splice|copy_file_range|"
    r"\w*alloc|posix_memalign|memalign|shutdown|getsockname|sigprocmask|pthread_sigmask|(clock_)?nanosleep)$"
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    fail_nth.build()
    running = Campaign(tmp_path_factory.mktemp("faults"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def calls(campaign: Campaign) -> dict[tuple[str, str], dict[str, int]]:
    """How often each function is called when nothing fails."""
    return {
        (scenario, role): counts
        for scenario in SCENARIOS
        for role, counts in fail_nth.profile(campaign, scenario).items()
    }


def test_every_call_that_can_fail_is_made_to_fail(campaign: Campaign) -> None:
    """F51: a system call that somebody adds is added to the campaign, or the reason is written down."""
    for program in (fail_nth.DAEMON, fail_nth.TRAINER):
        listing = subprocess.run(["nm", "-D", "--undefined-only", program], capture_output=True, text=True, check=True)
        imported = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
        failing = {name for name in imported if FAILING.match(name)}
        allocators = {name for name in failing if name.endswith("alloc") or name.endswith("memalign")}
        unknown = failing - allocators - set(ERRORS) - set(NOT_FAILED)
        if program == fail_nth.TRAINER:
            unknown -= {"opendir"}
        assert not unknown, f"{program.name} calls {sorted(unknown)}"
    assert set(ERRORS) == set(campaign.control.functions)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_sample(campaign: Campaign, calls: dict[tuple[str, str], dict[str, int]], scenario: str, role: str) -> None:
    """Each function that this process calls in this scenario, once; error, mode and N differ from one to the next."""
    problems, injected = [], 0
    counts = calls[scenario, role]
    for function, count in counts.items():
        dice = zlib.crc32(f"{scenario}/{role}/{function}".encode())
        error = ERRORS[function][dice % len(ERRORS[function])]
        mode = "once" if error.startswith("!") or dice % 2 else "on"
        n = 1 + dice // 8 % count
        verdict = campaign.run(Case(scenario, role, function, mode, error.lstrip("!")), n)
        injected += verdict.injected > 0
        problems += [f"{scenario}/{role}/{function}/{mode}/{error} N={n}: {problem}" for problem in verdict.problems]
    assert not problems, "\n".join(problems)
    # Counts differ a little from run to run, so the last call of a function may not come.
    assert injected >= len(counts) // 2


# What found a bug: docs/track-record.md. N is 1, 1 + stride, ... until clean.
REGRESSIONS = {
    "an_exception_in_a_public_call_or_a_thread_killed_the_trainer": ("save", "trainer", "alloc", "once", "ENOMEM", 11),
    "no_memory_at_all_killed_the_trainer_in_a_hash": ("save", "trainer", "alloc", "on", "ENOMEM", 13),
    "no_memory_in_a_restore": ("restore", "trainer", "alloc", "once", "ENOMEM", 9),
    "a_refused_munmap_killed_the_trainer": ("save", "trainer", "munmap", "once", "ENOMEM", 1),
    "an_interrupted_madvise_failed_a_save": ("save", "trainer", "madvise", "once", "EINTR", 1),
    "no_memory_ended_the_keeper": ("restart", "keeper", "alloc", "once", "ENOMEM", 17),
    "an_unreadable_report_of_a_child_hung_the_keeper": ("restart", "keeper", "read", "once", "EIO", 1),
    "a_worker_whose_http_server_could_not_be_woken_never_ended": ("restart", "worker", "epoll_ctl", "on", "ENOMEM", 1),
    "a_refused_unlock_killed_the_trainer": ("start", "trainer", "flock", "once", "ENOLCK", 1),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression(campaign: Campaign, name: str) -> None:
    scenario, role, function, mode, error, stride = REGRESSIONS[name]
    row, failures = fail_nth.Row(), list[str]()
    fail_nth.until_clean(campaign, Case(scenario, role, function, mode, error), 60, stride, row, failures, 3)
    assert not failures, "\n".join(failures)
    assert row.injected > 0


def test_the_judge_notices(campaign: Campaign) -> None:
    """A campaign that never failed proves nothing: lost work, a dead trainer and a dead keeper are told."""
    calm = Case("save", "worker", "alloc", "once", "ENOMEM")
    assert campaign.run(calm, 1 << 60).problems == []
    assert campaign.node is not None
    campaign.node.acked.append(1 << 62)
    assert any(problem.startswith("LOST_WORK") for problem in campaign.node_check())
    campaign.node.acked.clear()
    campaign.node.process.kill()
    campaign.node.process.wait()
    assert any(problem.startswith("DAEMON_GONE") for problem in campaign.node_check())
    assert fail_nth.judge_trainer(-6, ["ok connect"])[0].startswith("TRAINER_KILLED by signal 6")
    assert fail_nth.judge_trainer(0, ["violation wrong bytes", "done"])[0] == "VIOLATION violation wrong bytes"

"""The watchdog: what follows from a check, rule by rule, and whole checks over real sockets with a stub of systemd."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests import programs

GOLDEN = (programs.FILES / "golden/page.txt").read_text()
KEY = "sk-0123456789abcdef"

watchdog = programs.load("watchdog")
ready = programs.load("ready")
ocr_probe = watchdog.ocr_probe

PATIENCE = {
    "warm_up": 1800,
    "failures": 3,
    "stall": 120,
    "probe_interval": 300,
    "probe_timeout": 120,
    "backoff": 60,
    "backoff_max": 3600,
    "give_up": 5,
}
SETTINGS = watchdog.Settings(unit="dots-ocr.service", **PATIENCE)
READ_ALL = {"probe": "passed", "running": 0.0, "waiting": 0.0, "progress": 1000.0, "successes": 10.0}
HANGS = {"probe": "faulty", "probe_problem": "it hangs."}


class Life:
    """A server's life as the watchdog sees it, a check every half minute."""

    def __init__(self, **settings: Any) -> None:
        self.settings = replace(SETTINGS, **settings)
        self.now = 10_000.0
        self.started = self.now
        self.invocation = "first"
        self.state = watchdog.State(boot="boot")
        self.lines: tuple[str, ...] = ()
        self.restarts: list[float] = []
        self.forgiven: list[float] = []
        self.sleeps: list[float] = []

    def see(self, **measured: Any) -> Any:
        """Return what a check measures now."""
        known = {"time": self.now, "date": "2026-11-24", "active": "active", "invocation": self.invocation}
        return watchdog.Observation(**{**known, "active_seconds": self.now - self.started, **measured})

    def check(self, **measured: Any) -> str:
        """Check once, half a minute after the last time; return the state after it."""
        self.now += 30
        self.state, actions, self.lines = watchdog.decide(self.state, self.see(**measured), self.settings, self.now)
        assert len(actions) <= 1
        self.restarts += [self.now for action in actions if action == "restart"]
        self.forgiven += [self.now for action in actions if action == "forgive"]
        self.sleeps += [self.now for action in actions if action == "sleep"]
        state: str = self.state.state
        return state

    def is_probe_due(self, **measured: Any) -> bool:
        """Tell whether the next check would read a page."""
        self.now += 30
        due: bool = watchdog.is_probe_due(self.state, self.see(**measured), self.settings)
        self.now -= 30
        return due

    def start(self, invocation: str) -> None:
        """Start the server again."""
        self.invocation = invocation
        self.started = self.now

    def become_ready(self) -> None:
        """Start, and read a page."""
        assert self.check(**READ_ALL) == "ready"

    def fail(self, checks: int, **measured: Any) -> None:
        """Fail so many checks."""
        for _ in range(checks):
            self.check(**(measured or HANGS))

    def fail_until_restart(self) -> None:
        """Fail until the watchdog restarts the server, and let that happen."""
        before = len(self.restarts)
        for _ in range(200):
            self.check(**HANGS)
            if len(self.restarts) > before:
                break
        assert len(self.restarts) > before
        self.start(f"restart {len(self.restarts)}")


@pytest.fixture
def life() -> Life:
    return Life()


# A unit that does not run, and one that starts


@pytest.mark.parametrize("active", ["inactive", "failed", "activating", "deactivating"])
def test_unit_that_does_not_run_is_left_alone(life: Life, active: str) -> None:
    life.become_ready()
    life.fail(2)
    for _ in range(5):
        assert life.check(active=active) == "inactive"
    assert life.state.failures == 0
    assert not life.restarts
    assert not life.is_probe_due(active=active)


def test_server_on_demand_may_sleep_once_it_was_ready_for_long_enough_and_nobody_waits() -> None:
    life = Life(idle=60)
    life.become_ready()
    assert life.check() == "ready"
    assert not life.sleeps
    assert life.check(running=1.0, progress=1100.0) == "ready"
    assert not life.sleeps
    assert life.check(progress=1200.0) == "ready"
    assert life.sleeps == [life.now]
    for _ in range(40):  # a page of the watchdog's own would wake the card again and again
        assert not life.is_probe_due()
        life.check(progress=1200.0)
    life.start("second")
    assert life.check(active="inactive") == "asleep"
    assert life.check(active="failed") == "inactive"
    assert life.check(**READ_ALL) == "ready"


def test_start_may_take_its_time(life: Life) -> None:
    while life.now - life.started < SETTINGS.warm_up - 30:
        assert life.check(problem="/health does not answer.") == "starting"
    assert life.state.failures == 0
    assert life.check(problem="/health does not answer.") == "failing"


def test_page_that_is_misread_while_starting_is_no_failure(life: Life) -> None:
    assert life.check(**HANGS) == "starting"
    assert life.state.failures == 0


def test_start_that_never_gets_ready_is_restarted_after_its_time(life: Life) -> None:
    life.now += SETTINGS.warm_up
    life.fail(2)
    assert not life.restarts
    life.fail(1)
    assert len(life.restarts) == 1


def test_server_that_was_ready_is_not_starting_any_more(life: Life) -> None:
    life.become_ready()
    assert life.check(**HANGS) == "failing"
    life.fail(2)
    assert len(life.restarts) == 1


def test_healthy_server_is_not_ready_before_it_read_a_page(life: Life) -> None:
    assert life.check(running=0, waiting=0, progress=0, successes=0) == "starting"
    assert life.is_probe_due()
    assert life.check(**READ_ALL) == "ready"


def test_start_after_our_restart_may_take_its_time_again(life: Life) -> None:
    life.become_ready()
    life.fail(3)
    assert life.check(active="deactivating") == "inactive"
    life.start("second")
    assert life.check(problem="/health does not answer.") == "starting"
    assert (life.state.restarts, life.state.was_ready) == (1, False)


# Failures in a row


def test_failures_must_be_in_a_row(life: Life) -> None:
    life.become_ready()
    for _ in range(5):
        life.fail(2)
        life.become_ready()
    assert not life.restarts
    life.fail(3)
    assert len(life.restarts) == 1


def test_metrics_or_health_that_do_not_answer_are_a_failure(life: Life) -> None:
    life.become_ready()
    assert life.check(problem="/metrics does not answer.") == "failing"
    assert life.lines == ("<4>failing (1 of 3): /metrics does not answer.",)


def test_restart_says_why(life: Life) -> None:
    life.become_ready()
    life.fail(3)
    assert life.lines == ("<4>restarting dots-ocr.service, restart 1 in a row: it hangs.",)
    assert (life.state.state, life.state.reason) == ("restarting", "it hangs.")


def test_restart_that_did_not_happen_needs_a_probe(life: Life) -> None:
    life.become_ready()
    life.fail(3)
    assert life.is_probe_due()


# A queue that does not move


def test_queue_that_does_not_move_is_a_failure_if_no_page_is_read_either(life: Life) -> None:
    life.become_ready()
    queue = {"running": 3, "waiting": 2, "progress": 1000.0, "successes": 10.0}
    for _ in range(3):
        assert not life.is_probe_due(**queue)
        assert life.check(**queue) == "ready"
    assert life.is_probe_due(**queue)
    assert life.check(**queue, **HANGS) == "failing"
    assert "3 running, 2 waiting, and no progress for 120 s. it hangs." in life.lines[0]
    life.fail(2, **queue, **HANGS)
    assert len(life.restarts) == 1


def test_full_queue_that_does_not_move_is_a_failure_though_the_probe_is_sent_away(life: Life) -> None:
    life.become_ready()
    life.fail(3 + 3, running=3, waiting=64, progress=1000.0, probe="busy", probe_problem="answers 503.")
    assert len(life.restarts) == 1


def test_count_that_vllm_forgot_to_take_down_is_no_failure(life: Life) -> None:
    """After all clients went away vLLM can go on counting their requests as running (vllm issues 22545 and 29928)."""
    life.become_ready()
    forgotten = {"running": 3, "waiting": 0, "progress": 1000.0, "successes": 10.0}
    probes = 0
    for _ in range(100):
        due = life.is_probe_due(**forgotten)
        probes += due
        assert life.check(**forgotten, probe="passed" if due else "not done") == "ready"
    assert probes == 100 * 30 // SETTINGS.stall


@pytest.mark.parametrize("waiting", [0, 5])
def test_queue_that_moves_is_not_stuck(life: Life, waiting: int) -> None:
    life.become_ready()
    for count in range(20):
        queue = {"running": 3, "waiting": waiting, "progress": 1000.0 + count, "successes": 10.0 + count}
        assert not life.is_probe_due(**queue)
        assert life.check(**queue) == "ready"


def test_server_without_pages_need_not_move(life: Life) -> None:
    life.become_ready()
    idle = {"running": 0, "waiting": 0, "progress": 1000.0, "successes": 10.0}
    for _ in range(3):
        assert not life.is_probe_due(**idle)
        assert life.check(**idle) == "ready"
    life.now += SETTINGS.stall  # nobody looked for a while
    assert not life.is_probe_due(**idle)
    assert life.check(**idle) == "ready"
    # The wait of a page that comes now begins now.
    assert life.check(**{**idle, "running": 1}) == "ready"


def test_counter_that_starts_anew_has_moved(life: Life) -> None:
    life.become_ready()
    life.now += 200
    assert life.check(running=1, waiting=0, progress=5.0, successes=0.0) == "ready"


def test_metrics_of_another_name_are_no_reason_to_restart(life: Life) -> None:
    life.become_ready()
    for _ in range(20):
        assert life.check(running=3, waiting=0) == "ready"


def test_check_that_measured_nothing_does_not_hide_that_nothing_moves(life: Life) -> None:
    life.become_ready()
    queue = {"running": 3, "waiting": 2, "progress": 1000.0, "successes": 10.0}
    life.check(**queue)
    life.check(problem="/health does not answer.")
    life.check(**queue)
    assert life.check(**queue, **HANGS) == "failing"
    assert "no progress for 120 s" in life.lines[0]


# The probe


def test_probe_is_due_every_interval(life: Life) -> None:
    life.become_ready()
    while life.now - life.started < 300:
        assert not life.is_probe_due()
        assert life.check() == "ready"
    assert life.is_probe_due()


def test_traffic_postpones_the_probe(life: Life) -> None:
    life.become_ready()
    life.now += SETTINGS.probe_interval
    assert life.is_probe_due()
    for count in range(30):
        traffic = {"running": 1, "waiting": 0, "progress": 2000.0 + count, "successes": 11.0 + count}
        assert not life.is_probe_due(**traffic)
        assert life.check(**traffic) == "ready"


def test_traffic_does_not_postpone_the_probe_for_ever(life: Life) -> None:
    life.become_ready()
    life.now += 3000
    assert life.is_probe_due(running=1, waiting=0, progress=2000.0, successes=11.0)


def test_traffic_proves_nothing_after_a_failure(life: Life) -> None:
    life.become_ready()
    life.fail(1, **{**READ_ALL, **HANGS})
    assert life.is_probe_due(running=1, waiting=0, progress=2000.0, successes=11.0)


def test_traffic_can_prove_a_start(life: Life) -> None:
    life.check(running=1, waiting=0, progress=10.0, successes=0.0, probe="busy")
    assert life.check(running=1, waiting=0, progress=20.0, successes=1.0, probe="busy") == "ready"


@pytest.mark.parametrize("measured", [{"problem": "/health does not answer."}, {"probe": "denied"}])
def test_probe_is_not_sent_to_a_server_that_failed_already(life: Life, measured: dict[str, str]) -> None:
    life.become_ready()
    life.fail(1)
    assert life.is_probe_due()
    assert not life.is_probe_due(**measured)


def test_start_by_someone_else_needs_a_probe(life: Life) -> None:
    life.become_ready()
    assert not life.is_probe_due()
    life.start("second")
    assert life.is_probe_due()


@pytest.mark.parametrize(
    ("measured", "state"),
    [
        ({"running": 4, "waiting": 64, "progress": 1001.0}, "ready"),
        ({"running": 4, "waiting": 64, "progress": 1000.0}, "failing"),  # nothing moves
        ({"running": 0, "waiting": 0, "progress": 1001.0}, "failing"),  # nothing to wait for
        ({"running": 4, "waiting": 64}, "failing"),  # nobody knows
    ],
)
def test_probe_that_is_sent_away_is_no_failure_while_there_is_progress(
    life: Life, measured: dict[str, float], state: str
) -> None:
    life.become_ready()
    assert life.check(**measured, probe="busy", probe_problem="answers 503.") == state


def test_key_that_is_refused_is_no_reason_to_restart(life: Life) -> None:
    life.become_ready()
    denied = {"probe": "denied", "probe_problem": "the server refuses the key."}
    for _ in range(10):
        assert life.check(**denied) == "refused"
        assert life.lines == ("<3>cannot watch: the server refuses the key.",)
    assert not life.restarts
    assert life.is_probe_due()
    assert life.check(**READ_ALL) == "ready"


def test_key_that_is_refused_keeps_no_start_from_taking_too_long(life: Life) -> None:
    life.now += SETTINGS.warm_up
    life.fail(2)
    assert life.check(probe="denied", probe_problem="the server refuses the key.") == "refused"
    life.fail(3)
    assert len(life.restarts) == 1


# Restarts in a row


def test_pauses_between_restarts_grow(life: Life) -> None:
    life.settings = replace(life.settings, failures=1, backoff_max=500, give_up=99, warm_up=0)
    for _ in range(6):
        life.fail_until_restart()
    pauses = [after - before for before, after in zip(life.restarts, life.restarts[1:], strict=False)]
    assert pauses == [math.ceil(pause / 30) * 30 for pause in (120, 240, 480, 500, 500)]


def test_first_restart_of_a_row_keeps_its_distance_to_the_last_row(life: Life) -> None:
    life.settings = replace(life.settings, failures=1, backoff=600, probe_interval=60)
    life.become_ready()
    life.fail_until_restart()
    for _ in range(5):
        life.become_ready()
    assert life.state.restarts == 0
    life.fail_until_restart()
    assert life.restarts[1] - life.restarts[0] == 600


def test_pause_is_announced(life: Life) -> None:
    life.settings = replace(life.settings, backoff=300)
    life.become_ready()
    life.fail_until_restart()
    life.become_ready()
    life.fail(3)
    assert len(life.restarts) == 1
    assert life.lines == ("<4>failing, restart in 480 s at the earliest: it hangs.",)


def test_pauses_of_many_restarts_are_no_overflow(life: Life) -> None:
    life.become_ready()
    life.state = replace(life.state, restarts=5000, restarted_at=life.now)
    life.fail(3)
    assert "restart in 3510 s at the earliest" in life.lines[0]


def test_it_gives_up_after_restarts_that_did_not_help(life: Life) -> None:
    life.become_ready()
    for _ in range(5):
        life.fail_until_restart()
        life.now += SETTINGS.backoff_max + SETTINGS.warm_up
    life.fail(3)
    assert life.state.state == "gave_up"
    assert (life.state.since, life.state.reason) == ("2026-11-24", "it hangs.")
    (line,) = life.lines
    assert line.startswith("<3>gave up: 5 restarts did not make the server ready: it hangs. Fix: ")
    assert "systemctl restart dots-ocr.service" in line
    life.fail(100)
    assert life.state.state == "gave_up"
    assert life.lines == ("gave up at 2026-11-24: it hangs.",)
    assert len(life.restarts) == 5


@pytest.fixture
def hopeless(life: Life) -> Life:
    """A server that the watchdog gave up."""
    life.become_ready()
    life.state = replace(life.state, state="gave_up", was_ready=False, restarts=5, unready_restarts=5, failures=3)
    return life


def test_it_does_not_give_up_while_restarts_help_for_a_time(life: Life) -> None:
    for _ in range(20):
        life.become_ready()
        life.fail_until_restart()
    assert len(life.restarts) == 20
    assert life.state.unready_restarts == 1


def test_server_that_is_ready_again_after_all_is_watched_again(hopeless: Life) -> None:
    assert hopeless.is_probe_due()
    assert hopeless.check(**READ_ALL) == "ready"
    assert hopeless.lines[0] == "<4>the server is ready again after the watchdog gave up"
    assert hopeless.state.unready_restarts == 0


@pytest.mark.parametrize(
    "measured",
    [
        {"running": 1, "waiting": 0, "progress": 1001.0, "probe": "busy"},
        {"probe": "denied"},
        {"problem": "/health does not answer."},
        HANGS,
    ],
)
def test_only_a_page_that_is_read_brings_a_server_back(hopeless: Life, measured: dict[str, Any]) -> None:
    assert hopeless.check(**measured) == "gave_up"


def test_start_by_someone_else_begins_anew_after_giving_up(hopeless: Life) -> None:
    hopeless.start("second")
    assert hopeless.check(problem="/health does not answer.") == "starting"
    assert hopeless.lines[0] == "<4>the server was restarted after the watchdog gave up: it starts over"
    assert (hopeless.state.restarts, hopeless.state.unready_restarts) == (0, 0)


def test_stop_by_someone_else_begins_anew_after_giving_up(hopeless: Life) -> None:
    assert hopeless.check(active="inactive") == "inactive"
    assert "starts over" in hopeless.lines[0]
    assert (hopeless.state.restarts, hopeless.state.unready_restarts) == (0, 0)


def test_start_by_someone_else_forgets_restarts(life: Life) -> None:
    life.become_ready()
    life.fail_until_restart()
    life.check(**HANGS)
    assert life.state.restarts == 1
    life.start("by hand")
    life.check(**HANGS)
    assert life.state.restarts == 0
    assert life.lines[0] == "<4>the server was restarted: restarts before that are forgotten"


def test_restarts_are_forgiven_once_it_was_ready_for_a_while(life: Life) -> None:
    life.become_ready()
    life.fail_until_restart()
    life.become_ready()
    since = life.now
    while life.now - since < 2 * SETTINGS.probe_interval - 30:
        assert life.check(**READ_ALL) == "ready"
        assert life.state.restarts == 1
    assert life.check(**READ_ALL) == "ready"
    assert life.state.restarts == 0


def test_pauses_of_systemd_do_not_grow_from_one_crash_to_the_next(life: Life) -> None:
    life.become_ready()
    life.check(**READ_ALL)
    assert life.forgiven == [10_030.0]
    life.start("second")
    assert life.check(**HANGS) == "starting"
    assert len(life.forgiven) == 1
    life.check(**READ_ALL)
    assert len(life.forgiven) == 2


def test_failure_in_between_begins_the_while_anew(life: Life) -> None:
    life.become_ready()
    life.fail_until_restart()
    for _ in range(10):
        life.now += 500
        life.become_ready()
        life.fail(1)
    assert life.state.restarts == 1


# What it says


def test_it_speaks_when_something_changes(life: Life) -> None:
    said = []
    for measured in (
        {"problem": "/health does not answer."},
        {"problem": "/health does not answer."},
        {**READ_ALL, "running": 3.0},
        {**READ_ALL, "progress": 1001.0},
        {"active": "inactive"},
        {"active": "inactive"},
    ):
        life.check(**measured)
        said.append(life.lines)
    assert said == [
        ("starting: /health does not answer.",),
        (),
        ("ready, 3 running, 0 waiting",),
        (),
        ("dots-ocr.service is inactive: nothing to watch",),
        (),
    ]


# Metrics


def test_metrics_are_summed_over_their_labels() -> None:
    samples = ocr_probe.parse_metrics(
        """# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="dots, \\"ocr\\" } {"} 3.0
vllm:num_requests_running{engine="1",model_name="dots.ocr"} 1.0 1700000000000
vllm:num_requests_running_more 100
plain 1.5e+03
odd NaN
<html> none </html>
broken{ x
word of no number
"""
    )
    assert ocr_probe.total(samples, "vllm:num_requests_running") == 4
    assert ocr_probe.total(samples, "plain") == 1500
    assert samples[0].labels["engine"] == "0"
    for missing in ("vllm:num_requests", "odd", "broken", "word"):
        assert ocr_probe.total(samples, missing) is None


def test_request_whose_client_went_away_is_neither_progress_nor_success() -> None:
    lines = [
        f'vllm:request_success_total{{finished_reason="{reason}"}} {10**power}'
        for power, reason in enumerate(("stop", "length", "abort", "error", "repetition"))
    ]
    samples = ocr_probe.parse_metrics("\n".join(lines))
    assert ocr_probe.total(samples, watchdog.SUCCESS) == 11111
    assert ocr_probe.total(samples, watchdog.SUCCESS, watchdog.NO_PROGRESS) == 10011
    assert ocr_probe.total(samples, watchdog.SUCCESS, watchdog.NO_SUCCESS) == 1


# Whole checks


class Host:
    """A host with a server and a stub of systemd."""

    def __init__(self, folder: Path, server: HTTPServer) -> None:
        self.folder = folder
        self.server = server
        self.text = GOLDEN
        self.hangs = False
        self.closing = threading.Event()
        self.status = dict.fromkeys(("/health", "/metrics", "/v1/models", "/v1/chat/completions"), 200)
        self.requests: list[str] = []
        self.running = 0
        self.key_file = ""
        self.unit: dict[str, Any] = {"ActiveState": "active", "InvocationID": "first"}
        self.patience: dict[str, Any] = {**PATIENCE, "warm_up": 0}
        self.state_file = folder / "state/dots-ocr.json"
        server.expect_request(re.compile("/.*")).respond_with_handler(self.answer)
        program = folder / "systemctl"
        program.write_text(
            f'#!/bin/sh\ncd {folder}\nif [ "$1" = show ]; then cat unit.next 2>/dev/null || cat unit; exit; fi\n'
            'if [ "$1" = is-active ]; then cat deployment 2>/dev/null; exit; fi\n'
            'echo "$*" >> commands\n[ ! -e broken ] || { echo "Failed to restart" >&2; exit 1; }\n'
        )
        program.chmod(0o755)

    def answer(self, request: Request) -> Response:
        """Answer as vLLM does."""
        self.requests.append(request.path)
        if self.status[request.path] != 200:
            return Response("no", status=self.status[request.path])
        if request.path == "/health":
            return Response("")
        if request.path == "/metrics":
            counts = {"num_requests_running": self.running, "num_requests_waiting": 0}
            counts["generation_tokens_total"] = len(self.requests)
            return Response("".join(f'vllm:{name}{{engine="0"}} {count}\n' for name, count in counts.items()))
        if request.path == "/v1/models":
            return Response(json.dumps({"data": [{"id": "dots.ocr"}]}))
        if self.hangs:
            self.closing.wait(30)
        return Response(json.dumps({"choices": [{"message": {"content": self.text}, "finish_reason": "stop"}]}))

    def configure(self, **changes: Any) -> None:
        """Write the settings of the server."""
        settings = {
            "unit": "dots-ocr.service",
            "url": self.server.url_for("").rstrip("/"),
            "model": "dots.ocr",
            "likeness": 0.9,
            "api_key_file": self.key_file,
            "metrics": {
                "running": "vllm:num_requests_running",
                "waiting": "vllm:num_requests_waiting",
                "progress": ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"],
            },
            "watchdog": self.patience,
        }
        (self.folder / "server").mkdir(exist_ok=True)
        (self.folder / "server/dots-ocr.json").write_text(json.dumps({**settings, **changes}))

    def write_unit(self, name: str = "unit", **changes: Any) -> None:
        """Write what systemctl shows of the unit."""
        unit = {"ActiveEnterTimestampMonotonic": int(time.monotonic() * 1e6), **self.unit, **changes}
        (self.folder / name).write_text("".join(f"{key}={value}\n" for key, value in unit.items()))

    def run(
        self, program: Any = watchdog, /, call: programs.Call = programs.call, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """Call or run a program for the server."""
        self.configure(**changes)
        self.write_unit()
        folders = [f"--settings-folder={self.folder / 'server'}", f"--state-folder={self.state_file.parent}"]
        done = call(program, "dots-ocr", *folders, PATH=f"{self.folder}:{os.environ['PATH']}")
        assert KEY not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def commands(self) -> list[str]:
        """Return what systemd was told to do."""
        file = self.folder / "commands"
        return file.read_text().splitlines() if file.exists() else []

    def state(self) -> dict[str, Any]:
        """Return what the watchdog remembers."""
        state: dict[str, Any] = json.loads(self.state_file.read_text())
        return state


@pytest.fixture
def host(tmp_path: Path, httpserver: HTTPServer) -> Host:
    return Host(tmp_path, httpserver)


def test_ready_server_is_reported_once_and_not_probed_again(host: Host) -> None:
    host.running = 3
    first, second = host.run(call=programs.run), host.run(call=programs.run)
    assert (first.returncode, first.stdout, first.stderr) == (0, "dots-ocr: ready, 3 running, 0 waiting\n", "")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert host.requests.count("/v1/chat/completions") == 1
    assert (host.state()["state"], host.state()["boot"]) == ("ready", ocr_probe.boot_id())
    assert host.commands() == ["reset-failed dots-ocr.service"]


def test_first_page_is_left_to_the_deployment(host: Host) -> None:
    (host.folder / "deployment").write_text("active\n")
    assert host.run().returncode == 0
    assert "/v1/chat/completions" not in host.requests
    (host.folder / "deployment").write_text("inactive\n")
    host.run()
    assert host.requests.count("/v1/chat/completions") == 1
    (host.folder / "deployment").write_text("active\n")
    host.patience["probe_interval"] = 0
    host.run()
    assert host.requests.count("/v1/chat/completions") == 2, "a server that was ready is watched by all means"


def test_clock_that_jumps_does_not_matter(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock of the second check is a year ahead."""
    host.run()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 31e6)
    second = host.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert host.requests.count("/v1/chat/completions") == 1


def test_engine_that_hangs_while_health_answers_is_restarted(tmp_path: Path) -> None:
    with HTTPServer() as server:  # its own: the request that hangs ends only with the server
        host = Host(tmp_path, server)
        host.patience |= {"failures": 1, "probe_timeout": 1}
        host.hangs = True
        done = host.run()
        host.closing.set()
    assert done.returncode == 0
    assert done.stderr.startswith("<4>dots-ocr: restarting dots-ocr.service, restart 1 in a row: ")
    assert "does not answer within 1 s" in done.stderr
    assert host.commands() == ["try-restart --no-block dots-ocr.service"]
    assert host.state()["state"] == "restarting"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize("status", [500, 503])
def test_answer_that_fails_counts(host: Host, path: str, status: int) -> None:
    host.status[path] = status
    done = host.run()
    assert done.returncode == 0
    assert re.fullmatch(rf"<4>dots-ocr: failing \(1 of 3\): http://\S+{path} answers {status}: no\.\n", done.stderr)
    assert host.state()["failures"] == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("running", "failures"), [(3, 0), (0, 1)])
def test_full_queue_is_no_failure_while_it_moves(host: Host, status: int, running: int, failures: int) -> None:
    host.patience["probe_interval"] = 0
    host.run()
    host.running = running
    host.status["/v1/chat/completions"] = status
    host.run()
    assert host.requests.count("/v1/chat/completions") == 2
    assert host.state()["failures"] == failures


def test_misread_page_and_wrong_model_count(host: Host) -> None:
    host.text = "!!!!!!"
    assert "misreads the golden page" in host.run().stderr
    assert "failing (2 of 3): The server at" in host.run(model="another").stderr


def test_container_that_is_open_counts_although_it_reads(host: Host) -> None:
    host.run()
    note = host.state_file.with_suffix(".open")
    note.write_text("The container of dots-ocr is not isolated.")
    assert "failing (1 of 3): The container of dots-ocr is not isolated." in host.run().stderr
    note.unlink()
    host.run()
    assert host.state()["failures"] == 0


def test_start_is_given_its_time(host: Host) -> None:
    host.patience["warm_up"] = 60
    host.status["/health"] = 500
    assert host.run().stdout.startswith("dots-ocr: starting: ")
    host.unit["ActiveEnterTimestampMonotonic"] = int((time.monotonic() - 61) * 1e6)
    assert "failing (1 of 3)" in host.run().stderr


def test_unit_that_is_stopped_is_asked_nothing(host: Host) -> None:
    host.unit["ActiveState"] = "inactive"
    done = host.run()
    assert (done.returncode, done.stdout) == (0, "dots-ocr: dots-ocr.service is inactive: nothing to watch\n")
    assert host.requests == []


def test_unit_that_is_stopped_during_the_check_is_not_restarted(host: Host) -> None:
    host.patience["failures"] = 1
    host.status["/health"] = 500
    (host.folder / "systemctl").write_text(
        f"#!/bin/sh\ncd {host.folder}\necho $1 >> commands\ncat unit\nsed -i s/=active/=deactivating/ unit\n"
    )
    assert host.run().returncode == 0
    assert host.commands() == ["show", "show"]


def test_restart_that_systemd_refuses_is_reported_and_remembered(host: Host) -> None:
    host.patience["failures"] = 1
    host.status["/health"] = 500
    (host.folder / "broken").touch()
    done = host.run()
    assert done.returncode == 1
    assert "<3>dots-ocr: cannot watch: systemctl try-restart" in done.stderr
    assert "Failed to restart" in done.stderr
    assert host.state()["restarts"] == 1


def test_giving_up_is_a_failure_that_stays_and_readiness_mentions_it(host: Host) -> None:
    host.patience |= {"failures": 1, "give_up": 0}
    host.status["/health"] = 500
    first, second = host.run(call=programs.run), host.run()
    assert first.returncode == second.returncode == 1
    assert first.stderr.startswith("<3>dots-ocr: gave up: ")
    assert second.stdout.startswith("dots-ocr: gave up at 20")
    assert host.commands() == []
    assert set(host.state()) >= {"state", "since", "reason"}
    assert "The watchdog gave up restarting it at 20" in json.loads(host.run(ready).stdout)["problem"]
    host.status["/health"] = 200
    third = host.run()
    assert (third.returncode, third.stdout) == (0, "dots-ocr: ready, 0 running, 0 waiting\n")
    assert "ready again" in third.stderr


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/chat/completions"])
def test_refused_key_is_reported_and_restarts_nothing(host: Host, path: str) -> None:
    host.patience["failures"] = 1
    host.status[path] = 401
    host.key_file = str(host.folder / "api-key")
    Path(host.key_file).write_text(KEY)
    done = host.run()
    assert done.returncode == 1
    assert f"<3>dots-ocr: cannot watch: {host.server.url_for(path)} answers 401" in done.stderr
    assert host.commands() == []


# What it remembers


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"state": 1}', json.dumps({**asdict(watchdog.State()), "failures": "1"})]
)
def test_state_that_makes_no_sense_is_discarded_with_a_line(host: Host, text: str) -> None:
    host.state_file.parent.mkdir()
    host.state_file.write_text(text)
    done = host.run()
    assert done.returncode == 0
    assert done.stderr.startswith(f"<4>dots-ocr: discarded {host.state_file}: ")
    assert done.stdout == "dots-ocr: ready, 0 running, 0 waiting\n"
    assert host.state()["state"] == "ready"


@pytest.mark.parametrize(("boot", "failures"), [("another", 1), (None, 3)])
def test_state_of_another_boot_is_forgotten(host: Host, boot: str | None, failures: int) -> None:
    host.status["/health"] = 500
    host.run()
    host.run()
    host.state_file.write_text(json.dumps({**host.state(), "boot": boot or ocr_probe.boot_id()}))
    host.patience["failures"] = 9
    host.run()
    assert host.state()["failures"] == failures


def test_restart_that_cannot_be_remembered_is_not_done(host: Host) -> None:
    host.patience["failures"] = 1
    host.status["/health"] = 500
    host.state_file.mkdir(parents=True)
    done = host.run()
    assert done.returncode == 1
    assert "<3>dots-ocr: cannot watch: " in done.stderr
    assert host.commands() == []


def test_every_state_can_be_remembered(tmp_path: Path) -> None:
    state = watchdog.State(boot="boot", was_ready=True, failures=2, restarted_at=1.5, ready_since=3, progress=1e9)
    file = tmp_path / "dots-ocr.json"
    file.write_text(json.dumps(asdict(state)))
    assert watchdog.load_state(file, "boot") == (state, "")
    assert watchdog.load_state(file, "another") == (watchdog.State(boot="another"), "")
    assert watchdog.load_state(tmp_path / "none", "boot") == (watchdog.State(boot="boot"), "")


@pytest.mark.parametrize(("name", "status"), [("dots-ocr", 75), ("dots-ocr@1", 0)])
def test_one_watchdog_per_server_at_a_time(host: Host, name: str, status: int) -> None:
    host.state_file.parent.mkdir()
    with (host.state_file.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert host.run().returncode == status
    assert host.state_file.exists() is (status == 0)


@pytest.mark.parametrize("before", [None, 0o644])
def test_nobody_else_can_open_the_lock(host: Host, before: int | None) -> None:
    """Whoever can open it can lock it, and no check would be made; earlier releases let all read it."""
    lock = host.state_file.parent / "dots-ocr.lock"
    lock.parent.mkdir()
    if before:
        lock.touch(before)
    assert host.run().returncode == 0
    assert lock.stat().st_mode & 0o777 == 0o600


def test_lock_is_no_way_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "passwd")
    with pytest.raises(OSError, match="symbolic links"):
        ocr_probe.open_lock(tmp_path / "lock")
    assert not (tmp_path / "passwd").exists()


# What keeps it from watching


@pytest.mark.parametrize(
    ("key", "value"),
    [*itertools.product(sorted(PATIENCE), [None, "3", True, -1]), ("failures", 2.5), ("give_up", 2.5)],
)
def test_malformed_patience_is_named(host: Host, key: str, value: Any) -> None:
    host.configure(watchdog={**PATIENCE, key: value})
    server = ocr_probe.load_server("dots-ocr", host.folder / "server")
    with pytest.raises(ocr_probe.Failed, match=f"has no usable '{key}'"):
        watchdog.Settings.load(server)


@pytest.mark.parametrize(
    "change", [{"watchdog": None}, {"metrics": None}, {"metrics": {"running": "a", "waiting": "b"}}]
)
def test_malformed_settings_are_reported_with_the_fix(host: Host, change: dict[str, Any]) -> None:
    done = host.run(**change)
    assert done.returncode == 1
    assert re.fullmatch(r"<3>dots-ocr: cannot watch: .* has no usable .* Fix: .*site\.yml.*\n", done.stderr)


def test_systemd_that_does_not_answer_is_reported(host: Host) -> None:
    (host.folder / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    done = host.run()
    assert done.returncode == 1
    assert "systemd does not tell the state of dots-ocr.service" in done.stderr


def test_check_ends_before_systemd_ends_it() -> None:
    unit = (programs.FILES.parent / "templates/dots-ocr-watchdog@.service.j2").read_text()
    limit = re.search(r"^TimeoutStartSec=(\d+)$", unit, re.MULTILINE)
    assert limit
    requests = watchdog.HEALTH_SECONDS + watchdog.METRICS_SECONDS + watchdog.MODEL_SECONDS
    systemd = 2 * ocr_probe.SYSTEMCTL_SECONDS + watchdog.RESTART_SECONDS
    assert requests + watchdog.LONGEST_PROBE_SECONDS + systemd < int(limit[1])

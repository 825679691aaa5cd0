"""dots-ocr-server, the owner's command on a server's host, with what a rehearsal's host and its vLLM 0.32 said."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer

from tests import programs
from tests.test_ready import serve

# Recorded; but for two pages that nobody waited for.
METRICS = (
    Path(__file__)
    .with_name("vllm_metrics.txt")
    .read_text()
    .replace('"abort",model_name="dots.ocr"} 0.0', '"abort"} 2.0')
)
REASON = "The image's own libcuda took the place of the driver's."
SETTINGS: dict[str, Any] = {
    "name": "dots-ocr",
    "unit": "dots-ocr.service",
    "model": "dots.ocr",
    "likeness": 0.9,
    "watched": True,
    "watchdog": {"warm_up": 1800},
    "container": "dots-ocr",
    "gpu": {"index": 0},
    "profile": "native_v0_32",
    "image": {"reference": "docker.io/vllm/vllm-openai:v0.32.0", "pin": "docker.io/vllm/vllm-openai@sha256:a25d"},
    "weights": "/var/lib/dots-ocr/models/dots-studio--dots_ocr/fab941b7a1e84874ff15d44e16c9edd5987b31e0",
    "plan": {"gpu_memory_utilization": 0.85, "explanation": "15.42 of 15.92 GiB free"},
    "measured": {"note": "The KV cache holds 1 token."},
    "adaptations": [{"reason": REASON, "remedy": {}}],
    "metrics": {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting"},
}
CPU: dict[str, Any] = {
    **{name: SETTINGS[name] for name in ("name", "unit", "model", "likeness", "watched", "watchdog")},
    "profile": "cpu",
    "software": "/usr/local/lib/dots-ocr/software/0f1e2d3c4b5a",
    "metrics": {
        "running": "dots_ocr_pages_in_flight",
        "waiting": "dots_ocr_pages_waiting",
        "success": "dots_ocr_request_seconds_count",
    },
}
UNIT = {
    "ActiveState": "active",
    "SubState": "running",
    "UnitFileState": "enabled",
    "InvocationID": "32f9",
    "StateChangeTimestamp": "Mon 2026-11-30 10:33:53 UTC",
}
WATCHED = {"state": "ready", "since": "2026-11-30T10:34:19+00:00", "invocation": "32f9", "was_ready": True}

command = programs.load("dots-ocr-server")


class Host:
    """A host with one server, and stubs of the programs that know of it."""

    def __init__(self, folder: Path, url: str) -> None:
        """Make it run."""
        self.folder, self.url, self.key = folder, url, folder / "api-key"
        self.key.write_text("sk-0123456789abcdef\n")
        (folder / "server").mkdir()
        self.configure(SETTINGS)
        self.unit()
        self.watchdog()
        self.stub("journalctl", "")
        self.stub("docker", "echo PID; echo 2708; echo 2755")
        self.stub(
            "nvidia-smi",
            'case "$1" in *memory.total*) echo "0, NVIDIA GeForce RTX 5070 Ti, 580.95.05, 16303, 1900" ;; '
            '*) printf "2755, VLLM::EngineCore, 13600\\n999, game, 500\\n" ;; esac',
        )

    def configure(self, settings: dict[str, Any]) -> None:
        """Write the settings as the role does."""
        known = {**settings, "url": self.url, "api_key_file": str(self.key)}
        (self.folder / "server/dots-ocr.json").write_text(json.dumps(known))

    def stub(self, name: str, script: str) -> None:
        """Install a program of the host."""
        (self.folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{self.folder}/calls\n{script}\n')
        (self.folder / name).chmod(0o755)

    def unit(self, **changes: str) -> None:
        """Say what systemd says."""
        lines = "".join(f"{name}={value}\n" for name, value in {**UNIT, **changes}.items())
        self.stub("systemctl", f"cat <<'END'\n{lines}END")

    def watchdog(self, **changes: Any) -> None:
        """Write the state of the watchdog, which read a page a minute and a half ago."""
        proved = time.clock_gettime(time.CLOCK_BOOTTIME) - 90
        state = {**WATCHED, "boot": command.ocr_probe.boot_id(), "proved_at": proved, **changes}
        (self.folder / "dots-ocr.json").write_text(json.dumps(state))

    def journal(self, *, ended: str = "", seen: str = "", run: str = "", today: int = 0) -> None:
        """Say what the journal has: the last end, the watchdog's last warning, what the run said, pages of today."""

        def entry(text: str, second: int, **more: str) -> str:
            return json.dumps({"MESSAGE": text, "__REALTIME_TIMESTAMP": f"{1796034000 + second}000000", **more})

        files = {
            "ended": entry(ended, 10, MESSAGE_ID=command.ocr_probe.RESTART_SCHEDULED, INVOCATION_ID="7a")
            if ended
            else "",
            "seen": entry(seen, 5) if seen else "",
            "run": entry(run, 1, _SYSTEMD_INVOCATION_ID="7a"),
            "today": "\n".join(['INFO: 10.201.1.1:50478 - "POST /v1/chat/completions HTTP/1.1" 200 OK'] * today),
        }
        for name, text in files.items():
            (self.folder / f"journal.{name}").write_text(text)
        words = {"MESSAGE_ID=": "ended", "--priority=": "seen", "_SYSTEMD_INVOCATION_ID=7a": "run", "--grep=": "today"}
        cases = " ".join(f"*{word}*) cat {self.folder}/journal.{name} ;;" for word, name in words.items())
        self.stub("journalctl", f'case "$*" in {cases} esac')

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command."""
        folders = (f"--settings-folder={self.folder}/server", f"--state-folder={self.folder}")
        return programs.call(command, *folders, *words, PATH=f"{self.folder}:{os.environ['PATH']}")

    def status(self) -> dict[str, Any]:
        """Return what status tells programs of the one server."""
        (server,) = json.loads(self.run("status", "--json").stdout)["servers"]
        assert isinstance(server, dict)
        return server

    def calls(self, name: str) -> list[str]:
        """Return the calls of a program."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{name} ") and " show " not in line]


@pytest.fixture
def host(tmp_path: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Return a host whose server reads, for its root, at the time of Greenwich."""
    httpserver.expect_request("/metrics").respond_with_data(METRICS)
    httpserver.expect_request("/version").respond_with_json({"version": "0.32.0"})
    serve(httpserver)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield Host(tmp_path, httpserver.url_for("").rstrip("/"))
    monkeypatch.undo()
    time.tzset()


def test_status_fits_on_one_screen(host: Host) -> None:
    host.journal(today=31)
    done = host.run("status")
    expected = f"""\
dots-ocr
  state    running since 2026-11-30 10:33:53
  read     a page 1 min ago
  model    dots.ocr, weights fab941b7a1e8, profile native_v0_32
  image    docker.io/vllm/vllm-openai:v0.32.0, vLLM 0.32.0
  address  {host.url}
  key      {host.key}
  GPU 0    NVIDIA GeForce RTX 5070 Ti, driver 580.95.05: 15.9 GiB, 1.9 free, 13.3 ours
  pages    6 since the start, 31 today, with those of checks; median some 0.4 s, by the server's histogram
  queue    0 being read, 0 waiting
  fault    none in 7 days
  adapted  {REASON}
"""
    assert (done.returncode, done.stderr, done.stdout) == (0, "", expected)


def test_status_reads_no_page_and_tells_programs_the_same(host: Host, httpserver: HTTPServer) -> None:
    host.journal(today=31)
    told = host.status()
    assert told["gpu"] == {
        "index": 0,
        "name": "NVIDIA GeForce RTX 5070 Ti",
        "driver": "580.95.05",
        "total_mib": 16303,
        "free_mib": 1900,
        "ours_mib": 13600,
        "planned_mib": 13857,
    }
    assert told["pages"] == {"today": 31, "since_start": 6, "median_seconds": pytest.approx(0.4)}
    assert (told["state"], told["fault"], told["at_boot"], told["queue"]) == (
        "running", {}, True, {"running": 0, "waiting": 0},
    )  # fmt: skip
    assert {request.path for request, _ in httpserver.log} == {"/health", "/metrics", "/version"}


@pytest.mark.parametrize(
    ("unit", "watchdog", "state"),
    [
        ({"ActiveState": "inactive", "UnitFileState": "disabled"}, {}, "stopped"),
        ({"ActiveState": "inactive", "UnitFileState": "enabled"}, {}, "stopped"),
        ({"ActiveState": "failed", "UnitFileState": "enabled"}, {}, "failed"),
        ({"ActiveState": "activating", "SubState": "start-pre"}, {}, "starting"),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, {}, "failed"),
        ({"ActiveState": "deactivating"}, {}, "stopping"),
        ({}, {"state": "gave_up"}, "failed"),
        ({}, {"state": "gave_up", "invocation": "of a start before"}, "running"),
        ({}, {"state": "gave_up", "boot": "the one before"}, "running"),
    ],
)
def test_state_is_what_systemd_and_the_watchdog_say(
    unit: dict[str, str], watchdog: dict[str, str], state: str, host: Host
) -> None:
    host.unit(**unit)
    host.watchdog(**watchdog)
    assert host.status()["state"] == state
    assert host.run("status").returncode == (0 if state == "running" else 3)


def test_stopped_server_says_how_it_comes_back(host: Host) -> None:
    host.unit(ActiveState="inactive", UnitFileState="disabled", StateChangeTimestamp="")
    host.stub(
        "journalctl",
        """case "$*" in *--lines=1*) echo '{"MESSAGE": "x", "__REALTIME_TIMESTAMP": "1796034010000000"}' ;; esac""",
    )
    assert "state    stopped since 2026-11-30 10:20:10. Fix: sudo dots-ocr-server start\n" in host.run("status").stdout
    host.journal()
    assert "state    stopped since the last boot. Fix: sudo dots-ocr-server start\n" in host.run("status").stdout


def test_server_on_demand_is_asleep_or_stopped(host: Host) -> None:
    host.configure({**SETTINGS, "on_demand": {}})
    for enabled, state, status in (("enabled", "asleep", 0), ("disabled", "stopped", 3)):
        host.unit(ActiveState="inactive", UnitFileState=enabled)
        assert (host.status()["state"], host.run("status").returncode) == (state, status)


@pytest.mark.parametrize(("was_ready", "state"), [(False, "starting"), (True, "failed")])
def test_server_that_does_not_answer_starts_or_has_failed(host: Host, was_ready: bool, state: str) -> None:
    host.url = "http://127.0.0.1:9"
    host.configure(SETTINGS)
    host.watchdog(was_ready=was_ready, state="starting")
    assert (host.status()["state"], host.status()["queue"]) == (state, {})


def test_fault_that_lasts_is_told_as_readiness_finds_it(host: Host, httpserver: HTTPServer) -> None:
    httpserver.clear()
    serve(httpserver, model="facebook/opt-125m")
    host.watchdog(state="failing")
    fault = host.status()["fault"]
    assert (fault["at"], "serves facebook/opt-125m" in fault["problem"], bool(fault["fix"])) == ("now", True, True)


def test_last_fault_has_its_diagnosis_and_its_fix(host: Host) -> None:
    host.journal(seen="dots-ocr: restarting dots-ocr.service, restart 1 in a row: HTTP 500")
    assert host.status()["fault"]["problem"].startswith("dots-ocr: restarting")
    host.journal(seen="dots-ocr: the server was restarted")
    assert host.status()["fault"] == {}
    earlier = "dots-ocr: failing (1 of 3): HTTP 500"
    host.journal(seen=earlier, ended="Scheduled restart job", run="Error 804: forward compatibility")
    fault = host.status()["fault"]
    assert fault["at"] == "2026-11-30 10:20:10"
    assert "libcuda took the place of the driver's" in fault["problem"]
    assert "playbooks/host.yml" in fault["fix"]
    host.journal(ended="Scheduled restart job", run="nothing that is known")
    assert host.status()["fault"]["problem"] == "dots-ocr.service ended by itself."


def test_whoever_is_not_root_sees_the_status_and_is_told_what_needs_root(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    host.key.unlink()  # as good as one that may not be read
    done = host.run("status")
    assert done.returncode == 0
    assert "fault    not told to this user. Fix: sudo dots-ocr-server status\n" in done.stdout
    assert "today" not in done.stdout
    for name in ("start", "stop", "doctor", "update"):
        assert host.run(name).stderr == f"Only root may {name}. Fix: sudo dots-ocr-server {name}\n"
    assert not host.calls("systemctl")


def test_host_without_a_server_is_told(host: Host) -> None:
    (host.folder / "server/dots-ocr.json").unlink()
    assert host.run("status").stderr.startswith("No OCR server is installed on this host. Fix: ")


def test_server_on_the_cpu_has_its_own_metrics_and_no_gpu(host: Host, httpserver: HTTPServer) -> None:
    httpserver.clear()
    serve(httpserver)
    buckets = "".join(
        f'dots_ocr_request_seconds_bucket{{le="{le}"}} {n}\n' for le, n in (("1.0", 0), ("2.5", 4), ("+Inf", 4))
    )
    text = f"{buckets}dots_ocr_request_seconds_count 4\ndots_ocr_pages_in_flight 1\ndots_ocr_pages_waiting 3\n"
    httpserver.expect_request("/metrics").respond_with_data(text)
    httpserver.expect_request("/version").respond_with_json({"version": "0.1.0"})
    host.configure(CPU)
    shown = host.run("status").stdout
    assert "image    dots-ocr-client 0.1.0\n" in shown
    assert "pages    4 since the start, 0 today, with those of checks; median some 1.8 s" in shown
    assert "queue    1 being read, 3 waiting\n" in shown
    assert "GPU" not in shown


@pytest.mark.parametrize(
    ("counts", "seconds"), [([0, 0, 0], None), ([4, 4, 4], 0.5), ([0, 4, 4], 1.5), ([1, 3, 4], 1.5), ([0, 0, 2], 2.0)]
)
def test_median_is_estimated_as_prometheus_does(counts: list[int], seconds: float | None) -> None:
    buckets = zip(("1.0", "2.0", "+Inf"), counts, strict=True)
    samples = [command.Sample("x_bucket", {"le": le}, count) for le, count in buckets]
    assert command.median(samples, "x") == seconds


def test_card_that_nvidia_smi_cannot_tell_of_is_shown_with_its_words(host: Host) -> None:
    host.stub("nvidia-smi", 'echo "Unable to determine the device handle"; exit 15')
    assert "GPU 0    Unable to determine the device handle\n" in host.run("status").stdout
    host.stub("nvidia-smi", 'case "$1" in *total*) echo "0, N, 580.1, 16303, 1900" ;; esac')  # as under WSL2
    assert "15.9 GiB, 1.9 free, 13.5 planned for us\n" in host.run("status").stdout


def test_start_holds_at_boot_and_waits_until_a_page_is_read(host: Host) -> None:
    done = host.run("start")
    assert (done.returncode, host.calls("systemctl")) == (
        0,
        [
            f"systemctl {verb} dots-ocr.service dots-ocr-watchdog@dots-ocr.timer"
            for verb in ("reset-failed", "enable --now")
        ],
    )
    assert "read the golden page" in done.stdout


def test_start_that_fails_tells_why(host: Host) -> None:
    host.stub("systemctl", 'echo "Unit dots-ocr.service not found." >&2; exit 5')
    done = host.run("start")
    assert done.returncode == 1
    assert "Unit dots-ocr.service not found. Fix: " in done.stderr


def test_wait_shows_how_far_it_is(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([(75, '{"journal": "Loading weights: 40 %"}'), (0, '{"ready": true, "summary": "It reads."}')])
    monkeypatch.setattr(command, "ready", lambda *_: subprocess.CompletedProcess([], *next(answers), ""))
    assert host.run("start").stdout.splitlines() == [
        "dots-ocr: 0 of at most 1800 s: Loading weights: 40 %",
        "dots-ocr: It reads.",
    ]


def test_stop_holds_until_it_is_started(host: Host) -> None:
    assert host.run("stop").stdout.endswith("Stopped until 'sudo dots-ocr-server start'.\n")
    units = "dots-ocr-watchdog@dots-ocr.timer dots-ocr.service dots-ocr-watchdog@dots-ocr.service"
    assert host.calls("systemctl") == [
        f"systemctl disable --now {units}",
        "systemctl reset-failed dots-ocr.service dots-ocr-watchdog@dots-ocr.timer",
    ]


def test_plan_is_shown_with_the_settings(host: Host) -> None:
    shown = host.run("plan").stdout
    head = f"dots-ocr: 15.42 of 15.92 GiB free\n  {REASON}\nThe KV cache holds 1 token.\n"
    assert shown.startswith(head)
    assert json.loads(shown.removeprefix(head)) == json.loads(host.run("plan", "--json").stdout)


def test_doctor_reads_a_page_and_names_problems_with_their_fix(host: Host) -> None:
    host.unit()
    host.stub("systemctl", "printf 'ActiveState=active\\nUnitFileState=enabled\\n'")
    done = host.run("doctor")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "All is well.")
    assert "read the golden page" in done.stdout
    (host.folder / "dots-ocr.open").write_text("The container is not closed. Fix: this.")
    host.stub("systemctl", "printf 'ActiveState=inactive\\nUnitFileState=enabled\\n'")
    host.stub("nvidia-smi", "exit 9")
    done = host.run("doctor")
    assert done.returncode == 1
    for said in (
        "dots-ocr-watchdog@dots-ocr.timer is inactive, enabled. Fix:",
        "GPU 0: nvidia-smi does not answer. Fix:",
    ):
        assert said in done.stdout
    assert "The container is not closed. Fix: this.\nThere is a problem.\n" in done.stdout


def test_update_runs_where_the_deployment_lies_or_says_where_to(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(command, "CHECKOUT", checkout)
    assert "Fix: run there: git pull && ansible-playbook playbooks/upgrade.yml" in host.run("update").stdout
    checkout.mkdir()
    (checkout / "Makefile").touch()
    host.stub("git", "")
    host.stub("make", "exit 7")
    assert host.run("update").returncode == 7
    assert (host.calls("git"), host.calls("make")) == (["git pull --ff-only"], ["make .venv/ready"])

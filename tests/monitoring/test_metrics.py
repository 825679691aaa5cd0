"""The program that tells node exporter about GPUs, servers and certificates."""

from __future__ import annotations

import http.server
import importlib.util
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "roles/monitoring/files/metrics.py"
PROGRAMS = REPOSITORY / "roles/dots_ocr_server/files"
spec = importlib.util.spec_from_file_location("monitoring_metrics", FILE)
assert spec
assert spec.loader
metrics = importlib.util.module_from_spec(spec)
sys.modules["monitoring_metrics"] = metrics
spec.loader.exec_module(metrics)

NVIDIA_SMI = """#!/bin/sh
case "$1" in
    *memory.total*) echo "0, GPU-a, NVIDIA GeForce RTX 5070 Ti, 16303, 14000, 1900"
                    echo "1, GPU-b, NVIDIA \\"B\\", [N/A], 10, 20" ;;
    *temperature.gpu*) printf '0, 61\\n1, [N/A]\\n' ;;
    *power.draw*) echo 'Field "power.draw" is not a valid field to query.'; exit 2 ;;
    *utilization.gpu*) printf '0, 99\\n' ;;
esac
"""


def values(samples: Any) -> dict[tuple[str, str], float]:
    """Return {(name, first label's value): value} of all samples that have one."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): float(sample.value)
        for sample in samples
        if math.isfinite(sample.value)
    }


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> str:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    return str(program)


def test_gpus_are_told_as_dcgm_does(nvidia_smi: str) -> None:
    told = values(metrics.gpu_samples(nvidia_smi))
    assert told == {
        ("DCGM_FI_DEV_FB_USED", "0"): 14000,
        ("DCGM_FI_DEV_FB_FREE", "0"): 1900,
        ("DCGM_FI_DEV_FB_RESERVED", "0"): 403,
        ("DCGM_FI_DEV_FB_USED", "1"): 10,
        ("DCGM_FI_DEV_FB_FREE", "1"): 20,
        ("DCGM_FI_DEV_GPU_TEMP", "0"): 61,
        ("DCGM_FI_DEV_GPU_UTIL", "0"): 99,
        ("dots_ocr_gpu_up", ""): 1,
    }


@pytest.mark.parametrize("program", ["", "/nowhere/nvidia-smi", "/bin/false"])
def test_lost_gpu_is_told(program: str) -> None:
    assert values(metrics.gpu_samples(program)) == {("dots_ocr_gpu_up", ""): 0}


def test_driver_that_hangs_is_a_lost_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(metrics, "COMMAND_SECONDS", 0.1)
    assert values(metrics.gpu_samples(str(program))) == {("dots_ocr_gpu_up", ""): 0}


class Models(http.server.BaseHTTPRequestHandler):
    """A server that serves some model."""

    served = "dots.ocr"

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": self.served}]}).encode())


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return what systemd says of every unit."""
    said = {"ActiveState": "active", "ExecMainStartTimestamp": "@1795705330", "NRestarts": "2"}
    monkeypatch.setattr(metrics, "unit_properties", lambda _unit: said)
    monkeypatch.syspath_prepend(str(PROGRAMS))
    module = importlib.import_module("ocr_probe")
    monkeypatch.setattr(module, "unit_properties", lambda *_: {"InvocationID": "i"})
    monkeypatch.setattr(module, "boot_id", lambda: "b")
    return said


def settings(folder: Path, port: int, **more: Any) -> Path:
    """Write the settings of a server, and return their folder."""
    table = {
        "unit": "dots-ocr.service",
        "url": f"http://127.0.0.1:{port}",
        "model": "dots.ocr",
        "likeness": 1.0,
        "api_key_file": "",
        "watched": True,
        "gpu": {"index": 0},
        "plan": {"memory_total_mib": 16000, "gpu_memory_utilization": 0.5},
    }
    (folder / "dots-ocr.json").write_text(json.dumps(table | more))
    return folder


@pytest.mark.parametrize(("served", "right"), [("dots.ocr", 1), ("facebook/opt-125m", 0)])
def test_model_is_told(
    served: str, right: int, tmp_path: Path, port: int, probe: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "served", served)
    told = values(metrics.server_samples(PROGRAMS, settings(tmp_path, port), tmp_path / "watchdog"))
    assert told[("dots_ocr_model_right", "dots-ocr")] == right
    assert told[("dots_ocr_unit_active", "dots-ocr")] == 1
    assert told[("dots_ocr_unit_restarts", "dots-ocr")] == 2
    assert told[("dots_ocr_unit_start_time_seconds", "dots-ocr")] == 1795705330
    assert told[("dots_ocr_gpu_planned_mib", "dots-ocr")] == 8000
    assert told[("dots_ocr_watchdog_gave_up", "dots-ocr")] == 0


def test_server_that_does_not_answer_has_no_wrong_model(tmp_path: Path, probe: dict[str, str]) -> None:
    told = values(metrics.server_samples(PROGRAMS, settings(tmp_path, 9), tmp_path / "watchdog"))
    assert ("dots_ocr_model_right", "dots-ocr") not in told
    assert told[("dots_ocr_unit_active", "dots-ocr")] == 1


def test_stopped_server_is_told(tmp_path: Path, port: int, probe: dict[str, str]) -> None:
    probe.update(ActiveState="failed", ExecMainStartTimestamp="")
    told = values(metrics.server_samples(PROGRAMS, settings(tmp_path, port), tmp_path / "watchdog"))
    assert told[("dots_ocr_unit_active", "dots-ocr")] == 0
    assert ("dots_ocr_model_right", "dots-ocr") not in told
    assert ("dots_ocr_unit_start_time_seconds", "dots-ocr") not in told


def test_watchdog_that_gave_up_is_told(tmp_path: Path, port: int, probe: dict[str, str]) -> None:
    watchdog = tmp_path / "watchdog"
    watchdog.mkdir()
    state = {"state": "gave_up", "boot": "b", "invocation": "i", "since": "today", "reason": "hangs", "restarts": 5}
    (watchdog / "dots-ocr.json").write_text(json.dumps(state))
    samples = list(metrics.server_samples(PROGRAMS, settings(tmp_path, port), watchdog))
    told = values(samples)
    assert told[("dots_ocr_watchdog_gave_up", "dots-ocr")] == 1
    assert told[("dots_ocr_watchdog_restarts", "dots-ocr")] == 5
    now = [sample.labels["state"] for sample in samples if sample.name == "dots_ocr_watchdog_state" and sample.value]
    assert now == ["gave_up"]


def test_states_are_those_of_the_watchdog() -> None:
    text = (PROGRAMS / "watchdog").read_text()
    assert all(f'"{state}"' in text for state in metrics.WATCHDOG_STATES)


def test_settings_that_cannot_be_read_are_told(tmp_path: Path, probe: dict[str, str]) -> None:
    (tmp_path / "dots-ocr.json").write_text("{")
    told = values(metrics.server_samples(PROGRAMS, tmp_path, tmp_path))
    assert told == {("dots_ocr_server_readable", "dots-ocr"): 0}


def test_host_without_a_server_tells_nothing_of_one(tmp_path: Path) -> None:
    assert not list(metrics.server_samples(PROGRAMS, tmp_path, tmp_path))


def test_certificate_is_told(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", "/dev/null"]
    subprocess.run([*command, "-days", "10", "-out", str(good)], check=True, capture_output=True)
    bad.write_text("no certificate")
    told = values(metrics.certificate_samples([good, bad, tmp_path / "missing.pem"]))
    remaining = told.pop(("dots_ocr_certificate_expiry_time_seconds", str(good))) - time.time()
    assert 9 * 86400 < remaining <= 10 * 86400
    assert told == {
        ("dots_ocr_certificate_readable", str(good)): 1,
        ("dots_ocr_certificate_readable", str(bad)): 0,
    }


def test_text_is_what_prometheus_reads(nvidia_smi: str) -> None:
    text = metrics.render(metrics.gpu_samples(nvidia_smi))
    assert '\nDCGM_FI_DEV_FB_USED{gpu="1",UUID="GPU-b",modelName="NVIDIA \\"B\\""} 10\n' in text
    assert "nan" not in text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    # What it thinks of DCGM's capitals is another matter.
    assert done.returncode in (0, 3), done.stderr


def test_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "dots_ocr.prom"
    file.write_text("old")
    metrics.write(file, "new\n")
    assert file.read_text() == "new\n"
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_every_metric_has_its_help() -> None:
    text = FILE.read_text()
    assert all(f'"{name}"' in text for name in metrics.HELP)

#!/usr/bin/python3
"""Tell node exporter's textfile collector what it cannot see itself: GPUs, dots.ocr's servers, certificates.

    metrics FILE.prom [--gpu] [--certificate PATH ...]

A systemd timer calls it. The GPUs' metrics bear the names of NVIDIA's DCGM exporter where they mean the same, so that
rules and dashboards need not know which of the two a host has. The file is written as a whole or not at all.
Exit status 0: written, also when something on the host is wrong, since that is what it tells; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Where the role dots_ocr_server keeps its programs: a server is asked here as readiness and watchdog ask it.
PROGRAMS = Path("/usr/local/lib/dots-ocr")
SETTINGS = Path("/etc/dots-ocr/server")
WATCHDOG = Path("/var/lib/dots-ocr/watchdog")
WATCHDOG_STATES = ("new", "inactive", "asleep", "starting", "ready", "failing", "restarting", "refused", "gave_up")

# Root does not find it on its PATH there.
WSL_NVIDIA_SMI = Path("/usr/lib/wsl/lib/nvidia-smi")
GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "memory.free")
# One by one, because a driver refuses the whole question for one field that it does not know.
MORE_GPU_FIELDS = {
    "temperature.gpu": "DCGM_FI_DEV_GPU_TEMP",
    "utilization.gpu": "DCGM_FI_DEV_GPU_UTIL",
    "power.draw": "DCGM_FI_DEV_POWER_USAGE",
}
# A driver that hangs must not keep the rest from being told.
COMMAND_SECONDS = 10
MODEL_SECONDS = 5
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # of a label's value, between quotes

HELP = {
    "DCGM_FI_DEV_FB_USED": "Memory of the GPU in use, MiB",
    "DCGM_FI_DEV_FB_FREE": "Memory of the GPU that is free, MiB",
    "DCGM_FI_DEV_FB_RESERVED": "Memory of the GPU that nobody gets, MiB",
    "DCGM_FI_DEV_GPU_TEMP": "Temperature of the GPU, degrees Celsius",
    "DCGM_FI_DEV_GPU_UTIL": "Time during which the GPU worked, percent",
    "DCGM_FI_DEV_POWER_USAGE": "Power that the GPU draws, W",
    "dots_ocr_gpu_up": "Whether nvidia-smi answers and shows a GPU",
    "dots_ocr_gpu_planned_mib": "Memory of the GPU that the server takes when it runs, MiB",
    "dots_ocr_on_demand": "Whether the server leaves the GPU while nobody sends pages",
    "dots_ocr_unit_active": "Whether the server's unit runs",
    "dots_ocr_unit_start_time_seconds": "When the server's unit was last started",
    "dots_ocr_unit_restarts": "Restarts by systemd since the unit was last started by hand or by the watchdog",
    "dots_ocr_watchdog_state": "What the watchdog says of the server: 1 for its state, 0 for all others",
    "dots_ocr_watchdog_gave_up": "Whether the watchdog gave up restarting the server as it runs now",
    "dots_ocr_watchdog_restarts": "Restarts by the watchdog in a row",
    "dots_ocr_watchdog_watches": "Whether the server should be watched over",
    "dots_ocr_model_right": "Whether the server serves the right model; missing while it does not answer",
    "dots_ocr_server_readable": "Whether the server's settings could be read",
    "dots_ocr_certificate_expiry_time_seconds": "When a certificate expires",
    "dots_ocr_certificate_readable": "Whether a certificate could be read",
}


class Sample(NamedTuple):
    """One line of Prometheus' text format."""

    name: str
    labels: dict[str, str]
    value: float


def run(*command: str) -> str:
    """Return what a command prints; nothing if it fails, hangs or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=COMMAND_SECONDS
        ).stdout
    return ""


def unit_properties(unit: str) -> dict[str, str]:
    """Return what systemd says of a unit, dates as seconds since 1970; nothing if it does not answer."""
    names = "ActiveState,NRestarts,ExecMainStartTimestamp"
    lines = run("systemctl", "show", "--timestamp=unix", f"--property={names}", unit).splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def query(program: str, *fields: str) -> list[list[str]]:
    """Return the values of the fields, one row per GPU."""
    answer = run(program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits") if program else ""
    rows = [[value.strip() for value in line.split(",")] for line in answer.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def number(text: str) -> float:
    """Return a number; NaN for what a GPU cannot tell, such as [N/A]."""
    with contextlib.suppress(ValueError):
        return float(text)
    return math.nan


def gpu_samples(program: str) -> Iterator[Sample]:
    """Tell about every GPU."""
    gpus = {}
    for index, uuid, name, *memory in query(program, *GPU_FIELDS):
        labels = gpus[index] = {"gpu": index, "UUID": uuid, "modelName": name}
        total, used, free = map(number, memory)
        yield Sample("DCGM_FI_DEV_FB_USED", labels, used)
        yield Sample("DCGM_FI_DEV_FB_FREE", labels, free)
        yield Sample("DCGM_FI_DEV_FB_RESERVED", labels, total - used - free)
    for field, metric in MORE_GPU_FIELDS.items():
        for index, value in query(program, "index", field) if gpus else ():
            if index in gpus:
                yield Sample(metric, gpus[index], number(value))
    yield Sample("dots_ocr_gpu_up", {}, bool(gpus))


def server_samples(programs: Path, settings: Path, watchdog: Path) -> Iterator[Sample]:
    """Tell about every server of this host; nothing where the role dots_ocr_server has none."""
    files = sorted(settings.glob("*.json"))
    if not files or not (programs / "ocr_probe.py").exists():
        return
    sys.path.insert(0, str(programs))
    probe = importlib.import_module("ocr_probe")
    for file in files:
        labels = {"server": file.stem}
        try:
            server = probe.load_server(file.stem, settings)
        except probe.Failed:
            yield Sample("dots_ocr_server_readable", labels, 0)
            continue
        yield Sample("dots_ocr_server_readable", labels, 1)
        yield Sample("dots_ocr_on_demand", labels, bool(server.settings.get("on_demand")))
        yield from unit_samples(probe, server, labels)
        yield from watchdog_samples(probe, server, watchdog, labels)
        yield from plan_samples(server.settings, labels)


def unit_samples(probe: Any, server: Any, labels: dict[str, str]) -> Iterator[Sample]:
    """Tell about the unit of a server, and about the model that it serves."""
    properties = unit_properties(server.unit)
    active = properties.get("ActiveState") in ("active", "reloading", "refreshing")
    yield Sample("dots_ocr_unit_active", labels, active)
    yield Sample("dots_ocr_unit_restarts", labels, number(properties.get("NRestarts", "")))
    # The same for as long as it runs, whatever the clock does; empty if it never ran.
    started = number(properties.get("ExecMainStartTimestamp", "").lstrip("@"))
    yield Sample("dots_ocr_unit_start_time_seconds", labels, started or math.nan)
    if active:
        try:
            probe.check_model(server, MODEL_SECONDS)
        except (probe.NotYet, probe.Refused):
            return
        except probe.Failed:
            yield Sample("dots_ocr_model_right", {**labels, "model": server.model}, 0)
        else:
            yield Sample("dots_ocr_model_right", {**labels, "model": server.model}, 1)


def watchdog_samples(probe: Any, server: Any, folder: Path, labels: dict[str, str]) -> Iterator[Sample]:
    """Tell what the watchdog knows of a server."""
    yield Sample("dots_ocr_watchdog_watches", labels, server.settings.get("watched") is True)
    yield Sample("dots_ocr_watchdog_gave_up", labels, bool(probe.watchdog_gave_up(server, folder)))
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / f"{server.name}.json").read_bytes())
        if state["boot"] != probe.boot_id():
            return
        yield Sample("dots_ocr_watchdog_restarts", labels, number(str(state["restarts"])))
        for name in WATCHDOG_STATES:
            yield Sample("dots_ocr_watchdog_state", {**labels, "state": name}, state["state"] == name)


def plan_samples(settings: dict[str, Any], labels: dict[str, str]) -> Iterator[Sample]:
    """Tell how much of its GPU a server takes."""
    with contextlib.suppress(KeyError, TypeError):
        planned = settings["plan"]["memory_total_mib"] * settings["plan"]["gpu_memory_utilization"]
        yield Sample("dots_ocr_gpu_planned_mib", {**labels, "gpu": str(settings["gpu"]["index"])}, float(planned))


def certificate_samples(paths: Iterable[Path]) -> Iterator[Sample]:
    """Tell when certificates expire; one that is not there is not in use."""
    for path in paths:
        if not path.exists():
            continue
        labels = {"path": str(path)}
        # The first certificate of a chain is the server's own.
        answer = run("openssl", "x509", "-noout", "-enddate", "-in", str(path)).strip()
        readable = answer.startswith("notAfter=")
        yield Sample("dots_ocr_certificate_readable", labels, readable)
        if readable:
            expiry = ssl.cert_time_to_seconds(answer[len("notAfter=") :])
            yield Sample("dots_ocr_certificate_expiry_time_seconds", labels, expiry)


def render(samples: Iterable[Sample]) -> str:
    """Return the samples in Prometheus' text format, those without a value left out."""
    families: dict[str, list[str]] = {}
    for sample in samples:
        lines = families.setdefault(sample.name, [])
        labels = ",".join(f'{name}="{value.translate(ESCAPES)}"' for name, value in sample.labels.items())
        if math.isfinite(sample.value):
            lines.append(f"{sample.name}{'{' + labels + '}' if labels else ''} {float(sample.value):.12g}\n")
    told = {name: "".join(lines) for name, lines in families.items() if lines}
    return "".join(f"# HELP {name} {HELP[name]}.\n# TYPE {name} gauge\n{lines}" for name, lines in told.items())


def write(file: Path, text: str) -> None:
    """Write a file as a whole or not at all, for everybody to read."""
    draft = file.with_name(f".{file.name}.new")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.chmod(0o644)
    draft.replace(file)


def main() -> int:
    """Measure once."""
    parser = argparse.ArgumentParser(description="Write metrics for node exporter's textfile collector.")
    parser.add_argument("file", type=Path, metavar="FILE.prom")
    parser.add_argument("--gpu", action="store_true", help="ask nvidia-smi, where no DCGM exporter tells")
    parser.add_argument("--certificate", type=Path, action="append", default=[], help="to tell the expiry of")
    arguments = parser.parse_args()
    smi = str(WSL_NVIDIA_SMI) if WSL_NVIDIA_SMI.exists() else shutil.which("nvidia-smi") or ""
    samples = list(gpu_samples(smi)) if arguments.gpu else []
    samples += server_samples(PROGRAMS, SETTINGS, WATCHDOG)
    samples += certificate_samples(arguments.certificate)
    write(arguments.file, render(samples))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The whole rehearsal: deploy with the real playbooks, verify, read a page, lose the server, read on, get it back."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal import engine, hosts, shell
from rehearsal.engine import SOCKET
from rehearsal.shell import REPOSITORY, RehearsalError, output, say, step

HOST = "dots-ocr-rehearsal-host"
PORT = 18000
API = f"http://127.0.0.1:{PORT}/v1"
SAMPLE = REPOSITORY / "roles/dots_ocr_server/files/golden/page.png"
READY_SECONDS = 300
PROGRAMS = Path(sys.executable).parent


@dataclass(frozen=True)
class Reading:
    """What the client got for the sample page, and when."""

    occasion: str
    engine: str
    model: str
    seconds: float
    text: str
    reason: str


def run(options: Sequence[str] = ()) -> None:
    """Deploy on the rehearsal host, verify, demonstrate the fallback, print the summary; leaves the service running.

    The options are for ansible-playbook.
    """
    os.environ["PATH"] = f"{PROGRAMS}:{os.environ['PATH']}"
    readings: list[Reading] = []
    inventory = ("--hosts=ansible://ocr_servers", "--ansible-inventory=inventory/rehearsal")
    playbook = ("ansible-playbook", "site.yml", "-i", "inventory/rehearsal")
    seconds = take(
        {
            "install packages": engine.install_packages,
            "find or start a Docker Engine": engine.ensure,
            "build the images, which takes long the first time, and start the mirror": lambda: hosts.mirror_up("vllm"),
            f"start the host {HOST}": lambda: hosts.up(HOST, port=PORT),
            " ".join(playbook): lambda: shell.run(*playbook, *options, cwd=REPOSITORY),
            "pytest verification": lambda: shell.run("pytest", "verification", *inventory, cwd=REPOSITORY),
            "read the sample page, without the server too": lambda: readings.extend(_demonstrate()),
        }
    )
    deploy, verify = seconds[4:6]
    _summarise(readings, {"deploy": deploy, "verify": verify, "all": sum(seconds)})


def take(steps: dict[str, Callable[[], None]]) -> list[float]:
    """Take steps by their titles, say at each how many there are, and return the seconds that they took."""
    seconds = []
    for number, (title, action) in enumerate(steps.items(), 1):
        start = time.monotonic()
        with step(f"step {number} of {len(steps)}: {title}"):
            action()
        seconds.append(time.monotonic() - start)
    return seconds


def _demonstrate() -> list[Reading]:
    os.environ["DOTS_OCR_API_KEY"] = output("docker", "exec", HOST, "cat", "/etc/dots-ocr/api-key")
    readings = [_read("service running", expect="vllm")]
    output("docker", "exec", HOST, "systemctl", "stop", "dots-ocr.service")
    try:
        readings.append(_read("service stopped", expect="tesseract"))
    finally:
        output("docker", "exec", HOST, "systemctl", "start", "dots-ocr.service")
    output("docker", "exec", HOST, "/usr/local/lib/dots-ocr/ready", "dots-ocr", f"--wait={READY_SECONDS}")
    readings.append(_read("service started again", expect="vllm"))
    return readings


def _read(occasion: str, *, expect: str) -> Reading:
    command = ("dots-ocr", "read", str(SAMPLE), "--base-url", API, "--json", "--on-unavailable=fallback")
    document = json.loads(output(*command))
    page = document["pages"][0]
    reason = "; ".join(f"{attempt['engine']}: {attempt['reason']}" for attempt in page["attempts"])
    reading = Reading(occasion, page["engine"], page["model"], page["seconds"], document["text"], reason)
    say(f"    {occasion}: {reading.engine} ({reading.model}) read the page in {reading.seconds:.1f} s")
    if reading.engine != expect:
        raise RehearsalError(f"{occasion}: {expect} should have read the page, but {reading.engine} did. {reason}")
    if expect == "vllm" and _lines(reading.text) != _lines(SAMPLE.with_suffix(".txt").read_text()):
        raise RehearsalError(f"{occasion}: vLLM misread the page:\n{reading.text}")
    return reading


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _summarise(readings: list[Reading], timings: dict[str, float]) -> None:
    stand_in: dict[str, Any] = json.loads(output("docker", "exec", HOST, "cat", "/etc/stand-in-gpu.json"))
    lines = [
        "",
        "The rehearsal is up.",
        f"  running     dots-ocr.service on {HOST}: vLLM {hosts.IMAGE_TAG} (CPU build) in Docker under systemd",
        f"  URL         {API}",
        "  model id    dots.ocr",
        f"  times       deploy {timings['deploy']:.0f} s, verify {timings['verify']:.0f} s, all {timings['all']:.0f} s",
        f"  stand-ins   GPU ({stand_in['gpus'][0]['name']}), NVIDIA's package, weights (a tiny model that reads)",
        "",
    ]
    for reading in readings:
        lines.append(f"  {reading.occasion}: read by {reading.engine} ({reading.model}) in {reading.seconds:.1f} s")
        if reading.reason:
            lines.append(f"    because {reading.reason}")
        lines += [f"    | {line.rstrip()}" for line in reading.text.splitlines()]
    in_host = f"{'sudo ' if 'SUDO_UID' in os.environ else ''}docker --host unix://{SOCKET} exec"
    lines += [
        "",
        f"  API key     export DOTS_OCR_API_KEY=$({in_host} {HOST} cat /etc/dots-ocr/api-key)",
        f"  try it      .venv/bin/dots-ocr read {SAMPLE.relative_to(REPOSITORY)} --base-url {API}",
        "              Its model reads only pages that rehearsal/tiny_model/page.py draws: yours need real weights.",
        f"  look inside {in_host} -it {HOST} bash",
        "  remove it   make rehearse-down",
    ]
    say("\n".join(lines))

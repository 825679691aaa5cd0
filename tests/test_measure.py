"""What vLLM says of its memory when it starts, read from the journal of the current run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.plugin_utils import memory_plan

from tests import programs

FIGURES = json.loads((programs.FILES / "figures.json").read_text())
NAMES = {"weights_gib", "kv_gib", "device", "kv_tokens", "request_tokens", "concurrency", "graphs_gib"}
ANSWERS = "(APIServer pid=1) INFO:     Application startup complete."
UNIT = "InvocationID=now\nActiveEnterTimestamp=Mon 2026-11-30 00:13:00 CET"
PLAN = {
    **{"gpu_memory_utilization": 0.85, "max_model_len": 32768, "max_num_seqs": 16, "max_pixels": 11289600},
    **{"kv_tokens": 153270, "fits": True, "explanation": "..."},
}

ready = programs.load("ready")


def log(version: str) -> str:
    """Return what this vLLM says when it starts."""
    lines = [known["examples"].get(version, "") for known in FIGURES]
    return "\n".join([*dict.fromkeys(line for line in lines if line), ANSWERS])


class Host:
    """A host with one server's settings, and with stubs of systemd and its journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = {
            **{"unit": "dots-ocr.service", "url": "http://127.0.0.1:8000", "model": "dots.ocr", "likeness": 0.9},
            **{
                "api_key_file": "",
                "profile": "native_v0_32",
                "image": {"reference": "vllm:v0.32.0", "pin": "sha256:1"},
            },
            **{"plan": PLAN, "watchdog": {"warm_up": 5400}},
        }
        self.command("systemctl", UNIT)
        self.command("journalctl", "")

    def command(self, name: str, output: str) -> None:
        """Install a program that prints this, and writes down how it was called."""
        (self.folder / f"{name}.output").write_text(output + "\n")
        program = self.folder / name
        program.write_text(f'#!/bin/sh\necho "$@" >{self.folder}/{name}.words\ncat {self.folder}/{name}.output\n')
        program.chmod(0o755)

    def journal(self, *runs: tuple[str, str]) -> None:
        """Fill the journal with what each run said, by its invocation."""
        lines = [{"MESSAGE": line, "_SYSTEMD_INVOCATION_ID": run} for run, text in runs for line in text.splitlines()]
        self.command("journalctl", "\n".join(json.dumps(line) for line in lines))

    def measure(self, **changes: Any) -> dict[str, Any]:
        """Return what there is to record of the server."""
        (self.folder / "dots-ocr.json").write_text(json.dumps(self.settings | changes))
        done = programs.call(
            ready, "dots-ocr", "--measure", f"--settings-folder={self.folder}", PATH=f"{self.folder}:/bin:/usr/bin"
        )
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout).get("measured", {})
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("version", "figures"),
    [
        ("v0.18", {"weights_gib": 5.72, "kv_gib": 3.65, "graphs_gib": 0.31, "kv_tokens": 136592, "concurrency": 1.04}),
        ("v0.32", {"weights_gib": 5.72, "kv_gib": 3.65, "graphs_gib": 0.31, "kv_tokens": 136592, "concurrency": 1.04}),
        ("v0.32 for CPUs", {"device": "CPU", "kv_tokens": 2097152, "request_tokens": 8192, "concurrency": 256.0}),
    ],
)
def test_figures_of_each_vllm_are_read(host: Host, version: str, figures: dict[str, Any]) -> None:
    host.journal(("now", log(version)))
    expected = figures if "device" in figures else {**figures, "device": "GPU", "request_tokens": 131072}
    found = host.measure()
    assert {name: found[name] for name in found.keys() & NAMES} == expected
    assert (found["profile"], found["image"]) == ("native_v0_32", "sha256:1")


def test_every_pattern_matches_its_examples() -> None:
    for known in FIGURES:
        for example in known["examples"].values():
            assert set(ready.read_figures(example)) >= set(ready.re.compile(known["pattern"]).groupindex)


def test_record_belongs_to_the_limits_that_the_plan_knows(host: Host) -> None:
    host.journal(("now", log("v0.32")))
    found = host.measure()
    assert found["planned"] == {key: PLAN[key] for key in memory_plan.MEASURED}
    gpu = {"memory_total_mib": 16303, "memory_free_mib": 15791}
    last = memory_plan.memory_plan(gpu, "bare_metal")
    assert {key: last[key] for key in memory_plan.MEASURED} == found["planned"]


@pytest.mark.parametrize(
    ("tokens", "note"),
    [
        (137943, ""),
        (137942, "The KV cache holds 137,942 tokens, 10 % less than the planned 153,270."),
        (168597, ""),
        (306540, "The KV cache holds 306,540 tokens, 100 % more than the planned 153,270."),
    ],
)
def test_more_than_a_tenth_from_the_plan_is_told_and_learned(host: Host, tokens: int, note: str) -> None:
    host.journal(("now", f"INFO GPU KV cache size: {tokens:,} tokens"))
    found = host.measure()
    assert found["note"] == note
    gpu = {"memory_total_mib": 16303, "memory_free_mib": 15791}
    last = memory_plan.memory_plan(gpu, "bare_metal")
    memory = memory_plan.Memory("bare_metal", *gpu.values())
    assert bool(memory_plan.learn_from(last, found, memory, {}, []).gib) == bool(note)


def test_build_for_cpus_says_nothing_of_the_gpu(host: Host) -> None:
    host.journal(("now", log("v0.32 for CPUs")))
    assert host.measure()["note"] == ""


def test_only_the_run_that_goes_on_counts_and_only_until_it_answers(host: Host) -> None:
    host.journal(
        ("before", "INFO GPU KV cache size: 1,000 tokens"),
        ("now", "INFO Graph capturing finished in 1 secs, took 0.01 GiB"),
        ("now", log("v0.32")),
        ("now", "INFO Received request: 'GPU KV cache size: 2,000 tokens'"),
    )
    found = host.measure()
    # It captures a few graphs for a try before it captures all.
    assert (found["kv_tokens"], found["graphs_gib"]) == (136592, 0.31)
    words = (host.folder / "journalctl.words").read_text()
    assert "--since 2026-11-30 00:13:00 --until 2026-11-30 01:43:00" in words


@pytest.mark.parametrize("unit", ["", "InvocationID=now\nActiveEnterTimestamp=", "InvocationID=other\n" + UNIT[17:]])
def test_journal_that_tells_nothing_leaves_nothing_to_record(host: Host, unit: str) -> None:
    host.command("systemctl", unit)
    host.journal(("now", log("v0.32")))
    assert host.measure() == {}


@pytest.mark.parametrize(
    "text", ["", "INFO Model loading took 5.72 GiB memory and 29.3 seconds", "KV cache size: lots"]
)
def test_without_the_size_of_the_kv_cache_nothing_is_recorded(host: Host, text: str) -> None:
    host.journal(("now", text))
    assert host.measure() == {}


def test_server_that_is_not_there_is_said(host: Host) -> None:
    done = programs.call(ready, "dots-ocr", "--measure", f"--settings-folder={host.folder}")
    assert done.returncode == 1
    assert "servers on this host: none" in done.stdout

"""Which GPU and which plan a server of the role dots_ocr_server gets, by its tasks and templates, through Ansible."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from ansible.template import Templar, trust_as_template

from tests.templating import data_loader

ROLE = Path(__file__).resolve().parent.parent / "roles/dots_ocr_server"
SMALL = {"index": 0, "name": "NVIDIA GeForce RTX 3060", "compute_capability": "8.6"}
CHOSEN = {"index": 1, "name": "NVIDIA GeForce RTX 5070 Ti", "compute_capability": "12.0"}
BROKEN = {"index": 0, "name": "NVIDIA GeForce GT 710", "fault": "memory.total is [N/A]"}


IMAGE = "docker.io/vllm/vllm-openai:v0.32.0"


def role_tasks(file: str) -> list[dict[str, Any]]:
    """Return the tasks of one of the role's files."""
    tasks: list[dict[str, Any]] = data_loader().load_from_file(str(ROLE / "tasks" / file), trusted_as_template=True)
    return tasks


def serve(platform: str, gpus: list[dict[str, Any]], broken: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return the CDI device and the environment of a server on CHOSEN, on a host with these GPUs."""
    loader = data_loader()
    tasks = role_tasks("plan_vllm.yml")
    (task,) = (task for task in tasks if "_dots_ocr_server_instance" in task.get("ansible.builtin.set_fact", {}))
    candidate = {"gpu": CHOSEN, "plan": {}, "adaptations": [], "measured": {}}
    constants = loader.load_from_file(str(ROLE / "vars/main.yml"))
    variables: dict[str, Any] = {
        **task["vars"],
        "item": candidate,
        "index": 0,
        "dots_ocr_server_port": 8000,
        "_dots_ocr_server_fitting": [candidate],
        "_dots_ocr_server_gpu_keys": constants["_dots_ocr_server_gpu_keys"],
        "ansible_facts": {"gpu_host": {"platform": platform, "gpus": gpus, "gpus_broken": broken}},
    }
    instance = task["ansible.builtin.set_fact"]["_dots_ocr_server_instance"]
    server = Templar(loader=loader, variables=variables).template(instance)
    variables = {
        "ansible_managed": "Ansible managed",
        "item": server,
        "_dots_ocr_server_known": {"environment": {}, "environment_from_compute_capability_12": {}},
        "dots_ocr_server_environment": {},
    }
    text = trust_as_template((ROLE / "templates/vllm.env.j2").read_text())
    environment = str(Templar(loader=loader, variables=variables).template(text))
    return server["device"], [line for line in environment.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("platform", "gpus", "broken", "device", "visible"),
    [
        ("bare_metal", [CHOSEN], [], "all", []),
        ("bare_metal", [SMALL, CHOSEN], [], "1", []),
        ("bare_metal", [CHOSEN], [BROKEN], "1", []),
        ("wsl2", [CHOSEN], [], "all", []),
        ("wsl2", [SMALL, CHOSEN], [], "all", ["CUDA_VISIBLE_DEVICES=1"]),
        ("wsl2", [CHOSEN], [BROKEN], "all", ["CUDA_VISIBLE_DEVICES=1"]),
    ],
)
def test_server_gets_the_gpu_that_was_planned(
    platform: str, gpus: list[dict[str, Any]], broken: list[dict[str, Any]], device: str, visible: list[str]
) -> None:
    # CUDA's own order is another than nvidia-smi's, by which was planned.
    expected = (f"nvidia.com/gpu={device}", ["CUDA_DEVICE_ORDER=PCI_BUS_ID", *visible])
    assert serve(platform, gpus, broken) == expected


def plan(recorded: dict[str, Any], proven: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return what is planned for CHOSEN, where so much is recorded of the server that runs on it."""
    loader = data_loader()
    (task,) = (task for task in role_tasks("plan_vllm.yml") if task.get("register") == "_dots_ocr_server_planned")
    constants = loader.load_from_file(str(ROLE / "vars/main.yml"))
    limits = ("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_pixels", "max_num_queued_reqs")
    tags = [{"tag": "v0.32.0", "driver_version": "1.0"}]
    profile = {"tags": tags, "compute_capability": {"oldest": "7.5", "newest": "12.0"}}
    held = recorded["plan"]["gpu_memory_utilization"] * 16303 if "plan" in recorded else 0
    proof = base64.b64encode(json.dumps(proven or recorded).encode()).decode()
    variables: dict[str, Any] = {
        **task["vars"],
        **{f"dots_ocr_server_{limit}": 0 for limit in (*limits, "api_server_count")},
        "dots_ocr_server_adapt": True,
        "dots_ocr_server_extra_args": [],
        "_dots_ocr_server_reference": IMAGE,
        "_dots_ocr_server_profiles": {"native": profile},
        "_dots_ocr_server_profile_order": ["native"],
        "_dots_ocr_server_chosen": {"name": "native", "tag": "v0.32.0"},
        "_dots_ocr_server_gpu_keys": constants["_dots_ocr_server_gpu_keys"],
        "_dots_ocr_server_adapted": {},
        "_dots_ocr_server_recorded": {"dots-ocr": recorded} if recorded else {},
        "_dots_ocr_server_running": ["dots-ocr"] if recorded else [],
        "_dots_ocr_server_proven": {"results": [{"content": proof}] if recorded else []},
        "item": {**CHOSEN, "driver_version": "580.95.05", "memory_total_mib": 16303}
        | {"memory_free_mib": round(15791 - held)},
        "ansible_facts": {"gpu_host": {"platform": "bare_metal"}},
        **changes,
    }
    fact = task["ansible.builtin.set_fact"]["_dots_ocr_server_candidate"]
    found: dict[str, Any] = Templar(loader=loader, variables=variables).template(fact)
    return found


def record(planned: dict[str, Any], kv_tokens: int) -> dict[str, Any]:
    """Return the settings of a server that was planned so, and found room for so many tokens when it started."""
    names = ("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_pixels", "kv_tokens")
    measured = {"device": "GPU", "kv_tokens": kv_tokens, "planned": {name: planned["plan"][name] for name in names}}
    image = {"reference": IMAGE, "pin": "sha256:1"}
    return {
        **{"name": "dots-ocr", "gpu": CHOSEN, "image": image, "plan": planned["plan"]},
        **{"adaptations": [], "extra_args": [], "measured": measured},
    }


def test_next_deployment_plans_with_what_the_card_showed_and_the_one_after_it_with_the_same() -> None:
    first = plan({})
    second = plan(record(first, 100_000))
    assert (first["plan"]["max_num_seqs"], second["plan"]["max_num_seqs"]) == (16, 8)
    assert (first["measured"], second["measured"]) == ({}, {})
    third = plan(record(second, 100_000))
    assert third["plan"] == second["plan"]
    assert third["measured"]["kv_tokens"] == 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"dots_ocr_server_adapt": False},
        {"dots_ocr_server_extra_args": ["--kv-cache-dtype=fp8"]},
        {"_dots_ocr_server_reference": "docker.io/vllm/vllm-openai:v0.33.0"},
        {"gpu": {**CHOSEN, "name": "NVIDIA GeForce RTX 5080"}},
    ],
    ids=str,
)
def test_another_image_card_or_argument_or_a_ban_starts_anew(changes: dict[str, Any]) -> None:
    first = plan({})
    of_another = {name: changes.pop(name) for name in list(changes) if name == "gpu"}
    learned = plan(record(first, 100_000))
    for before in (first, learned):
        found = plan(record(before, 100_000) | of_another, **changes)
        assert found["plan"]["max_num_seqs"] == 16
        assert "learned" not in found["plan"]
        # A ban is on the use, not on the record, which belongs to its limits.
        assert bool(found["measured"]) == ("dots_ocr_server_adapt" in changes and before is first)


def test_settings_of_before_there_were_figures_are_read() -> None:
    first = plan({})
    before = record(first, 100_000)
    del before["measured"], before["extra_args"]
    found = plan(before)
    assert (found["plan"], found["measured"]) == (first["plan"], {})

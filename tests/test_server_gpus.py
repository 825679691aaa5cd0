"""Which GPU a server of the role dots_ocr_server gets, by its task and template, through Ansible's own templating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible.template import Templar, trust_as_template

from tests.templating import data_loader

ROLE = Path(__file__).resolve().parent.parent / "roles/dots_ocr_server"
SMALL = {"index": 0, "name": "NVIDIA GeForce RTX 3060", "compute_capability": "8.6"}
CHOSEN = {"index": 1, "name": "NVIDIA GeForce RTX 5070 Ti", "compute_capability": "12.0"}
BROKEN = {"index": 0, "name": "NVIDIA GeForce GT 710", "fault": "memory.total is [N/A]"}


def serve(platform: str, gpus: list[dict[str, Any]], broken: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return the CDI device and the environment of a server on CHOSEN, on a host with these GPUs."""
    loader = data_loader()
    tasks = loader.load_from_file(str(ROLE / "tasks/plan_vllm.yml"), trusted_as_template=True)
    (task,) = (task for task in tasks if "_dots_ocr_server_instance" in task.get("ansible.builtin.set_fact", {}))
    candidate = {"gpu": CHOSEN, "plan": {}, "adaptations": []}
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

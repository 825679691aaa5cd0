"""Ansible filter gpu_problems: what keeps the GPUs of a measured host from serving the model in one of the images."""

from __future__ import annotations

DOCUMENTATION = r"""
name: gpu_problems
short_description: Judge the GPUs of a host by the images and by the memory plan
version_added: 0.1.0
description:
  - Says whether an image runs on a GPU of this host with its driver, and whether the model fits into the GPU's memory.
    Which image and how much memory is decided by the filters C(image_profile) and C(memory_plan).
  - Says nothing of a host without a GPU that answers; that is the business of the module C(gpu_host).
positional: choices, with_any_driver, plans, profiles, driver_version, wanted
options:
  _input:
    description: The fact C(gpu_host).
    type: dict
    required: true
  choices:
    description: What C(image_profile) chose for each GPU.
    type: list
    elements: dict
    required: true
  with_any_driver:
    description: What it would choose for each if the driver were newer than all.
    type: list
    elements: dict
    required: true
  plans:
    description: What C(memory_plan) plans for each GPU; empty if the memory is not to be judged.
    type: list
    elements: dict
    required: true
  profiles:
    description: Every profile by name, as in roles/dots_ocr_server/profiles.
    type: dict
    required: true
  driver_version:
    description: The oldest driver of an image that is already chosen, such as an air-gap bundle's; else the profile's.
    type: str
    default: ""
  wanted:
    description: Indexes of the GPUs that shall serve; empty for all that answer.
    type: list
    elements: int
    default: []
"""

EXAMPLES = r"""
- name: Name the problems
  ansible.builtin.set_fact:
    problems: >-
      {{ ansible_facts['gpu_host']
         | dots_ocr.deploy.gpu_problems(choices, choices_with_any_driver, plans, profiles) }}
"""

RETURN = r"""
_value:
  description: Every problem, as the module C(gpu_host) returns them.
  type: list
  elements: dict
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

Host = dict[str, Any]
Problem = dict[str, str]


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 580.65.06 for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def oldest(versions: list[str]) -> str:
    """Return the oldest of some versions."""
    return min(versions, key=version)


def gpu_problems(
    host: Host,
    choices: list[Host],
    with_any_driver: list[Host],
    plans: list[Host],
    profiles: dict[str, Host],
    driver_version: str = "",
    wanted: Sequence[int] = (),
) -> list[Problem]:
    """Return every problem with its fix; DOCUMENTATION has the rest."""
    capable = [index for index, choice in enumerate(with_any_driver) if choice["fits"]]
    everything = range(len(choices))
    return [
        *judge_wanted(host, wanted),
        *(judge_image(host, with_any_driver, profiles) if not capable else ()),
        *judge_driver(host, [choices[index] for index in capable], [with_any_driver[index] for index in capable],
                      profiles, driver_version),
        # Of those that an image runs on; if none is, of all, so that both problems are named at once.
        *judge_memory(host, [plans[index] for index in capable or everything] if plans else []),
    ]  # fmt: skip


def judge_wanted(host: Host, wanted: Sequence[int]) -> Iterator[Problem]:
    """Yield the GPUs that are asked for by name but do not answer, while others do."""
    answer = {gpu["index"] for gpu in host["gpus"]}
    faults = {card["index"]: f" ({card['name']}: {card['fault']})" for card in host.get("gpus_broken", ())}
    for index in wanted if answer else ():
        if index not in answer:
            yield {
                "problem": f"dots_ocr_server_gpus asks for GPU {index}, which does not answer{faults.get(index, '')}",
                "fix": f"take it out of dots_ocr_server_gpus (there is {', '.join(map(str, sorted(answer)))}); or"
                " reboot, and look at 'journalctl --dmesg --grep NVRM'",
                "mended_by": "",
            }


def judge_image(host: Host, with_any_driver: list[Host], profiles: dict[str, Host]) -> Iterator[Problem]:
    """Yield that no image has kernels for a GPU, whatever the driver."""
    if not with_any_driver:
        return
    names = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in host["gpus"])
    reason, fix = with_any_driver[0]["problem"], with_any_driver[0]["fix"]
    if "dots_ocr_server_profile" not in fix:  # that would not help: none of them does
        ranges = {name: known["compute_capability"] for name, known in profiles.items() if name in reason}
        reason = ", ".join(f"{name} has {known['oldest']} to {known['newest']}" for name, known in ranges.items())
        bounds = [bound for known in ranges.values() for bound in (known["oldest"], known["newest"])]
        fix = f"use a GPU of compute capability {min(bounds, key=version)} to {max(bounds, key=version)}"
    yield {"problem": f"no image has kernels for the GPU {names}: {reason}", "fix": fix, "mended_by": ""}


def judge_driver(
    host: Host, choices: list[Host], with_any_driver: list[Host], profiles: dict[str, Host], driver_version: str
) -> Iterator[Problem]:
    """Yield that the driver is too old for the image, on whichever GPU it would run."""
    if not choices or (not driver_version and any(choice["fits"] for choice in choices)):
        return
    name, found = with_any_driver[0]["name"], host["gpus"][0]["driver_version"]
    floor = driver_version or oldest([tag["driver_version"] for tag in profiles[name]["tags"]])
    if version(found) < version(floor):
        wsl = host["platform"] in ("wsl1", "wsl2")
        where = "in Windows (never inside WSL)" if wsl else "with the open kernel modules, then reboot"
        yield {
            "problem": f"the NVIDIA driver is {found}, the image {name} needs {floor} or newer",
            "fix": f"install a newer driver, branch 580 or newer, {where}",
            "mended_by": "" if wsl else "nvidia_driver",
        }


def judge_memory(host: Host, plans: list[Host]) -> Iterator[Problem]:
    """Yield that the model fits into no GPU, and who holds its memory."""
    if not plans or any(plan["fits"] for plan in plans):
        return
    holders = [f"{one['name']} (process {one['pid']}) {one['memory_mib']} MiB" for one in host["gpu_processes"]]
    held = f"; memory is held by {', '.join(holders)}" if holders else ""
    for plan in plans:
        yield {"problem": plan["problem"] + held, "fix": plan["fix"], "mended_by": ""}


class FilterModule:
    """The filter's registration."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by its name."""
        return {"gpu_problems": gpu_problems}

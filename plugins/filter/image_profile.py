"""Ansible filter image_profile: choose the family of images, and the tag, that a GPU and its driver can run."""

from __future__ import annotations

DOCUMENTATION = r"""
name: image_profile
short_description: Choose the image profile for a GPU
version_added: 0.1.0
description:
  - Takes the first profile, in the order given, whose range of compute capabilities holds the GPU, and of it the first
    tag whose CUDA the driver is new enough for.
  - Where none suits it returns the reason with its fix instead of failing, so that the caller can report it.
positional: profiles, order, wanted
options:
  _input:
    description: A GPU as the module gpu_host measures it.
    type: dict
    required: true
  profiles:
    description: Every profile by name, as in roles/dots_ocr_server/profiles.
    type: dict
    required: true
  order:
    description: Names of the profiles to try, best first.
    type: list
    elements: str
    required: true
  wanted:
    description: The only profile to try, or C(auto).
    type: str
    default: auto
"""

EXAMPLES = r"""
- name: Choose the image
  ansible.builtin.set_fact:
    chosen: >-
      {{ ansible_facts['gpu_host'].gpus[0]
         | dots_ocr.deploy.image_profile(profiles, ['native_v0_32', 'rednote_v0_9_1']) }}
"""

RETURN = r"""
_value:
  description: C(fits); C(name) and C(tag) of the choice, or C(problem) and C(fix).
  type: dict
"""

import re
from typing import Any

from ansible.errors import AnsibleFilterError


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 580.65.06 for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def refuse(name: str, profile: dict[str, Any], gpu: dict[str, Any]) -> str | None:
    """Return why a profile cannot run on this GPU with this driver, or None."""
    capability = gpu["compute_capability"]
    oldest, newest = profile["compute_capability"]["oldest"], profile["compute_capability"]["newest"]
    if not version(oldest) <= version(capability) <= version(newest):
        return (
            f"{name} has kernels for compute capability {oldest} to {newest} only, the {gpu['name']} has {capability}:"
            " it would end with 'no kernel image is available for execution on the device'"
        )
    floor = min((tag["driver_version"] for tag in profile["tags"]), key=version)
    if version(gpu["driver_version"]) < version(floor):
        return f"{name} needs driver {floor} or newer, this host has {gpu['driver_version']}"
    return None


def image_profile(
    gpu: dict[str, Any], profiles: dict[str, Any], order: list[str], wanted: str = "auto"
) -> dict[str, Any]:
    """Return {"fits": True, "name", "tag"} of the profile to use, or {"fits": False, "problem", "fix"}.

    Raises:
        AnsibleFilterError: `wanted` names no profile.
    """
    if wanted != "auto" and wanted not in profiles:
        raise AnsibleFilterError(f"unknown profile {wanted}; there are: {', '.join(order)}")
    reasons = {}
    for name in order if wanted == "auto" else [wanted]:
        reason = refuse(name, profiles[name], gpu)
        if reason is None:
            fitting = (
                t for t in profiles[name]["tags"] if version(t["driver_version"]) <= version(gpu["driver_version"])
            )
            return {"fits": True, "name": name, "tag": next(fitting)["tag"]}
        reasons[name] = reason
    others = [name for name in order if name not in reasons and refuse(name, profiles[name], gpu) is None]
    fix = (
        f"set dots_ocr_server_profile to {others[0]}, or leave it at auto"
        if others
        else "install NVIDIA driver 580 or newer, or use a GPU of compute capability 7.5 to 12.0"
    )
    return {"fits": False, "problem": "; ".join(reasons.values()), "fix": fix}


class FilterModule:
    """The filter's registration."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by its name."""
        return {"image_profile": image_profile}

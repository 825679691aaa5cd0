"""Ansible filter server_plan: what a host runs, chosen from what is measured, installed and wished for."""

from __future__ import annotations

DOCUMENTATION = r"""
name: server_plan
short_description: Plan the servers of a host
version_added: 0.1.0
description:
  - Takes the first profile, in the order given, whose range of compute capabilities holds a GPU, and of it the first
    tag whose CUDA the driver is new enough for; plans the memory of each GPU; and
    defines a server for each GPU that the model fits into.
  - Returns what keeps the host from that instead of failing, so that the caller can report it. Says nothing of a host
    without a GPU that answers; that is the business of the module C(gpu_host). The image is then what a GPU that fits
    would get.
positional: profiles, known, wanted, installed
options:
  _input:
    description: The fact C(gpu_host).
    type: dict
    required: true
  profiles:
    description: Every profile by name, as in roles/dots_ocr_server/profiles.
    type: dict
    required: true
  known:
    description:
      - C(order), the names of the profiles to try, best first; C(advisories), what is known of vLLM, as in
        roles/dots_ocr_server/advisories.yml; C(pins), the digests of tags, as in files/pins.json.
    type: dict
    required: true
  wanted:
    description:
      - The options of the role C(dots_ocr_server) without their prefix, C(limits) being those of the memory plan, and
        C(driver_version), the oldest driver of an image that is already chosen.
    type: dict
    required: true
  installed:
    description:
      - C(recorded), the settings of each server by name; C(running), the names of those that run; C(proven), the
        settings that were proven to read; C(adapted), what this deployment found to help each GPU, by its index;
        C(stopped), whether their owner has stopped the servers, who then counts on it that they get their memory back.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Plan
  ansible.builtin.set_fact:
    plan: "{{ ansible_facts['gpu_host'] | dots_ocr.deploy.server_plan(profiles, known, wanted) }}"
"""

RETURN = r"""
_value:
  description: The fact C(dots_ocr_server_plan), as the role C(dots_ocr_server) describes it.
  type: dict
"""

import ipaddress
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from packaging.version import Version

from ..module_utils.cards import Problem, trouble, version
from ..plugin_utils.memory_plan import RESERVE_MIB, memory_plan

Data = dict[str, Any]

GPU_KEYS = ("index", "name", "compute_capability")  # what is recorded of one
NEWEST_DRIVER = "9999"


def refuse(name: str, profile: Data, gpu: Data) -> str | None:
    """Return why a profile cannot run on this GPU with this driver, or None."""
    capability = gpu["compute_capability"]
    oldest, newest = profile["compute_capability"]["oldest"], profile["compute_capability"]["newest"]
    if not version(oldest) <= version(capability) <= version(newest):
        return (
            f"{name} has kernels for compute capability {oldest} to {newest} only, the {gpu['name']} has {capability}:"
            " it would end with 'no kernel image is available for execution on the device'"
        )
    floor = oldest_driver(profile)
    if version(gpu["driver_version"]) < version(floor):
        return f"{name} needs driver {floor} or newer, this host has {gpu['driver_version']}"
    return None


def oldest_driver(profile: Data) -> str:
    """Return the oldest driver that one of the profile's images runs with."""
    return str(min((tag["driver_version"] for tag in profile["tags"]), key=version))


def choose(gpu: Data, profiles: Mapping[str, Data], order: Sequence[str], wanted: str = "auto") -> Data:
    """Return {"fits": True, "name", "tag"} of the profile for a GPU, or {"fits": False, "problem", "fix"}."""
    if wanted != "auto" and wanted not in profiles:
        raise AnsibleFilterError(f"unknown profile {wanted}; there are: {', '.join(order)}")
    reasons = {}
    for name in order if wanted == "auto" else [wanted]:
        reason = refuse(name, profiles[name], gpu)
        if reason is None:
            driver = version(gpu["driver_version"])
            tags = (tag["tag"] for tag in profiles[name]["tags"] if version(tag["driver_version"]) <= driver)
            return {"fits": True, "name": name, "tag": next(tags)}
        reasons[name] = reason
    others = [name for name in order if name not in reasons and refuse(name, profiles[name], gpu) is None]
    fix = (
        f"set dots_ocr_server_profile to {others[0]}, or leave it at auto"
        if others
        else "install NVIDIA driver 580 or newer, or use a GPU of compute capability 7.5 to 12.0"
    )
    return {"fits": False, "problem": "; ".join(reasons.values()), "fix": fix}


def server_plan(
    host: Data, profiles: Mapping[str, Data], known: Data, wanted: Data, installed: Data | None = None
) -> Data:
    """Return the plan of a host; DOCUMENTATION has the rest."""
    asked_for = [int(index) for index in wanted["gpus"]]
    gpus = [gpu for gpu in host["gpus"] if not asked_for or gpu["index"] in asked_for]
    of_driver = (profiles, known["order"], wanted["profile"])
    choices = [choose(gpu, *of_driver) for gpu in gpus]
    newest = [{**gpu, "driver_version": NEWEST_DRIVER} for gpu in gpus]  # as if their driver were newer than all
    capable = [choose(gpu, *of_driver) for gpu in newest]
    # For a GPU and a driver that nobody has seen yet.
    name = known["order"][0] if wanted["profile"] == "auto" else wanted["profile"]
    unseen = {"fits": True, "name": name, "tag": profiles[name]["tags"][0]["tag"]}
    chosen = next((choice for choice in (*choices, *capable) if choice["fits"]), unseen)
    image = name_image(chosen, profiles[chosen["name"]], known["pins"], wanted)
    # If no image runs on any, the memory of all is judged, so that both problems are named at once.
    unfit = {}
    if any(choice["fits"] for choice in capable):
        of_chosen = {gpu["index"]: choose(gpu, *of_driver[:2], chosen["name"]) for gpu in newest}
        unfit = {index: choice for index, choice in of_chosen.items() if not choice["fits"]}
    plans = [
        plan_gpu(gpu, host["platform"], image, wanted, installed or {}) for gpu in gpus if gpu["index"] not in unfit
    ]
    # A driver that is to come changes the image, not whether the model fits.
    ready = {gpu["index"] for gpu in gpus if not refuse(chosen["name"], profiles[chosen["name"]], gpu)}
    fitting = [one for one in plans if one["plan"]["fits"] and one["gpu"]["index"] in ready]
    return {
        "engine": wanted["engine"],
        "platform": host["platform"],
        "address": wanted["address"],
        "port": int(wanted["port"]),
        "image": image,
        "gpus": [
            *plans,
            *({"gpu": describe(gpu), "plan": unfit[gpu["index"]]} for gpu in gpus if gpu["index"] in unfit),
        ],
        "metrics": {name: dict(profile["metrics"]) for name, profile in profiles.items()},
        "servers": [define(one, index, host, fitting, int(wanted["port"])) for index, one in enumerate(fitting)],
        "problems": [
            *judge_wanted(host, asked_for),
            *judge_image(gpus, capable, profiles),
            *(trouble(choice["problem"], choice["fix"]) for choice in unfit.values() if asked_for),
            *judge_driver(host, choices, capable, profiles, wanted["driver_version"]),
            *judge_memory(host, plans, bool(asked_for)),
            *(judge_key(image, profiles[image["profile"]], known["advisories"], wanted) if gpus else ()),
        ],
    }


def describe(gpu: Data) -> Data:
    """Return what is recorded of a GPU."""
    return {key: gpu[key] for key in GPU_KEYS}


def name_image(chosen: Data, profile: Data, pins: Mapping[str, Data], wanted: Data) -> Data:
    """Return the image of a choice under all of its names, and the oldest driver that it runs with."""
    name, tag = wanted["image"] or profile["image"], wanted["image_tag"] or chosen["tag"]
    repository = f"{wanted['registry']}/{name}"
    # An archive has no digest of a registry.
    pinned = "" if wanted["image_archive"] else pins.get(f"{repository}:{tag}", {}).get("digest", "")
    digest = wanted["image_digest"] or pinned
    drivers = {one["tag"]: one["driver_version"] for one in profile["tags"]}
    return {
        "profile": chosen["name"],
        "registry": wanted["registry"],
        "name": name,
        "tag": tag,
        "repository": repository,
        "digest": digest,
        "reference": f"{repository}@{digest}" if digest else f"{repository}:{tag}",
        "driver_version": drivers.get(tag, profile["tags"][0]["driver_version"]),
    }


def plan_gpu(gpu: Data, platform: str, image: Data, wanted: Data, installed: Data) -> Data:
    """Return a GPU with the plan of its memory, what helped it to start before, and what it showed then."""
    what = describe(gpu)
    recorded = installed.get("recorded", {}).values()
    before = next((one for one in recorded if one.get("gpu", {}).get("index") == gpu["index"]), {})
    # What vLLM showed with another image, card or arguments says nothing of these.
    same = (
        before.get("image", {}).get("reference") == image["reference"]
        and before.get("gpu") == what
        and before.get("extra_args", []) == wanted["extra_args"]
    )
    measured = before.get("measured", {}) if same else {}
    # With another image or card none may be needed.
    kept = next(
        (
            one.get("adaptations", [])
            for one in installed.get("proven", [])
            if one.get("gpu") == what and one["image"]["reference"] == image["reference"]
        ),
        [],
    )
    memory = "wsl2" if platform.startswith("wsl") else "bare_metal"
    asleep = "on_demand" in before and before["name"] not in installed.get("running", [])
    if installed.get("stopped") or asleep:
        # Whoever has the memory now, such as a game, has it only until the server is started.
        total = gpu["memory_total_mib"]
        planned = math.ceil(before.get("plan", {}).get("gpu_memory_utilization", 0) * total) + RESERVE_MIB[memory]
        gpu = {**gpu, "memory_free_mib": max(gpu["memory_free_mib"], min(planned, total))}
    new = installed.get("adapted", {}).get(str(gpu["index"]), [])
    adaptations = [*kept, *(one for one in new if one not in kept)]
    plan = memory_plan(
        gpu,
        memory,
        wanted["limits"],
        before.get("plan", {}),
        before.get("name", "") in installed.get("running", []),
        [lowered for one in adaptations if (lowered := one["remedy"].get("plan"))],
        measured,
        same and wanted["adapt"],
    )
    # Of other limits it says nothing.
    still = {**plan, **measured.get("planned", {})} == plan
    return {"gpu": what, "plan": plan, "adaptations": adaptations, "measured": measured if still else {}}


def define(one: Data, index: int, host: Data, fitting: Sequence[Data], port: int) -> Data:
    """Return the server of a GPU, one of those that the model fits into."""
    number = one["gpu"]["index"]
    name = "dots-ocr" if len(fitting) == 1 else f"dots-ocr@{number}"
    # A broken one is in the container too if all are.
    cards = len(host["gpus"]) + len(host.get("gpus_broken", ()))
    # WSL2 has one CDI device for all of its GPUs.
    whole = host["platform"] == "wsl2" or cards == 1
    return {
        "name": name,
        "unit": f"{name}.service",
        "container": name.replace("@", "-"),
        "device": f"nvidia.com/gpu={'all' if whole else number}",
        "visible_devices": str(number) if whole and cards > 1 else "",
        "port": port + index,
        **one,
    }


def judge_wanted(host: Data, asked_for: Sequence[int]) -> Iterator[Problem]:
    """Yield the GPUs that are asked for by name but do not answer, while others do."""
    answer = {gpu["index"] for gpu in host["gpus"]}
    faults = {card["index"]: f" ({card['name']}: {card['fault']})" for card in host.get("gpus_broken", ())}
    for index in asked_for if answer else ():
        if index not in answer:
            yield trouble(
                f"dots_ocr_server_gpus asks for GPU {index}, which does not answer{faults.get(index, '')}",
                f"take it out of dots_ocr_server_gpus (there is {', '.join(map(str, sorted(answer)))}); or"
                " reboot, and look at 'journalctl --dmesg --grep NVRM'",
            )


def judge_image(gpus: Sequence[Data], capable: Sequence[Data], profiles: Mapping[str, Data]) -> Iterator[Problem]:
    """Yield that no image has kernels for a GPU, whatever the driver."""
    if not gpus or any(choice["fits"] for choice in capable):
        return
    names = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in gpus)
    reason, fix = capable[0]["problem"], capable[0]["fix"]
    if "dots_ocr_server_profile" not in fix:  # that would not help: none of them does
        ranges = {name: one["compute_capability"] for name, one in profiles.items() if name in reason}
        reason = ", ".join(f"{name} has {one['oldest']} to {one['newest']}" for name, one in ranges.items())
        bounds = [bound for one in ranges.values() for bound in (one["oldest"], one["newest"])]
        fix = f"use a GPU of compute capability {min(bounds, key=version)} to {max(bounds, key=version)}"
    yield trouble(f"no image has kernels for the GPU {names}: {reason}", fix)


def judge_driver(
    host: Data, choices: Sequence[Data], capable: Sequence[Data], profiles: Mapping[str, Data], driver_version: str
) -> Iterator[Problem]:
    """Yield that the driver is too old for the image, on whichever GPU it would run."""
    names = [choice["name"] for choice in capable if choice["fits"]]
    if not names or (not driver_version and any(choice["fits"] for choice in choices)):
        return
    found, floor = host["gpus"][0]["driver_version"], driver_version or oldest_driver(profiles[names[0]])
    if version(found) < version(floor):
        wsl = host["platform"] in ("wsl1", "wsl2")
        where = "in Windows (never inside WSL)" if wsl else "with the open kernel modules, then reboot"
        yield trouble(
            f"the NVIDIA driver is {found}, the image {names[0]} needs {floor} or newer",
            f"install a newer driver, branch 580 or newer, {where}",
            "" if wsl else "nvidia_driver",
        )


def judge_memory(host: Data, plans: Sequence[Data], all_of_them: bool) -> Iterator[Problem]:
    """Yield that the model fits into no GPU, or not into each that is asked for, and who holds its memory."""
    refused = [one for one in plans if not one["plan"]["fits"]]
    if len(refused) < len(plans) and not (all_of_them and refused):
        return
    holders = [f"{one['name']} (process {one['pid']}) {one['memory_mib']} MiB" for one in host.get("gpu_processes", ())]
    held = f"; memory is held by {', '.join(holders)}" if holders else ""
    for one in refused:
        what = f"the model does not fit into GPU {one['gpu']['index']}: {one['plan']['problem']}{held}"
        yield trouble(what, one["plan"]["fix"])


def vllm_of(profile: Data, image: str, tag: str) -> Version:
    """Return the version of vLLM in an image: what its tag says, else the profile's."""
    own = Version(profile["vllm"])
    found = re.search(r"\d+(?:\.\d+)+(?:\.?(?:rc|post|dev)\d+)?", tag)
    if not found:
        return own
    told = Version(found[0])
    # The tags of an image of another name may count something else.
    return min(told, own) if image not in ("", profile["image"]) else told


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches an address; a name is not looked up, other than localhost."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def judge_key(image: Data, profile: Data, advisories: Sequence[Data], wanted: Data) -> Iterator[Problem]:
    """Yield that an API key that can be bypassed would guard an address that others reach."""
    # A digest says nothing of the version; what the profile says counts then.
    vllm = vllm_of(profile, wanted["image"], "" if wanted["image_digest"] else wanted["image_tag"])
    open_doors = [
        one for one in advisories if one["bypasses_key"] and Version(one["since"]) <= vllm < Version(one["fixed"])
    ]
    if open_doors and not is_loopback(wanted["address"]):
        doors = ", ".join(f"{one['id']}: {one['what']}" for one in open_doors)
        floor = max((one["fixed"] for one in open_doors), key=Version)
        yield trouble(
            f"The API key of {image['profile']} (vLLM {vllm}) can be bypassed ({doors}), so its API must not listen at"
            f" {wanted['address']}, which dots_ocr_server_address asks for",
            f"use an image with vLLM {floor} or newer (dots_ocr_server_profile native_v0_32, with driver 575.57.08"
            " or newer), or leave dots_ocr_server_address at 127.0.0.1 and let a gateway on this host check the keys",
        )


class FilterModule:
    """The filter's registration."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by its name."""
        return {"server_plan": server_plan}

"""What is known of NVIDIA's cards by their ids and compute capabilities."""

from __future__ import annotations

import re
from typing import Any

Problem = dict[str, str]

# NVIDIA's device ids grow with the generations (general knowledge): the open modules drive Turing and newer alone, and
# Blackwell is driven by the open modules alone.
OLDEST_OPEN = 0x1E00
OLDEST_BLACKWELL = 0x2900
BLACKWELL_CAPABILITY = (10,)
OLDEST_CAPABILITY = (7, 5)  # Turing: of any image (roles/dots_ocr_server/profiles) and of the open modules


def trouble(problem: str, fix: str, mended_by: str = "") -> Problem:
    """Return a problem with its fix, and the role that deals with it."""
    return {"problem": problem, "fix": fix, "mended_by": mended_by}


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as 580.65.06 for comparison."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def is_blackwell(host: dict[str, Any]) -> bool:
    """Tell whether a GPU is of the Blackwell generation or newer, also where no driver says so."""
    return any(version(gpu.get("compute_capability", "")) >= BLACKWELL_CAPABILITY for gpu in host["gpus"]) or any(
        int(device, 16) >= OLDEST_BLACKWELL for device in host["nvidia_pci_ids"]
    )


def needs_open_modules(host: dict[str, Any]) -> bool:
    """Tell whether only the open modules will do: for Blackwell, unless a GPU answers that the others drive, too.

    Such a GPU is one that an image may run on: Turing to Ada.
    """
    capabilities = [version(gpu.get("compute_capability", "")) for gpu in host["gpus"]]
    older = any(OLDEST_CAPABILITY <= capability < BLACKWELL_CAPABILITY for capability in capabilities)
    return is_blackwell(host) and not older


def why_none(host: dict[str, Any]) -> tuple[str, str] | None:
    """Return why a machine has no NVIDIA GPU that a driver could have, and the fix; nothing if it has one."""
    if host["nvidia_pci_devices"] or host["gpus"]:
        return None
    if not (reserved := host.get("nvidia_pci_reserved")):
        return "there is no NVIDIA GPU in this machine", "choose a machine that has one"
    return (
        f"the NVIDIA GPU at {reserved[0]['address']} is kept for a virtual machine by {reserved[0]['driver']}",
        "deploy to that virtual machine; or give the card back (no such driver in /etc/modprobe.d and on the kernel's"
        " command line, update-initramfs -u) and reboot",
    )

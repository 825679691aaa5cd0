"""Ansible filter key_bypass: whether a server would be published with an API key that can be bypassed."""

from __future__ import annotations

DOCUMENTATION = r"""
name: key_bypass
short_description: Refuse an address for an image whose API key can be bypassed
version_added: 0.1.0
description:
  - Takes an image profile and says what is wrong with publishing it at an address. Nothing is at a loopback address,
    and nothing if no known fault of its vLLM lets requests in without the key.
  - A tag that is given instead of the profile's decides which vLLM it is, if it holds a version. For an image of
    another name, whose tags may count something else, the older of both counts.
positional: name, advisories, address, image, tag
options:
  _input:
    description: Every profile by name, as in roles/dots_ocr_server/profiles.
    type: dict
    required: true
  name:
    description: The profile that is chosen.
    type: str
    required: true
  advisories:
    description: What is known of vLLM, as in roles/dots_ocr_server/advisories.yml.
    type: list
    elements: dict
    required: true
  address:
    description: Where the API shall listen.
    type: str
    required: true
  image:
    description: Name of the image instead of the profile's.
    type: str
    default: ""
  tag:
    description: Tag of the image instead of the profile's.
    type: str
    default: ""
"""

EXAMPLES = r"""
- name: Judge the address
  ansible.builtin.set_fact:
    found: "{{ profiles | dots_ocr.deploy.key_bypass('native_v0_18', advisories, '0.0.0.0') }}"
"""

RETURN = r"""
_value:
  description: C(problem) and C(fix), or nothing if nothing is wrong.
  type: dict
"""

import ipaddress
import re
from typing import Any

from packaging.version import Version


def vllm_of(profile: dict[str, Any], image: str, tag: str) -> Version:
    """Return the version of vLLM in an image: what its tag says, else the profile's."""
    own = Version(profile["vllm"])
    found = re.search(r"\d+(?:\.\d+)+(?:\.?(?:rc|post|dev)\d+)?", tag)
    if not found:
        return own
    told = Version(found[0])
    return min(told, own) if image not in ("", profile["image"]) else told


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches an address; a name is not looked up, other than localhost."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def key_bypass(
    profiles: dict[str, Any], name: str, advisories: list[dict[str, Any]], address: str, image: str = "", tag: str = ""
) -> dict[str, str]:
    """Return {"problem", "fix"}, or {} if nothing is wrong; DOCUMENTATION has the rest."""
    version = vllm_of(profiles[name], image, tag)
    open_doors = [
        one for one in advisories if one["bypasses_key"] and Version(one["since"]) <= version < Version(one["fixed"])
    ]
    if not open_doors or is_loopback(address):
        return {}
    doors = ", ".join(f"{one['id']}: {one['what']}" for one in open_doors)
    floor = max((one["fixed"] for one in open_doors), key=Version)
    return {
        "problem": f"The API key of {name} (vLLM {version}) can be bypassed ({doors}), so its API must not listen at"
        f" {address}, which dots_ocr_server_address asks for",
        "fix": f"use an image with vLLM {floor} or newer (dots_ocr_server_profile native_v0_32, with driver 575.57.08"
        " or newer), or leave dots_ocr_server_address at 127.0.0.1 and let a gateway on this host check the keys",
    }


class FilterModule:
    """The filter's registration."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by its name."""
        return {"key_bypass": key_bypass}

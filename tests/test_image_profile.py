"""The filter image_profile, with the profiles that the role really has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError

REPOSITORY = Path(__file__).resolve().parent.parent
ROLE = REPOSITORY / "roles/dots_ocr_server"
spec = importlib.util.spec_from_file_location("image_profile", REPOSITORY / "plugins/filter/image_profile.py")
assert spec
assert spec.loader
plugin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)

PROFILES: dict[str, Any] = {}
for file in sorted((ROLE / "profiles").glob("*.yml")):
    PROFILES.update(yaml.safe_load(file.read_text()))
ORDER: list[str] = yaml.safe_load((ROLE / "vars/main.yml").read_text())["_dots_ocr_server_profile_order"]


def choose(capability: str, driver: str, wanted: str = "auto") -> dict[str, Any]:
    gpu = {"name": "card", "compute_capability": capability, "driver_version": driver}
    chosen: dict[str, Any] = plugin.image_profile(gpu, PROFILES, ORDER, wanted)
    return chosen


def test_every_profile_is_in_the_order_once() -> None:
    assert sorted(ORDER) == sorted(PROFILES)


def test_preflight_asks_in_the_same_order() -> None:
    file = REPOSITORY / "roles/preflight/vars/main.yml"
    assert yaml.safe_load(file.read_text())["_preflight_profile_order"] == ORDER


def test_files_are_named_after_their_profile() -> None:
    for file in (ROLE / "profiles").glob("*.yml"):
        assert list(yaml.safe_load(file.read_text())) == [file.stem]


@pytest.mark.parametrize(
    ("capability", "driver", "name", "tag"),
    [
        ("12.0", "580.173.02", "native_v0_32", "v0.32.0"),
        ("12.0", "596.21", "native_v0_32", "v0.32.0"),  # as Windows drivers are numbered
        ("12.0", "575.64.03", "native_v0_32", "v0.32.0-cu129"),
        ("8.9", "575.64.03", "native_v0_32", "v0.32.0-cu129"),
        ("8.9", "570.133.07", "rednote_v0_9_1", "vllm-openai-v0.9.1"),
    ],
)
def test_best_image_for_gpu_and_driver(capability: str, driver: str, name: str, tag: str) -> None:
    assert choose(capability, driver) == {"fits": True, "name": name, "tag": tag}


def test_conservative_profile_comes_on_request_only() -> None:
    assert choose("12.0", "575.64.03", "native_v0_18") == {"fits": True, "name": "native_v0_18", "tag": "v0.18.1"}


def test_seed_image_is_refused_on_blackwell_with_reason_and_alternative() -> None:
    refused = choose("12.0", "580.173.02", "rednote_v0_9_1")
    assert "kernels for compute capability 8.0 to 9.0 only, the card has 12.0" in refused["problem"]
    assert "no kernel image is available" in refused["problem"]
    assert refused["cure"] == "set dots_ocr_server_profile to native_v0_32, or leave it at auto"


def test_driver_too_old_for_every_image() -> None:
    refused = choose("12.0", "570.133.07")
    assert "native_v0_32 needs driver 575.57.08 or newer, this host has 570.133.07" in refused["problem"]
    assert "rednote_v0_9_1 has kernels for compute capability 8.0 to 9.0 only" in refused["problem"]
    assert "driver 580 or newer" in refused["cure"]


def test_gpu_newer_than_every_image_is_refused() -> None:
    assert "the card has 13.0" in choose("13.0", "650.1")["problem"]


def test_unknown_profile_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="unknown profile native; there are: native_v0_32"):
        choose("12.0", "580.173.02", "native")

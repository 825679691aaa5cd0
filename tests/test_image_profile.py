"""The filters image_profile and key_bypass, with the profiles and advisories that the role really has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible.template import Templar
from packaging.version import Version

from tests.templating import data_loader

REPOSITORY = Path(__file__).resolve().parent.parent
ROLE = REPOSITORY / "roles/dots_ocr_server"


def load_plugin(name: str) -> Any:
    """Return the module of a filter."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"plugins/filter/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plugin, key_bypass = map(load_plugin, ("image_profile", "key_bypass"))

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
    assert refused["fix"] == "set dots_ocr_server_profile to native_v0_32, or leave it at auto"


def test_driver_too_old_for_every_image() -> None:
    refused = choose("12.0", "570.133.07")
    assert "native_v0_32 needs driver 575.57.08 or newer, this host has 570.133.07" in refused["problem"]
    assert "rednote_v0_9_1 has kernels for compute capability 8.0 to 9.0 only" in refused["problem"]
    assert "driver 580 or newer" in refused["fix"]


def test_gpu_newer_than_every_image_is_refused() -> None:
    assert "the card has 13.0" in choose("13.0", "650.1")["problem"]


def test_unknown_profile_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="unknown profile native; there are: native_v0_32"):
        choose("12.0", "580.173.02", "native")


ADVISORIES: list[dict[str, Any]] = yaml.safe_load((ROLE / "advisories.yml").read_text())


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.53", "::1", "[::1]", "localhost"])
@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_profile_may_answer_on_loopback(name: str, address: str) -> None:
    assert key_bypass.key_bypass(PROFILES, name, ADVISORIES, address) == {}


@pytest.mark.parametrize("address", [
    "0.0.0.0", "::", "[::]", "192.168.1.20", "fd00::1", "ocr.example.org", "127.example.org", "localhost.org", "",
])  # fmt: skip
@pytest.mark.parametrize(("name", "version"), [("native_v0_18", "0.18.1"), ("rednote_v0_9_1", "0.9.1")])
def test_key_that_can_be_bypassed_is_published_nowhere(name: str, version: str, address: str) -> None:
    found = key_bypass.key_bypass(PROFILES, name, ADVISORIES, address)
    assert f"The API key of {name} (vLLM {version}) can be bypassed (CVE-2026-48746: " in found["problem"]
    assert f"must not listen at {address}" in found["problem"]
    assert "vLLM 0.22.0 or newer" in found["fix"]
    assert key_bypass.key_bypass(PROFILES, "native_v0_32", ADVISORIES, address) == {}


@pytest.mark.parametrize(("name", "image", "tag", "refused"), [
    ("native_v0_32", "", "v0.21.0", True),
    ("native_v0_32", "", "v0.22.0rc1", True),
    ("native_v0_32", "", "v0.22.0", False),
    ("native_v0_32", "", "v0.32.0-cu129", False),
    ("native_v0_32", "", "nightly", False),
    ("native_v0_18", "", "v0.22.1", False),
    ("native_v0_18", "", "nightly", True),
    ("native_v0_32", "mirror/vllm-openai", "v0.18.1", True),
    # Their own counting of releases says nothing of vLLM.
    ("native_v0_18", "mirror/ocr", "v7.1", True),
    ("native_v0_32", "mirror/ocr", "v7.1", False),
])  # fmt: skip
def test_tag_tells_which_vllm_it_is(name: str, image: str, tag: str, refused: bool) -> None:
    assert bool(key_bypass.key_bypass(PROFILES, name, ADVISORIES, "0.0.0.0", image, tag)) is refused


def test_advisories_are_whole() -> None:
    """Without `fixed` nobody would know the way out, and a floor below its start would never apply."""
    assert len({one["id"] for one in ADVISORIES}) == len(ADVISORIES)
    for one in ADVISORIES:
        assert set(one) == {"id", "what", "since", "fixed", "bypasses_key"}
        assert re.fullmatch(r"CVE-\d{4}-\d{4,}", one["id"])
        assert Version(one["since"]) < Version(one["fixed"])


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"dots_ocr_server_address": "0.0.0.0"}, True),
        ({"dots_ocr_server_address": "127.0.0.1"}, False),
        ({"dots_ocr_server_address": "0.0.0.0", "dots_ocr_server_image_tag": "v0.22.0"}, False),
        # A tag beside a digest is not what runs.
        (
            {
                "dots_ocr_server_address": "0.0.0.0",
                "dots_ocr_server_image_tag": "v0.22.0",
                "dots_ocr_server_image_digest": "sha256:0",
            },
            True,
        ),
    ],
)
def test_both_roles_refuse_it_before_anything_is_pulled(settings: dict[str, str], refused: bool) -> None:
    gpu = {"index": 0, "name": "card", "compute_capability": "8.9", "driver_version": "575.64.03"}
    loader = data_loader()
    known: dict[str, Any] = {
        **loader.load_from_file(str(ROLE / "defaults/main.yml"), trusted_as_template=True),
        **{
            "_dots_ocr_server_profiles": PROFILES,
            "_preflight_profiles": PROFILES,
            "ansible_facts": {"gpu_host": {"gpus": [gpu]}},
        },
        "_dots_ocr_server_chosen": choose("8.9", "575.64.03", "native_v0_18"),
        **settings,
        "dots_ocr_server_profile": "native_v0_18",
    }
    for role in ("dots_ocr_server", "preflight"):
        folder = REPOSITORY / "roles" / role
        known |= {"role_path": str(folder)}
        known |= loader.load_from_file(str(folder / "vars/main.yml"), trusted_as_template=True)
        if role == "preflight":
            templar = Templar(loader=loader, variables=known)
            assert bool(templar.template(known["_preflight_bypass"])) is refused
            continue
        tasks = loader.load_from_file(str(folder / "tasks/validate_vllm.yml"), trusted_as_template=True)
        (task,) = (task for task in tasks if "key_bypass" in str(task.get("vars")))
        templar = Templar(loader=loader, variables={**known, **task["vars"]})
        assert templar.evaluate_conditional(task["ansible.builtin.assert"]["that"]) is not refused
        said = templar.template(task["ansible.builtin.assert"]["fail_msg"])
        assert ("must not listen at 0.0.0.0" in said and "Fix: use an image with vLLM 0.22.0" in said) is refused

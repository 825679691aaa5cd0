"""The filter server_plan, with the profiles and advisories of the role: image, memory, servers, problems."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible.template import Templar, trust_as_template
from ansible_collections.dots_ocr.deploy.plugins.filter import server_plan as plugin
from packaging.version import Version

from tests.templating import data_loader

ROLE = Path(__file__).resolve().parents[4] / "roles/dots_ocr_server"
CONSTANTS = yaml.safe_load((ROLE / "vars/main.yml").read_text())
ORDER: list[str] = CONSTANTS["_dots_ocr_server_data"]["order"]
ADVISORIES: list[dict[str, Any]] = yaml.safe_load((ROLE / "advisories.yml").read_text())
PROFILES: dict[str, Any] = {}
for file in sorted((ROLE / "profiles").glob("*.yml")):
    PROFILES.update(yaml.safe_load(file.read_text()))
WANTED: dict[str, Any] = {
    **{"engine": "vllm", "profile": "auto", "gpus": [], "address": "127.0.0.1", "port": 8000},
    **{"registry": "docker.io", "image": "", "image_tag": "", "image_digest": "", "image_archive": ""},
    **{"driver_version": "", "adapt": True, "extra_args": [], "limits": {}},
}
IMAGE = "docker.io/vllm/vllm-openai:v0.32.0"


def gpu(**changes: Any) -> dict[str, Any]:
    """Return a desktop card, with changes."""
    return {
        "index": 0,
        "name": "NVIDIA GeForce RTX 5070 Ti",
        "memory_total_mib": 16303,
        "memory_free_mib": 15791,
        "compute_capability": "12.0",
        "driver_version": "580.173.02",
        **changes,
    }


OLD = gpu(name="Quadro P4000", compute_capability="6.1", memory_total_mib=24576, memory_free_mib=24000)
SMALL = gpu(index=1, memory_total_mib=6144, memory_free_mib=6000)
HOLDER = {"pid": 4711, "name": "python3", "memory_mib": 11000}
LOST = {"index": 1, "name": "NVIDIA GeForce RTX 3060", "fault": "memory.total is [GPU is lost]"}


def plan(
    *gpus: dict[str, Any],
    platform: str = "bare_metal",
    host: dict[str, Any] | None = None,
    installed: dict[str, Any] | None = None,
    pins: dict[str, Any] | None = None,
    **wanted: Any,
) -> dict[str, Any]:
    """Return the plan of a host with these GPUs."""
    known = {"order": ORDER, "advisories": ADVISORIES, "pins": pins or {}}
    measured = {"platform": platform, "gpus": list(gpus), "gpu_processes": [], **(host or {})}
    found: dict[str, Any] = plugin.server_plan(measured, PROFILES, known, {**WANTED, **wanted}, installed)
    return found


def problems(*gpus: dict[str, Any], **arguments: Any) -> list[dict[str, str]]:
    """Return the problems of that plan."""
    found: list[dict[str, str]] = plan(*gpus, **arguments)["problems"]
    return found


def choose(capability: str, driver: str, wanted: str = "auto") -> dict[str, Any]:
    """Return the choice of the image for a GPU."""
    one = {"name": "card", "compute_capability": capability, "driver_version": driver}
    chosen: dict[str, Any] = plugin.choose(one, PROFILES, ORDER, wanted)
    return chosen


def test_every_profile_is_in_the_order_once() -> None:
    assert sorted(ORDER) == sorted(PROFILES)


def test_files_are_named_after_their_profile() -> None:
    for file in (ROLE / "profiles").glob("*.yml"):
        assert all(name.startswith(file.stem) for name in yaml.safe_load(file.read_text()))


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
    image = plan(gpu(compute_capability=capability, driver_version=driver))["image"]
    assert (image["profile"], image["tag"]) == (name, tag)


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
    assert plan(gpu(driver_version="570.133.07"))["servers"] == []


def test_gpu_newer_than_every_image_is_refused() -> None:
    assert "the card has 13.0" in choose("13.0", "650.1")["problem"]


def test_unknown_profile_is_an_error() -> None:
    with pytest.raises(AnsibleFilterError, match="unknown profile native; there are: native_v0_32"):
        choose("12.0", "580.173.02", "native")


def test_image_for_a_host_that_nobody_has_seen_is_the_best_one_or_the_one_that_is_wanted() -> None:
    image = plan()["image"]
    assert (image["profile"], image["reference"], image["driver_version"]) == ("native_v0_32", IMAGE, "580.95.05")
    assert plan(profile="rednote_v0_9_1")["image"]["repository"] == "docker.io/rednotehilab/dots.ocr"
    assert plan(image_tag="v0.32.0-cu129")["image"]["driver_version"] == "575.57.08"
    assert plan(image_tag="v0.33.0")["image"]["driver_version"] == "580.95.05"


def test_pinned_digest_counts_unless_another_is_given_or_an_archive_holds_the_image() -> None:
    pins = {IMAGE: {"digest": "sha256:pinned"}}
    assert plan(pins=pins)["image"]["reference"] == "docker.io/vllm/vllm-openai@sha256:pinned"
    assert plan(pins=pins, image_digest="sha256:own")["image"]["reference"].endswith("@sha256:own")
    assert plan(pins=pins, image_tag="v0.33.0")["image"]["digest"] == ""
    assert plan(pins=pins, image_archive="/image.tar.zst")["image"]["reference"] == IMAGE
    assert plan(pins=pins, registry="mirror:5000")["image"]["reference"] == "mirror:5000/vllm/vllm-openai:v0.32.0"


def test_good_card_has_no_problem() -> None:
    assert problems(gpu()) == []
    assert problems() == []


@pytest.mark.parametrize(("platform", "where", "mended_by"), [
    ("bare_metal", "with the open kernel modules, then reboot", "nvidia_driver"),
    ("wsl2", "in Windows (never inside WSL)", ""),
])  # fmt: skip
def test_old_driver_is_measured_against_the_image_for_this_card(platform: str, where: str, mended_by: str) -> None:
    (found,) = problems(gpu(driver_version="570.133.07"), platform=platform)
    assert "the NVIDIA driver is 570.133.07, the image native_v0_32 needs 575.57.08" in found["problem"]
    assert where in found["fix"]
    assert found["mended_by"] == mended_by


def test_older_card_with_an_older_driver_gets_the_older_image() -> None:
    ampere = gpu(compute_capability="8.6", driver_version="570.133.07")
    assert problems(ampere) == []
    assert "native_v0_18" in problems(ampere, profile="native_v0_18")[0]["problem"]


def test_bundle_says_what_driver_its_image_needs() -> None:
    card = gpu(driver_version="575.57.08")
    assert problems(card) == []
    (found,) = problems(card, driver_version="580.65.06")
    assert "needs 580.65.06 or newer" in found["problem"]
    assert problems(gpu(), driver_version="580.65.06") == []


def test_card_that_no_image_has_kernels_for_is_told_which_would_do() -> None:
    (found,) = problems(OLD)
    assert "no image has kernels for the GPU Quadro P4000 (6.1)" in found["problem"]
    assert found["fix"] == "use a GPU of compute capability 7.5 to 12.0"


def test_profile_that_does_not_suit_is_told_apart_from_a_card_that_does_not() -> None:
    (found,) = problems(gpu(), profile="rednote_v0_9_1")
    assert "rednote_v0_9_1 has kernels for compute capability 8.0 to 9.0" in found["problem"]
    assert "set dots_ocr_server_profile to native_v0_32" in found["fix"]


def test_card_that_is_asked_for_must_answer() -> None:
    host = {"gpus_broken": [LOST]}
    assert problems(gpu(), host=host) == []
    assert problems(gpu(), host=host, gpus=[0]) == []
    (found,) = problems(gpu(), host=host, gpus=[0, 1])
    assert "asks for GPU 1, which does not answer (NVIDIA GeForce RTX 3060: memory.total is [GPU is" in found["problem"]
    assert "there is 0" in found["fix"]


def test_one_capable_card_among_several_is_enough_unless_more_are_asked_for() -> None:
    cards = (OLD, SMALL, gpu(index=2))
    found = plan(*cards)
    assert found["problems"] == []
    assert [one["gpu"]["index"] for one in found["servers"]] == [2]
    assert sorted((one["gpu"]["index"], one["plan"]["fits"]) for one in found["gpus"]) == [
        (0, False),
        (1, False),
        (2, True),
    ]
    kernels, memory = problems(*cards, gpus=[0, 1, 2])
    assert "the Quadro P4000 has 6.1" in kernels["problem"]
    assert "the model does not fit into GPU 1" in memory["problem"]


def test_memory_of_a_card_that_is_too_old_does_not_help_a_small_one() -> None:
    (found,) = problems(OLD, SMALL)
    assert "GiB at least" in found["problem"]


def test_card_that_is_old_and_small_hears_of_both_at_once() -> None:
    assert len(problems({**SMALL, "compute_capability": "6.1"})) == 2


def test_who_holds_the_memory_is_named() -> None:
    (found,) = problems(gpu(memory_free_mib=3000), host={"gpu_processes": [HOLDER]})
    assert "memory is held by python3 (process 4711) 11000 MiB" in found["problem"]
    assert "end other programs" in found["fix"]


def bypass(name: str, address: str, **image: str) -> list[dict[str, str]]:
    """Return what is said of a key that guards an address."""
    wanted = {**WANTED, "address": address, **image}
    return list(plugin.judge_key({"profile": name}, PROFILES[name], ADVISORIES, wanted))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.53", "::1", "[::1]", "localhost"])
@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_profile_may_answer_on_loopback(name: str, address: str) -> None:
    assert bypass(name, address) == []


@pytest.mark.parametrize("address", [
    "0.0.0.0", "::", "[::]", "192.168.1.20", "fd00::1", "ocr.example.org", "127.example.org", "localhost.org", "",
])  # fmt: skip
@pytest.mark.parametrize(("name", "version"), [("native_v0_18", "0.18.1"), ("rednote_v0_9_1", "0.9.1")])
def test_key_that_can_be_bypassed_is_published_nowhere(name: str, version: str, address: str) -> None:
    (found,) = bypass(name, address)
    assert f"The API key of {name} (vLLM {version}) can be bypassed (CVE-2026-48746: " in found["problem"]
    assert f"must not listen at {address}" in found["problem"]
    assert "vLLM 0.22.0 or newer" in found["fix"]
    assert bypass("native_v0_32", address) == []


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
    assert bool(bypass(name, "0.0.0.0", image=image, image_tag=tag)) is refused


def test_advisories_are_whole() -> None:
    """Without `fixed` nobody would know the way out, and a floor below its start would never apply."""
    assert len({one["id"] for one in ADVISORIES}) == len(ADVISORIES)
    for one in ADVISORIES:
        assert set(one) == {"id", "what", "since", "fixed", "bypasses_key"}
        assert re.fullmatch(r"CVE-\d{4}-\d{4,}", one["id"])
        assert Version(one["since"]) < Version(one["fixed"])


def by_role(variables: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as the role's own task makes it, with the variables that a user may set."""
    loader = data_loader()
    parts = (
        loader.load_from_file(str(ROLE / part), trusted_as_template=True)
        for part in ("defaults/main.yml", "vars/main.yml")
    )
    known: dict[str, Any] = {name: value for part in parts for name, value in part.items()}
    known["_dots_ocr_server_profiles"] = {
        name: profile
        for one in (ROLE / "profiles").glob("*.yml")
        for name, profile in loader.load_from_file(str(one), trusted_as_template=True).items()
    }
    tasks = loader.load_from_file(str(ROLE / "tasks/plan.yml"), trusted_as_template=True)
    (task,) = (task for task in tasks if "ansible.builtin.set_fact" in task)
    loader.set_basedir(str(ROLE / "files"))
    templar = Templar(loader=loader, variables={**known, "role_path": str(ROLE), **task["vars"], **variables})
    found: dict[str, Any] = templar.template(task["ansible.builtin.set_fact"]["dots_ocr_server_plan"])
    return found


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
def test_role_plans_by_what_the_user_sets(settings: dict[str, str], refused: bool) -> None:
    card = gpu(compute_capability="8.9", driver_version="575.64.03")
    host = {"platform": "bare_metal", "gpus": [card]}
    limits = {"dots_ocr_server_max_num_seqs": 3, "dots_ocr_server_port": 8100, "dots_ocr_server_gpus": [0]}
    found = by_role({"dots_ocr_server_host": host, "dots_ocr_server_profile": "native_v0_18", **limits, **settings})
    said = " ".join(f"{one['problem']} Fix: {one['fix']}" for one in found["problems"])
    assert ("must not listen at 0.0.0.0" in said and "Fix: use an image with vLLM 0.22.0" in said) is refused
    assert (found["servers"][0]["port"], found["servers"][0]["plan"]["max_num_seqs"]) == (8100, 3)
    assert found["metrics"]["rednote_v0_9_1"]["kv_cache_usage"] == "vllm:gpu_cache_usage_perc"


SECOND = gpu(index=1)
AMPERE = gpu(name="NVIDIA GeForce RTX 3060", compute_capability="8.6", memory_total_mib=4096, memory_free_mib=4000)
BROKEN = {"index": 0, "name": "NVIDIA GeForce GT 710", "fault": "memory.total is [N/A]"}


@pytest.mark.parametrize(
    ("platform", "gpus", "broken", "device", "visible"),
    [
        ("bare_metal", [SECOND], [], "all", []),
        ("bare_metal", [AMPERE, SECOND], [], "1", []),
        ("bare_metal", [SECOND], [BROKEN], "1", []),
        ("wsl2", [SECOND], [], "all", []),
        ("wsl2", [AMPERE, SECOND], [], "all", ["CUDA_VISIBLE_DEVICES=1"]),
        ("wsl2", [SECOND], [BROKEN], "all", ["CUDA_VISIBLE_DEVICES=1"]),
    ],
)
def test_server_gets_the_gpu_that_was_planned(
    platform: str, gpus: list[dict[str, Any]], broken: list[dict[str, Any]], device: str, visible: list[str]
) -> None:
    (server,) = plan(*gpus, platform=platform, host={"gpus_broken": broken})["servers"]
    variables = {
        "ansible_managed": "Ansible managed",
        "item": server,
        "_dots_ocr_server_known": {"environment": {}, "environment_from_compute_capability_12": {}},
        "dots_ocr_server_environment": {},
    }
    text = trust_as_template((ROLE / "templates/vllm.env.j2").read_text())
    environment = str(Templar(loader=data_loader(), variables=variables).template(text))
    lines = [line for line in environment.splitlines() if line and not line.startswith("#")]
    # CUDA's own order is another than nvidia-smi's, by which was planned.
    assert (server["device"], lines) == (f"nvidia.com/gpu={device}", ["CUDA_DEVICE_ORDER=PCI_BUS_ID", *visible])


@pytest.mark.parametrize(
    ("address", "host", "asked"),
    [
        *(("0.0.0.0", "0.0.0.0", "127.0.0.1"), ("192.0.2.1", "192.0.2.1", "192.0.2.1")),
        *((one, "[::1]", "[::1]") for one in ("::1", "[::1]")),
        ("::", "[::]", "[::1]"),
    ],
)
def test_address_of_ipv6_may_have_brackets_or_none(address: str, host: str, asked: str) -> None:
    constants = data_loader().load_from_file(str(ROLE / "vars/main.yml"), trusted_as_template=True)
    named = {f"_dots_ocr_server_{name}": constants[f"_dots_ocr_server_{name}"] for name in ("address", "host")}
    line = next(one for one in (ROLE / "templates/settings.json.j2").read_text().splitlines() if "'0.0.0.0'" in one)
    url = trust_as_template("{{ '' " + line.rstrip(",") + " }}")
    variables = {"dots_ocr_server_address": address, "item": {"port": 8000}, **named}
    templar = Templar(loader=data_loader(), variables=variables)
    assert templar.template(named["_dots_ocr_server_host"]) == host
    assert templar.template(named["_dots_ocr_server_address"]) == host.strip("[]")
    assert templar.template(url) == f"{asked}:8000"


def test_each_gpu_gets_a_server_with_a_port_of_its_own() -> None:
    servers = plan(gpu(), gpu(index=1))["servers"]
    assert [(one["name"], one["container"], one["port"]) for one in servers] == [
        ("dots-ocr@0", "dots-ocr-0", 8000),
        ("dots-ocr@1", "dots-ocr-1", 8001),
    ]


def planned(recorded: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """Return what is planned for SECOND, where so much is recorded and proven of the server that runs on it."""
    held = recorded["plan"]["gpu_memory_utilization"] * 16303 if "plan" in recorded else 0
    card = {**SECOND, "memory_free_mib": round(15791 - held)}
    installed = {"recorded": {"dots-ocr": recorded}, "running": ["dots-ocr"], "proven": [recorded]} if recorded else {}
    found: dict[str, Any] = plan(card, installed=installed, **wanted)["servers"][0]
    return found


def record(server: dict[str, Any], kv_tokens: int) -> dict[str, Any]:
    """Return the settings of a server that was planned so, and found room for so many tokens when it started."""
    names = ("gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_pixels", "kv_tokens")
    measured = {"device": "GPU", "kv_tokens": kv_tokens, "planned": {name: server["plan"][name] for name in names}}
    image = {"reference": IMAGE, "pin": "sha256:1"}
    return {
        **{"name": "dots-ocr", "gpu": server["gpu"], "image": image, "plan": server["plan"]},
        **{"adaptations": server["adaptations"], "extra_args": [], "measured": measured},
    }


def test_a_game_that_has_the_memory_of_a_stopped_server_changes_nothing_in_its_plan() -> None:
    stopped = {"recorded": {"dots-ocr": record(planned({}), 130_000)}, "stopped": True}
    busy = {**SECOND, "memory_free_mib": 3000}
    assert plan(busy, installed=stopped)["servers"][0]["plan"] == planned({})["plan"]
    assert plan(busy, installed={**stopped, "stopped": False})["servers"] == []


def test_next_deployment_plans_with_what_the_card_showed_and_the_one_after_it_with_the_same() -> None:
    first = planned({})
    second = planned(record(first, 100_000))
    assert (first["plan"]["max_num_seqs"], second["plan"]["max_num_seqs"]) == (16, 8)
    assert (first["measured"], second["measured"]) == ({}, {})
    third = planned(record(second, 100_000))
    assert third["plan"] == second["plan"]
    assert third["measured"]["kv_tokens"] == 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"adapt": False},
        {"extra_args": ["--kv-cache-dtype=fp8"]},
        {"image_tag": "v0.33.0"},
        {"gpu": {"index": 1, "name": "NVIDIA GeForce RTX 5080", "compute_capability": "12.0"}},
    ],
    ids=str,
)
def test_another_image_card_or_argument_or_a_ban_starts_anew(changes: dict[str, Any]) -> None:
    first = planned({})
    of_another = {name: changes.pop(name) for name in list(changes) if name == "gpu"}
    learned = planned(record(first, 100_000))
    for before in (first, learned):
        found = planned(record(before, 100_000) | of_another, **changes)
        assert found["plan"]["max_num_seqs"] == 16
        assert "learned" not in found["plan"]
        # A ban is on the use, not on the record, which belongs to its limits.
        assert bool(found["measured"]) == ("adapt" in changes and before is first)


def test_settings_of_before_there_were_figures_are_read() -> None:
    first = planned({})
    before = record(first, 100_000)
    del before["measured"], before["extra_args"]
    found = planned(before)
    assert (found["plan"], found["measured"]) == (first["plan"], {})


def test_what_helped_the_card_is_kept_for_this_image_and_new_remedies_come_after_it() -> None:
    before = {"diagnosis": "memory", "remedy": {"plan": {"utilization": 0.05}}}
    new = {"diagnosis": "graphs", "remedy": {"arguments": ["--enforce-eager"]}}
    recorded = record(planned({}), 150_000) | {"adaptations": [before]}
    installed = {"recorded": {"dots-ocr": recorded}, "proven": [recorded], "adapted": {"1": [before, new]}}
    (server,) = plan(SECOND, installed=installed)["servers"]
    assert server["adaptations"] == [before, new]
    assert server["plan"]["gpu_memory_utilization"] == 0.8
    (server,) = plan(SECOND, installed={**installed, "adapted": {}}, image_tag="v0.33.0")["servers"]
    assert server["adaptations"] == []

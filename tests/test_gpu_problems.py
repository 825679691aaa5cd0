"""The filter gpu_problems: whether an image and its memory plan suit the GPUs of a host."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
ORDER = ["native_v0_32", "rednote_v0_9_1", "native_v0_18"]


def load_filter(name: str) -> Any:
    """Return a filter of this repository."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / f"plugins/filter/{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FilterModule().filters()[name]


gpu_problems, image_profile, memory_plan = map(load_filter, ("gpu_problems", "image_profile", "memory_plan"))
PROFILES = {
    name: known
    for file in (REPOSITORY / "roles/dots_ocr_server/profiles").glob("*.yml")
    for name, known in yaml.safe_load(file.read_text()).items()
}


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
SMALL = gpu(memory_total_mib=6144, memory_free_mib=6000)
HOLDER = {"pid": 4711, "name": "python3", "memory_mib": 11000}


def problems(
    *gpus: dict[str, Any],
    wanted: str = "auto",
    driver: str = "",
    platform: str = "bare_metal",
    asked_for: tuple[int, ...] = (),
    **host: Any,
) -> list[dict[str, str]]:
    """Return the problems of a host with these GPUs, as the role preflight asks for them."""
    newest = [{**one, "driver_version": "9999"} for one in gpus]
    found: list[dict[str, str]] = gpu_problems(
        {"platform": platform, "gpus": list(gpus), "gpu_processes": [], **host},
        [image_profile(one, PROFILES, ORDER, wanted) for one in gpus],
        [image_profile(one, PROFILES, ORDER, wanted) for one in newest],
        [memory_plan(one, platform) for one in gpus],
        PROFILES,
        driver,
        asked_for,
    )
    return found


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
    assert "native_v0_18" in problems(ampere, wanted="native_v0_18")[0]["problem"]


def test_bundle_says_what_driver_its_image_needs() -> None:
    card = gpu(driver_version="575.57.08")
    assert problems(card) == []
    (found,) = problems(card, driver="580.65.06")
    assert "needs 580.65.06 or newer" in found["problem"]
    assert problems(gpu(), driver="580.65.06") == []


def test_card_that_no_image_has_kernels_for_is_told_which_would_do() -> None:
    (found,) = problems(OLD)
    assert "no image has kernels for the GPU Quadro P4000 (6.1)" in found["problem"]
    assert found["fix"] == "use a GPU of compute capability 7.5 to 12.0"


def test_profile_that_does_not_suit_is_told_apart_from_a_card_that_does_not() -> None:
    (found,) = problems(gpu(), wanted="rednote_v0_9_1")
    assert "rednote_v0_9_1 has kernels for compute capability 8.0 to 9.0" in found["problem"]
    assert "set dots_ocr_server_profile to native_v0_32" in found["fix"]


def test_card_that_is_asked_for_must_answer() -> None:
    lost = {"index": 1, "name": "NVIDIA GeForce RTX 3060", "fault": "memory.total is [GPU is lost]"}
    assert problems(gpu(), gpus_broken=[lost]) == []
    assert problems(gpu(), gpus_broken=[lost], asked_for=(0,)) == []
    (found,) = problems(gpu(), gpus_broken=[lost], asked_for=(0, 1))
    assert "asks for GPU 1, which does not answer (NVIDIA GeForce RTX 3060: memory.total is [GPU is" in found["problem"]
    assert "there is 0" in found["fix"]


def test_one_capable_card_among_several_is_enough() -> None:
    assert problems(OLD, SMALL, gpu()) == []


def test_memory_of_a_card_that_is_too_old_does_not_help_a_small_one() -> None:
    (found,) = problems(OLD, SMALL)
    assert "GiB at least" in found["problem"]


def test_card_that_is_old_and_small_hears_of_both_at_once() -> None:
    assert len(problems({**SMALL, "compute_capability": "6.1"})) == 2


def test_who_holds_the_memory_is_named() -> None:
    (found,) = problems(gpu(memory_free_mib=3000), gpu_processes=[HOLDER])
    assert "memory is held by python3 (process 4711) 11000 MiB" in found["problem"]
    assert "end other programs" in found["fix"]

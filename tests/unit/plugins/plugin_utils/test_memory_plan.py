"""The memory plan: the limits for known cards, wishes, refusals, and what holds for every card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.plugin_utils import memory_plan as module
from hypothesis import assume, given
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parents[4]

Plan = dict[str, Any]

DESKTOP = (16303, 15791)
LIMITS = ("max_pixels", "max_num_seqs", "max_model_len", "max_num_queued_reqs", "api_server_count")


def gpu(total: int, free: int) -> dict[str, Any]:
    """Return a GPU as gpu_host measures it, memory in MiB."""
    return {
        "index": 0,
        "name": "NVIDIA GeForce RTX 5070 Ti",
        "memory_total_mib": total,
        "memory_free_mib": free,
        "compute_capability": "12.0",
        "driver_version": "580.173.02",
    }


def plan(total: int, free: int, platform: str = "bare_metal", **arguments: Any) -> Plan:
    """Plan for a GPU with so much memory, in MiB."""
    found: Plan = module.memory_plan(gpu(total, free), platform, **arguments)
    return found


def rung(found: Plan) -> int:
    """Return how high up the ladder a plan without wishes is; -1 for a refusal."""
    if not found["fits"]:
        return -1
    places = [(pixels, seqs) for pixels, seqs, _ in module.LADDER]
    return places.index((found["max_pixels"], found["max_num_seqs"]))


def percent(found: Plan) -> int:
    """Return the utilization as a whole number, for exact comparison."""
    value: float = found["gpu_memory_utilization"] * 100
    assert value == pytest.approx(round(value))
    return round(value)


@pytest.mark.parametrize(
    ("total", "free", "platform", "utilization", "limits"),
    [
        (*DESKTOP, "bare_metal", 0.85, (11_289_600, 16, 32768, 80, 1)),
        (16303, 14900, "wsl2", 0.85, (11_289_600, 16, 32768, 80, 1)),
        (16303, 12800, "wsl2", 0.72, (11_289_600, 8, 32768, 40, 1)),
        (12227, 11700, "bare_metal", 0.85, (5_017_600, 8, 24576, 40, 1)),
        (12227, 10900, "wsl2", 0.80, (5_017_600, 8, 24576, 40, 1)),
        (10240, 9900, "bare_metal", 0.85, (5_017_600, 4, 24576, 20, 1)),
        (24564, 24000, "bare_metal", 0.85, (11_289_600, 48, 32768, 240, 1)),
        (32607, 31800, "bare_metal", 0.85, (11_289_600, 64, 32768, 320, 1)),
    ],
)
def test_known_card(total: int, free: int, platform: str, utilization: float, limits: tuple[int, ...]) -> None:
    found = plan(total, free, platform)
    assert found["gpu_memory_utilization"] == utilization
    assert tuple(found[key] for key in LIMITS) == limits


def test_explanation_shows_the_arithmetic() -> None:
    found = plan(*DESKTOP)
    assert found["kv_tokens"] == 153_270
    assert found["explanation"] == (
        "15.42 of 15.92 GiB free, 0.50 kept back; utilization 0.85 (the most we plan) = 13.53 GiB"
        " - weights 5.72 - encoder 3.37 - overhead 0.35 = 4.09 GiB for 153,270 KV tokens, 20 usual pages;"
        " limits: images up to 11.29 MP, requests up to 32,768 tokens, 16 pages at once, 80 with those that wait,"
        " API processes: 1"
    )
    assert "0.72 (what is free and not kept back)" in plan(16303, 12800, "wsl2")["explanation"]


def test_card_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    assert plan(8151, 7900) == {
        "fits": False,
        "problem": "the model needs weights 5.72 + encoder 1.50 for images up to 5.02 MP + overhead 0.35"
        " + KV cache 0.44 for 16,384 tokens = 8.01 GiB at least, but vLLM gets utilization 0.85 (the most we plan)"
        " = 6.77 GiB (7.71 of 7.96 GiB free, 0.50 kept back)",
        "fix": "use a GPU with 10 GiB of memory or more,"
        " or try dots_ocr_server_fp8: true (weights of 8 bits; never run on a card)",
    }


def test_weights_of_8_bits_fit_into_a_card_with_8_gb() -> None:
    found = plan(8151, 7900, wishes={"fp8": 1})
    assert {key: found[key] for key in ("fits", "fp8", "max_pixels", "max_num_seqs")} == {
        "fits": True,
        "fp8": 1,
        "max_pixels": 5_017_600,
        "max_num_seqs": 4,
    }
    assert "weights 3.33 - encoder 1.50" in found["explanation"]
    assert plan(8151, 7900, wishes={"fp8": 1}, previous=found) == found
    assert plan(16303, 16000, previous=plan(16303, 16000, wishes={"fp8": 1})) == plan(16303, 16000)
    without = plan(16303, 16000)
    assert plan(16303, 16000, wishes={"fp8": 1}, previous=without)["kv_tokens"] > without["kv_tokens"]
    # Windows keeps more of it.
    assert plan(8151, 7127, "wsl2", wishes={"fp8": 1})["max_num_seqs"] == 2
    assert "fp8" not in plan(8151, 3000, wishes={"fp8": 1})["fix"]


@pytest.mark.parametrize(("platform", "where"), [("bare_metal", "programs that"), ("wsl2", "programs in Windows that")])
def test_fix_of_a_busy_card_is_to_free_it_and_then_it_fits(platform: str, where: str) -> None:
    refused = plan(16303, 6000, platform)
    assert not refused["fits"]
    assert where in refused["fix"]
    found = re.search(r"until ([\d.]+) GiB are free", refused["fix"])
    assert found
    enough = round(float(found[1]) * 1024)
    assert plan(16303, enough, platform)["fits"]
    assert not plan(16303, enough - 200, platform)["fits"]


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"max_num_seqs": 4}, {"max_num_seqs": 4, "max_pixels": 11_289_600, "max_num_queued_reqs": 20}),
        ({"max_pixels": 5_017_600}, {"max_num_seqs": 24, "max_model_len": 24576}),
        ({"max_pixels": 1_003_520}, {"max_num_seqs": 32, "max_model_len": 24576}),
        ({"max_model_len": 16384}, {"max_pixels": 5_017_600, "max_model_len": 16384}),
        ({"max_model_len": 16384, "max_pixels": 11_289_600}, {"max_model_len": 16384, "max_pixels": 11_289_600}),
        ({"gpu_memory_utilization": 0.75}, {"gpu_memory_utilization": 0.75, "max_num_seqs": 8}),
        ({"gpu_memory_utilization": 0.95}, {"gpu_memory_utilization": 0.95, "max_num_seqs": 24}),
        ({"max_num_queued_reqs": 7}, {"max_num_seqs": 16, "max_num_queued_reqs": 7}),
        ({"api_server_count": 3}, {"max_num_seqs": 16, "api_server_count": 3}),
        ({"max_pixels": 11_289_600, "gpu_memory_utilization": 0.64}, {"max_num_seqs": 2, "max_model_len": 24576}),
        ({"max_num_seqs": 129, "max_model_len": 1024, "max_pixels": 401_408}, {"api_server_count": 2}),
    ],
    ids=str,
)
def test_wish_is_taken_as_it_is_and_the_rest_is_planned_around_it(wishes: Plan, expected: Plan) -> None:
    found = plan(*DESKTOP, wishes=wishes)
    assert {key: found[key] for key in expected} == expected
    assert found["wishes"] == wishes


@pytest.mark.parametrize("nothing", [None, 0, 0.0, "", "0"])
def test_empty_wish_is_planned(nothing: Any) -> None:
    assert plan(*DESKTOP, wishes=dict.fromkeys(module.WISHES, nothing)) == plan(*DESKTOP)


def test_wish_from_the_command_line_is_a_text() -> None:
    wishes = {"gpu_memory_utilization": "0.8", "max_num_seqs": "4"}
    assert plan(*DESKTOP, wishes=wishes) == plan(*DESKTOP, wishes={"gpu_memory_utilization": 0.8, "max_num_seqs": 4})


@pytest.mark.parametrize(
    ("memory", "wishes", "problem", "fix"),
    [
        (
            DESKTOP,
            {"gpu_memory_utilization": 0.97},
            "a utilization of 0.97 takes 15.44 of 15.92 GiB, but 15.42 GiB are free",
            "set dots_ocr_server_gpu_memory_utilization to 0 to have it planned, or to 0.96 at most, or end",
        ),
        (
            DESKTOP,
            {"max_num_seqs": 64},
            "KV cache 12.82 for 480,000 tokens = 20.39 GiB at least, but vLLM gets utilization 0.85",
            "change dots_ocr_server_max_num_seqs, or set to 0 to have it planned: without these wishes it fits",
        ),
        (
            (12227, 11700),
            {"max_pixels": 11_289_600, "max_num_seqs": 8},
            "+ KV cache 1.60 for 60,000 tokens = 11.04 GiB",
            "change dots_ocr_server_max_num_seqs, dots_ocr_server_max_pixels",
        ),
        (
            DESKTOP,
            {"gpu_memory_utilization": 0.4},
            "vLLM gets utilization 0.4 (as wished) = 6.37 GiB",
            "change dots_ocr_server_gpu_memory_utilization",
        ),
        (
            DESKTOP,
            {"max_model_len": 8192},
            "a longest request of 8,192 tokens has no room for the largest image: 6,400 tokens + 256 of the prompt"
            " + 2,500 of a usual answer",
            "raise dots_ocr_server_max_model_len, set it to 0 to have it planned, or lower dots_ocr_server_max_pixels",
        ),
        (
            DESKTOP,
            {"max_model_len": 8192, "max_pixels": 11_289_600},
            "no room for the largest image: 14,400 tokens + 256 of the prompt",
            "lower dots_ocr_server_max_pixels",
        ),
        ((8151, 7900), {"max_num_seqs": 4}, "= 8.37 GiB", "use a GPU with 10 GiB of memory or more, or smaller wishes"),
    ],
    ids=str,
)
def test_wish_that_cannot_fit_is_refused_with_the_arithmetic(
    memory: tuple[int, int], wishes: Plan, problem: str, fix: str
) -> None:
    found = plan(*memory, wishes=wishes)
    assert not found["fits"]
    assert problem in found["problem"]
    assert fix in found["fix"]


def test_several_cards_have_a_plan_each() -> None:
    found = [plan(*memory) for memory in (DESKTOP, (8151, 7900), (24564, 24000))]
    assert [rung(one) for one in found] == [5, -1, 8]


def without_us(free: int, last: Plan) -> int:
    """Return what nvidia-smi shows as free while our server runs with a plan, in MiB."""
    held: float = last["gpu_memory_utilization"] * last["memory_total_mib"]
    return max(0, free - round(held))


def test_running_server_keeps_its_plan_although_its_memory_is_taken() -> None:
    last = plan(*DESKTOP)
    assert plan(16303, without_us(15791, last), previous=last, running=True) == last


def test_stopped_server_is_planned_anew_if_its_plan_no_longer_fits() -> None:
    last = plan(*DESKTOP)
    found = plan(16303, 13000, previous=last)
    assert found == plan(16303, 13000)
    assert found["gpu_memory_utilization"] == 0.76


def test_running_server_is_not_planned_down_but_up() -> None:
    last = plan(16303, 12800, "wsl2")
    less, more = without_us(11500, last), without_us(15000, last)
    assert plan(16303, less, "wsl2", previous=last, running=True) == last
    found = plan(16303, more, "wsl2", previous=last, running=True)
    assert (found["gpu_memory_utilization"], found["max_num_seqs"]) == (0.85, 16)


@pytest.mark.parametrize("running", [False, True])
def test_wish_that_agrees_with_the_plan_keeps_it_and_one_that_does_not_changes_it(running: bool) -> None:
    last = plan(12227, 11700)
    free = without_us(11700, last) if running else 11700
    same = plan(12227, free, wishes={"max_pixels": 5_017_600}, previous=last, running=running)
    assert same == {**last, "wishes": {"max_pixels": 5_017_600}}
    other = plan(12227, free, wishes={"max_num_seqs": 2}, previous=last, running=running)
    assert other["max_num_seqs"] == 2
    taken_back = plan(12227, free, previous=other, running=running)
    assert {key: taken_back[key] for key in LIMITS} == {key: last[key] for key in LIMITS}


def test_plan_of_another_card_or_platform_or_of_corrected_sizes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    last = plan(*DESKTOP)
    assert plan(24564, 24000, previous=last) == plan(24564, 24000)
    assert plan(*DESKTOP, "wsl2", previous=last)["platform"] == "wsl2"
    monkeypatch.setattr(module, "WEIGHTS_GIB", 7.0)
    assert plan(*DESKTOP, previous=last)["max_num_seqs"] == 8


def test_wished_utilization_is_refused_where_it_does_not_fit_beside_what_others_took() -> None:
    last = plan(*DESKTOP)
    wishes = {"gpu_memory_utilization": 0.9}
    assert plan(16303, without_us(15791, last), previous=last, running=True, wishes=wishes)["fits"]
    assert not plan(16303, without_us(14000, last), previous=last, running=True, wishes=wishes)["fits"]


def test_wished_utilization_may_use_the_reserve_and_keeps_its_plan() -> None:
    wishes = {"gpu_memory_utilization": 0.95}
    last = plan(*DESKTOP, wishes=wishes)
    assert plan(16303, 15691, wishes=wishes, previous=last) == last


def test_running_server_without_a_record_is_told_to_stop_or_believed_what_it_is_wished() -> None:
    found = plan(16303, 2000, running=True)
    assert not found["fits"]
    assert found["fix"].startswith("stop the server first")
    assert plan(16303, 2000, running=True, wishes={"gpu_memory_utilization": 0.8})["fits"]


# What a failed start showed to be too high


@pytest.mark.parametrize(
    ("lowered", "expected"),
    [
        ([{"utilization": 0.05}], {"gpu_memory_utilization": 0.8, "max_pixels": 11_289_600, "max_num_seqs": 16}),
        ([{"below": ["max_num_seqs"]}], {"gpu_memory_utilization": 0.85, "max_num_seqs": 8}),
        ([{"below": ["max_pixels"]}], {"gpu_memory_utilization": 0.85, "max_pixels": 5_017_600, "max_num_seqs": 8}),
        ([{"below": ["max_model_len"]}], {"max_model_len": 24_576}),
        ([{"utilization": 0.05}, {"utilization": 0.05}], {"gpu_memory_utilization": 0.75}),
        ([{"below": ["max_num_seqs"]}, {"below": ["max_num_seqs"]}], {"max_pixels": 5_017_600, "max_num_seqs": 4}),
        ([], {"gpu_memory_utilization": 0.85, "max_num_seqs": 16}),
    ],
    ids=str,
)
def test_plan_that_was_too_high_is_lowered(lowered: list[Plan], expected: Plan) -> None:
    found = plan(*DESKTOP, lowered=lowered)
    assert {key: found[key] for key in expected} == expected
    assert found.get("lowered", []) == lowered


def test_lowered_plan_says_so_and_is_kept() -> None:
    lowered = [{"utilization": 0.05, "below": ["max_num_seqs"]}]
    first = plan(*DESKTOP, lowered=lowered)
    assert "utilization 0.8 (lowered after a failed start)" in first["explanation"]
    again = plan(16303, without_us(15791, first), previous=first, running=True, lowered=lowered)
    assert json.dumps(again) == json.dumps(first)


def test_plan_is_made_anew_where_it_is_lowered_now_and_where_it_is_no_longer() -> None:
    lowered = [{"below": ["max_num_seqs"]}]
    high, low = plan(*DESKTOP), plan(*DESKTOP, lowered=lowered)
    assert plan(*DESKTOP, previous=high, lowered=lowered) == low
    assert plan(*DESKTOP, previous=low) == high


def test_wishes_are_not_lowered() -> None:
    wishes = {"gpu_memory_utilization": 0.85, "max_num_seqs": 16, "max_pixels": 11_289_600, "max_model_len": 32_768}
    lowered = [{"utilization": 0.05, "below": ["max_num_seqs", "max_pixels", "max_model_len"]}]
    found = plan(*DESKTOP, wishes=wishes, lowered=lowered)
    assert {key: found[key] for key in wishes} == wishes


def test_plan_that_cannot_be_lowered_is_refused_with_the_arithmetic() -> None:
    found = plan(*DESKTOP, lowered=[{"utilization": 0.5}])
    assert "vLLM gets utilization 0.35 (lowered after a failed start)" in found["problem"]


# What vLLM measured when it started


def card(found: Plan, more_gib: float, **changes: Any) -> Plan:
    """Return what is recorded of a start with a plan, where the KV cache has so much more than we think."""
    limits = module.Limits(found["max_pixels"], found["max_num_seqs"], found["max_model_len"])
    budget = module.gib(found["gpu_memory_utilization"] * found["memory_total_mib"]) + more_gib
    planned = {key: found[key] for key in module.MEASURED}
    return {"device": "GPU", "kv_tokens": max(0, limits.kv_tokens(budget)), "planned": planned, **changes}


def deploy_again(
    last: Plan, more_gib: float, running: bool, total: int = 16303, free: int = 15791, **more: Any
) -> Plan:
    """Plan again on a card that has so much more for the KV cache, after a start with the last plan."""
    now = without_us(free, last) if running else free
    return plan(total, now, previous=last, running=running, **{"measured": card(last, more_gib), **more})


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (-1.5, {"max_num_seqs": 8, "max_pixels": 11_289_600}),
        (-3.0, {"max_num_seqs": 8, "max_pixels": 5_017_600}),
        (1.5, {"max_num_seqs": 24, "max_pixels": 11_289_600}),
    ],
)
def test_plan_learns_from_the_card_once(more: float, expected: Plan, running: bool) -> None:
    first = plan(*DESKTOP)
    second = deploy_again(first, more, running)
    assert {key: second[key] for key in expected} == expected
    assert second["gpu_memory_utilization"] == first["gpu_memory_utilization"]
    assert second["kv_tokens"] == pytest.approx(card(second, more)["kv_tokens"], rel=0.01)
    assert f" {'-' if more < 0 else '+'} {abs(more):.2f} as measured before = " in second["explanation"]
    third = deploy_again(second, more, running)
    assert json.dumps(third) == json.dumps(second)


@pytest.mark.parametrize(("free", "more"), [(13556, -0.2), (15450, 0.3)])
def test_difference_up_to_a_tenth_changes_nothing(free: int, more: float) -> None:
    first = plan(16303, free, wishes={"gpu_memory_utilization": 0.88} if more > 0 else {})
    limits = module.Limits(first["max_pixels"], first["max_num_seqs"], first["max_model_len"])
    # It would lead to another rung.
    higher = limits._replace(max_num_seqs=24)
    tokens = card(first, more)["kv_tokens"]
    assert tokens >= higher.needed_kv_tokens() > first["kv_tokens"] if more > 0 else tokens < limits.needed_kv_tokens()
    assert deploy_again(first, more, running=True, free=free, wishes=first["wishes"]) == first


def test_what_was_learned_does_not_bring_a_drift_of_memory_along() -> None:
    first = plan(16303, 13000)
    second = plan(16303, 13400, previous=first, measured=card(first, -1.2))
    assert (second["gpu_memory_utilization"], second["max_pixels"]) == (0.76, 5_017_600)


def test_difference_that_leads_to_the_same_limits_does_not_touch_the_record() -> None:
    wishes = {"max_num_seqs": 4, "max_pixels": 1_003_520, "max_model_len": 8192}
    first = plan(*DESKTOP, wishes=wishes)
    again = deploy_again(first, -3.0, running=True, free=15000, wishes=wishes)
    assert json.dumps(again) == json.dumps(first)


def test_what_was_measured_refuses_no_wish() -> None:
    wishes = {"max_num_seqs": 16, "max_pixels": 11_289_600}
    first = plan(*DESKTOP, wishes=wishes)
    assert deploy_again(first, -3.0, running=True, wishes=wishes) == first
    # Memory became free, so that there is a new plan.
    wishes["max_num_seqs"] = 14
    low = plan(16303, 13066, wishes=wishes)
    high = plan(*DESKTOP, previous=low, measured=card(low, -1.9), wishes=wishes)
    assert (high["gpu_memory_utilization"], high["max_num_seqs"]) == (0.85, 14)
    assert high["kv_tokens"] < 14 * module.PAGE_TOKENS
    assert json.dumps(plan(*DESKTOP, previous=high, wishes=wishes)) == json.dumps(high)


def test_larger_images_are_not_planned_from_what_smaller_ones_left() -> None:
    first = plan(12227, 11700)
    assert first["max_pixels"] == 5_017_600
    found = deploy_again(first, 4.0, running=True, total=12227, free=11700)
    assert found == first


def test_plan_that_learned_learns_again_only_that_there_is_less() -> None:
    second = deploy_again(plan(*DESKTOP), 1.5, running=True)
    assert deploy_again(second, 3.0, running=True) == second
    third = deploy_again(second, -1.5, running=True)
    assert third["max_num_seqs"] == 8
    assert deploy_again(third, 1.5, running=True) == third


def test_memory_that_became_free_is_planned_with_what_was_learned() -> None:
    low = plan(16303, 13000)
    high = plan(*DESKTOP, previous=low, measured=card(low, -1.5))
    assert (high["gpu_memory_utilization"], high["max_num_seqs"]) == (0.85, 8)
    assert high["learned"]["gib"] == -1.5


@pytest.mark.parametrize(
    ("change", "starts_anew"),
    [
        ({"learn": False}, True),
        ({"wishes": {"max_model_len": 24_576}}, True),
        ({"wishes": {"max_num_queued_reqs": 7}}, False),
        ({"total": 16304, "free": 15791}, True),
        ({"lowered": [{"utilization": 0.05}]}, True),
    ],
    ids=str,
)
def test_changed_card_or_limit_starts_anew(change: Plan, starts_anew: bool) -> None:
    second = deploy_again(plan(*DESKTOP), -1.5, running=False)
    found = deploy_again(second, -1.5, running=False, **change)
    if starts_anew:
        asked = {key: value for key, value in change.items() if key in ("wishes", "lowered")}
        assert found == plan(change.get("total", 16303), 15791, **asked)
    else:
        assert (found["learned"], found["max_num_seqs"]) == (second["learned"], second["max_num_seqs"])


def test_rung_that_failed_does_not_come_back_because_there_seems_to_be_room() -> None:
    lowered = [{"below": ["max_num_seqs"]}]
    first = plan(*DESKTOP, lowered=lowered)
    assert first["max_num_seqs"] == 8
    assert deploy_again(first, 3.0, running=True, lowered=lowered) == first


@pytest.mark.parametrize(
    "changes",
    [{"device": "CPU"}, {"planned": {}}, {"planned": None}, {"kv_tokens": "many"}, {"kv_tokens": -1}],
    ids=str,
)
def test_what_was_measured_of_something_else_or_is_no_figure_is_not_used(changes: Plan) -> None:
    first = plan(*DESKTOP)
    measured = card(first, -1.5, **changes)
    if "kv_tokens" in changes:
        with pytest.raises(module.AnsibleFilterError, match="the measured KV cache must be a number"):
            deploy_again(first, 0, running=True, measured=measured)
    else:
        assert deploy_again(first, 0, running=True, measured=measured) == first


def test_without_a_figure_what_was_learned_stays() -> None:
    second = deploy_again(plan(*DESKTOP), -1.5, running=True)
    assert deploy_again(second, 0, running=True, measured={}) == second


@pytest.mark.parametrize("previous", [None, {}, {"fits": False, "problem": "", "fix": ""}, {"fits": True}])
def test_no_usable_record_is_none(previous: Plan | None) -> None:
    assert plan(*DESKTOP, previous=previous) == plan(*DESKTOP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"memory_total_mib": 16303}, "bare_metal"), "the GPU's memory_free_mib must be a number and not negative"),
        ((gpu(16303, -1), "bare_metal"), "memory_free_mib must be a number and not negative, not -1"),
        ((gpu(0, 0), "bare_metal"), "0 MiB cannot be free of 0 MiB"),
        ((gpu(1000, 1001), "bare_metal"), "1001 MiB cannot be free of 1000 MiB"),
        ((gpu(*DESKTOP), "wsl2", {"max_seqs": 1}), "unknown wishes: max_seqs; there are: gpu_memory_utilization"),
        ((gpu(*DESKTOP), "wsl2", {"max_num_seqs": -1}), "max_num_seqs must be a number and not negative, not -1"),
        ((gpu(*DESKTOP), "wsl2", {"max_num_seqs": 1.5}), "max_num_seqs must be a whole number, not 1.5"),
        ((gpu(*DESKTOP), "wsl2", {"max_num_seqs": True}), "max_num_seqs must be a number"),
        ((gpu(*DESKTOP), "wsl2", {"max_num_seqs": "many"}), "max_num_seqs must be a number"),
        ((gpu(*DESKTOP), "wsl2", {"gpu_memory_utilization": 85}), "must be a fraction up to 1, not 85"),
        ((gpu(*DESKTOP), "wsl2", {}, {"gpu_memory_utilization": "x"}, True), "the previous utilization must be"),
    ],
    ids=str,
)
def test_malformed_input_is_an_error(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(module.AnsibleFilterError, match=re.escape(message)):
        module.memory_plan(*arguments)


# What holds for every card: total and free memory in MiB, and those of which every one fits without wishes.

platforms = st.sampled_from(["bare_metal", "wsl2"])
memories = st.integers(4096, 98304).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))
enough = st.integers(12000, 98304).flatmap(lambda total: st.tuples(st.just(total), st.integers(10500, total)))
wished = st.fixed_dictionaries(
    {},
    optional={
        "gpu_memory_utilization": st.integers(30, 100).map(lambda value: value / 100),
        "max_model_len": st.integers(8192, 65536),
        "max_num_seqs": st.integers(1, 150),
        "max_pixels": st.integers(784, 15_000_000),
        "max_num_queued_reqs": st.integers(1, 2000),
        "api_server_count": st.integers(1, 8),
    },
)


@given(enough, platforms)
def test_plan_never_takes_what_is_not_free_or_is_kept_back(memory: tuple[int, int], platform: str) -> None:
    total, free = memory
    found = plan(total, free, platform)
    assert percent(found) * total <= (free - {"bare_metal": 512, "wsl2": 1024}[platform]) * 100
    assert percent(found) <= 85


@given(memories, platforms, st.integers(0, 20000))
def test_more_free_memory_never_means_less(memory: tuple[int, int], platform: str, more: int) -> None:
    total, free = memory
    before, after = plan(total, free, platform), plan(total, min(total, free + more), platform)
    assert rung(after) >= rung(before)
    assert not before["fits"] or percent(after) >= percent(before)


@given(memories, platforms, st.integers(0, 20000))
def test_larger_card_with_as_much_in_use_never_means_less(memory: tuple[int, int], platform: str, more: int) -> None:
    total, free = memory
    before, after = plan(total, free, platform), plan(total + more, free + more, platform)
    assert rung(after) >= rung(before)
    assert not before["fits"] or percent(after) >= percent(before)


@given(enough, platforms, wished, st.booleans())
def test_second_run_plans_the_same(memory: tuple[int, int], platform: str, wishes: Plan, running: bool) -> None:
    total, free = memory
    first = plan(total, free, platform, wishes=wishes)
    assume(first["fits"])
    now = without_us(free, first) if running else free
    assert plan(total, now, platform, wishes=wishes, previous=first, running=running) == first


@given(enough, platforms, st.floats(-0.05, 0.05, exclude_min=True, exclude_max=True))
def test_drift_under_5_percent_does_not_change_a_running_plan(
    memory: tuple[int, int], platform: str, drift: float
) -> None:
    total, free = memory
    first = plan(total, free, platform)
    now = min(max(0, without_us(free, first) + int(drift * total)), total)
    assert plan(total, now, platform, previous=first, running=True) == first


@given(enough, platforms, wished)
def test_plan_holds_its_longest_request_and_its_pages_and_every_wish(
    memory: tuple[int, int], platform: str, wishes: Plan
) -> None:
    found = plan(*memory, platform, wishes=wishes)
    assert found["fits"] or (found["problem"] and found["fix"])
    assume(found["fits"])
    assert found["kv_tokens"] >= found["max_model_len"]
    assert found["kv_tokens"] >= found["max_num_seqs"] * min(7500, found["max_model_len"])
    assert found["max_model_len"] > found["max_pixels"] / 784 + 256
    assert {key: found[key] for key in wishes} == wishes


@given(enough, wished, st.booleans(), st.floats(-4, 8), st.floats(0, 4), st.integers(-800, 800))
def test_plan_changes_once_for_a_card_that_is_not_as_we_think(
    memory: tuple[int, int], wishes: Plan, running: bool, more: float, per_large_image: float, drift: int
) -> None:
    # An encoder that takes more than we think takes the most with large images.
    def real(found: Plan) -> float:
        return more - per_large_image * int(found["max_pixels"]) / 11_289_600

    total, free = memory
    first = plan(total, free, wishes=wishes)
    assume(first["fits"])
    plans = [first]
    for _ in range(4):
        memory_now = {"total": total, "free": min(total, max(0, free + drift)) if running else free}
        assume(card(plans[-1], real(plans[-1]))["kv_tokens"] > 0)  # a server without any does not start
        plans.append(deploy_again(plans[-1], real(plans[-1]), running, **memory_now, wishes=wishes))
    assert all(found["fits"] for found in plans)
    limits = [tuple(found[key] for key in ("gpu_memory_utilization", *LIMITS)) for found in plans]
    settled = 2 if per_large_image == 0 else 3
    assert limits[-1] == limits[settled - 1 if per_large_image == 0 else settled]
    assert json.dumps(plans[-1]) == json.dumps(plans[settled])


@given(memories, platforms, wished)
def test_plan_survives_a_json_file(memory: tuple[int, int], platform: str, wishes: Plan) -> None:
    found = plan(*memory, platform, wishes=wishes)
    text = json.dumps(found)
    assert json.loads(text) == found
    if found["fits"]:
        again = plan(*memory, platform, wishes=wishes, previous=json.loads(text))
        assert json.dumps(again) == text

"""Tests of the action plugin nvidia_driver_plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.dots_ocr.deploy.plugins.action import nvidia_driver_plan

from tests.unit.plugins.modules.test_nvidia_driver_plan import GOOD_DRIVER, GPU, NO_DRIVER, host

WISHES = {"branch": "auto", "package_version": "", "source": "auto"}
OLD = {"loaded": "550.1", "installed": "550.1"}


def asks(driver: dict[str, Any], wishes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> bool:
    """Tell whether the module runs; if it does not, the plan must be to do nothing."""
    driver = {**GOOD_DRIVER, "ours": False, "reboot_wanted_by": [], **driver}
    machine = host(**{"driver": driver, "gpus": [GPU], "nvidia_smi": "/usr/bin/nvidia-smi", **changes})
    monkeypatch.setattr(nvidia_driver_plan.ActionBase, "run", lambda *_: {})
    action = object.__new__(nvidia_driver_plan.ActionModule)
    action._task = SimpleNamespace(args={"host": machine, **WISHES, **wishes})
    action._execute_module = lambda task_vars: {"by": "the module"}
    plan = action.run(None, {})
    if plan == {"by": "the module"}:
        return True
    assert (plan["install"], plan["faults"], plan["missing"], plan["reboot"]) == (False, [], [], "")
    return False


@pytest.mark.parametrize("wishes", [{}, {"branch": "570"}, {"branch": 570}, {"package_version": "580.173.02"}])
def test_good_driver_of_others_needs_no_module(wishes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asks({}, wishes, monkeypatch)


@pytest.mark.parametrize(
    ("driver", "wishes", "changes"),
    [
        ({"ours": True}, {}, {}),
        (NO_DRIVER, {}, {"gpus": []}),
        (OLD, {}, {}),  # refused, with its fix
        ({}, {"branch": "590"}, {}),
        ({}, {"branch": "newest"}, {}),
        ({"flavour": "proprietary", "loaded_flavour": "proprietary"}, {}, {}),
        ({"installed": "580.180.01"}, {}, {}),  # a reboot is due
        ({"loaded": ""}, {}, {}),
        ({"reboot_wanted_by": ["nvidia-utils-580"]}, {}, {}),
        ({}, {}, {"gpus": []}),  # it does not work
        ({}, {}, {"platform": "container"}),
    ],
)
def test_all_else_is_for_the_module(
    driver: dict[str, Any], wishes: dict[str, str], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asks(driver, wishes, monkeypatch, **changes)

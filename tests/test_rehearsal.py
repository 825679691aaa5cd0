"""The rehearsal's own promises."""

from __future__ import annotations

import subprocess

from rehearsal import hosts


def test_tiny_model_is_what_its_sources_make() -> None:
    assert hosts.MODEL_SOURCES.read_text().strip() == hosts.model_sources(), "run '.venv/bin/python -m rehearsal train'"


def test_host_that_does_not_run_is_unreachable() -> None:
    """So that playbooks wait for one that boots, and go on without one that is gone."""
    command = ["ansible", "--inventory=nowhere,", "--connection=docker", "--module-name=ansible.builtin.ping", "all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # engine.py has set the environment
    assert "UNREACHABLE!" in done.stdout
    assert "the host nowhere does not run on this machine" in done.stdout

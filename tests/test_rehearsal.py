"""The rehearsal's own promises."""

from __future__ import annotations

import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from rehearsal import hosts

CONNECTION = Path(__file__).resolve().parent.parent / "rehearsal/connection/docker.py"


def test_tiny_model_is_what_its_sources_make() -> None:
    assert hosts.MODEL_SOURCES.read_text().strip() == hosts.model_sources(), "run '.venv/bin/python -m rehearsal train'"


def test_host_that_does_not_run_is_unreachable() -> None:
    """So that playbooks wait for one that boots, and go on without one that is gone."""
    command = ["ansible", "--inventory=nowhere,", "--connection=docker", "--module-name=ansible.builtin.ping", "all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # engine.py has set the environment
    assert "UNREACHABLE!" in done.stdout
    assert "the host nowhere does not run on this machine" in done.stdout


def test_command_that_a_host_stops_as_it_shuts_down_goes_on() -> None:
    spec = spec_from_file_location("docker_connection", CONNECTION)
    assert spec
    assert spec.loader
    connection = module_from_spec(spec)
    spec.loader.exec_module(connection)
    with subprocess.Popen(["sh", "-c", "kill -STOP $$; echo on"], stdout=subprocess.PIPE) as running:
        connection.let_go_on(running)
        assert running.communicate(timeout=20)[0] == b"on\n"

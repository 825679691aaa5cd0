"""The rehearsal's own promises."""

from __future__ import annotations

import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from rehearsal import engine, hosts, rehearse

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


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine have none of the programs and files that packages bring."""
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("pathlib.Path.exists", lambda _: False)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("system", ["debian", "ubuntu"])
def test_rehearsal_installs_nothing_that_only_the_tests_need(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": system})
    wanted, tested = set(engine.packages()), set(engine.packages(tests=True))
    browser = {"chromium", "chromium-driver"} if system == "debian" else set()  # Ubuntu has a snap in its place
    fonts = {"fonts-dejavu-core", "fonts-wqy-microhei"}
    languages = {"tesseract-ocr-rus", "tesseract-ocr-chi-sim"}
    assert tested - wanted == {"haproxy", "prometheus", "poppler-utils", *fonts, *languages, *browser}
    assert {"mmdebstrap", "docker.io", "tesseract-ocr"} <= wanted


def test_services_of_packages_neither_start_nor_stay_enabled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    units, policy, calls = {"ssh.service"}, tmp_path / "policy-rc.d", []
    monkeypatch.setattr(engine, "POLICY", policy)
    monkeypatch.setattr(engine, "packages", lambda **_: ["haproxy"])
    monkeypatch.setattr(engine, "_enabled_units", units.copy)
    monkeypatch.setattr(engine, "output", lambda *words: calls.append(words))

    def install(*words: str, **_: object) -> None:
        if "install" in words:
            assert subprocess.run([policy, "haproxy", "start"], check=False).returncode == 101
            units.add("haproxy.service")

    monkeypatch.setattr(engine, "run", install)
    engine.install_packages(tests=True)
    assert calls == [("systemctl", "disable", "--quiet", "haproxy.service")]
    assert not policy.exists()


def test_rehearsal_says_which_step_of_how_many_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    seconds = rehearse.take({"dig": lambda: done.append("dug"), "sow": lambda: done.append("sown")})
    assert done == ["dug", "sown"]
    assert len(seconds) == 2
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("==>")] == ["==> step 1 of 2: dig", "==> step 2 of 2: sow"]

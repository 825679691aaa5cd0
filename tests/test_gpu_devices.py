"""The module gpu_devices: the throwaway program, and when a specification is stale. The rest runs on hosts."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "plugins/modules/gpu_devices.py"
spec = importlib.util.spec_from_file_location("gpu_devices", FILE)
assert spec
assert spec.loader
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

# As nvidia-ctk writes it; a node that has another place on the host says so.
YAML = """
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  - path: /dev/nvidia0
    hostPath: /dev/null
  mounts:
  - containerPath: /usr/lib/libcuda.so.{version}
    hostPath: {library}
  hooks:
  - hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
"""


@pytest.mark.parametrize(("path", "status"), [("/dev/null", 0), ("/dev/there-is-none", 2), ("/", 21)])
def test_program_opens_what_it_is_told_to_and_exits_with_the_error(tmp_path: Path, path: str, status: int) -> None:
    program = tmp_path / "open"
    program.write_bytes(module.program())
    program.chmod(0o755)
    assert subprocess.run([program, path], check=False).returncode == status


def test_image_holds_the_program_and_a_folder() -> None:
    with tarfile.open(fileobj=io.BytesIO(module.image())) as archive:
        assert archive.getnames() == ["etc", "open"]
        assert archive.getmember("open").mode == 0o755


def test_files_on_the_host_are_those_that_the_specification_takes_from_it() -> None:
    text = YAML.format(version="580.65.06", library="/usr/lib/libcuda.so.580.65.06")
    assert module.host_files(text) == ["/dev/nvidiactl", "/dev/null", "/usr/lib/libcuda.so.580.65.06"]


def test_specification_in_json_is_read_too() -> None:
    text = '{"deviceNodes": [{"path": "/dev/nvidia0", "hostPath": "/dev/null"}], "mounts": [{"hostPath": "/usr/x"}]}'
    assert module.host_files(text) == ["/dev/null", "/usr/x"]


def test_specification_that_names_a_missing_file_is_stale(tmp_path: Path) -> None:
    text = f"hostPath: {tmp_path}/libcuda.so.1.1\n"
    assert module.why_stale(text, "") == f"it names {tmp_path}/libcuda.so.1.1, which is gone"
    (tmp_path / "libcuda.so.1.1").touch()
    assert module.why_stale(text, "") == ""


def test_specification_for_another_driver_than_the_loaded_one_is_stale(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.580.65.06"
    library.touch()
    text = f"hostPath: {library}\n"
    assert module.why_stale(text, "580.65.06") == ""
    assert module.why_stale(text, "580.173.02") == "it is for the driver 580.65.06, loaded is 580.173.02"


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("path: /dev/nvidiactl\npath: /dev/nvidia1\n", "/dev/nvidia1"),
        ("path: /dev/dxg\n", "/dev/dxg"),
        ("", "/dev/nvidiactl"),
    ],
)
def test_node_to_open_is_one_that_a_container_gets(text: str, node: str) -> None:
    assert module.node(text) == node


@pytest.mark.parametrize(
    ("message", "cure"),
    [
        ('could not select device driver "cdi" with capabilities: []', "run the role docker_engine"),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all", "/var/run/cdi"),
        ("Cannot connect to the Docker daemon", "systemctl status docker.service"),
        ("write: No space left on device", "free some space"),
        ("anything else", "journalctl -u docker.service"),
    ],
)
def test_message_of_the_engine_gets_a_cure(message: str, cure: str) -> None:
    text = module.explain(message, "nvidia.com/gpu=all")
    assert message in text
    assert cure in text.split("Cure:")[1]

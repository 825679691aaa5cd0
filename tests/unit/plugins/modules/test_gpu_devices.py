"""The module gpu_devices: the throwaway program, and when a specification is stale. The rest runs on hosts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.dots_ocr.deploy.plugins.modules import gpu_devices as module

FILE = Path(__file__).resolve().parents[4] / "plugins/modules/gpu_devices.py"

Run = Callable[..., subprocess.CompletedProcess[str]]

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
    ("message", "fix"),
    [
        ('could not select device driver "cdi" with capabilities: []', "run the role docker_engine"),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all", "/var/run/cdi"),
        ("Cannot connect to the Docker daemon", "systemctl status docker.service"),
        ("write: No space left on device", "free some space"),
        ("anything else", "journalctl -u docker.service"),
    ],
)
def test_message_of_the_engine_gets_a_fix(message: str, fix: str) -> None:
    text = module.explain(message, "nvidia.com/gpu=all")
    assert message in text
    assert fix in text.split("Fix:")[1]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the two folders of specifications, the later of which wins."""
    own, run = tmp_path / "etc", tmp_path / "run"
    own.mkdir()
    run.mkdir()
    monkeypatch.setattr(module, "OWN_SPECIFICATIONS", own)
    monkeypatch.setattr(module, "SPECIFICATION", run / "nvidia.yaml")
    return own, run


CDI_YAML = 'cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: "0"\n- name: all\n  containerEdits: {}\n'
CDI_JSON = '{"cdiVersion": "0.7.0", "kind": "nvidia.com/gpu", "devices": [{"name": "0"}, {"name": "all"}]}'


class TestRivals:
    """Specifications that have the same device."""

    @pytest.mark.parametrize("other", [CDI_YAML, CDI_JSON])
    @pytest.mark.parametrize("device", ["nvidia.com/gpu=all", "nvidia.com/gpu=0"])
    def test_two_in_one_folder(self, folders: tuple[Path, Path], other: str, device: str) -> None:
        local = folders[1] / f"nvidia-local.{'json' if other == CDI_JSON else 'yaml'}"
        module.SPECIFICATION.write_text(CDI_YAML)
        local.write_text(other)
        assert module.rivals(device) == sorted([module.SPECIFICATION, local])
        text = module.explain(f"CDI device injection failed: unresolvable CDI devices {device}", device)
        assert f"both have the device {device}, so neither counts. Fix: remove {local}, which" in text

    def test_two_of_others_in_their_folder(self, folders: tuple[Path, Path]) -> None:
        for name in ("a.yaml", "b.yaml"):
            (folders[0] / name).write_text(CDI_YAML)
        assert f"Fix: remove {folders[0] / 'b.yaml'}, which" in module.explain_rivals(
            "x", module.rivals("nvidia.com/gpu=all")
        )

    def test_none(self, folders: tuple[Path, Path]) -> None:
        module.SPECIFICATION.write_text(CDI_YAML)
        (folders[0] / "nvidia.yaml").write_text(CDI_YAML)  # the later folder wins
        for name in ("notes.txt", "nvidia.yml", "nvidia.yaml.bak"):  # none to those who read specifications
            (folders[1] / name).write_text(CDI_YAML)
        (folders[1] / "other.yaml").write_text(CDI_YAML.replace("nvidia.com/gpu", "nvidia.com/mig"))
        (folders[1] / "single.yaml").write_text(
            CDI_YAML.replace("name: all", "name: all-but-one").replace('"0"', "GPU-1")
        )
        assert module.rivals("nvidia.com/gpu=all") == []


@pytest.mark.parametrize("name", ["nvidia.yml", "nvidia.yaml.bak"])
def test_only_specifications_are_blamed(folders: tuple[Path, Path], name: str) -> None:
    (folders[0] / name).write_text("hostPath: /there/is/none\n")
    assert f"remove {folders[0]}" not in module.explain("anything else", "nvidia.com/gpu=all")
    (folders[0] / "nvidia.yaml").write_text("hostPath: /there/is/none\n")
    assert f"remove {folders[0]}/nvidia.yaml" in module.explain("anything else", "nvidia.com/gpu=all")


SILENT = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
NO_LIBRARY = "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system."
MISSING = "/bin/sh: 1: /usr/sbin/nvidia-smi: not found\nsh: line 1: /usr/lib/wsl/lib/nvidia-smi: not found\n"
SANDBOX = (
    'time="2026-11-29T10:00:00Z" level=warning msg="Failed to init nvsandboxutils: ERROR_LIBRARY_LOAD; ignoring"\n'
    'time="2026-11-29T10:00:00Z" level=info msg="Auto-detected mode as \\"nvml\\""\n'
)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "nothing was said"),
        # nvidia-smi comes first, looked for in three places.
        (f"{MISSING}{SILENT}\n", SILENT),
        (f"{SILENT}\n{MISSING}", SILENT),
        (f"{NO_LIBRARY}\nPlease also try adding its directory to your PATH.\n{MISSING}",
         NO_LIBRARY),
        (f"Unable to determine the device handle for GPU0: GPU is lost.\n{MISSING}",
         "Unable to determine the device handle for GPU0: GPU is lost."),
        (f"GPU 0: Error Free GTX (UUID: GPU-1)\n{SANDBOX}time=x level=fatal msg=denied\n", "denied"),
        (f"GPU 0: Error Free GTX (UUID: GPU-1)\nWARNING: infoROM is corrupted at gpu 0000:01:00.0\n{MISSING}",
         "WARNING: infoROM is corrupted at gpu 0000:01:00.0"),
        (f'{SANDBOX}time="x" level=error msg="failed to initialize NVML: ERROR_LIBRARY_NOT_FOUND"\n{SANDBOX}',
         "failed to initialize NVML: ERROR_LIBRARY_NOT_FOUND"),
        (f'{SANDBOX}time="x" level=error msg="cannot write \\"/x\\": denied"\n', 'cannot write "/x": denied'),
        (f"Failed to initialize NVML: Driver/library version mismatch\n{SANDBOX}",
         "Failed to initialize NVML: Driver/library version mismatch"),
        (f"{SANDBOX}No devices were found\n", "No devices were found"),
        ("nvidia-cdi-refresh.service: Failed with result 'exit-code'.\nsystemd[1]: Failed to start x.\n",
         "nothing was said"),
        (SANDBOX, "Failed to init nvsandboxutils: ERROR_LIBRARY_LOAD; ignoring"),
    ],
)  # fmt: skip
def test_error_of_the_tool_is_told_from_its_warnings(said: str, why: str) -> None:
    assert module.why_it_failed(said) == why


@pytest.mark.parametrize(
    ("state", "cause", "fix"),
    [
        ("Result=success\nConditionResult=yes", "", ""),
        ("Result=exit-code\nConditionResult=yes", "", ""),
        ("Result=success\nConditionResult=no", "nvidia-smi is in none of the places", "nvidia-smi is in /usr/bin"),
        ("Result=exec-condition\nConditionResult=no", "modules.dep names no nvidia module", "reboot"),
    ],
)
def test_skipped_unit_says_which_condition_did_not_hold(state: str, cause: str, fix: str) -> None:
    told = module.why_skipped(state)
    assert bool(told) == bool(cause)
    assert cause in told.partition("Fix:")[0]
    assert fix in told.partition("Fix:")[2]


STAND_INS = FILE.parents[2] / "rehearsal"


@pytest.fixture
def ctk(folders: tuple[Path, Path], tmp_path: Path) -> Run:
    """Return the stand-in of nvidia-ctk, with its places below a folder of the test; a GPU answers."""
    places = {"/usr/bin/nvidia-smi": tmp_path / "nvidia-smi", "/etc/stand-in-gpu.json": tmp_path / "gpu.json",
              "/etc/cdi": folders[0], "/var/run/cdi": folders[1], "/dev/dxg": tmp_path / "dxg",
              "/usr/lib/wsl": tmp_path, "/run/stand-in-gpu": tmp_path / "taken"}  # fmt: skip
    package = STAND_INS / "apt/libnvidia-container/packages/nvidia-container-toolkit-base"
    for source in (STAND_INS / "host/root/usr/bin/nvidia-smi", package / "usr/bin/nvidia-ctk"):
        text = source.read_text()
        for old, new in places.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        (tmp_path / source.name).write_text(text)
        (tmp_path / source.name).chmod(0o755)
    (tmp_path / "gpu.json").write_bytes((STAND_INS / "host/root/etc/stand-in-gpu.json").read_bytes())

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "nvidia-ctk"), "cdi", *words]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)

    return run


class TestRealTool:
    """What NVIDIA's tool of 1.20.0 writes and says, by its stand-in."""

    def test_specification_of_a_card(self, ctk: Run) -> None:
        assert ctk("generate", f"--output={module.SPECIFICATION}").returncode == 0
        text = module.SPECIFICATION.read_text()
        spec = yaml.safe_load(text)
        hooks = {hook["args"][1] for hook in spec["containerEdits"]["hooks"]}
        assert hooks == {"create-symlinks", "update-ldcache", "disable-device-node-modification", "enable-cuda-compat",
                         "update-application-profile"}  # fmt: skip
        names = ["0", "GPU-00000000-0000-0000-0000-000000000000", "all"]
        assert [entry["name"] for entry in spec["devices"]] == names
        assert ctk("list").stdout.split() == [f"nvidia.com/gpu={name}" for name in names]
        assert list(spec) == sorted(spec)
        assert module.node(text) == "/dev/nvidia0"
        assert "/usr/bin/nvidia-cdi-hook" not in module.host_files(text)
        assert "/dev/nvidiactl" not in module.host_files(text)

    def test_specification_of_wsl(self, ctk: Run, tmp_path: Path) -> None:
        (tmp_path / "dxg").touch()
        (tmp_path / "lib").mkdir()
        (tmp_path / "nvidia-smi").rename(tmp_path / "lib/nvidia-smi")
        assert ctk("generate", f"--output={module.SPECIFICATION}").returncode == 0
        spec = yaml.safe_load(module.SPECIFICATION.read_text())
        assert [entry["name"] for entry in spec["devices"]] == ["all"]
        hooks = [hook["args"][1] for hook in spec["containerEdits"]["hooks"]]
        assert hooks == ["create-symlinks", "update-ldcache"]

    def test_disabled_hooks(self, ctk: Run) -> None:
        for disabled, left in (("enable-cuda-compat", 4), ("all", 0)):
            environment = {module.DISABLED_HOOKS: disabled}
            assert ctk("generate", f"--output={module.SPECIFICATION}", **environment).returncode == 0
            assert module.SPECIFICATION.read_text().count("hookName") == left

    def test_devices_that_two_specifications_have(
        self,
        ctk: Run,
        folders: tuple[Path, Path],
    ) -> None:
        ctk("generate", f"--output={module.SPECIFICATION}")
        (folders[1] / "local.yaml").write_text(module.SPECIFICATION.read_text())
        said = ctk("list")
        assert said.stdout == ""
        assert 'level=warning msg="The following registry errors were reported:"' in said.stderr
        for device in ("0", "GPU-00000000-0000-0000-0000-000000000000", "all"):
            assert f'conflicting device \\"nvidia.com/gpu={device}\\"' in said.stderr
            assert module.rivals(f"nvidia.com/gpu={device}") == sorted(
                [module.SPECIFICATION, folders[1] / "local.yaml"]
            )

    def test_later_folder_wins_but_brings_back_nothing(
        self,
        ctk: Run,
        folders: tuple[Path, Path],
    ) -> None:
        module.SPECIFICATION.write_text(CDI_YAML)
        (folders[0] / "nvidia.yaml").write_text(CDI_YAML)
        assert "nvidia.com/gpu=all" in ctk("list").stdout.split()
        (folders[0] / "local.yaml").write_text(CDI_YAML)
        assert "nvidia.com/gpu=all" not in ctk("list").stdout.split()
        assert module.rivals("nvidia.com/gpu=all") == [folders[0] / "local.yaml", folders[0] / "nvidia.yaml"]


@pytest.mark.parametrize(
    ("status", "listed", "said", "why"),
    [
        (1, "", f'{SANDBOX}time="x" level=warning msg="The following registry errors were reported:"\n'
                'time="x" level=warning msg="/etc/cdi/a.yaml: [failed to load CDI Spec]"\n', SILENT),
        (0, "", f'{SANDBOX}time="x" level=warning msg="The following registry errors were reported:"\n'
                'time="x" level=warning msg="/etc/cdi/a.yaml: [failed to load CDI Spec]"\n'
                'time="x" level=info msg="Found 0 CDI devices"\n', "/etc/cdi/a.yaml: [failed to load CDI Spec]"),
        (1, "nvidia.com/gpu=all", SANDBOX, f"is stale (old) and cannot be rewritten ({SILENT})"),
    ],
)  # fmt: skip
def test_refresh_says_who_knows_why(
    status: int, listed: str, said: str, why: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"restart": (status, "", ""), "list": (0, listed, said), "InvocationID": (0, "1", ""),
               "ConditionResult": (0, "Result=success\nConditionResult=yes", ""), "journalctl": (0, SILENT, ""),
               "reset-failed": (0, "", "")}  # fmt: skip

    def ask(_: Any, *command: str) -> tuple[int, str, str]:
        return next(answer for word, answer in answers.items() if word in " ".join(command))

    monkeypatch.setattr(module.Devices, "ask", ask)
    devices = module.Devices({"device": "nvidia.com/gpu=all", "disabled_hooks": []}, check=False)
    with pytest.raises(module.Problem) as told:
        devices.refresh("old")
    assert why in str(told.value)


HOOKS = ["enable-cuda-compat"]
OURS = f"{module.MARK}\nNVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS="


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{OURS}enable-cuda-compat\n"),
        ("NVIDIA_CTK_DEBUG=1\n", f"NVIDIA_CTK_DEBUG=1\n{OURS}enable-cuda-compat\n"),
        ("NVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS=a,b\n",
         f"NVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS=a,b\n{OURS}a,b,enable-cuda-compat\n"),
        ('# mine\nNVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS="a"\n',
         f'# mine\nNVIDIA_CTK_CDI_GENERATE_DISABLED_HOOKS="a"\n{OURS}a,enable-cuda-compat\n'),
    ],
)  # fmt: skip
def test_hook_is_switched_off_beside_what_the_host_has(before: str, after: str) -> None:
    assert module.environment(before, HOOKS) == after
    assert module.environment(after, HOOKS) == after
    assert module.environment(after, []) == before

"""Each profile's command line, rendered by Ansible and parsed by the vLLM version that the profile is for.

vLLM 0.32 is the rehearsal's image. Another one, vllm-VERSION.txt, is laid over that image: enough for its parser.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rehearsal import images
from rehearsal.engine import LABEL, STATE
from rehearsal.shell import fingerprint, run, step

HERE = Path(__file__).resolve().parent
ROLE = HERE.parent.parent / "roles/dots_ocr_server"
FILES = sorted((ROLE / "profiles").glob("*.yml"))
PROFILES = sorted(re.findall(r"^(native_\w+):", "\n".join(file.read_text() for file in FILES), re.MULTILINE))

# Unlike every default, so that a default cannot pass for them.
PLAN = {
    "gpu_memory_utilization": 0.77,
    "max_model_len": 20480,
    "max_num_seqs": 7,
    "max_pixels": 9031680,
    "max_num_queued_reqs": 23,
    "api_server_count": 2,
}
DIAGNOSES = json.loads((ROLE / "files/diagnoses.json").read_text())
SETTINGS = {
    "_dots_ocr_server_limits": PLAN,
    "_dots_ocr_server_remedies": [known["remedy"] for known in DIAGNOSES if "remedy" in known],
    "dots_ocr_server_model_names": ["first", "second/name"],
    "dots_ocr_server_extra_args": ["--seed=42"],
    "dots_ocr_server_shutdown_timeout": 71,
    "dots_ocr_server_fp8": True,
    "dots_ocr_server_tls_certificate": "/etc/ssl/certificate.pem",
}
RENDERED = """{{ {
    'arguments': _dots_ocr_server_arguments,
    'environment': _dots_ocr_server_known.environment
        | combine(_dots_ocr_server_known.environment_from_compute_capability_12),
    'metrics': _dots_ocr_server_known.metrics,
    'tags': _dots_ocr_server_known.tags | map(attribute='tag')
} | to_json }}"""


@dataclass(frozen=True)
class Profile:
    """A profile as the role renders it, and its vLLM, which takes a question and returns what ask_vllm.py answers."""

    version: str
    tags: list[str]
    arguments: list[str]
    environment: dict[str, str]
    metrics: list[str]
    vllm: Callable[..., dict[str, Any]]


def render(name: str, folder: Path) -> dict[str, Any]:
    """Let Ansible render what the profile makes of SETTINGS and of the role's variables."""
    files = [ROLE / "defaults/main.yml", ROLE / "vars/main.yml", *FILES]
    target = folder / "rendered.json"
    copy = {"content": RENDERED, "dest": str(target), "mode": "0600"}
    command = ["ansible", "localhost", "--inventory", "localhost,", "--connection", "local"]
    command += ["--module-name", "ansible.builtin.copy", "--args", json.dumps(copy)]
    chosen = {"_dots_ocr_server_known": f"{{{{ {name} }}}}", "ansible_python_interpreter": sys.executable}
    settings = json.dumps({**SETTINGS, **chosen})
    for variables in (*(f"@{file}" for file in files), settings):
        command += ["--extra-vars", variables]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    rendered: dict[str, Any] = json.loads(target.read_text())
    return rendered


def overlay(requirements: Path) -> Path:
    """Return a folder with these wheels unpacked; they are downloaded once."""
    folder = STATE / "vllm-parsers" / f"{requirements.stem}-{fingerprint(requirements)}"
    if not folder.exists():
        with step(f"download what {requirements.name} names"):
            growing = folder.with_name("growing")
            shutil.rmtree(growing, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=STATE) as wheels:
                run(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", *images.pip_platform_options(),
                    "--require-hashes", "--requirement", requirements, "--dest", wheels)  # fmt: skip
                for wheel in map(zipfile.ZipFile, Path(wheels).iterdir()):
                    # vLLM's libraries are large, made for another torch than the image's, and nothing a parser needs.
                    # Its metadata would say that it is made for CUDA, which it then looks for.
                    unwanted = re.compile(r"vllm/.*\.so|vllm-[^/]*\.dist-info/.*")
                    wheel.extractall(growing, (name for name in wheel.namelist() if not unwanted.fullmatch(name)))
            growing.rename(folder)
    return folder


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
    """Render the profile, and keep its vLLM at hand for the tests of this profile."""
    rendered = render(request.param, tmp_path_factory.mktemp("rendered"))
    version = ".".join(re.findall(r"\d+", request.param)[:2])
    name = f"test-command-line-{version}"
    subprocess.run(["docker", "rm", "--force", name], check=True)
    command = ["docker", "run", "--rm", "--name", name, "--interactive", "--pull", "never", "--network", "none"]
    command += ["--label", LABEL]
    command += ["--volume", f"{HERE}/ask_vllm.py:/ask_vllm.py:ro", "--entrypoint", "python3"]
    requirements = HERE / f"vllm-{version}.txt"
    if requirements.exists():
        command += ["--volume", f"{overlay(requirements)}:/overlay:ro", "--env", "PYTHONPATH=/overlay"]
    command += [images.vllm(), "/ask_vllm.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def vllm(arguments: list[str], environment: tuple[str, ...] = (), metrics: tuple[str, ...] = ()) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            question = {"arguments": arguments, "environment": environment, "metrics": metrics}
            process.stdin.write(json.dumps(question) + "\n")
            return json.loads(process.stdout.readline() or pytest.fail("vLLM's parser does not answer, see above"))

        metrics = re.findall(r"vllm:\w+", json.dumps(rendered["metrics"]))
        yield Profile(version, rendered["tags"], rendered["arguments"], rendered["environment"], metrics, vllm)


def replaced(arguments: list[str], old: str, new: str) -> list[str]:
    """Return the arguments with one option renamed."""
    changed = [re.sub(rf"^{old}(?==|$)", new, argument) for argument in arguments]
    assert changed != arguments
    return changed


def test_command_line_is_accepted(profile: Profile) -> None:
    answer = profile.vllm(profile.arguments)
    assert answer["message"] == ""
    assert answer["status"] == 0


def test_parser_is_of_the_version_that_the_profile_is_for(profile: Profile) -> None:
    version = profile.vllm(profile.arguments)["version"]
    assert version.startswith(f"{profile.version}.")
    assert {tag.split("-")[0] for tag in profile.tags} == {f"v{version}"}


def test_values_arrive_as_meant(profile: Profile) -> None:
    values = profile.vllm(profile.arguments)["values"]
    for name in PLAN.keys() & values.keys():  # an older version lacks some
        assert (name, values[name]) == (name, PLAN[name])
    assert values["model_tag"] == "/models/DotsOCR"
    assert values["served_model_name"] == SETTINGS["dots_ocr_server_model_names"]
    assert values["shutdown_timeout"] == SETTINGS["dots_ocr_server_shutdown_timeout"]
    assert values["ssl_certfile"] == "/run/secrets/tls/certificate.pem"
    assert values["ssl_keyfile"] == "/run/secrets/tls/key.pem"
    assert values["seed"] == 42
    assert values["quantization"] == "fp8"
    assert values["mm_processor_kwargs"]["max_pixels"] == PLAN["max_pixels"]
    assert values["limit_mm_per_prompt"] == {"image": 1, "video": 0}
    assert values["chat_template_content_format"] == "string"
    assert values["allowed_media_domains"] == ["invalid.invalid"]
    assert values["enable_prefix_caching"] is False
    assert values["middleware"] == ["dots_ocr_gate.Gate"]


def test_renamed_flag_is_refused(profile: Profile) -> None:
    answer = profile.vllm(replaced(profile.arguments, "--max-num-seqs", "--max-number-seqs"))
    assert answer["status"] == 2
    assert "unrecognized arguments: --max-number-seqs=7" in answer["message"]


def test_value_of_the_wrong_kind_is_refused(profile: Profile) -> None:
    answer = profile.vllm([*profile.arguments, "--limit-mm-per-prompt={image:1}"])
    assert answer["status"] == 2
    assert "--limit-mm-per-prompt" in answer["message"]


def test_no_flag_is_shortened(profile: Profile) -> None:
    """The parser takes any unambiguous beginning of a flag, until a new flag makes it ambiguous."""
    assert profile.vllm(profile.arguments)["shortened"] == []
    shortened = replaced(profile.arguments, "--max-model-len", "--max-model-l")
    answer = profile.vllm(shortened)
    assert (answer["status"], answer["shortened"]) == (0, ["--max-model-l"])


def test_environment_is_known(profile: Profile) -> None:
    """VLLM ignores a variable that it does not know."""
    names = [name for name in profile.environment if name.startswith("VLLM_")]
    answer = profile.vllm(profile.arguments, (*names, "VLLM_API_KEY", "VLLM_GPU_MEMORY_UTILIZATION"))
    assert answer["unknown_environment"] == ["VLLM_GPU_MEMORY_UTILIZATION"]


def test_metrics_are_known(profile: Profile) -> None:
    answer = profile.vllm(profile.arguments, metrics=(*profile.metrics, "vllm:request_success_total", "vllm:invented"))
    assert answer["unknown_metrics"] == ["vllm:invented"]

"""The application reads with the server, through its own names, and gets its own files back."""

import json

import pytest
from testinfra.host import Host

FOLDER = "/home/oleg/chatvlmllm"
GOLDEN = "/usr/local/lib/dots-ocr/golden/page"
MODULES = (
    "vllm_dots_ocr_client.py",
    "models/dots_ocr_vllm_integration.py",
    "vllm_streamlit_adapter.py",
    "single_container_manager.py",
    "quick_vllm_test.py",
)


def as_oleg(host: Host, command: str) -> str:
    """Run a command in the checkout as the application's user; return what it prints."""
    words = f"cd {FOLDER} && {command}"
    output: str = host.check_output("runuser -u oleg -- sh -c %s", words)
    return output


def test_application_reads_a_page_with_the_server(host: Host) -> None:
    page = json.loads(as_oleg(host, f".venv/bin/python example_chatvlm_usage.py {GOLDEN}.png"))
    expected = host.file(f"{GOLDEN}.txt").content_string.split()
    completion = page["completion"]
    assert completion["usage"]["method"] == "vllm"
    assert completion["choices"][0]["message"]["content"].split() == expected
    assert page["file"]["method"] == "vllm"
    assert page["file"]["content"].split() == expected


@pytest.mark.parametrize("module", MODULES)
def test_originals_are_kept(host: Host, module: str) -> None:
    backup = host.file(f"{FOLDER}/{module}.before-dots-ocr")
    assert "# Written by dots-ocr-deploy" not in backup.content_string
    assert backup.user == "oleg"
    assert "dots_ocr_client_installed.chatvlmllm" in host.file(f"{FOLDER}/{module}").content_string


def test_key_can_be_read_by_the_owner_alone(host: Host) -> None:
    environment = host.file(f"{FOLDER}/.dots-ocr.env")
    assert (environment.user, environment.mode) == ("oleg", 0o600)
    key = host.file("/etc/dots-ocr/api-key").content_string.strip()
    assert f"DOTS_OCR_API_KEY={key}\n" in environment.content_string
    found = host.run("grep --recursive --files-with-matches -e %s %s", key, FOLDER)
    assert found.stdout.split() == [f"{FOLDER}/.dots-ocr.env"]


def test_git_does_not_see_key_and_backups(host: Host) -> None:
    lines = host.file(f"{FOLDER}/.git/info/exclude").content_string.splitlines()
    assert lines[0] == "*.orig"
    assert {"/.dots-ocr.env", "/requirements-dots-ocr.txt", "*.before-dots-ocr"} <= set(lines)


def test_page_needs_no_cuda_compiler(host: Host) -> None:
    lines = host.file(f"{FOLDER}/requirements-dots-ocr.txt").content_string.splitlines()
    assert lines[1:] == ["torch>=2.0.0", "streamlit>=1.28.0"]


def test_application_s_own_client_can_still_be_imported(host: Host) -> None:
    words = "from dots_ocr_client import DotsOCRClient; print(DotsOCRClient)"
    assert "dots_ocr_client.DotsOCRClient" in as_oleg(host, f".venv/bin/python -c '{words}'")


def test_everything_belongs_to_the_owner_of_the_checkout(host: Host) -> None:
    assert host.check_output("find %s ! -user oleg", FOLDER) == ""


def test_nothing_else_is_left_on_the_host(host: Host) -> None:
    assert host.check_output("find /tmp -name 'ansible.*' -o -name 'tmp.*'") == ""

"""The API key and the contents of requests stay where they belong."""

from __future__ import annotations

import secrets

import pytest
from testinfra.host import Host

from server import Settings, ask


@pytest.fixture(scope="module")
def key(host: Host, server: Settings) -> str:
    with host.sudo():
        return str(host.check_output("cat %s", server["api_key_file"]))


def test_key_is_long_and_only_root_and_the_container_read_it(host: Host, server: Settings, key: str) -> None:
    file = host.file(server["api_key_file"])
    assert len(key) >= 32
    assert (file.user, file.group, file.mode) == ("root", "root", 0o440)


@pytest.mark.parametrize(
    ("command", "shows"),
    [
        ("docker inspect dots-ocr", "dots-ocr"),
        ("ps -A -ww -o args", "--served-model-name"),
        ("journalctl --no-pager", "dots-ocr"),
        ("systemctl show dots-ocr.service", "docker run"),
        ("cat /etc/systemd/system/dots-ocr.service", "docker run"),
        ("cat /etc/dots-ocr/server/dots-ocr.env", "HF_HUB_OFFLINE"),
    ],
)
def test_key_is_not_in(host: Host, key: str, command: str, shows: str) -> None:
    with host.sudo():
        text = host.check_output(command)
    assert shows in text
    assert key not in text


@pytest.mark.parametrize("broken", [False, True])
def test_journal_does_not_hold_what_was_asked(host: Host, server: Settings, broken: bool) -> None:
    mark = f"canary-{secrets.token_hex(8)}"
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{mark}"}}] if broken else mark
    body = {"model": server["model"], "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    status, _ = ask(host, server, "/v1/chat/completions", body=body)
    assert status == (400 if broken else 200)
    with host.sudo():
        assert mark not in host.check_output("journalctl --no-pager --since=-5min --unit='dots-ocr*'")

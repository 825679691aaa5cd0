"""The same service on a host without a GPU: its API, its unit, and what is not there."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from testinfra.host import Host

URL = "http://127.0.0.1:8000"
PAGE = "/usr/local/lib/dots-ocr/golden/page.png"
KEY_FILE = "/etc/dots-ocr/api-key"
MODEL_NAMES = ["dots.ocr", "rednote-hilab/dots.ocr", "dotsocr-model", "model", "rehearsal-model"]

# Sends a request as a client does, and prints status, headers and body as JSON.
ASK = """
import base64, json, pathlib, sys, urllib.error, urllib.request
url, key_file, image = sys.argv[1:]
data = None
if image:
    url_of_image = "data:image/png;base64," + base64.b64encode(pathlib.Path(image).read_bytes()).decode()
    text = "<|img|><|imgpad|><|endofimg|>Extract the text content from this image."
    content = [{"type": "image_url", "image_url": {"url": url_of_image}}, {"type": "text", "text": text}]
    data = json.dumps({"model": "dots.ocr", "messages": [{"role": "user", "content": content}]}).encode()
headers = {"Authorization": "Bearer " + pathlib.Path(key_file).read_text().strip()} if key_file else {}
request = urllib.request.Request(url, data, {**headers, "Content-Type": "application/json"})
try:
    answer = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read().decode()]))
"""


def ask(host: Host, path: str, *, key: bool = True, page: bool = False) -> tuple[int, dict[str, str], str]:
    words = ["python3", "-c", ASK, URL + path, KEY_FILE if key else "", PAGE if page else ""]
    status, headers, body = json.loads(host.check_output(shlex.join(words)))
    return status, headers, body


@pytest.fixture(scope="module")
def unit(host: Host) -> dict[str, Any]:
    """What systemd says of the service."""
    return dict(host.service("dots-ocr").systemd_properties)


def test_it_runs_now_and_at_boot(host: Host) -> None:
    for name in ("dots-ocr.service", "dots-ocr-watchdog@dots-ocr.timer"):
        assert host.service(name).is_running
        assert host.service(name).is_enabled


def test_it_is_ready_and_says_so(host: Host) -> None:
    verdict = json.loads(host.check_output("/usr/local/lib/dots-ocr/ready dots-ocr"))
    assert verdict["ready"], verdict
    assert "likeness 1.000" in verdict["summary"]


def test_every_name_of_the_model_is_served(host: Host) -> None:
    _, _, text = ask(host, "/v1/models")
    assert [entry["id"] for entry in json.loads(text)["data"]] == MODEL_NAMES


def test_answer_names_the_engine(host: Host) -> None:
    status, headers, text = ask(host, "/v1/chat/completions", page=True)
    assert (status, headers["x-dots-ocr-engine"]) == (200, "tesseract")
    assert json.loads(text)["dots_ocr"]["engine"] == "tesseract"


def test_request_without_the_key_is_refused(host: Host) -> None:
    assert ask(host, "/v1/models", key=False)[0] == 401
    assert ask(host, "/v1/chat/completions", key=False, page=True)[0] == 401


def test_page_for_people_needs_no_key(host: Host) -> None:
    status, headers, text = ask(host, "/", key=False)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert '<strong id="state">ready' in text


def test_owner_stops_it_until_it_is_started(host: Host) -> None:
    def state(status: int) -> str:
        done = host.run("dots-ocr-server status --json")
        assert done.rc == status, done
        return str(json.loads(done.stdout)["servers"][0]["state"])

    assert state(0) == "running"
    host.check_output("dots-ocr-server stop")
    host.check_output("systemctl start multi-user.target timers.target")  # what a boot starts
    assert state(3) == "stopped"
    assert "read the golden page" in host.check_output("dots-ocr-server start")
    assert state(0) == "running"
    assert "All is well." in host.check_output("dots-ocr-server doctor")


def test_key_is_the_hosts_own_and_stays_secret(host: Host) -> None:
    file = host.file(KEY_FILE)
    key = file.content_string.strip()
    assert len(key) >= 32
    assert (file.user, file.group, file.mode) == ("root", "root", 0o440)
    for command in ("ps -A -ww -o args", "journalctl --no-pager", "systemctl show dots-ocr.service"):
        text = host.check_output(command)
        assert "dots-ocr" in text
        assert key not in text


def test_port_is_open_on_loopback_only(host: Host) -> None:
    assert host.socket("tcp://127.0.0.1:8000").is_listening
    assert not host.socket("tcp://0.0.0.0:8000").is_listening


def test_watchdog_sees_pages_that_are_read(host: Host) -> None:
    """It restarts a server whose metrics it cannot get; without their right names it would not see pages that hang."""
    assert ask(host, "/v1/chat/completions", page=True)[0] == 200
    host.run("systemctl start --wait dots-ocr-watchdog@dots-ocr.service")
    state = json.loads(host.file("/var/lib/dots-ocr/watchdog/dots-ocr.json").content_string)
    assert (state["state"], state["restarts"]) == ("ready", 0), state
    assert state["progress"] >= 1
    assert state["successes"] >= 1


def test_process_is_confined(host: Host, unit: dict[str, Any]) -> None:
    assert unit["DynamicUser"] == "yes"
    assert unit["Restart"] == "always"
    assert unit["MemoryMax"] == str(16 << 30)
    lines = host.file(f"/proc/{unit['MainPID']}/status").content_string.splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert int(status["Uid"].split()[0]) >= 61184  # systemd's range for dynamic users
    assert int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"


def test_systemd_finds_little_to_say_against_it(host: Host) -> None:
    """Of 10.0 an unprotected service has about 9.6; what is left here is the network, and root for the watchdog."""
    for threshold, unit in ((15, "dots-ocr.service"), (20, "dots-ocr-watchdog@dots-ocr.service")):
        done = host.run(f"systemd-analyze security --no-pager --threshold={threshold} {unit}")
        assert done.rc == 0, done.stdout


def test_process_reaches_nobody(host: Host, unit: dict[str, Any]) -> None:
    assert set(unit["IPAddressDeny"].split()) == {"0.0.0.0/0", "::/0"}


def test_host_has_neither_docker_nor_weights(host: Host) -> None:
    assert not host.exists("docker")
    assert not host.exists("nvidia-ctk")
    assert not host.file("/var/lib/dots-ocr/models").exists


def test_software_is_roots_and_nothing_half_done_is_left(host: Host) -> None:
    folder = "/usr/local/lib/dots-ocr/software"
    assert host.check_output("find %s ! -user root -o ! -type l -perm /022", folder) == ""
    assert len(host.file(folder).listdir()) == 1

"""playbooks/pin.yml against a Hub and a registry of our own, and what the roles make of what it writes."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from ansible.template import Templar

from tests.templating import data_loader

REPOSITORY = Path(__file__).resolve().parent.parent
ROLES = REPOSITORY / "roles"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MANIFEST = b'{\n   "schemaVersion": 2,\n   "note": "\xc3\xa9"\n}'
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"

# What the roles take, without and with what goes before a pin.
USE = """
- hosts: ocr_servers
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: dots_ocr_model, tasks_from: look}
    - ansible.builtin.include_role: {name: dots_ocr_model, tasks_from: resolve, public: true}
    - ansible.builtin.include_role: {name: dots_ocr_server, tasks_from: show}
    # What is pinned comes last: it would take the other's place in the recap.
    - ansible.builtin.include_role: {name: dots_ocr_model, tasks_from: trusted}
      vars:
        dots_ocr_model_repository: "{{ item }}"
        dots_ocr_model_weights: {revision: "{{ _dots_ocr_model_commit }}"}
      loop: [unpinned/model, dots-studio/dots.ocr]
    - ansible.builtin.include_role: {name: dots_ocr_server, tasks_from: show_trusted}
      vars:
        dots_ocr_server_image_tag: "{{ item }}"
      loop: [v0.34.0, v0.32.0]
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"
    dots_ocr_server_host: {platform: "", gpus: []}
"""
SHOW = """
- ansible.builtin.include_tasks: plan.yml
- ansible.builtin.copy:
    content: "{{ [_dots_ocr_model_commit, dots_ocr_server_plan.image.reference] | to_json }}"
    dest: "{{ role_path }}/shown.json"
"""
SHOW_TRUSTED = """
- ansible.builtin.include_tasks: plan.yml
- ansible.builtin.include_tasks: trusted.yml
  vars:
    _dots_ocr_server_image: {reference: "any:{{ dots_ocr_server_image_tag }}", pin: sha256:any}
"""


class Handler(BaseHTTPRequestHandler):
    """The Hub, a registry that wants a token as Docker Hub does, and who gives that out."""

    said = DIGEST
    asked = 0

    def do_GET(self) -> None:
        host = self.headers["Host"]
        if self.path.startswith("/api/models/"):
            Handler.asked += 1
            self.answer(200, json.dumps({"sha": COMMIT}).encode())
        elif self.path.startswith("/token?service=registry.of.ours&scope=repository:"):
            self.answer(200, json.dumps({"token": "for " + self.path.rpartition("repository:")[2]}).encode())
        elif (
            self.headers["Authorization"] == f"Bearer for {self.path.split('/manifests/')[0].removeprefix('/v2/')}:pull"
        ):
            self.answer(200, MANIFEST, {"Docker-Content-Digest": self.said})
        else:
            realm = f'Bearer realm="http://{host}/token",service="registry.of.ours",scope="any"'
            self.answer(401, b"{}", {"WWW-Authenticate": realm})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def roles(tmp_path: Path) -> Path:
    """The two roles, with a pin of another registry."""
    for role in ("dots_ocr_model", "dots_ocr_server"):
        shutil.copytree(ROLES / role, tmp_path / role)
        (tmp_path / role / "files/pins.json").write_text('{"other": {}}')
    for name in ("native_v0_18", "rednote_v0_9_1"):  # the tags of the other are enough
        (tmp_path / f"dots_ocr_server/profiles/{name}.yml").unlink()
    (tmp_path / "dots_ocr_server/tasks/show.yml").write_text(SHOW)
    (tmp_path / "dots_ocr_server/tasks/show_trusted.yml").write_text(SHOW_TRUSTED)
    return tmp_path


def pin(address: str, roles: Path, *more: str) -> subprocess.CompletedProcess[str]:
    settings = {"dots_ocr_model_hub": f"http://{address}", "dots_ocr_server_registry": address, "pin_scheme": "http"}
    command = ["ansible-playbook", "playbooks/pin.yml", *more, "--inventory=ocr_servers,", "--connection=local"]
    command += ["--extra-vars", json.dumps({**settings, "pin_roles": str(roles), "dots_ocr_model_root": str(roles)})]
    command += ["--extra-vars", "ansible_python_interpreter={{ansible_playbook_python}}"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(roles)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)


def test_what_hub_and_registry_say_is_written_with_the_date_and_used(
    address: str, roles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "asked", 0)
    before = datetime.datetime.now(datetime.UTC).date()
    use = roles / "use.yml"
    use.write_text(USE)
    done = pin(address, roles, str(use))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "for vllm/vllm-openai" not in done.stdout  # a token
    days = {day.isoformat() for day in (before, datetime.datetime.now(datetime.UTC).date())}
    weights = json.loads((roles / "dots_ocr_model/files/pins.json").read_text())
    assert weights.pop("other") == {}
    assert [(name, one["commit"], one["date"] in days) for name, one in weights.items()] == [
        (f"http://{address}/dots-studio/dots.ocr@main", COMMIT, True)
    ]
    images = json.loads((roles / "dots_ocr_server/files/pins.json").read_text())
    assert images.pop("other") == {}
    profiles = [
        one
        for file in (roles / "dots_ocr_server/profiles").glob("*.yml")
        for one in yaml.safe_load(file.read_text()).values()
    ]
    tags = {f"{address}/{one['image']}:{tag['tag']}" for one in profiles for tag in one["tags"]}
    assert {name: (one["digest"], one["date"] in days) for name, one in images.items()} == dict.fromkeys(
        tags, (DIGEST, True)
    )

    shown = {file.stem: json.loads(file.read_text()) for file in (roles / "dots_ocr_server").glob("*.json")}
    image = f"{address}/vllm/vllm-openai"
    assert shown == {"shown": [COMMIT, f"{image}@{DIGEST}"]}
    assert Handler.asked == 1  # by the playbook, and not by the role
    recap = " ".join(done.stdout.partition("CUSTOM STATS")[2].split())
    assert f"unpinned/model at main is commit {COMMIT}, as http://{address} said when it was first asked" in recap
    assert "any:v0.34.0 is sha256:any, as the registry said when it was first asked" in recap


@pytest.mark.parametrize(
    ("digest", "commit", "sound"),
    [
        (DIGEST, COMMIT, True),
        (DIGEST, "main", False),
        (DIGEST, COMMIT[1:], False),
        (DIGEST, COMMIT + "0", False),
        (DIGEST[:-1], COMMIT, False),
        (DIGEST.removeprefix("sha256:"), COMMIT, False),
    ],
)
def test_only_a_digest_and_a_commit_are_written(digest: str, commit: str, sound: bool) -> None:
    (play,) = data_loader().load_from_file(str(REPOSITORY / "playbooks/pin.yml"), trusted_as_template=True)
    names = [task["name"] for task in play["tasks"][0]["block"]]
    checked = names.index("Check that each digest matches its manifest")
    assert checked < min(number for number, name in enumerate(names) if name.endswith("pinned"))
    known = {
        "item": {"docker_content_digest": digest, "content": MANIFEST.decode()},
        "_pin_weights": {"json": {"sha": commit}},
    }
    conditions = play["tasks"][0]["block"][checked]["ansible.builtin.assert"]["that"]
    templar = Templar(loader=data_loader(), variables=known)
    assert all(templar.evaluate_conditional(one) for one in conditions) == sound


def test_digest_that_is_not_that_of_its_manifest_is_not_written(
    address: str, roles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "said", f"sha256:{'0' * 64}")
    done = pin(address, roles)
    assert done.returncode != 0
    assert f"says sha256:{'0' * 64} of" in done.stdout
    assert json.loads((roles / "dots_ocr_server/files/pins.json").read_text()) == {"other": {}}
    assert json.loads((roles / "dots_ocr_model/files/pins.json").read_text()) == {"other": {}}

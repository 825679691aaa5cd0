"""The module hub_download against the rehearsal's Hub and against servers that fail in every way, over real sockets."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HUB = REPOSITORY / "rehearsal/mirror/root/usr/local/lib/mirror/hub.py"
PROXY = REPOSITORY / "molecule/docker_engine/files/proxy.py"


def load(file: str) -> ModuleType:
    """Return a plugin as a module."""
    return load_file(REPOSITORY / "plugins" / file)


def load_file(file: Path) -> ModuleType:
    """Return a file as a module."""
    spec = importlib.util.spec_from_file_location(f"plugin_{file.parent.name}", file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_download = load("modules/hub_download.py")
action = load("action/hub_download.py")

NAME = "dots-studio/dots.ocr"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "dots_ocr"}',
    LARGE: bytes(range(256)) * 400,
    "dots.ocr LICENSE AGREEMENT": b"read me",
    "empty/of content": b"",
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tries follow one another at once."""
    monkeypatch.setattr(hub_download, "FIRST_DELAY_SECONDS", 0.001)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return where the weights shall go."""
    return tmp_path / "root/home"


def write(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write files, those of the model unless others are given."""
    for path, content in (FILES if files is None else files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def sums(files: dict[str, bytes]) -> str:
    """Return the manifest of files."""
    return "".join(f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files))


def call(home: Path, *, check_mode: bool = False, **options: Any) -> dict[str, Any]:
    """Do one slice."""
    unset = dict.fromkeys(("hub", "repository", "token", "folder", "archive", "revision"))
    parameters = {**unset, "home": str(home), "seconds": 15, **options}
    result: dict[str, Any] = hub_download.Call(parameters).run(check_mode=check_mode)
    return result


def download(home: Path, url: str, commit: str = COMMIT, **options: Any) -> dict[str, Any]:
    """Do one slice of a download."""
    return call(home, hub=url, repository=NAME, revision=commit, **options)


def problem(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of a call that must fail, and that must name a fix."""
    with pytest.raises(hub_download.Problem) as caught:
        function(*arguments, **options)
    assert "Fix: " in str(caught.value)
    return str(caught.value)


def assert_in_place(folder: Path, files: dict[str, bytes] | None = None) -> None:
    """Check that a commit's folder has the files and the manifest, that all may read them, and that nothing else is."""
    files = FILES if files is None else files
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == {*files, "SHA256SUMS"}
    assert (folder / "SHA256SUMS").read_text() == sums(files)
    assert {(folder / path).read_bytes() == content for path, content in files.items()} == {True}
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()} == {0o644}
    assert {entry.name for entry in folder.parent.iterdir()} <= {folder.name, ".lock"}


# --- the rehearsal's Hub


@dataclass
class RunningHub:
    """The rehearsal's Hub with one repository, and what it was asked for."""

    url: str
    folder: Path
    log: Path
    commit: str = ""

    def requests(self, path: str) -> list[str]:
        """Return status and Range of each request for a path, as the log has them."""
        lines = self.log.read_text().splitlines()
        return [line.split('" ')[1] for line in lines if path in line and '" ' in line]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start_hub(tmp_path: Path) -> Iterator[Callable[..., RunningHub]]:
    """Start Hubs, each a process of its own, and stop them in the end."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(files: dict[str, bytes] | None = None, content: dict[str, bytes] | None = None) -> RunningHub:
        number, port = len(processes), free_port()
        folder, log = tmp_path / f"hub{number}", tmp_path / f"hub{number}.log"
        write(folder / NAME, files)
        other = write(tmp_path / f"content{number}" / NAME, content).parent.parent if content else folder
        words = [sys.executable, str(HUB), str(folder), str(port), str(free_port()), str(other)]
        with log.open("w") as errors:
            processes.append(subprocess.Popen(words, stderr=errors))
        hub = RunningHub(f"http://127.0.0.1:{port}", folder, log)
        end = time.monotonic() + 20
        while not hub.commit:
            assert time.monotonic() < end
            try:
                with urllib.request.urlopen(f"{hub.url}/api/models/{NAME}/revision/main", timeout=5) as response:
                    hub.commit = json.loads(response.read())["sha"]
            except OSError:
                time.sleep(0.05)
        return hub

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_download_is_whole_and_needs_no_hub_afterwards(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    result = download(home, hub.url, hub.commit)
    total = sum(map(len, FILES.values()))
    assert result == {
        "done": True,
        "changed": True,
        "path": str(home / hub.commit),
        "revision": hub.commit,
        "bytes_total": total,
        "bytes_done": total,
        "bytes_received": total,
    }
    assert_in_place(home / hub.commit)
    assert "302 bytes=0-" in hub.requests(f"resolve/{hub.commit}/{LARGE}")

    asked = hub.log.read_text()
    again = download(home, hub.url, hub.commit)
    assert (again["done"], again["changed"]) == (True, False)
    assert hub.log.read_text() == asked


def test_proxy_is_the_only_way_to_the_hub(
    start_hub: Callable[..., RunningHub], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start_hub()
    url = hub.url.replace("127.0.0.1", "127.0.0.1.invalid")  # which the proxy alone knows
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub_download, "TRIES", 1)
    fix = problem(download, home, url, hub.commit).split("Fix: ")[1]
    assert "http_proxy, https_proxy and no_proxy" in fix
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), load_file(PROXY).Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    try:
        download(home, url, hub.commit)
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert_in_place(home / hub.commit)


def test_download_goes_on_inside_a_file(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    write(home / f"{hub.commit}.incoming", {f"{LARGE}.part": FILES[LARGE][:70000]})
    result = download(home, hub.url, hub.commit)
    assert result["bytes_received"] == result["bytes_total"] - 70000
    # Through the redirect too.
    assert hub.requests(f"/{LARGE}") == ["302 bytes=70000-", "206 bytes=70000-"]
    assert_in_place(home / hub.commit)


def test_work_comes_in_slices(
    start_hub: Callable[..., RunningHub], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "CHUNK", 20000)
    hub = start_hub()
    slices = [download(home, hub.url, hub.commit, seconds=0)]
    while not slices[-1]["done"]:
        assert slices[-1]["changed"]
        assert not (home / hub.commit).exists()
        slices.append(download(home, hub.url, hub.commit, seconds=0))
    assert len(slices) > len(FILES[LARGE]) / 20000
    assert [step["bytes_done"] for step in slices] == sorted(step["bytes_done"] for step in slices)
    assert sum(step["bytes_received"] for step in slices) == slices[-1]["bytes_total"]
    assert_in_place(home / hub.commit)


def test_slice_begins_with_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(hub_download.time, "monotonic", lambda: now)
    clock = hub_download.Clock(15)
    now = 1000.0  # a Hub that takes its time must not leave a slice without a byte
    assert not clock.over()
    clock.start()
    now += 14
    clock.start()
    assert not clock.over()
    now += 1
    assert clock.over()


def test_check_mode_foresees_and_writes_nothing(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    result = download(home, hub.url, hub.commit, check_mode=True)
    assert (result["done"], result["changed"], result["path"]) == (True, True, str(home / hub.commit))
    assert not home.parent.exists()


def test_large_file_with_a_wrong_checksum_is_removed_and_fetched_anew(
    start_hub: Callable[..., RunningHub], home: Path
) -> None:
    bad = start_hub(content={LARGE: FILES[LARGE][:-1] + b"x"})
    message = problem(download, home, bad.url, bad.commit)
    assert f"The checksum is wrong of {LARGE}" in message
    assert not (home / bad.commit).exists()
    good = start_hub()
    result = download(home, good.url, good.commit)
    assert result["bytes_received"] == len(FILES[LARGE])
    assert_in_place(home / good.commit)


def test_commit_or_repository_that_the_hub_lacks_is_named(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    message = problem(download, home, hub.url)
    assert f"does not give {NAME} at commit {COMMIT}: status 404" in message
    assert "dots_ocr_model_repository" in message
    assert not home.exists()


def test_what_an_older_run_left_does_not_come_along(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    strays = {"other.safetensors": b"x", "deep/er/x.part": b"", "config.json": b"another length"}
    write(home / f"{hub.commit}.incoming", strays)
    download(home, hub.url, hub.commit)
    assert_in_place(home / hub.commit)


def test_folder_without_a_manifest_is_not_taken_for_a_commit(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    write(home / hub.commit, {"config.json": b""})
    assert "has no SHA256SUMS" in problem(download, home, hub.url, hub.commit)


def test_call_waits_for_another_one_in_the_same_folder(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    home.mkdir(parents=True)
    other = threading.Thread(target=download, args=(home, hub.url, hub.commit), daemon=True)
    with hub_download.alone(home):
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert [file.name for file in home.iterdir()] == [".lock"]
    other.join(20)
    assert_in_place(home / hub.commit)


def test_folder_that_a_stranger_locked_keeps_nobody_waiting(start_hub: Callable[..., RunningHub], home: Path) -> None:
    """Everybody may open the folder of the weights, and lock it; the file that is the lock only its owner opens."""
    hub = start_hub()
    home.mkdir(parents=True)
    caller = threading.Thread(target=download, args=(home, hub.url, hub.commit), daemon=True)
    stranger = os.open(home, os.O_RDONLY)
    fcntl.flock(stranger, fcntl.LOCK_EX)
    caller.start()
    caller.join(20)
    os.close(stranger)
    assert_in_place(home / hub.commit)
    assert (home / ".lock").stat().st_mode & 0o777 == 0o600


def test_full_disk_is_told_before_anything_is_written(
    start_hub: Callable[..., RunningHub], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start_hub()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=50, f_frsize=1024))
    message = problem(download, home, hub.url, hub.commit)
    assert "0.1 MB are needed, 0.1 MB are free" in message
    assert not (home / f"{hub.commit}.incoming").exists()
    # What is there already takes no more space.
    write(home / f"{hub.commit}.incoming", {f"{LARGE}.part": FILES[LARGE][:70000]})
    assert download(home, hub.url, hub.commit)["done"]


def test_disk_that_runs_full_keeps_what_arrived(
    start_hub: Callable[..., RunningHub], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "CHUNK", 20000)
    hub = start_hub()
    real = Path.open

    class FullDisk(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() >= 60000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def fake(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.name == f"{LARGE}.part":
            return FullDisk(self, mode.replace("b", ""))
        return real(self, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fake)
        assert "it ran full" in problem(download, home, hub.url, hub.commit)
    arrived = (home / f"{hub.commit}.incoming" / f"{LARGE}.part").stat().st_size
    assert arrived >= 60000
    result = download(home, hub.url, hub.commit)
    assert result["bytes_received"] <= result["bytes_total"] - arrived
    assert_in_place(home / hub.commit)


# --- servers with faults


@dataclass
class Answer:
    """What a server says; a length greater than the body's makes the connection end early, or be reset."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    reset: bool = False


Script = Callable[[str, dict[str, str]], Answer]


@dataclass
class Scripted:
    """A server that follows a script, and the path and headers of each request."""

    url: str
    requests: list[tuple[str, dict[str, str]]]

    def headers(self, path: str, name: str) -> list[str]:
        """Return one header, empty where it is missing, of each request whose path has an ending."""
        return [headers.get(name, "") for asked, headers in self.requests if asked.endswith(path)]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Scripted]]:
    """Start servers that follow scripts, and stop them in the end."""
    servers = []

    def start(script: Script) -> Scripted:
        requests: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = dict(self.headers.items())
                requests.append((self.path, headers))
                answer = script(self.path, headers)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
                self.end_headers()
                self.wfile.write(answer.body)
                if answer.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return Scripted(f"http://127.0.0.1:{server.server_port}", requests)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def listing(files: dict[str, bytes], **changes: Any) -> bytes:
    """Return the Hub's listing of files; LARGE is a large one."""
    items = []
    for path, content in files.items():
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        item: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git}
        if path == LARGE:
            item["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        items.append({**item, **changes})
    return json.dumps(items).encode()


def ranged(content: bytes, headers: dict[str, str]) -> Answer:
    """Answer a request with the Range that it asks for."""
    start = int(headers["Range"].removeprefix("bytes=").removesuffix("-"))
    return Answer(content[start:], 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"})


ONE = {LARGE: FILES[LARGE]}


def test_server_without_range_begins_a_file_anew(
    serve: Callable[[Script], Scripted], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "CHUNK", 20000)
    server = serve(lambda path, _: Answer(listing(ONE) if "/tree/" in path else ONE[LARGE]))
    write(home / f"{COMMIT}.incoming", {f"{LARGE}.part": b"not the start of it"})
    # A slice of no time at all: the file comes whole even so, since a cut would throw away what has come.
    first = download(home, server.url, seconds=0)
    assert (first["done"], first["bytes_received"]) == (False, len(ONE[LARGE]))
    assert download(home, server.url, seconds=0)["done"]
    assert server.headers(LARGE, "Range") == ["bytes=19-"]
    assert_in_place(home / COMMIT, ONE)


def test_connection_that_is_cut_is_taken_up_again(serve: Callable[[Script], Scripted], home: Path) -> None:
    def script(path: str, headers: dict[str, str]) -> Answer:
        if "/tree/" in path:
            return Answer(listing(ONE))
        answer = ranged(ONE[LARGE], headers)
        return Answer(answer.body[:30000], 206, answer.headers, length=len(answer.body))

    server = serve(script)
    assert download(home, server.url)["bytes_received"] == len(ONE[LARGE])
    assert server.headers(LARGE, "Range") == [f"bytes={start}-" for start in (0, 30000, 60000, 90000)]
    assert_in_place(home / COMMIT, ONE)


def test_connection_that_is_reset_is_taken_up_again(serve: Callable[[Script], Scripted], home: Path) -> None:
    resets = iter([True, True])

    def script(path: str, headers: dict[str, str]) -> Answer:
        if "/tree/" in path:
            return Answer(listing(ONE))
        answer = ranged(ONE[LARGE], headers)
        if next(resets, False):
            return Answer(answer.body[:30000], 206, answer.headers, length=len(answer.body), reset=True)
        return answer

    server = serve(script)
    assert download(home, server.url)["done"]
    assert len(server.headers(LARGE, "Range")) == 3
    assert_in_place(home / COMMIT, ONE)


def test_part_that_is_too_long_is_begun_anew(serve: Callable[[Script], Scripted], home: Path) -> None:
    server = serve(lambda path, headers: Answer(listing(ONE)) if "/tree/" in path else ranged(ONE[LARGE], headers))
    write(home / f"{COMMIT}.incoming", {f"{LARGE}.part": ONE[LARGE] + b"x"})
    assert download(home, server.url)["done"]
    assert server.headers(LARGE, "Range") == ["bytes=0-"]
    assert_in_place(home / COMMIT, ONE)


def test_server_that_gives_nothing_more_is_given_up_and_what_arrived_is_kept(
    serve: Callable[[Script], Scripted], home: Path
) -> None:
    size = len(ONE[LARGE])

    def script(path: str, headers: dict[str, str]) -> Answer:
        if "/tree/" in path:
            return Answer(listing(ONE))
        return Answer(ONE[LARGE][:30000], length=size)  # without Range: the same bytes each time

    server = serve(script)
    assert f"{LARGE} ends after 30000 of {size} bytes" in problem(download, home, server.url)
    assert len(server.headers(LARGE, "Range")) == 1 + hub_download.TRIES
    assert (home / f"{COMMIT}.incoming" / f"{LARGE}.part").stat().st_size == 30000


def test_server_that_sends_another_range_than_asked_for_is_not_believed(
    serve: Callable[[Script], Scripted], home: Path
) -> None:
    server = serve(lambda path, _: Answer(listing(ONE)) if "/tree/" in path else ranged(ONE[LARGE], {"Range": "9"}))
    assert "another part of a file" in problem(download, home, server.url)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_refusal_is_tried_again(serve: Callable[[Script], Scripted], home: Path, status: int) -> None:
    refusals = iter([True, True, False, True, True])

    def script(path: str, headers: dict[str, str]) -> Answer:
        if next(refusals, False):
            return Answer(status=status)
        return Answer(listing(ONE)) if "/tree/" in path else ranged(ONE[LARGE], headers)

    assert download(home, serve(script).url)["done"]


def test_hub_that_does_not_answer_is_named(home: Path) -> None:
    message = problem(download, home, f"http://127.0.0.1:{free_port()}")
    assert "Connection refused" in message
    assert "check that the host reaches the Hub" in message
    assert not home.exists()


def test_refusal_for_lack_of_a_token_says_so(serve: Callable[[Script], Scripted], home: Path) -> None:
    server = serve(lambda *_: Answer(status=401))
    assert "dots_ocr_model_token" in problem(download, home, server.url)
    assert len(server.requests) == 1


def test_proxy_that_wants_a_password_is_told(serve: Callable[[Script], Scripted], home: Path) -> None:
    server = serve(lambda *_: Answer(status=407))
    assert "the user and the password in http_proxy and https_proxy" in problem(download, home, server.url)


def test_token_goes_to_the_hub_alone(serve: Callable[[Script], Scripted], home: Path) -> None:
    content_network = serve(lambda _, headers: ranged(ONE[LARGE], headers))

    def script(path: str, headers: dict[str, str]) -> Answer:
        if "/tree/" in path:
            return Answer(listing(ONE))
        if "/resolve/" in path:  # to the Hub itself first, as it does for a repository with a new name
            return Answer(status=308, headers={"Location": f"/cache/{LARGE}"})
        return Answer(status=302, headers={"Location": f"{content_network.url}/{LARGE}"})

    hub = serve(script)
    assert download(home, hub.url, token="hf_secret")["done"]
    assert [headers.get("Authorization") for _, headers in hub.requests] == ["Bearer hf_secret"] * 3
    assert content_network.headers(LARGE, "Authorization") == [""]
    assert content_network.headers(LARGE, "Range") == ["bytes=0-"]
    assert "hf_secret" not in str(content_network.requests)


def test_redirect_from_https_to_http_is_refused() -> None:
    redirects = hub_download.Redirects("https://hub.example.org", "hf_secret")
    request = urllib.request.Request("https://hub.example.org/file")
    message = problem(redirects.redirect_request, request, None, 302, "", {}, "http://hub.example.org/file")
    assert "not secure" in message


@pytest.mark.parametrize(
    "path",
    ["../config.json", "a/../../b", "/etc/passwd", "a//b", "./a", "a\\b", "a\nb", "a\0b", "", "SHA256SUMS", "x.part"],
)
def test_path_that_could_do_harm_is_refused(serve: Callable[[Script], Scripted], home: Path, path: str) -> None:
    server = serve(lambda *_: Answer(listing({**ONE, path: b"x"})))
    assert repr(path)[1:-1] in problem(download, home, server.url)
    assert not home.exists()


@pytest.mark.parametrize("body", [b"<html>log in first</html>", b'{"error": "x"}', b'[{"type": "file"}]', b"[1]", b"5"])
def test_answer_that_is_no_listing_is_refused(serve: Callable[[Script], Scripted], home: Path, body: bytes) -> None:
    server = serve(lambda *_: Answer(body))
    assert "dots_ocr_model_hub" in problem(download, home, server.url)


def test_small_file_with_a_wrong_checksum_is_removed(serve: Callable[[Script], Scripted], home: Path) -> None:
    small = {"config.json": FILES["config.json"]}
    wrong = FILES["config.json"].upper()
    server = serve(lambda path, headers: Answer(listing(small)) if "/tree/" in path else ranged(wrong, headers))
    assert "The checksum is wrong of config.json" in problem(download, home, server.url)
    assert list((home / f"{COMMIT}.incoming").iterdir()) == []


def test_file_of_another_size_than_listed_is_refused(serve: Callable[[Script], Scripted], home: Path) -> None:
    longer = ONE[LARGE] + b"x"
    server = serve(lambda path, headers: Answer(listing(ONE)) if "/tree/" in path else ranged(longer, headers))
    # No more than the listed bytes are taken, and these are the right ones.
    assert download(home, server.url)["bytes_received"] == len(ONE[LARGE])
    shorter = serve(lambda path, headers: Answer(listing(ONE)) if "/tree/" in path else ranged(b"abc", headers))
    assert "ends after 3 of" in problem(download, home / "other", shorter.url)


def test_listing_of_several_pages_is_read_to_its_end(serve: Callable[[Script], Scripted], home: Path) -> None:
    small = {"config.json": FILES["config.json"]}

    def script(path: str, headers: dict[str, str]) -> Answer:
        if "cursor" in path:
            return Answer(listing(ONE))
        if "/tree/" in path:
            return Answer(listing(small), headers={"Link": f'<{path}&cursor=2>; rel="next"'})
        return ranged(ONE[LARGE] if path.endswith(LARGE) else small["config.json"], headers)

    assert download(home, serve(script).url)["done"]
    assert_in_place(home / COMMIT, {**ONE, **small})


@pytest.mark.parametrize("hub", ["huggingface.co", "ftp://hub.example.org"])
def test_hub_must_be_a_url(home: Path, hub: str) -> None:
    assert "is no URL of a Hub" in problem(download, home, hub)


def test_abbreviated_commit_is_refused(home: Path) -> None:
    assert "no full commit hash" in problem(download, home, "http://127.0.0.1:9", "0123456")


# --- folder and archive


def test_folder_is_copied_under_the_name_of_its_manifest(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "folder")
    commit = hashlib.sha256(sums(FILES).encode()).hexdigest()[:40]
    foreseen = call(home, folder=str(folder), check_mode=True)
    assert (foreseen["changed"], foreseen["revision"]) == (True, commit)
    assert not home.exists()
    result = call(home, folder=str(folder))
    assert (result["changed"], result["revision"], result["path"]) == (True, commit, str(home / commit))
    assert_in_place(home / commit)
    assert not call(home, folder=str(folder))["changed"]
    assert not call(home, folder=str(folder), check_mode=True)["changed"]
    assert_in_place(home / commit)


def test_what_programs_leave_beside_the_files_is_not_taken(tmp_path: Path, home: Path) -> None:
    beside = {".cache/huggingface/x.lock": b"", ".git/HEAD": b"ref: refs/heads/main"}
    archive = pack(tmp_path / "archive", {**FILES, **beside})
    assert_in_place(Path(call(home / "1", archive=str(archive))["path"]))
    folder = write(tmp_path / "folder", {**FILES, **beside, "SHA256SUMS": sums(FILES).encode()})
    (folder / ".git/hook").symlink_to("/nowhere")
    assert_in_place(Path(call(home / "2", folder=str(folder))["path"]))


def test_folder_is_copied_under_the_commit_that_it_names(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "folder", {**FILES, "REVISION": f"{COMMIT}\n".encode()})
    # In another order and style than ours, as other programs write it.
    lines = sums(FILES).replace("  ", " *./").splitlines()
    (folder / "SHA256SUMS").write_text("\n".join(reversed(lines)) + "\n")
    assert call(home, folder=str(folder))["revision"] == COMMIT
    assert_in_place(home / COMMIT)


def test_copy_of_a_folder_goes_on_inside_a_file(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "CHUNK", 20000)
    folder = write(tmp_path / "folder")
    slices = [call(home, folder=str(folder), seconds=0)]
    while not slices[-1]["done"]:
        assert slices[-1]["path"] == ""
        slices.append(call(home, folder=str(folder), seconds=0))
    assert sum(step["bytes_received"] for step in slices) == slices[-1]["bytes_total"]
    assert_in_place(Path(slices[-1]["path"]))


def test_half_copied_folder_is_not_completed_from_another_one(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_download, "CHUNK", 20000)
    folder = write(tmp_path / "folder")
    assert not call(home, folder=str(folder), seconds=0)["done"]
    other = {**FILES, LARGE: FILES[LARGE][::-1]}
    result = call(home, folder=str(write(folder, other)))
    shutil.rmtree(next(home.glob("*.incoming")))
    assert_in_place(Path(result["path"]), other)


def test_folder_that_does_not_match_its_manifest_is_refused(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "folder", {**FILES, "SHA256SUMS": sums(FILES).encode()})
    (folder / LARGE).write_bytes(FILES[LARGE][::-1])
    assert f"The checksum is wrong of {LARGE}" in problem(call, home, folder=str(folder))
    (folder / "modeling.py").write_text("import os")
    assert "are not the same: modeling.py" in problem(call, home, folder=str(folder))
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    assert "unsafe path" in problem(call, home, folder=str(folder))
    (folder / "SHA256SUMS").write_text("rubbish\n")
    assert "has the line 'rubbish'" in problem(call, home, folder=str(folder))
    assert [entry.name for entry in home.iterdir() if len(entry.name) == 40] == []


def test_folder_with_another_commit_than_wanted_is_refused(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "folder")
    message = problem(call, home, folder=str(folder), revision=COMMIT)
    assert f"but {COMMIT} is wanted" in message
    assert "dots_ocr_model_upgrade" in message
    write(folder, {"REVISION": b"f" * 40})
    assert f"holds commit {'f' * 40}" in problem(call, home, folder=str(folder), revision=COMMIT)
    write(folder, {"REVISION": b"main"})
    assert "no full commit hash" in problem(call, home, folder=str(folder))


def test_link_in_a_folder_is_refused(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "folder")
    (folder / "x").symlink_to("/etc/shadow")
    assert "x is no regular file" in problem(call, home, folder=str(folder))
    (folder / "x").unlink()
    (folder / "x").symlink_to("/etc")
    assert "x is no regular file" in problem(call, home, folder=str(folder))


def test_folder_that_is_no_model_is_refused(tmp_path: Path, home: Path) -> None:
    assert "There is no folder" in problem(call, home, folder=str(tmp_path / "missing"))
    folder = write(tmp_path / "folder", {"model/config.json": b""})
    assert "has no config.json" in problem(call, home, folder=str(folder))


def pack(archive: Path, members: dict[str, bytes], kind: str = "") -> Path:
    """Write a tar archive."""
    with tarfile.open(archive, f"w:{kind}") as tar:  # type: ignore[call-overload]
        for path, content in members.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), 0o600
            tar.addfile(member, io.BytesIO(content))
    return archive


def below(top: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Return files with another start of their paths."""
    return {f"{top}{path}": content for path, content in files.items()}


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("top", ["", "./", "dots.ocr/"])
def test_archive_is_unpacked(tmp_path: Path, home: Path, kind: str, top: str) -> None:
    members = below(top, {**FILES, "SHA256SUMS": sums(FILES).encode(), "REVISION": COMMIT.encode()})
    archive = pack(tmp_path / "archive", members, kind)
    assert call(home, archive=str(archive), check_mode=True)["revision"] == COMMIT
    assert call(home, archive=str(archive), seconds=0)["revision"] == COMMIT
    assert_in_place(home / COMMIT)


def test_archive_without_a_manifest_gets_the_name_of_the_one_it_would_have(tmp_path: Path, home: Path) -> None:
    archive = pack(tmp_path / "archive", FILES)
    commit = hashlib.sha256(sums(FILES).encode()).hexdigest()[:40]
    assert call(home, archive=str(archive), check_mode=True)["revision"] == commit
    assert call(home, archive=str(archive))["revision"] == commit
    assert_in_place(home / commit)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_archive_of_zstd_is_unpacked(tmp_path: Path, home: Path) -> None:
    archive = pack(tmp_path / "archive.tar", FILES)
    subprocess.run(["zstd", "--quiet", str(archive)], check=True)
    result = call(home, archive=f"{archive}.zst")
    assert_in_place(Path(result["path"]))
    with Path(f"{archive}.zst").open("ab") as packed:
        packed.write(b"rubbish that no tar notices")
    with pytest.raises(tarfile.ReadError, match="zstd finds it damaged"):
        call(home / "other", archive=f"{archive}.zst")


def test_archive_of_zstd_without_the_program_names_the_fix(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "archive").write_bytes(hub_download.ZSTD_MAGIC)
    assert "install zstd" in problem(call, home, archive=str(tmp_path / "archive"))


@pytest.mark.parametrize("path", ["../config.json", "/config.json", "dots.ocr/../../x"])
def test_archive_with_a_path_that_could_do_harm_is_refused(tmp_path: Path, home: Path, path: str) -> None:
    assert "unsafe path" in problem(call, home, archive=str(pack(tmp_path / "archive", {path: b"x"})))
    assert not home.exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_archive_with_anything_but_files_is_refused(tmp_path: Path, home: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "archive", "w") as tar:
        member = tarfile.TarInfo("config.json")
        member.type, member.linkname = kind, "/etc/shadow"
        tar.addfile(member)
    assert "no regular file" in problem(call, home, archive=str(tmp_path / "archive"))


def test_archive_that_is_missing_or_holds_a_file_twice_is_refused(tmp_path: Path, home: Path) -> None:
    assert "There is no archive" in problem(call, home, archive=str(tmp_path / "missing"))
    archive = pack(tmp_path / "archive", {"config.json": b"1", "./config.json": b"2"})
    assert "has config.json twice" in problem(call, home, archive=str(archive))


# --- as Ansible runs it


def test_progress_says_how_much_how_fast_and_how_long() -> None:
    line = action.progress(NAME, 3_200_000_000, 6_100_000_000, 42_000_000)
    assert line == "dots-studio/dots.ocr: 3.2 of 6.1 GB (52 %), 42 MB/s, 69 s left"
    assert action.progress(NAME, 5_000_000, 5_000_000, 1_250_000) == f"{NAME}: 5.0 of 5.0 MB (100 %), 1.2 MB/s"
    assert action.progress(NAME, 0, 900, 0) == f"{NAME}: 0 of 900 B (0 %)"


@pytest.mark.parametrize(
    ("last", "received"),
    [
        ({"done": True, "changed": True, "bytes_done": 100, "bytes_total": 100, "bytes_received": 20}, 100),
        ({"failed": True, "msg": "x"}, 80),
    ],
)
def test_action_calls_the_module_until_it_is_done_or_fails(
    last: dict[str, Any], received: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"done": False, "changed": True, "bytes_done": 40, "bytes_total": 100, "bytes_received": 40}
    results = iter([first, {**first, "bytes_done": 80}, last])
    shown: list[str] = []
    monkeypatch.setattr(action.Display, "display", lambda _, line: shown.append(line))
    plugin = object.__new__(action.ActionModule)
    plugin._task = SimpleNamespace(args={"repository": NAME}, action="hub_download", no_log=False)
    monkeypatch.setattr(action.ActionBase, "run", lambda *_: {})
    monkeypatch.setattr(plugin, "_execute_module", lambda **_: next(results), raising=False)
    assert plugin.run(task_vars={"inventory_hostname": "gpu1"}) == {**last, "bytes_received": received}
    assert shown[0].startswith(f"progress: [gpu1] {NAME}: 40 of 100 B (40 %)")
    assert len(shown) == received / 40 if "failed" in last else 3


def ansible(**arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the module on this machine as Ansible does."""
    words = ["ansible", "localhost", "--connection=local", "-vvv", "--module-name=dots_ocr.deploy.hub_download"]
    words += [f"--args={json.dumps(arguments)}"]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)


def test_ansible_shows_the_progress_but_no_token(start_hub: Callable[..., RunningHub], home: Path) -> None:
    hub = start_hub()
    done = ansible(hub=hub.url, repository=NAME, revision=hub.commit, home=str(home), token="hf_secret")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"progress: [localhost] {NAME}: 102.4 of 102.4 kB (100 %)" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    assert_in_place(home / hub.commit)


def test_ansible_shows_what_is_wrong_and_the_fix(tmp_path: Path, home: Path) -> None:
    archive = pack(tmp_path / "archive", FILES)
    with archive.open("r+b") as file:
        file.truncate(90000)
    done = ansible(archive=str(archive), home=str(home))
    assert done.returncode != 0
    assert "The archive is damaged: unexpected end of data. Fix: copy it to the host anew." in done.stdout
    archive.unlink()
    done = ansible(archive=str(archive), home=str(home))
    assert f"There is no archive {archive} on the host. Fix: check dots_ocr_model_archive." in done.stdout

"""The programs of the role dots_ocr_model: weights from the Hub, from a folder, from an archive."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILES = Path(__file__).resolve().parent.parent / "roles/dots_ocr_model/files"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = "model.safetensors"
MODEL = {
    "config.json": b'{"model_type": "dots_ocr"}',
    LARGE: bytes(range(256)) * 400,
    "dots.ocr LICENSE AGREEMENT": b"read me",
    "empty/of content": b"",
}


def write(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write files, those of the model unless others are given."""
    for path, content in (MODEL if files is None else files).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def sums(files: dict[str, bytes]) -> str:
    """Return the manifest of files."""
    return "".join(f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n" for path in sorted(files))


NAMED_BY_MANIFEST = hashlib.sha256(sums(MODEL).encode()).hexdigest()[:40]


def assert_whole(folder: Path, files: dict[str, bytes] | None = None) -> None:
    """Check that a folder has the files and the manifest, that all may read them, and that nothing else is."""
    files = MODEL if files is None else files
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {*files, "SHA256SUMS"}
    assert (folder / "SHA256SUMS").read_text() == sums(files)
    assert {(folder / path).read_bytes() == content for path, content in files.items()} == {True}
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()} == {0o644}


# --- from the Hub; that its real client takes part is seen in the scenario dots_ocr_model


class Refused(Exception):
    """What the client raises for a status."""

    def __init__(self, status: int) -> None:
        """Take the status."""
        super().__init__(f"{status} Error\n(Request ID: 1)")
        self.response = SimpleNamespace(status_code=status)


class Client:
    """In place of the Hub's client: sends what it has from a byte on, and before that what went wrong."""

    def __init__(self) -> None:
        """Have the whole model, and no fault."""
        self.files = dict(MODEL)
        self.faults: list[tuple[int, Exception]] = []  # after so many bytes
        self.asked: list[tuple[str, int]] = []
        self.token: str | bool = ""

    def headers(self, token: str | bool) -> dict[str, str]:
        self.token = token
        return {"authorization": str(token)}

    def get(self, url: str, file: Any, *, resume_size: int, headers: dict[str, str], expected_size: int) -> None:
        assert headers == {"authorization": str(self.token)}
        path = url.removeprefix(f"http://hub/{COMMIT}/")
        self.asked.append((path, resume_size))
        rest = self.files[path][resume_size:]
        if path == LARGE and self.faults:
            sent, fault = self.faults.pop(0)
            file.write(rest[:sent])
            file.flush()
            raise fault
        file.write(rest)
        file.flush()
        if resume_size + len(rest) != expected_size:
            raise OSError("Consistency check failed")


@pytest.fixture
def client() -> Client:
    """Return the client that fetch() uses."""
    return Client()


@pytest.fixture
def fetch(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return the program as a function that downloads the model, and returns its folder."""
    modules: dict[str, dict[str, Any]] = {
        "huggingface_hub": {
            "constants": SimpleNamespace(ENDPOINT="http://hub"),
            "hf_hub_url": lambda repository, path, revision: f"http://hub/{revision}/{path}",
        },
        "huggingface_hub.file_download": {"http_get": client.get},
        "huggingface_hub.utils": {"build_hf_headers": client.headers},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    program: dict[str, Any] = {"__name__": "fetch"}
    exec(compile((FILES / "fetch.py").read_text(), "fetch.py", "exec"), program)
    folder, token = tmp_path / "weights", tmp_path / "token"
    folder.mkdir()
    token.write_text("sesame\n")
    program |= {"FOLDER": folder, "TOKEN": token, "FIRST_DELAY_SECONDS": 0}
    listing = [
        {"type": "file", "path": path, "size": len(content)}
        | (
            {"lfs": {"oid": hashlib.sha256(content).hexdigest()}}
            if path == LARGE
            else {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        )
        for path, content in MODEL.items()
    ]

    def run() -> Path:
        program["main"]("dots-studio/dots.ocr", COMMIT, "/models", json.dumps(listing))
        return folder

    return run


def refusal(function: Callable[[], Any]) -> str:
    """Return the message of a program that must end with one, and that must name a fix."""
    with pytest.raises(SystemExit) as caught:
        function()
    message = str(caught.value.code)
    assert "Fix: " in message
    assert "\n" not in message
    return message


def test_download_is_whole_and_sends_the_token(fetch: Callable[[], Path], client: Client) -> None:
    assert_whole(fetch())
    assert client.token == "sesame"
    assert client.asked == [(path, 0) for path, content in MODEL.items() if content]


def test_download_that_is_cut_goes_on_inside_the_file(fetch: Callable[[], Path], client: Client) -> None:
    client.faults = [(1000, ConnectionResetError()) for _ in range(8)]  # more than it tries in vain
    assert_whole(fetch())
    assert [offset for path, offset in client.asked if path == LARGE] == [1000 * number for number in range(9)]


@pytest.mark.parametrize("fault", [TimeoutError(), Refused(429), Refused(503), Refused(416)], ids=repr)
def test_what_may_pass_is_tried_five_times(fetch: Callable[[], Path], client: Client, fault: Exception) -> None:
    client.faults = [(0, fault)] * 9
    assert f"http://hub does not give {LARGE} of dots-studio/dots.ocr at commit {COMMIT}: " in refusal(fetch)
    assert len(client.faults) == 4
    client.faults = []
    assert_whole(fetch())


def test_what_arrived_is_kept_for_the_next_run(fetch: Callable[[], Path], client: Client) -> None:
    client.faults = [(1000, TimeoutError()), *[(0, TimeoutError())] * 5]
    refusal(fetch)
    client.asked.clear()
    assert_whole(fetch())
    assert client.asked[0] == (LARGE, 1000)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_is_told_at_once(fetch: Callable[[], Path], client: Client, status: int) -> None:
    client.faults = [(0, Refused(status))] * 2
    assert f"{status} Error (Request ID: 1). Fix: " in refusal(fetch)
    assert len(client.faults) == 1


def test_disk_that_runs_full_keeps_what_arrived(fetch: Callable[[], Path], client: Client) -> None:
    client.faults = [(1000, OSError(errno.ENOSPC, "No space left on device"))] * 2
    assert refusal(fetch).startswith("/models ran full. Fix: free some space")
    assert len(client.faults) == 1
    client.faults = []
    assert_whole(fetch())
    assert (LARGE, 1000) in client.asked


@pytest.mark.parametrize("path", [LARGE, "config.json"])
def test_file_with_a_wrong_checksum_is_removed_and_fetched_anew(
    fetch: Callable[[], Path], client: Client, path: str
) -> None:
    client.files[path] = bytes(len(MODEL[path]))
    assert refusal(fetch).startswith(f"The checksum is wrong of {path} from http://hub; removed. Fix: run again")
    client.files = MODEL
    client.asked.clear()
    assert_whole(fetch())
    assert client.asked == [(path, 0)]


@pytest.mark.parametrize("size", [1000, 200_000])
def test_file_of_another_size_than_listed_is_given_up(fetch: Callable[[], Path], client: Client, size: int) -> None:
    client.files[LARGE] = bytes(size)
    assert f"does not give {LARGE}" in refusal(fetch)


def test_part_that_is_too_long_is_begun_anew(fetch: Callable[[], Path], client: Client, tmp_path: Path) -> None:
    write(tmp_path / "weights", {f"{LARGE}.part": bytes(200_000)})
    assert_whole(fetch())
    assert (LARGE, 0) in client.asked


# --- from a folder or an archive on the host


def take(source: Path, home: Path, commit: str = "") -> Path:
    """Return the folder that the weights come to; where they do not, fail with the message."""
    words = [str(FILES / "take"), str(source), str(home), commit]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert [entry.name for entry in home.glob("*.incoming")] == []
    if done.returncode:
        assert "Fix: " in done.stderr
        sys.exit(done.stderr.strip())
    return home / done.stdout.strip()


def pack(archive: Path, mode: str = "w", top: str = "") -> Path:
    """Pack the model, below a folder of the archive if need be."""
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for path, content in MODEL.items():
            member = tarfile.TarInfo(top + path)
            member.size, member.mode, member.uid = len(content), 0o600, 12345
            tar.addfile(member, io.BytesIO(content))
    return archive


def test_folder_is_taken_under_the_name_of_its_manifest(tmp_path: Path) -> None:
    folder = take(write(tmp_path / "source"), tmp_path / "root/home")
    assert folder.name == NAMED_BY_MANIFEST
    assert_whole(folder)
    # With the manifest it comes to the same, and so it does if that is there already, in a form of its own.
    (folder / "SHA256SUMS").write_text("".join(reversed(sums(MODEL).replace("  ", " *./").splitlines(True))))
    again = take(folder, tmp_path / "other")
    assert again.name == NAMED_BY_MANIFEST
    assert_whole(again)
    assert take(folder, tmp_path / "other") == again


def test_folder_is_taken_under_the_commit_that_it_names(tmp_path: Path) -> None:
    source = write(
        tmp_path / "source", {**MODEL, "REVISION": f"{COMMIT}\n".encode(), "SHA256SUMS": sums(MODEL).encode()}
    )
    folder = take(source, tmp_path / "home", COMMIT)
    assert folder.name == COMMIT
    assert_whole(folder)
    message = refusal(lambda: take(source, tmp_path / "home", COMMIT[::-1]))
    assert f"{source} holds commit {COMMIT}, but {COMMIT[::-1]} is wanted. Fix: " in message
    assert "dots_ocr_model_upgrade" in message


def test_what_programs_leave_beside_the_files_is_not_taken(tmp_path: Path) -> None:
    left = {".cache/huggingface/download/config.json.metadata": b"", ".git/HEAD": b""}
    source = write(tmp_path / "source", {**MODEL, **left})
    assert_whole(take(source, tmp_path / "home"))
    subprocess.run(
        ["tar", "--create", f"--file={tmp_path}/model.tar", "--directory", source.parent, "source"], check=True
    )
    assert_whole(take(tmp_path / "model.tar", tmp_path / "other"))


@pytest.mark.parametrize(("kind", "top"), [("", ""), ("gz", "./"), ("bz2", "dots.ocr/"), ("xz", "./dots.ocr/")])
def test_archive_is_unpacked(tmp_path: Path, kind: str, top: str) -> None:
    folder = take(pack(tmp_path / f"model.tar.{kind}", f"w:{kind}", top), tmp_path / "home")
    assert folder.name == NAMED_BY_MANIFEST
    assert_whole(folder)


def test_archive_of_zstd_is_unpacked(tmp_path: Path) -> None:
    subprocess.run(["zstd", "--quiet", "--rm", pack(tmp_path / "model.tar")], check=True)
    assert_whole(take(tmp_path / "model.tar.zst", tmp_path / "home"))


MANIFEST = sums(MODEL)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (
            {"SHA256SUMS": MANIFEST.encode(), LARGE: bytes(102400)},
            f"The checksum is wrong of files from .*: {LARGE}: FAILED",
        ),
        (
            {"SHA256SUMS": MANIFEST.encode(), "further": b""},
            "SHA256SUMS of .* and its files are not the same: \tfurther",
        ),
        ({"SHA256SUMS": f"{'0' * 64}  ../up\n{MANIFEST}".encode()}, r"are not the same: \.\./up"),
        ({"SHA256SUMS": b"nonsense"}, "are not the same"),
        ({"REVISION": b"main\n"}, "REVISION in .* is no full commit hash"),
        ({"back\\slash": b""}, r"no plain name: \./back\\slash"),
        ({"line\nbreak": b""}, "no plain name"),
    ],
)
def test_folder_that_is_not_in_order_is_refused(tmp_path: Path, files: dict[str, bytes], complaint: str) -> None:
    source = write(tmp_path / "source", {**MODEL, **files})
    with pytest.raises(SystemExit, match=complaint):
        take(source, tmp_path / "home")
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == [".lock"]
    assert (tmp_path / "home/.lock").stat().st_mode & 0o777 == 0o600


def test_link_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    (source / "passwords").symlink_to("/etc/passwd")
    assert "not a regular file, or has no plain name: ./passwords. Fix: " in refusal(
        lambda: take(source, tmp_path / "home")
    )


@pytest.mark.parametrize("path", ["../outside", "model/../../outside"])
def test_archive_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    archive = pack(tmp_path / "model.tar", top="model/")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(path))
    assert "cannot be unpacked: " in refusal(lambda: take(archive, tmp_path / "home"))
    assert not list(tmp_path.rglob("outside"))


def test_archive_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "model.tar")
    archive.write_bytes(archive.read_bytes()[:50_000])
    assert "copy it to the host again if it is damaged" in refusal(lambda: take(archive, tmp_path / "home"))


def test_what_is_no_model_or_not_there_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"README.md": b""})
    assert "has no config.json, so it is not a model. Fix: " in refusal(lambda: take(source, tmp_path / "home"))
    message = refusal(lambda: take(tmp_path / "nothing", tmp_path / "home"))
    assert message == (
        f"There is no {tmp_path}/nothing on the host. Fix: check dots_ocr_model_folder and dots_ocr_model_archive."
    )


def test_folder_without_a_manifest_is_not_taken_for_a_commit(tmp_path: Path) -> None:
    write(tmp_path / "home" / NAMED_BY_MANIFEST)
    source = write(tmp_path / "source")
    assert "has no SHA256SUMS. Fix: remove the folder" in refusal(lambda: take(source, tmp_path / "home"))


def test_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    with (source / "huge").open("wb") as file:
        file.truncate(1 << 43)
    message = refusal(lambda: take(source, tmp_path / "home"))
    assert "is too small: 8796093 MB are needed, " in message

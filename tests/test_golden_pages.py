"""Golden pages of one's own against servers that read, misread, or do not, over real sockets."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests import programs

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"
PASSED, FAILED, WRONG_USAGE = 0, 1, 2
KEY = "sk-0123456789abcdef"

golden_pages = programs.load("golden_pages")
ocr_probe = golden_pages.ocr_probe


class Pages:
    """A folder of golden pages, and a server that reads on each what its bytes say."""

    def __init__(self, folder: Path, server: HTTPServer) -> None:
        self.folder = folder / "golden"
        self.folder.mkdir()
        self.settings = folder / "server"
        self.settings.mkdir()
        self.server = server
        self.requests: list[dict[str, Any]] = []
        self.misread: dict[str, str] = {}
        self.finish_reason = "stop"
        self.listing: dict[str, Any] = {"id": "dots.ocr", "max_model_len": 32768}

    def add(self, name: str, text: str, *, accepted: str | None = None, magic: bytes = PNG) -> None:
        """Write an image whose text the server reads, and the text that is accepted for it."""
        (self.folder / name).write_bytes(magic + text.encode())
        if accepted is not None:
            self.text(name).write_text(accepted)

    def text(self, name: str) -> Path:
        """Return the file with the accepted text of an image."""
        return (self.folder / name).with_suffix(".txt")

    def read(self, request: Request) -> Response:
        """Read a page."""
        body = json.loads(request.get_data())
        self.requests.append(body)
        image = base64.b64decode(body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
        text = image.removeprefix(PNG).removeprefix(JPEG).decode()
        choice = {"message": {"content": self.misread.get(text, text)}, "finish_reason": self.finish_reason}
        return Response(json.dumps({"choices": [choice]}))

    def run(
        self, *arguments: str, folder: Path | None = None, url: str = "", call: programs.Call = programs.call
    ) -> tuple[int, dict[str, Any]]:
        """Call or run the program; return its exit status and its verdict."""
        self.server.expect_request("/v1/models").respond_with_json({"data": [self.listing]})
        self.server.expect_request("/v1/chat/completions", method="POST").respond_with_handler(self.read)
        key_file = self.settings / "api-key"
        key_file.write_text(KEY)
        settings = {
            "unit": "dots-ocr.service",
            "url": url or self.server.url_for("").rstrip("/"),
            "model": "dots.ocr",
            "likeness": 0.9,
            "api_key_file": str(key_file),
        }
        (self.settings / "dots-ocr.json").write_text(json.dumps(settings))
        folders = [f"--folder={folder or self.folder}", f"--settings-folder={self.settings}"]
        done = call(golden_pages, *arguments, *folders)
        assert KEY not in done.stdout + done.stderr
        if done.returncode == WRONG_USAGE:
            return done.returncode, {}
        assert done.stderr == ""
        verdict: dict[str, Any] = json.loads(done.stdout)
        assert verdict["passed"] is (done.returncode == PASSED)
        return done.returncode, verdict


@pytest.fixture
def pages(tmp_path: Path, httpserver: HTTPServer) -> Pages:
    return Pages(tmp_path, httpserver)


# Compare


def test_pages_that_are_read_as_accepted_pass(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", accepted="Invoice 1\n")
    pages.add("b.PNG", "Invoice 2", accepted=" Invoice\n2")
    pages.add("c.jpg", "Invoice 3", accepted="Invoice 3", magic=JPEG)
    pages.add("d.jpeg", "Invoice 4", accepted="Invoice 4", magic=JPEG)
    (pages.folder / "notes.md").write_text("no page")
    status, verdict = pages.run("dots-ocr", "compare", "--likeness=1.0", call=programs.run)
    assert status == PASSED
    assert verdict["pages"] == [{"page": name, "likeness": 1.0} for name in ("a.png", "b.PNG", "c.jpg", "d.jpeg")]
    assert "all golden pages (4)" in verdict["summary"]


def test_page_that_is_read_differently_is_shown_and_the_others_are_read_too(pages: Pages) -> None:
    pages.add("a.png", "Total due $241.85", accepted="Invoice from Northwind")
    pages.add("b.png", "Invoice 2", accepted="Invoice 2")
    status, verdict = pages.run("dots-ocr", "compare", call=programs.run)
    first, second = verdict["pages"]
    assert status == FAILED
    assert first["likeness"] < 0.9
    assert first["read"] == "Total due $241.85"
    assert second == {"page": "b.png", "likeness": 1.0}
    assert "a.png is read differently" in verdict["problem"]
    assert "accept --all" in verdict["fix"]


@pytest.mark.parametrize(("options", "status"), [([], PASSED), (["--likeness=1.0"], FAILED)])
def test_likeness_is_that_of_the_settings_or_of_the_command(pages: Pages, options: list[str], status: int) -> None:
    pages.add("a.png", "Printer paper A4 $54.60", accepted="Printer paper A4 $54.50")
    assert pages.run("dots-ocr", "compare", *options)[0] == status


def test_image_without_a_text_is_not_accepted_yet(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1")
    status, verdict = pages.run("dots-ocr", "compare")
    assert status == FAILED
    assert "a.png is not accepted yet" in verdict["problem"]
    assert "golden_pages dots-ocr accept" in verdict["fix"]
    assert not pages.text("a.png").exists()


@pytest.mark.parametrize("name", ["golden", "nowhere"])
def test_no_page_is_no_failure_but_said(pages: Pages, name: str) -> None:
    folder = pages.folder.with_name(name)
    status, verdict = pages.run("dots-ocr", "compare", folder=folder)
    assert status == PASSED
    assert verdict["pages"] == []
    assert f"no golden page in {folder}" in verdict["summary"]


def test_requests_are_deterministic_and_have_the_placeholder_once(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", accepted="Invoice 1")
    pages.run("dots-ocr", "compare")
    (request,) = pages.requests
    assert request["temperature"] == 0
    assert request["model"] == "dots.ocr"
    assert request["messages"][0]["content"][1]["text"].count("<|img|><|imgpad|><|endofimg|>") == 1


@pytest.mark.parametrize(("length", "tokens"), [(4096, 2048), (16384, 8192), (32768, 8192), (None, 8192)])
def test_answer_leaves_half_of_the_context_to_the_image(pages: Pages, length: int | None, tokens: int) -> None:
    pages.listing["max_model_len"] = length
    pages.add("a.png", "Invoice 1", accepted="Invoice 1")
    pages.run("dots-ocr", "compare")
    assert pages.requests[0]["max_completion_tokens"] == tokens


@pytest.mark.parametrize(("magic", "kind"), [(PNG, "image/png"), (JPEG, "image/jpeg")])
def test_type_of_an_image_is_that_of_its_content(pages: Pages, magic: bytes, kind: str) -> None:
    pages.add("a.png", "Invoice 1", accepted="Invoice 1", magic=magic)
    pages.run("dots-ocr", "compare")
    url = pages.requests[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith(f"data:{kind};base64,")


def test_file_that_is_no_image_is_named_and_the_others_are_read(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", accepted="Invoice 1", magic=b"GIF89a")
    pages.add("b.png", "Invoice 2", accepted="Invoice 2")
    status, verdict = pages.run("dots-ocr", "compare")
    assert status == FAILED
    assert "a.png is neither PNG nor JPEG" in verdict["problem"]
    assert verdict["pages"][1]["likeness"] == 1.0


@pytest.mark.parametrize("action", ["compare", "accept"])
def test_images_that_share_a_text_are_refused(pages: Pages, action: str) -> None:
    pages.add("a.png", "Invoice 1")
    pages.add("a.jpg", "Invoice 2", magic=JPEG)
    status, verdict = pages.run("dots-ocr", action)
    assert status == FAILED
    assert "share the text a.txt" in verdict["problem"]


def test_text_that_is_none_is_named(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1")
    pages.text("a.png").write_bytes(b"\xff\xfe")
    status, verdict = pages.run("dots-ocr", "compare")
    assert status == FAILED
    assert "a.txt cannot be read as text" in verdict["problem"]


def test_server_that_is_down_is_named_once(pages: Pages) -> None:
    for name in ("a.png", "b.png"):
        pages.add(name, "Invoice", accepted="Invoice")
    status, verdict = pages.run("dots-ocr", "compare", url="http://127.0.0.1:9")
    assert status == FAILED
    assert verdict["problem"].count("does not answer") == 1


def test_another_model_is_refused(pages: Pages) -> None:
    pages.listing["id"] = "facebook/opt-125m"
    pages.add("a.png", "Invoice 1", accepted="Invoice 1")
    status, verdict = pages.run("dots-ocr", "compare")
    assert status == FAILED
    assert "serves facebook/opt-125m instead of dots.ocr" in verdict["problem"]


def test_server_without_settings_is_a_failure_with_a_fix(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1")
    status, verdict = pages.run("dots-ocr@7", "compare")
    assert status == FAILED
    assert "dots-ocr@7.json" in verdict["problem"]
    assert "ansible-playbook site.yml" in verdict["fix"]


@pytest.mark.parametrize("arguments", [[], ["dots-ocr"], ["dots-ocr", "reject"], ["dots-ocr", "compare", "--all"]])
def test_wrong_usage_has_a_status_of_its_own(pages: Pages, arguments: list[str]) -> None:
    assert pages.run(*arguments)[0] == WRONG_USAGE


# Accept


def test_accepted_page_passes_from_then_on(pages: Pages) -> None:
    pages.add("a.png", "Rechnung über 5 €\nZeile 2")
    status, verdict = pages.run("dots-ocr", "accept")
    assert status == PASSED
    assert verdict["pages"] == [{"page": "a.png", "accepted": "Rechnung über 5 €\nZeile 2"}]
    assert pages.text("a.png").read_text(encoding="utf-8") == "Rechnung über 5 €\nZeile 2\n"
    assert pages.run("dots-ocr", "compare", "--likeness=1.0")[0] == PASSED


def test_accepted_texts_are_kept_unless_all_are_wanted_anew(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", accepted="as it was")
    pages.add("b.png", "Invoice 2")
    assert [entry["page"] for entry in pages.run("dots-ocr", "accept")[1]["pages"]] == ["b.png"]
    assert pages.text("a.png").read_text() == "as it was"
    assert [entry["page"] for entry in pages.run("dots-ocr", "accept", "--all")[1]["pages"]] == ["a.png", "b.png"]
    assert pages.text("a.png").read_text() == "Invoice 1\n"


def test_nothing_to_accept_asks_no_server(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", accepted="Invoice 1")
    status, verdict = pages.run("dots-ocr", "accept", url="http://127.0.0.1:9")
    assert status == PASSED
    assert verdict["summary"].startswith("0 of 1 ")


@pytest.mark.parametrize("action", ["compare", "accept"])
def test_text_that_is_cut_off_neither_passes_nor_is_accepted(pages: Pages, action: str) -> None:
    pages.finish_reason = "length"
    pages.add("a.png", "Invoice 1", accepted="Invoice 1" if action == "compare" else None)
    status, verdict = pages.run("dots-ocr", action)
    assert status == FAILED
    assert "a.png was cut off after 8192 tokens" in verdict["problem"]
    assert pages.text("a.png").exists() is (action == "compare")


@pytest.mark.parametrize("action", ["compare", "accept"])
def test_page_that_reads_as_nothing_proves_nothing(pages: Pages, action: str) -> None:
    pages.add("a.png", " \n", accepted="" if action == "compare" else None)
    status, verdict = pages.run("dots-ocr", action)
    assert status == FAILED
    assert "reads nothing on a.png" in verdict["problem"]
    assert pages.text("a.png").exists() is (action == "compare")


def test_page_that_cannot_be_read_keeps_no_other_from_being_accepted(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1", magic=b"GIF89a")
    pages.add("b.png", "Invoice 2")
    assert pages.run("dots-ocr", "accept")[0] == FAILED
    assert not pages.text("a.png").exists()
    assert pages.text("b.png").read_text() == "Invoice 2\n"


def test_folder_that_cannot_be_written_is_named(pages: Pages) -> None:
    pages.add("a.png", "Invoice 1")
    (pages.folder / ".a.txt.new").mkdir()
    status, verdict = pages.run("dots-ocr", "accept")
    assert status == FAILED
    assert str(pages.folder) in verdict["problem"]


def test_half_a_character_is_no_crash(pages: Pages) -> None:
    pages.misread["Invoice 1"] = "Invoice \ud800"
    pages.add("a.png", "Invoice 1")
    assert pages.run("dots-ocr", "accept")[0] == PASSED
    assert pages.text("a.png").read_text() == "Invoice ?\n"


def test_file_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "page.txt"
    ocr_probe.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        ocr_probe.write_text(file, "new \ud800")
    assert file.read_text() == "old"
    with file.open() as reader:
        ocr_probe.write_text(file, "new")
        assert reader.read() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".txt"] == ["page.txt"]
    assert file.read_text() == "new"

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support import FakeServer, answering, ask, card

from dots_ocr_client import (
    ConfigurationError,
    DotsOCR,
    DotsOCRError,
    InvalidKey,
    Mode,
    PageImage,
    Unauthorized,
    VLLMEngine,
)
from dots_ocr_client.credentials import Address, Secrets, read_key, without_login

KEY = "sesame-open/1"
URL = "http://reader:pass%2Fword-1@127.0.0.1:8000/v1"
SECRETS = (KEY, "pass/word-1", "pass%2Fword-1", "cmVhZGVyOnBhc3Mvd29yZC0x")
"""The key, and the password as it is, in the URL and as it is sent."""


# How keys are read


@pytest.mark.parametrize(
    "text",
    [
        "sesame",
        "sesame\r\n",
        "\n\n sesame\t",
        "\ufeffsesame\r\n",
        '"sesame"',
        "'sesame'\r\n",
        '\ufeff " sesame\r" ',
        "\N{NO-BREAK SPACE}sesame",
    ],
)
def test_what_editors_and_shells_leave_around_a_key_is_taken_off(text: str) -> None:
    assert read_key(text) == "sesame"


@pytest.mark.parametrize("text", [None, ""])
def test_no_key_is_no_fault(text: str | None) -> None:
    assert read_key(text) is None


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "\r\n",
        "\ufeff",
        '""',
        "open sesame",
        "open\nsesame",
        "open\rsesame",
        "ключ-sesame",
        "ï»¿sesame",
        "sesame\0",
        "ses\x1bame",
        "sesame\udcff",
        "ses\u200bame",
        '"sesame',
        "sesame'",
        b"sesame",
    ],
)
@pytest.mark.attack("a key with lines, spaces or other letters", "refused before anything is sent; never repeated")
def test_what_can_be_no_key_is_refused_before_anything_is_sent_and_is_not_repeated(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidKey, match=r"^api_key= is not one key: .* Fix: set DOTS_OCR_API_KEY") as caught:
        VLLMEngine(api_key=text)
    assert "ame" not in str(caught.value)
    if isinstance(text, str) and "\0" not in text:
        monkeypatch.setenv("DOTS_OCR_API_KEY", text)
        with pytest.raises(InvalidKey, match=r"^DOTS_OCR_API_KEY is not one key"):
            DotsOCR()


# How base URLs are read


@pytest.mark.parametrize(
    ("text", "url", "login"),
    [
        ("http://host:8000/v1", "http://host:8000/v1", None),
        ("\ufeffhttp://host:8000/v1/\r\n", "http://host:8000/v1", None),
        ('"http://host:8000/v1"', "http://host:8000/v1", None),
        ("https://me:secret@host/v1", "https://host/v1", ("me", "secret")),
        ("https://me:a%40b%2Fc@[::1]:8000/v1/", "https://[::1]:8000/v1", ("me", "a@b/c")),
        ("https://token@host/v1", "https://host/v1", ("token", "")),
    ],
)
def test_a_base_url_is_an_address_and_a_login(text: str, url: str, login: tuple[str, str] | None) -> None:
    address = Address.of(text)
    assert (address.url, address.login) == (url, login)
    assert "secret" not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "me:secret@host:8000/v1",
        "ftp://me:secret@host/v1",
        "http://me:secret@/v1",
        "http://me:sec/ret@host/v1",
        "http://me:1/secret@host/v1",
        "http://me:se#cret@host/v1",
        "http://me:se?cret@host/v1",
        "http://me:sec@ret@host:port/v1",
        "http://me:sec ret@host/v1",
        "http://me:secret@ho\nst/v1",
        "http://host/v1?token=secret",
        "http://host/v1#secret",
    ],
)
@pytest.mark.attack("a malformed address with user and password", "refused; the password is not shown")
def test_a_base_url_that_is_refused_is_shown_without_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a base URL") as caught:
        VLLMEngine(url)
    assert not any(part in str(caught.value) for part in ("secret", "sec", "ret", "cret", "me:"))


def test_user_and_password_go_in_the_place_of_the_key_and_are_shown_nowhere(
    page: PageImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sent = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append((str(request.url), request.headers["authorization"]))
        return httpx2.Response(401)

    with pytest.raises(Unauthorized, match="user and password of the base URL") as caught:
        ask(answer, page, url=URL, api_key=KEY)
    assert sent == [("http://127.0.0.1:8000/v1/models", "Basic cmVhZGVyOnBhc3Mvd29yZC0x")]
    assert_clean(caught.value, caplog.text)
    assert VLLMEngine(URL).base_url == "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize("url", ["http://me:secret@host", "me:secret@host", "http://me:a/secret@host?b=secret"])
def test_any_url_can_be_shown_without_its_login(url: str) -> None:
    assert without_login(url) in ("http://host", "host")


# What a server repeats


def assert_clean(error: BaseException | None, *texts: str) -> None:
    """The secrets are in no text, and nowhere in an error and those behind it."""
    chain = [] if error is None else [*traceback.format_exception(error)]
    while error is not None:
        assert error.__context__ is None or isinstance(error.__context__, DotsOCRError), "it may hold a whole request"
        chain += [repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    for text in (*chain, *texts):
        for secret in SECRETS:
            assert secret not in text


def everything(request: httpx2.Request) -> str:
    """What was sent, and the secrets in every spelling of a program that repeats what it was sent."""
    spelled = [form for secret in SECRETS for form in (secret, secret.replace("/", r"\/"), secret.replace("/", "%2F"))]
    return f"{dict(request.headers)} {' '.join(spelled)}"


def completion(text: str, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr", "choices": [choice], **fields}


def streamed(text: str) -> bytes:
    """A stream in which no piece has a whole secret in it."""
    pieces = [{"choices": [{"index": 0, "delta": {"content": one}}]} for one in (*text, None)]
    pieces[-1]["choices"] = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    return b"".join(f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces)


def fault(status: int, as_text: bool, said: str) -> httpx2.Response:
    return httpx2.Response(status, text=said) if as_text else httpx2.Response(status, json={"error": {"message": said}})


Echo = Callable[[str], httpx2.Response]

ECHOES: dict[str, Echo] = {
    "text": lambda said: httpx2.Response(200, json=completion(said)),
    "layout": lambda said: httpx2.Response(
        200, json=completion(json.dumps([{"bbox": [0, 0, 9, 9], "category": said, "text": said}]))
    ),
    "model": lambda said: httpx2.Response(200, json=completion("text", model=said)),
    "warnings": lambda said: httpx2.Response(
        200, json=completion("text", dots_ocr={"engine": said, "model": said, "warnings": [said, [said]]})
    ),
    "stream": lambda said: httpx2.Response(200, content=streamed(said), headers={"Content-Type": "text/event-stream"}),
    "error in a stream": lambda said: httpx2.Response(
        200,
        content=f"data: {json.dumps({'error': {'message': said}})}\n\n",
        headers={"Content-Type": "text/event-stream"},
    ),
    "reason to stop": lambda said: httpx2.Response(
        200, json=completion("text") | {"choices": [{"message": {"content": "text"}, "finish_reason": said}]}
    ),
    "no answer": lambda said: httpx2.Response(200, text=said),
    "cut in two by the longest message": lambda said: httpx2.Response(500, text="x" * 290 + " " + KEY + said),
}
for _status in (302, 400, 401, 403, 404, 429, 500):
    ECHOES[f"{_status} as text"] = partial(fault, _status, True)
    ECHOES[f"{_status} as JSON"] = partial(fault, _status, False)


@pytest.mark.parametrize("where", ECHOES)
@pytest.mark.attack(
    "a server that repeats key or login, in every part of an answer", "`***` in results, errors, tracebacks and logs"
)
def test_a_key_that_a_server_repeats_is_in_no_result_and_in_no_error(
    where: str, page: PageImage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = answering(lambda request: ECHOES[where](everything(request)))
    mode: Mode = "layout" if where == "layout" else "text"
    stream = "stream" in where
    try:
        answer = ask(answers, page, mode, url=URL, api_key=KEY, stream=stream)
    except DotsOCRError as error:
        assert_clean(error, caplog.text)
    else:
        assert_clean(None, repr(answer), caplog.text)
        assert "***" in repr(answer)
        assert where not in ("text", "layout", "stream") or "the server repeated the key" in answer.warnings[0]


@pytest.mark.parametrize("key", ["x", "1", "-", "ocr", "0.11.0"])
def test_a_key_that_is_a_word_changes_no_names(key: str, page: PageImage) -> None:
    models = httpx2.Response(200, json={"data": [card("dots.ocr", 16_384)]})
    answer = ask(answering(httpx2.Response(200, json=completion("read")), models=models), page, api_key=key)
    assert answer.text == "read"


@pytest.mark.parametrize("said", [{"id": KEY}, {"id": "x", "root": [KEY], KEY: {"deep": KEY}}])
def test_a_key_among_the_models_is_hidden(said: dict[str, Any], page: PageImage) -> None:
    models = httpx2.Response(200, json={"data": [said]})
    with pytest.raises(ConfigurationError, match=r"serves: '(\*\*\*|x)'") as caught:
        ask(answering(httpx2.Response(500), models=models), page, api_key=KEY)
    assert_clean(caught.value)


def test_a_key_in_a_fault_of_the_connection_is_hidden(page: PageImage) -> None:
    def fail(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.RemoteProtocolError(f"illegal status line: {request.headers['authorization']!r}")

    with pytest.raises(DotsOCRError, match="illegal status line") as caught:
        ask(answering(fail), page, api_key=KEY)
    assert_clean(caught.value)


@pytest.mark.parametrize(("key", "text"), [("test", "a test"), ("article", "a article"), ("document", "a ***")])
def test_a_short_key_is_hidden_in_messages_and_left_in_the_words_of_a_page(
    key: str, text: str, page: PageImage
) -> None:
    answer = ask(answering(httpx2.Response(200, json=completion(f"a {key}", model=f"a {key}"))), page, api_key=key)
    assert (answer.text, answer.model) == (text, "a ***")


def test_secrets_are_hidden_however_they_are_written() -> None:
    secrets = Secrets(['a"b\\c/d&1'])
    for text in ('a"b\\c/d&1', r"a\"b\\c/d&1", r"a\"b\\c\/d&1", "a%22b%5Cc%2Fd%261", "a&quot;b\\c/d&amp;1"):
        assert secrets.hide(f"<{text}>") == "<***>", text
    assert Secrets([]).hide("text") == "text"


def test_a_key_with_the_line_end_of_windows_reaches_the_server_without_it(
    server: FakeServer, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTS_OCR_API_KEY", "sesame\r")
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url + "\r")
    with DotsOCR() as ocr:
        assert ocr.read_page(page.image, mode="text").engine == "vllm"
    assert server.requests[0].headers["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    ("variable", "host", "sent"),
    [
        (None, "127.0.0.1", "Bearer of-this-host"),
        (None, "ocr.example", "Bearer none"),
        ("", "127.0.0.1", "Bearer none"),
        ("mine", "127.0.0.1", "Bearer mine"),
    ],
)
def test_the_key_of_this_host_is_for_its_own_server_where_nothing_else_is_said(
    server: FakeServer,
    page: PageImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    host: str,
    sent: str,
) -> None:
    file = tmp_path / "api-key"
    file.write_text("of-this-host\n")
    monkeypatch.setattr("dots_ocr_client.credentials.KEY_FILE", file)
    # A name that is no loopback address, and leads there all the same.
    monkeypatch.setattr("dots_ocr_client.engines.vllm.is_loopback", lambda name: host == "127.0.0.1")
    if variable is not None:
        monkeypatch.setenv("DOTS_OCR_API_KEY", variable)
    with DotsOCR(engines=[VLLMEngine(server.base_url)]) as ocr:
        ocr.read_page(page.image, mode="text")
    assert server.requests[0].headers["Authorization"] == sent


def test_cards_of_models_keep_what_is_no_secret() -> None:
    assert Secrets([KEY]).hide_all([card("a", 1), None, 1.5]) == [card("a", 1), None, 1.5]

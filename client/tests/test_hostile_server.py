"""A server that means harm: each page fails for itself, with one of our errors, or is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import answering, ask, card

from dots_ocr_client import AsyncDotsOCR, ConfigurationError, EngineError, FailedPage, Mode, Page, PageImage, VLLMEngine
from dots_ocr_client.engines import server as transport
from dots_ocr_client.engines import vllm
from dots_ocr_client.engines.server import ENGINE_HEADER
from dots_ocr_client.errors import UnusableAnswer
from dots_ocr_client.results import Attempt, layout

GRAY = PageImage.of(1, Image.new("RGB", (280, 280), "gray"))
JSON, STREAM = "application/json", "text/event-stream"
DEEP = 100_000


@pytest.fixture(autouse=True, scope="module")
def one_try() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm, "TRIES", 1)
        patch.setattr(vllm, "OVERLOAD_TRIES", 1)
        yield


def completion(content: Any = "text", reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr", "choices": [choice], **fields}


def piece(content: Any, reason: Any = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}]}


def events(*pieces: Any) -> str:
    return "".join(f"data: {json.dumps(one)}\n\n" for one in pieces)


def outcome(body: str | bytes, kind: str = JSON, mode: Mode = "text", **more: Any) -> str:
    """Read a page with a server that answers so; return the name of the error, or that it was read."""
    status = more.pop("status", 200)
    models = more.pop("models", None)
    headers = {"Content-Type": kind, **more.pop("headers", {})}
    answers = answering(
        lambda _: httpx2.Response(status, content=body, headers=headers),
        models=None if models is None else httpx2.Response(200, content=models, headers={"Content-Type": JSON}),
    )
    try:
        found = ask(answers, GRAY, mode, **more)
    except (EngineError, ConfigurationError) as error:
        return type(error).__name__ if len(str(error)) < 5_000 else "a message that is too long for a result"
    page = Page(
        1, 280, 280, found.mode, found.text, found.cells, "vllm", found.model, 1.0,
        found.prompt_tokens, found.completion_tokens, found.finish_reason, (), found.warnings,
    )  # fmt: skip
    assert Page.from_dict(json.loads(json.dumps(page.to_dict()))) == page
    assert "<script" not in page.html()
    page.markdown().encode()
    return "read"


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        ("[" * DEEP, JSON, "ServerUnavailable"),
        ('{"choices":' * DEEP, JSON, "ServerUnavailable"),
        (json.dumps(completion("text", "x" * 100_000)), JSON, "UnusableAnswer"),
        (json.dumps(completion(choices={"a": 1})), JSON, "ServerUnavailable"),
        (json.dumps(completion(usage={"prompt_tokens": 10**400, "completion_tokens": -1})), JSON, "read"),
        (json.dumps(completion(usage={"prompt_tokens": True, "completion_tokens": 1.5})), JSON, "read"),
        (json.dumps(completion(model={"a": ["b"]})), JSON, "read"),
        (json.dumps(completion(model="m" * 100_000)), JSON, "read"),
        (json.dumps(completion(dots_ocr={"warnings": [{"a": 1}, None], "engine": [[]]})), JSON, "read"),
        (json.dumps(completion("a \ud800 b")), JSON, "read"),
        (events(piece("te"), piece("xt", "stop")), STREAM, "read"),
        ("data: " + "[" * DEEP + "\n\n", STREAM, "ServerUnavailable"),
        ("data: " + '{"choices":' * DEEP + "\n\n", STREAM, "ServerUnavailable"),
        (events(piece(5, "stop")), STREAM, "ServerUnavailable"),
        (events(piece({"a": 1}), piece("b", "stop")), STREAM, "ServerUnavailable"),
    ],
    ids=range(15),
)
@pytest.mark.attack("an answer that is nested, typed wrongly, huge, cut or no text", "one page's failure")
def test_an_answer_of_any_kind_is_one_page_s_failure(body: str | bytes, kind: str, expected: str) -> None:
    assert outcome(body, kind, stream=kind == STREAM) in expected.split("|")


KEY = "sesame-open"
ATTEMPT: dict[str, Any] = {"engine": "vllm", "outcome": "failed", "error": "E", "reason": "gone", "seconds": 1.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("header", "about", "engine", "model", "attempts"),
    [
        (None, None, None, "dots.ocr", ()),
        ("vllm", None, "vllm", "dots.ocr", ()),
        ("cpu", None, "cpu", "dots.ocr", ()),
        ("cpu", {"engine": "tesseract", "model": "rus"}, "tesseract", "rus", ()),
        (
            None,
            {"engine": "textlayer", "model": "pdfium 1", "attempts": [ATTEMPT]},
            "textlayer",
            "pdfium 1",
            (ATTEMPT,),
        ),
        (None, {"engine": "e" * 65, "attempts": [{**ATTEMPT, "seconds": -1}]}, None, "dots.ocr", ()),
        (None, {"engine": "a\u0439", "attempts": [7]}, None, "dots.ocr", ()),
        (None, {"engine": f"key {KEY}", "attempts": {"a": 1}}, None, "dots.ocr", ()),
        (None, {"engine": "", "model": ""}, None, "dots.ocr", ()),
        (None, {"attempts": [{**ATTEMPT, "more": 1}]}, None, "dots.ocr", ()),
        ("tesseract\xe9", [], None, "dots.ocr", ()),
    ],
)
def test_a_server_is_believed_who_read_the_page_if_that_can_be(
    header: str | None, about: Any, engine: str | None, model: str, attempts: tuple[Any, ...], stream: bool
) -> None:
    headers: dict[str, Any] = {} if header is None else {ENGINE_HEADER: header.encode("latin-1")}
    if stream:
        body = events(piece("te"), {**piece("xt", "stop"), "dots_ocr": about})
        answer = httpx2.Response(200, content=body, headers={"Content-Type": STREAM, **headers})
    else:
        answer = httpx2.Response(200, json=completion(dots_ocr=about), headers=headers)
    found = ask(answering(answer), GRAY, api_key=KEY, stream=stream)
    assert (found.engine, found.model) == (engine, model)
    assert found.attempts == tuple(Attempt(**one) for one in attempts)
    told = engine not in (None, "vllm")
    assert found.warnings == ((f"the server had {engine} ({model}) read the page",) if told else ())


def test_attempts_of_a_server_hold_no_key_and_no_half_characters() -> None:
    about = {"engine": "tesseract", "attempts": [{**ATTEMPT, "reason": f"a\ud800\n{KEY}" + "x" * 9_999}] * 999}
    found = ask(answering(httpx2.Response(200, content=json.dumps(completion(dots_ocr=about)))), GRAY, api_key=KEY)
    assert len(found.attempts) == transport.WARNINGS
    assert found.attempts[0].reason.startswith("a\ufffd ***xxx")
    assert len(found.attempts[0].reason) <= 2_000


@pytest.mark.parametrize(
    "models",
    [
        "[" * DEEP,
        '{"data": [{"id": "dots.ocr", "root": ' + "[" * 500 + "]" * 500 + "}]}",
        json.dumps({"data": [card(f"model {number}", 1) for number in range(9_999)]}),
        json.dumps({"data": [card("m" * 100_000, 1)]}),
    ],
    ids=range(4),
)
@pytest.mark.attack("a list of models that is none", "a failure with a short message")
def test_a_list_of_models_of_any_kind_is_a_failure_with_a_short_message(models: str) -> None:
    assert outcome(json.dumps(completion()), models=models) in ("ServerUnavailable", "ModelNotServed")


@pytest.mark.parametrize("length", ["-1", "0", "true"])
def test_a_context_that_is_none_is_not_believed(length: str) -> None:
    models = f'{{"data": [{{"id": "dots.ocr", "max_model_len": {length}}}]}}'
    assert outcome(json.dumps(completion()), models=models) == "read"


@pytest.mark.parametrize("version", ['"' + "9" * 5_000 + '.1"', "[" * DEEP], ids=range(2))
def test_a_version_that_is_none_is_not_believed(version: str) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/version":
            return httpx2.Response(200, content=f'{{"version": {version}}}', headers={"Content-Type": JSON})
        return answering(httpx2.Response(200, json=completion()))(request)

    assert ask(answer, GRAY, stream=False).text == "text"


@pytest.mark.parametrize("fault", [RecursionError, KeyError])
def test_a_fault_of_a_kind_that_nobody_thought_of_is_no_layout(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(layout, "_values", fail)
    with pytest.raises(UnusableAnswer, match=fault.__name__):
        layout.parse("[]", (1, 1), (1, 1), texts=True)


def test_a_page_that_fails_so_stops_no_other(tmp_path: Path) -> None:
    bodies = iter([b"[" * DEEP, json.dumps(completion()).encode(), json.dumps(completion()).encode()])
    file = tmp_path / "three.tiff"
    GRAY.image.save(file, save_all=True, append_images=[GRAY.image, GRAY.image])

    async def run() -> list[Page | FailedPage]:
        engine = VLLMEngine("http://host/v1", stream=False)
        async with AsyncDotsOCR(engines=[engine]) as ocr:
            engine._server._connect()
            assert engine._server._http is not None
            engine._server._http._transport = httpx2.MockTransport(
                answering(lambda _: httpx2.Response(200, content=next(bodies), headers={"Content-Type": JSON}))
            )
            return [page async for page in ocr.stream(file, mode="text")]

    pages = asyncio.run(run())
    assert sorted(isinstance(page, Page) for page in pages) == [False, True, True]


@pytest.mark.attack("a body without end", "not read to its end")
def test_a_body_without_end_is_not_read_to_its_end() -> None:
    read = 0

    class Endless(httpx2.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal read
            while True:
                read += 2**20
                yield b" " * 2**20

    answers = answering(lambda _: httpx2.Response(200, stream=Endless(), headers={"Content-Type": JSON}))
    with pytest.raises(EngineError, match="is longer than") as caught:
        ask(answers, GRAY, stream=False)
    assert type(caught.value) is EngineError
    assert read <= transport.MAX_ANSWER_BYTES + 2**20


WORDS = st.sampled_from(["\ud800", "\0", "stop", "9" * 5_000, "<table><tr><td>", "$$", "```", "\\frac", "\x1b[2J"])
VALUES = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=9) | WORDS
NAMES = st.sampled_from(
    ["bbox", "category", "text", "choices", "message", "delta", "content", "finish_reason", "usage", "model", "error"]
)
ANY = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=10
)
CELLS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"bbox": st.lists(st.integers(-5, 400) | VALUES, max_size=5), "category": VALUES, "text": VALUES},
    ),
    max_size=3,
)
DEEPLY = st.builds(lambda text, times: text * times, st.sampled_from(["[", '{"text":', "<td>"]), st.integers(1, 5_000))
CONTENTS = st.text() | DEEPLY | CELLS.map(json.dumps) | ANY
BODIES = st.one_of(
    st.builds(completion, CONTENTS, st.just("stop") | ANY, usage=ANY, model=ANY, dots_ocr=ANY).map(json.dumps),
    st.lists(st.builds(piece, CONTENTS, st.none() | st.just("stop") | ANY), max_size=3).map(lambda one: events(*one)),
    ANY.map(json.dumps),
    DEEPLY,
)


@settings(max_examples=25)
@given(BODIES, st.sampled_from([JSON, STREAM]), st.sampled_from(["text", "layout"]), st.sampled_from([200, 400, 500]))
@example('{"choices":' * DEEP, JSON, "text", 200)
@example("data: " + "[" * DEEP + "\n\n", STREAM, "text", 200)
@example(events(piece(5, "stop")), STREAM, "text", 200)
def test_whatever_comes_is_read_or_is_one_of_our_errors(body: str, kind: str, mode: Mode, status: int) -> None:
    outcome(body.encode(errors="replace"), kind, mode, status=status, stream=kind == STREAM)


@pytest.mark.parametrize(
    ("kind", "piece"),
    [("text/event-stream", b"data: []\n"), ("text/event-stream", b"x"), ("text/event-stream+json", b"[],")],
)
@pytest.mark.attack("an event without end, or one piece that calls itself a stream", "not read to its end")
def test_an_event_without_end_is_not_read_to_its_end(kind: str, piece: bytes) -> None:
    read = 0

    class Endless(httpx2.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal read
            while read < transport.MAX_BODY_BYTES:
                read += 2**16
                yield piece * (2**16 // len(piece))

    answer = httpx2.Response(200, stream=Endless(), headers={"Content-Type": kind})
    with pytest.raises(EngineError, match="longer than"):
        ask(answering(lambda _: answer), GRAY, stream=kind == "text/event-stream")
    assert read < 2 * transport.MAX_ANSWER_BYTES

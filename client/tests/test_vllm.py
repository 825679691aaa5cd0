from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import FakeServer, answering, ask, prompt_of, reply, sent_image
from werkzeug import Response

from dots_ocr_client import (
    Answer,
    Box,
    Cell,
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    EngineError,
    Limiter,
    Mode,
    ModelNotServed,
    ModeNotSupported,
    Overloaded,
    PageImage,
    Repetition,
    RequestRejected,
    ServerUnavailable,
    Task,
    Unauthorized,
    UnusableAnswer,
    VLLMEngine,
)
from dots_ocr_client.engines import server as transport
from dots_ocr_client.engines import vllm
from dots_ocr_client.pages import images
from dots_ocr_client.prompts import MODES
from dots_ocr_client.results import layout

WAIT_SECONDS = vllm.WAIT_SECONDS  # before the tests shorten it
LOOP = "The same line again.\n" * 200
BLANK = PageImage.of(1, Image.new("RGB", (280, 280), "white"))
YESTERDAY, TOMORROW = (format_datetime(datetime.now(UTC) + timedelta(days=days), usegmt=True) for days in (-1, 1))


def read(engine: VLLMEngine, page: PageImage, *tasks: Task | Mode, seconds: float = 20.0) -> list[Answer]:
    """Read a page in several ways, one after the other."""

    async def run() -> list[Answer]:
        try:
            return [await engine.read(page, task if isinstance(task, Task) else Task(task), seconds) for task in tasks]
        finally:
            await engine.aclose()

    return asyncio.run(run())


@pytest.fixture
def engine(server: FakeServer) -> VLLMEngine:
    return VLLMEngine(server.base_url)


# What is sent


def test_the_answer_comes_with_its_origin_and_its_tokens(engine: VLLMEngine, page: PageImage) -> None:
    (answer,) = read(engine, page, "text")
    assert answer == Answer(
        mode="text",
        text="read by the server",
        model="dots.ocr",
        prompt_tokens=28 * 8 + 22,
        completion_tokens=4,
        finish_reason="stop",
    )


@pytest.mark.parametrize("mode", ["layout", "layout_only", "text", "web", "scene"])
def test_the_placeholder_stands_exactly_once_in_front_of_the_trained_prompt(
    mode: Mode, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, mode)
    (body,) = server.bodies
    assert prompt_of(body) == "<|img|><|imgpad|><|endofimg|>" + MODES[mode].prompt
    assert [message["role"] for message in body["messages"]] == ["user"]


def test_server_that_goes_away_behind_a_404_is_away(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(seconds: float) -> list[dict[str, Any]]:
        raise ServerUnavailable("cannot reach it")

    monkeypatch.setattr(engine._server, "models", gone)
    error = asyncio.run(engine._server._explain_not_found(1.0, "dots.ocr"))
    assert isinstance(error, ServerUnavailable)


def test_an_svg_is_asked_for_in_the_size_that_was_sent(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    read(engine, page, "svg")
    assert prompt_of(server.bodies[0]).endswith('viewBox="0 0 784 224"')
    assert (server.bodies[0]["temperature"], server.bodies[0]["top_p"]) == (0.9, 1.0)


def test_a_question_has_its_system_prompt_and_is_sent_as_it_is(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, Task("general", question="What is {this} <|img|><|imgpad|><|endofimg|>?"))
    (body,) = server.bodies
    assert body["messages"][0] == {"role": "system", "content": "You are a helpful assistant."}
    assert prompt_of(body) == "<|img|><|imgpad|><|endofimg|>What is {this} ?"


def test_a_box_is_sent_in_pixels_of_what_the_model_sees(engine: VLLMEngine, server: FakeServer) -> None:
    page = PageImage.of(1, Image.new("RGB", (1000, 500), "white"))
    read(engine, page, Task("grounding", box=Box(0, 0, 1000, 250)))
    assert prompt_of(server.bodies[0]).endswith("Bounding Box:\n[0, 0, 1008, 252]")


def test_a_box_outside_the_page_is_not_sent(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    with pytest.raises(RequestRejected, match=r"outside the page of 784 x 224 px\. Fix: "):
        read(engine, page, Task("grounding", box=Box(784, 0, 900, 100)))
    assert server.requests == []


def test_the_page_is_sent_as_it_is(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    read(engine, page, "text")
    assert sent_image(server.bodies[0]).convert("RGB").tobytes() == page.image.tobytes()


def test_upstreams_sampling_and_the_loop_detector_are_sent(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, "layout")
    (body,) = server.bodies
    assert (body["model"], body["temperature"], body["top_p"]) == ("dots.ocr", 0.1, 0.9)
    assert body["repetition_detection"] == {"max_pattern_size": 32, "min_pattern_size": 1, "min_count": 64}


# How long the answer may be


@pytest.mark.parametrize("mode", ["layout", "text"])
def test_the_answer_may_take_what_the_image_and_the_prompt_leave(
    mode: Mode, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, mode)
    (body,) = server.bodies
    left = 16_384 - 28 * 8 - body["max_completion_tokens"]
    assert len(prompt_of(body)) / 2 < left < len(prompt_of(body)) / 2 + 65


A4_AT_300 = (2_480, 3_508)  # 11,125 tokens


@pytest.fixture(scope="module")
def large_page() -> PageImage:
    return PageImage.of(1, Image.new("RGB", A4_AT_300, "gray"))


@pytest.mark.parametrize(
    ("max_pixels", "context"),
    [(1_000_000, 2_048), (1_000_000, 4_096), (5_000_000, 8_192), (5_000_000, 7_000), (images.MAX_PIXELS, 11_600)],
)
def test_what_a_server_that_shrinks_pages_accepts_is_never_refused(
    max_pixels: int, context: int, large_page: PageImage, engine: VLLMEngine, server: FakeServer
) -> None:
    server.max_pixels, server.models, server.strict = max_pixels, {"dots.ocr": context}, True
    answers = read(engine, large_page, "text", "layout", "layout", "text")
    assert {sent_image(body).size for body in server.bodies} - {(56, 56)} == {A4_AT_300}
    box = layout.to_page(Box(0, 0, 28, 28), images.smart_resize(*A4_AT_300, max_pixels=max_pixels), A4_AT_300)
    assert [[cell.box for cell in answer.cells] for answer in answers] == [[], [box], [box], []]


def test_the_answer_gets_what_a_server_that_shrinks_pages_has_left(
    large_page: PageImage, engine: VLLMEngine, server: FakeServer
) -> None:
    server.max_pixels, server.strict = 1_000_000, True
    read(engine, large_page, "layout", "layout")
    first, _, second = server.bodies
    assert "max_completion_tokens" not in first  # the server's own default is all that is left
    assert 14_000 < second["max_completion_tokens"] < 16_384 - 1_200


def test_a_page_that_does_not_fit_is_refused_by_the_server_with_a_fix(
    large_page: PageImage, engine: VLLMEngine, server: FakeServer
) -> None:
    server.models, server.strict = {"dots.ocr": 8_192}, True
    with pytest.raises(RequestRejected, match="larger --max-model-len, or give a smaller image"):
        read(engine, large_page, "text")


@pytest.mark.parametrize(("context", "tokens"), [(16_384, 11_125), (12_000, 7_904), (8_192, 4_956), (4_096, 2_730)])
def test_a_page_of_a_pdf_is_shrunk_to_leave_room_for_its_answer(
    context: int, tokens: int, large_page: PageImage, engine: VLLMEngine, server: FakeServer
) -> None:
    page = replace(large_page, dpi=300)
    server.models, server.strict = {"dots.ocr": context}, True
    (answer,) = read(engine, page, "layout")
    sent = sent_image(server.bodies[0]).size
    assert 0.97 * tokens < images.image_tokens(*sent) <= tokens
    assert answer.cells[0].box == layout.to_page(Box(0, 0, 28, 28), images.smart_resize(*sent), A4_AT_300)
    shrunk = f"sent as {sent[0]} x {sent[1]} px, to leave its answer room in a context of {context} tokens"
    assert [warning for warning in answer.warnings if shrunk in warning] == list(answer.warnings)
    assert bool(answer.warnings) == (context < 16_384)


def test_a_prompt_that_takes_more_tokens_than_expected_leaves_the_length_to_the_server(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.fail_with(400, "This model's maximum context length is 16384 tokens. However, you requested", times=1)
    (answer,) = read(engine, page, "text")
    assert answer.text == "read by the server"
    assert ["max_completion_tokens" in body for body in server.bodies] == [True, False]


def test_a_page_refused_for_its_length_again_is_given_up_with_a_fix(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.fail_with(400, "This model's maximum context length is 16384 tokens.")
    with pytest.raises(RequestRejected, match="larger --max-model-len, or give a smaller image"):
        read(engine, page, "text")
    assert len(server.requests) == 2


def test_a_server_that_hides_its_context_sets_the_limit_itself(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.models = {"dots.ocr": None}
    assert read(engine, page, "text")[0].text == "read by the server"
    assert "max_completion_tokens" not in server.bodies[0]


# Which server and which model


def test_the_server_is_asked_about_itself_once_and_again_after_a_failure(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, "text", "text")
    assert (server.asked_for("/v1/models"), server.asked_for("/version")) == (1, 1)
    server.fail_with(400)
    with pytest.raises(RequestRejected):
        read(engine, page, "text")
    server.answer, server.models = None, {"dots.ocr": 8_192}
    read(engine, page, "text")
    assert (server.asked_for("/v1/models"), server.asked_for("/version")) == (2, 2)
    assert server.bodies[0]["max_completion_tokens"] - server.bodies[-1]["max_completion_tokens"] == 8_192


def test_a_wrong_model_fails_fast_and_names_those_that_exist(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.models = {"facebook/opt-125m": 2048, "other": 1}
    with pytest.raises(ModelNotServed, match="'facebook/opt-125m', 'other'") as caught:
        read(engine, page, "text")
    assert (caught.value.model, caught.value.served) == ("dots.ocr", ("facebook/opt-125m", "other"))
    assert server.requests == []


def test_a_model_that_vanishes_after_the_first_page_is_a_fault_of_the_server(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, "text")
    server.models = {"newer": 1}
    server.fail_with(404)
    with pytest.raises(ServerUnavailable, match=r"in place of the right one.*'newer'"):
        read(engine, page, "text")


@pytest.mark.parametrize(
    ("root", "sent"),
    [
        ("rednote-hilab/dots.ocr", False),
        ("/models/DotsOCR", True),
        ("rednote-hilab/dots.mocr", True),
        ("/models/dots.ocr-1.5", True),
        (None, True),
    ],
)
def test_a_mode_of_dots_mocr_is_not_asked_of_what_is_plainly_dots_ocr(
    root: str | None, sent: bool, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.root = root
    with contextlib.nullcontext() if sent else pytest.raises(ModeNotSupported, match=r"only dots\.mocr"):
        read(engine, page, "scene")
    assert len(server.requests) == sent
    read(engine, page, "text")


def test_a_base_url_without_an_api_fails_fast(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.models_answer = lambda: reply({"detail": "Not Found"}, 404)
    with pytest.raises(ConfigurationError, match="usually ends in /v1"):
        read(engine, page, "text")


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1"]
)
def test_a_malformed_base_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a base URL"):
        VLLMEngine(url)


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_fails_fast(status: int, engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.models_answer = lambda: reply({"error": "no"}, status)
    with pytest.raises(Unauthorized, match="DOTS_OCR_API_KEY"):
        read(engine, page, "text")
    assert server.asked_for("/v1/models") == 1


def test_a_page_that_a_firewall_forbids_is_one_page_s_failure(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    read(engine, page, "text")
    server.fail_with(403, "blocked", times=1)
    with pytest.raises(RequestRejected, match=r"with 403: .*blocked"):
        read(engine, page, "text")
    assert read(engine, page, "text")[0].text == "read by the server"


def test_the_key_and_the_address_come_from_our_own_environment_only(
    server: FakeServer, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    monkeypatch.setenv("DOTS_OCR_BASE_URL", server.base_url)
    read(VLLMEngine(), page, "text")
    monkeypatch.setenv("DOTS_OCR_API_KEY", "ours")
    read(VLLMEngine(), page, "text")
    keys = [request.headers["Authorization"] for request in server.requests]
    assert keys == ["Bearer none", "Bearer ours"]


def test_a_proxy_is_not_asked_for_this_machine(
    engine: VLLMEngine, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert read(engine, page, "text")[0].text == "read by the server"


def test_cards_and_version_are_told_as_the_server_sends_them(engine: VLLMEngine, server: FakeServer) -> None:
    async def ask() -> tuple[list[dict[str, Any]], str | None, str | None]:
        cards, version = await engine.models(5.0), await engine.version(5.0)
        server.version = None
        return cards, version, await engine.version(5.0)

    cards, version, none = asyncio.run(ask())
    assert [(card["id"], card["max_model_len"]) for card in cards] == [("dots.ocr", 16_384)]
    assert (version, none) == ("0.25.1", None)


# Layouts


def cells_json(*boxes: tuple[int, int, int, int]) -> str:
    return json.dumps([{"bbox": box, "category": "Text", "text": f"cell {box[0]}"} for box in boxes])


def test_a_layout_has_cells_and_their_text(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.script = [(cells_json((0, 0, 784, 112), (28, 112, 784, 224)), "stop")]
    (answer,) = read(engine, page, "layout")
    assert answer.cells == (
        Cell("Text", Box(0, 0, 784, 112), "cell 0"),
        Cell("Text", Box(28, 112, 784, 224), "cell 28"),
    )
    assert (answer.mode, answer.text, answer.warnings) == ("layout", "cell 0\n\ncell 28", ())


def test_a_layout_without_texts_has_none(engine: VLLMEngine, page: PageImage) -> None:
    (answer,) = read(engine, page, "layout_only")
    assert (answer.text, answer.cells) == ("", (Cell("Text", Box(0, 0, 28, 28)),))


def test_repairs_of_a_layout_are_warnings(engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.script = [("```json\n" + cells_json((0, 0, 28, 28)) + "\n```", "stop")]
    (answer,) = read(engine, page, "layout")
    assert (len(answer.cells), len(answer.warnings), len(server.requests)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "finish_reason", "warning"),
    [
        (LOOP, "stop", "the layout answer repeated itself without end"),
        ("[", "repetition", "the layout answer repeated itself without end"),
        (cells_json((0, 0, 28, 28)), "length", "the layout answer was cut off"),
        ("I cannot read this.", "stop", "the layout answer was of no use"),
        ("[]", "stop", "the layout answer was of no use"),
        ("", "stop", "the layout answer was of no use"),
    ],
)
def test_a_layout_that_fails_is_read_as_plain_text_instead(
    text: str, finish_reason: str, warning: str, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.script = [(text, finish_reason)]
    (answer,) = read(engine, page, "layout")
    assert (answer.mode, answer.text, answer.cells) == ("text", "read by the server", ())
    assert answer.warnings[0].startswith(warning)
    assert answer.warnings[0].endswith(", so the page was read as plain text")


def test_a_layout_that_fails_as_plain_text_too_gives_both_reasons(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.script = [(cells_json((0, 0, 28, 28)), "length"), ("no no no", "repetition")]
    with pytest.raises(UnusableAnswer, match=r"the layout: .*cut off.* as plain text: .*repeated itself"):
        read(engine, page, "layout")


@pytest.mark.parametrize(("text", "finish_reason"), [(LOOP, "stop"), ("cut", "length")])
@pytest.mark.parametrize("mode", ["text", "layout_only", "scene"])
def test_other_modes_are_tried_again_at_another_temperature(
    mode: Mode, text: str, finish_reason: str, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.script = [(text, finish_reason)]
    (answer,) = read(engine, page, mode)
    assert [body["temperature"] for body in server.bodies] == [0.1, 0.5]
    assert answer.mode == mode
    assert "read again at temperature 0.5" in answer.warnings[0]


@pytest.mark.parametrize("text", ["", "[]"])
def test_an_empty_answer_is_the_right_one_for_a_blank_page(text: str, engine: VLLMEngine, server: FakeServer) -> None:
    server.script = [(text, "stop")]
    (answer,) = read(engine, BLANK, "layout")
    assert (answer.mode, answer.text, answer.cells, answer.warnings) == ("layout", "", (), ())


@pytest.mark.parametrize(
    ("finish_reason", "text", "error", "message"),
    [
        ("length", "cut", CutOff, "cut off"),
        ("repetition", "no no no", Repetition, "repeated itself"),
        ("stop", LOOP, Repetition, "repeated itself"),
        ("stop", "\n" * 2_000, Repetition, "repeated itself"),
        ("stop", "", UnusableAnswer, "not blank"),
        ("stop", " \n", UnusableAnswer, "not blank"),
        ("stop", None, UnusableAnswer, "no text"),
        ("content_filter", "half", UnusableAnswer, "'content_filter'"),
    ],
)
def test_an_unusable_answer_is_not_returned(
    finish_reason: str,
    text: str | None,
    error: type[EngineError],
    message: str,
    engine: VLLMEngine,
    server: FakeServer,
    page: PageImage,
) -> None:
    server.finish_reason, server.text = finish_reason, text
    with pytest.raises(error, match=message) as caught:
        read(engine, page, "text")
    assert type(caught.value) is error


@pytest.mark.parametrize("finish_reason", ["abort", "error"])
def test_a_page_that_the_server_gives_up_is_sent_again(
    finish_reason: str, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.script = [("half", finish_reason)]
    (answer,) = read(engine, page, "text")
    assert (answer.text, len(server.requests)) == ("read by the server", 2)


def test_long_regular_text_is_not_taken_for_a_loop() -> None:
    assert not transport.is_loop("".join(f"{number:4}  ............ page {number}\n" for number in range(300)))
    assert not transport.is_loop("." * 500)
    assert transport.is_loop("A page, and then " + "<td></td>" * 400)


# A server that shrinks pages further than we do


@settings(max_examples=200)
@given(st.integers(56, 4_000), st.integers(56, 4_000), st.integers(images.MIN_PIXELS, images.MAX_PIXELS))
def test_the_size_that_the_model_saw_follows_from_the_tokens(width: int, height: int, max_pixels: int) -> None:
    seen = images.smart_resize(width, height, max_pixels=max_pixels)
    limit = images.server_limit(width, height, seen[0] * seen[1] // 784)
    assert limit is not None
    assert limit <= max_pixels
    assert images.smart_resize(width, height, max_pixels=limit) == seen


@pytest.mark.parametrize("tokens", [-1, 0, 1_799, 1_801])  # 50 columns of 36, the next smaller are 50 of 35
def test_tokens_that_no_limit_explains_tell_no_size(tokens: int) -> None:
    assert images.server_limit(1_400, 1_000, 1_750) is not None
    assert images.server_limit(1_400, 1_000, tokens) is None


@pytest.mark.parametrize("side", [700, 1_000, 2_000, 3_200])
def test_boxes_are_right_though_the_server_shrank_the_page(side: int, engine: VLLMEngine, server: FakeServer) -> None:
    page = PageImage.of(1, Image.new("RGB", (side, side * 4 // 3), "gray"))
    server.max_pixels = 600 * 600
    seen = images.smart_resize(page.width, page.height, max_pixels=server.max_pixels)
    server.script = [(cells_json((0, 0, *seen)), "stop")]
    (answer,) = read(engine, page, "layout")
    assert answer.cells[0].box == (0, 0, page.width, page.height)
    assert answer.warnings == (f"the server shrank the page to {seen[0]} x {seen[1]} px",)


def test_the_slightest_shrinking_is_noticed(engine: VLLMEngine, server: FakeServer) -> None:
    page = PageImage.of(1, Image.new("RGB", (1652, 2352), "gray"))
    server.max_pixels = 1652 * 2352 - 1
    assert "shrank the page to" in read(engine, page, "layout")[0].warnings[0]


def test_how_the_server_shrinks_is_learnt_once_and_kept(engine: VLLMEngine, server: FakeServer) -> None:
    page = PageImage.of(1, Image.new("RGB", (1400, 1400), "gray"))
    server.max_pixels = 600 * 600
    read(engine, page, "layout", "layout", Task("grounding", box=Box(0, 0, 1400, 1400)))
    sizes = [sent_image(body).size for body in server.bodies]
    assert sizes == [(1400, 1400), (56, 56), (1400, 1400), (1400, 1400)]
    assert server.bodies[1]["max_completion_tokens"] == 1
    assert prompt_of(server.bodies[3]).endswith("[0, 0, 588, 588]")


def test_a_server_that_does_not_count_images_makes_boxes_uncertain(
    engine: VLLMEngine, server: FakeServer, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_usage", lambda body, text: {"prompt_tokens": 9, "completion_tokens": 1})
    (answer,) = read(engine, page, "layout")
    assert answer.cells[0].box == (0, 0, 28, 28)
    assert "boxes may be off" in answer.warnings[0]


def test_a_server_that_does_not_count_at_all_is_believed(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.counts = False
    (answer,) = read(engine, page, "layout")
    assert (answer.prompt_tokens, answer.warnings, len(server.requests)) == (None, (), 1)


# Errors, and which of them are tried again


@pytest.mark.parametrize(
    ("status", "error", "tries"),
    [
        (400, RequestRejected, 1),
        (413, RequestRejected, 1),
        (422, RequestRejected, 1),
        (429, Overloaded, 6),
        (503, Overloaded, 6),
        (500, ServerUnavailable, 3),
        (502, ServerUnavailable, 3),
        (302, ServerUnavailable, 3),
    ],
)
def test_each_status_has_its_error_and_its_number_of_tries(
    status: int, error: type[EngineError], tries: int, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.fail_with(status, "the reason " + "x" * 10_000)
    with pytest.raises(error, match=str(status)) as caught:
        read(engine, page, "layout")
    assert type(caught.value) is error
    assert len(str(caught.value)) < 500
    assert len(server.requests) == tries


def test_a_passing_overload_is_waited_for_and_halves_what_is_in_flight(server: FakeServer, page: PageImage) -> None:
    limiter = Limiter(start=8, cap=32)
    server.fail_with(503, times=2)
    (answer,) = read(VLLMEngine(server.base_url, limiter=limiter), page, "text")
    assert (answer.text, answer.warnings, limiter.limit) == ("read by the server", (), 4)


def test_pages_that_are_read_make_room_for_more(server: FakeServer, page: PageImage) -> None:
    limiter = Limiter(start=1, cap=8)

    async def hold() -> None:
        engine = VLLMEngine(server.base_url, limiter=limiter)
        async with limiter:
            await engine.read(page, Task("text"), 9.0)
        await engine.aclose()

    asyncio.run(hold())
    assert limiter.limit == 2


@pytest.mark.parametrize(
    "value", ["1.5", YESTERDAY, "soon", "nan", "-1"], ids=["1.5", "yesterday", "soon", "nan", "-1"]
)
def test_a_wish_to_be_left_alone_is_heeded(value: str, engine: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.retry_after = value
    server.fail_with(429, times=1)
    started = time.monotonic()
    assert read(engine, page, "text")[0].text == "read by the server"
    assert (time.monotonic() - started >= 1.5) == (value == "1.5")


@pytest.mark.parametrize("value", ["20", TOMORROW], ids=["20", "tomorrow"])
def test_a_wish_for_more_time_than_there_is_ends_the_tries(
    value: str, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.retry_after = value
    server.fail_with(429)
    with pytest.raises(Overloaded) as caught:
        read(engine, page, "text", seconds=10.0)
    assert len(server.requests) == 1
    assert (caught.value.retry_after or 0) > 19


def test_a_server_that_is_not_there_is_given_up_early(page: PageImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "WAIT_SECONDS", WAIT_SECONDS)
    sleep, waits = asyncio.sleep, list[float]()

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", note)
    with pytest.raises(ServerUnavailable):
        read(VLLMEngine("http://127.0.0.1:9/v1"), page, "text")
    assert WAIT_SECONDS < sum(waits) < 2


def test_a_server_that_is_not_there_or_still_starts_is_named_with_a_fix(page: PageImage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(ServerUnavailable, match="start the server, or wait: it takes minutes to start"):
        read(VLLMEngine(url), page, "text")


def test_a_proxy_in_front_of_a_server_that_starts_is_told_from_a_server(page: PageImage) -> None:
    """Docker's proxy accepts, and closes at once while nobody listens behind it."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.close()
                    accepted.append(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises(ServerUnavailable, match="wait if it is just starting, which takes minutes"):
            read(VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"), page, "text")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(accepted) == 3


@pytest.mark.parametrize(
    "body", ["<html>a proxy</html>", "{", "{}", '{"choices": []}', '{"data": [{"name": "no id"}]}', "[1]", "null"]
)
@pytest.mark.parametrize("where", ["models", "answer", "stream"])
def test_what_is_no_api_answer_is_not_believed(where: str, body: str, page: PageImage) -> None:
    kind = "text/html" if body.startswith("<") else "application/json"
    answer = httpx2.Response(200, content=body, headers={"Content-Type": kind})
    with pytest.raises(ServerUnavailable, match="what else listens there"):
        ask(answering(answer, models=answer if where == "models" else None), page, stream=where == "stream")


def test_an_answer_without_end_is_not_read_to_the_end(
    engine: VLLMEngine, server: FakeServer, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_BODY_BYTES", 100_000)
    server.text = "".join(map(str, range(30_000)))
    with pytest.raises(EngineError, match="longer than 100000 bytes"):
        read(engine, page, "text")
    assert len(server.requests) == 1


def test_an_answer_that_may_unpack_to_gigabytes_is_not_unpacked(
    engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.answer = lambda: Response(b"", headers={"Content-Encoding": "gzip"})
    with pytest.raises(EngineError, match="compresses"):
        read(engine, page, "text")


def test_a_host_that_swallows_packets_is_given_up_early(page: PageImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.3)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(3):  # more than the queue takes: from then on the kernel drops what comes
            caller = waiting.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        with pytest.raises(ServerUnavailable, match="no connection in time"):
            read(VLLMEngine(f"http://127.0.0.1:{listener.getsockname()[1]}/v1"), page, "text")
    assert time.monotonic() - started < 4  # a connection may take 5 s where nobody sets less


# Streams


@pytest.mark.parametrize(
    ("version", "streamed"), [("0.25.1", False), ("0.17.0rc1", False), ("0.16.2", True), ("dev", True), (None, True)]
)
def test_answers_are_streamed_unless_the_server_ends_loops_by_itself(
    version: str | None, streamed: bool, engine: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    server.version = version
    (answer,) = read(engine, page, "text")
    (body,) = server.bodies
    assert (body.get("stream", False), "repetition_detection" in body) == (streamed, not streamed)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("read by the server", 28 * 8 + 22, 4)


@pytest.fixture
def streaming(server: FakeServer) -> VLLMEngine:
    return VLLMEngine(server.base_url, stream=True)


def test_a_loop_in_a_stream_is_ended_while_it_lasts(streaming: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.text, server.seconds = "<td></td>" * 20_000, 0.0005
    with pytest.raises(Repetition):
        read(streaming, page, "text")
    assert len(server.requests) == 2
    assert server.hung_up.wait(2.0), "the connection was left open"


@pytest.mark.parametrize("limit", ["FIRST_TOKEN_SECONDS", "IDLE_SECONDS"])
def test_a_stream_that_stops_is_given_up(
    limit: str, streaming: VLLMEngine, server: FakeServer, page: PageImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, limit, 0.1)
    server.seconds = 0.4
    with pytest.raises(DeadlineExceeded, match="did not begin" if limit.startswith("FIRST") else "in the middle"):
        read(streaming, page, "text")
    assert server.hung_up.wait(2.0), "the connection was left open"


def test_a_stream_that_breaks_off_is_read_again(streaming: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.cut = 2
    with pytest.raises(ServerUnavailable, match="closed the connection"):
        read(streaming, page, "text")
    assert len(server.requests) == 3
    server.cut = None
    assert read(streaming, page, "text")[0].text == "read by the server"


@pytest.mark.parametrize(
    ("end", "message"),
    [("", "broke its answer off"), ('data: {"error": {"message": "engine died"}}\n\n', "engine died")],
)
def test_a_stream_that_ends_too_early_or_in_an_error_is_not_an_answer(
    end: str, message: str, streaming: VLLMEngine, server: FakeServer, page: PageImage
) -> None:
    chunk = {"model": "m", "choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n{end}"
    server.answer = lambda: Response(body, content_type="text/event-stream")
    with pytest.raises(ServerUnavailable, match=message):
        read(streaming, page, "text")


def test_giving_up_a_page_closes_its_connection(streaming: VLLMEngine, server: FakeServer, page: PageImage) -> None:
    server.text, server.seconds = "".join(map(str, range(5_000))), 0.02

    async def give_up() -> None:
        reading = asyncio.create_task(streaming.read(page, Task("text"), 20.0))
        while not server.in_flight:
            await asyncio.sleep(0.01)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading

    asyncio.run(give_up())
    assert server.hung_up.wait(2.0), "the connection was left open"


@dataclass
class Dripper:
    """Sends `start`, and then one byte every 20 ms until the other side closes."""

    start: bytes
    socket: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    closed: threading.Event = field(default_factory=threading.Event)

    def serve(self) -> None:
        connection, _ = self.socket.accept()
        with connection:
            connection.settimeout(0.02)
            connection.sendall(self.start)
            while True:
                try:
                    if not connection.recv(65536):
                        break
                except TimeoutError:
                    pass
                except OSError:
                    break
                try:
                    connection.sendall(b" ")
                except OSError:
                    break
        self.closed.set()


@pytest.fixture(params=["headers", "body"])
def dripper(request: pytest.FixtureRequest) -> Iterator[Dripper]:
    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\nX: y"
    made = Dripper(start + (b"\r\n\r\n" if request.param == "body" else b""))
    thread = threading.Thread(target=made.serve)
    thread.start()
    yield made
    thread.join(10)
    made.socket.close()


def test_a_server_that_drips_is_hung_up_on_at_the_deadline(dripper: Dripper, page: PageImage) -> None:
    engine = VLLMEngine(f"http://127.0.0.1:{dripper.socket.getsockname()[1]}/v1")

    async def run() -> None:
        async with asyncio.timeout(0.7):
            await engine.read(page, Task("text"), 0.7)

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(run())
    assert 0.6 < time.monotonic() - started < 15  # the server would drip for half an hour
    assert dripper.closed.wait(1.0), "the connection was left open"

"""What stands in front of vLLM in its container: the requests that pass, and those that it keeps from vLLM."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.dots_ocr.deploy.plugins.filter import api_paths as plugin
from dots_ocr_client.engines.vllm import REPETITION
from PIL import Image

from tests import programs

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "the-key-of-the-server-0123456789"
CHAT = "/v1/chat/completions"
START = "<p>$state</p>"
MIB = 1 << 20

gate = programs.load("dots_ocr_gate.py")


class Answer(NamedTuple):
    """What came of a request, and what vLLM saw of it: nothing if the gate kept it."""

    status: int
    content: Any
    headers: dict[bytes, bytes]
    seen: list[tuple[str, dict[bytes, bytes], bytes]]

    def refuses(self, status: int, *words: str, param: str | None = None) -> bool:
        """Tell whether it is this refusal, in OpenAI's shape, with a way out, and unseen by vLLM."""
        error = self.content["error"]
        right = (self.status, error["code"], error["param"]) == (status, status, param) and not self.seen
        return right and "Fix: " in error["message"] and all(word in error["message"] for word in words)


class Server:
    """The gate with a vLLM that answers what it got."""

    def __init__(self, folder: Path) -> None:
        """Start as the container does."""
        settings = folder / "dots_ocr_gate.settings"
        settings.write_text(json.dumps({"paths": plugin.api_paths("server"), "max_body_mib": 2, "page": START}))
        self.gate = gate.Gate(self.vllm, settings)
        self.seen: list[tuple[str, dict[bytes, bytes], bytes]] = []
        self.held: list[int] = []
        self.status = 200

    async def vllm(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer with the body."""
        message = await receive() if scope["type"] == "http" else {}
        self.held.append(self.gate.held)
        assert not scope.get("query_string")
        self.seen.append((scope.get("path", scope["type"]), dict(scope.get("headers", [])), message.get("body", b"")))
        if scope["type"] == "http":
            assert not message["more_body"]
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps((await receive())["type"]).encode()})

    def ask(self, path: str, body: Any = b"", *, method: str = "POST", key: str | None = KEY, **more: Any) -> Answer:
        """Send a request: its body whole, or a list of messages as uvicorn hands them on."""
        data = body if isinstance(body, bytes | list) else json.dumps(body).encode()
        messages = data if isinstance(data, list) else [{"type": "http.request", "body": data, "more_body": False}]
        headers = [(b"content-type", b"application/json"), *more.pop("headers", [])]
        if isinstance(data, bytes):
            headers.append((b"content-length", b"%d" % len(data)))
        if key:
            headers.append((b"authorization", f"Bearer {key}".encode()))
        scope = {"type": "http", "method": method, "path": path, "query_string": b"a=b", "headers": headers, **more}
        return self.send(scope, [*messages, {"type": "http.disconnect"}])

    def send(self, scope: dict[str, Any], messages: list[dict[str, Any]]) -> Answer:
        """Run the application with what it receives; one that waits for more is not answered."""
        sent: list[dict[str, Any]] = []
        self.seen.clear()

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else await asyncio.Future()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        asyncio.run(self.gate(scope, receive, send))
        content = b"".join(message.get("body", b"") for message in sent)
        start = sent[0] if sent else {}
        headers = dict(start.get("headers", []))
        found = content.decode() if b"text/html" in headers.get(b"content-type", b"") else json.loads(content or "null")
        return Answer(start.get("status", 0), found, headers, list(self.seen))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Return a server with a key; afterwards it holds nothing of what was asked."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    found = Server(tmp_path)
    yield found
    assert found.gate.held == 0


def picture(kind: str = "PNG", size: tuple[int, int] = (28, 28), **more: Any) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    Image.new("1" if size[0] > 5000 else "L", size).save(file, kind, **more)
    return file.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    """Return a picture as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def page(address: Any = "", **more: Any) -> dict[str, Any]:
    """Return the body of a request to read a page."""
    image = {"type": "image_url", "image_url": {"url": address or url(picture())}}
    content = [image, {"type": "text", "text": "<|img|><|imgpad|><|endofimg|>Extract."}]
    return {"model": "dots.ocr", "messages": [{"role": "user", "content": content}], **more}


def parts(*content: Any) -> dict[str, Any]:
    """Return the body of a request with these parts."""
    return page(messages=[{"role": "user", "content": list(content)}])


def test_page_reaches_vllm_byte_by_byte_and_its_hanging_up_too(server: Server) -> None:
    body = json.dumps(page(), indent=3).encode()
    pieces = [{"type": "http.request", "body": body[at : at + 50], "more_body": True} for at in range(0, len(body), 50)]
    answer = server.ask(CHAT, [*pieces, {"type": "http.request", "body": b"", "more_body": False}])
    assert (answer.status, answer.content) == (200, "http.disconnect")
    assert [(path, data) for path, _, data in answer.seen] == [(CHAT, body)]
    assert server.held == [len(body) + 3 * 28 * 28]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.1, "top_p": 0.9, "max_completion_tokens": 9000, "repetition_detection": REPETITION},
        {"temperature": 0, "top_p": 1, "max_tokens": 4, "stop": ["\n"], "seed": -1, "user": "somebody"},
        {"stream": True, "stream_options": {"include_usage": True}, "stop": "Paper"},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stop": [], "ignore_eos": True, "min_tokens": 0, "skip_special_tokens": False, "top_k": -1},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "tool_choice": "none", "response_format": {"type": "text"}},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.05, "model": None},
        {"logprobs": None, "tools": None, "functions": None, "stop": None, "max_tokens": None, "stream_options": None},
        {"repetition_detection": {"max_pattern_size": 8, "min_count": 4}, "chat_template_kwargs": {}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "length_penalty": 1.0, "logit_bias": {}},
        {"metadata": {}, "store": False, "service_tier": "auto", "stop_token_ids": [151_935], "min_tokens": 1},
    ],
)
def test_what_clients_send_passes(more: dict[str, Any], server: Server) -> None:
    assert server.ask(CHAT, page(**more)).status == 200


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "Read."}, {"role": "user", "content": "hi", "name": "somebody"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": []}],
        [{"role": "assistant", "content": "a", "refusal": None, "tool_calls": None}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": url(picture())}]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url(picture())}},
                    {"type": "text", "text": "<|img|><|imgpad|><|endofimg|>Read."},
                ],
            }
        ],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(picture()), "detail": "high"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a" * 900_000}]}],
        [],
    ],
)
def test_messages_of_openai_clients_pass(messages: Any, server: Server) -> None:
    assert server.ask(CHAT, page(messages=messages)).status == 200


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
@pytest.mark.attack("another path of vLLM, or one written oddly", "404")
def test_only_the_list_is_answered(method: str, server: Server) -> None:
    # What vLLM 0.32 answers, and other spellings of what is allowed.
    paths = "/ /docs /openapi.json /load /ping /tokenize /detokenize /invocations /scale_elastic_ep /v1/responses"
    paths += " /v1/completions /v1/messages /v1/chat/completions/batch /inference/v1/generate /kv_event_sources"
    paths += f" /v1 /v1/ /v1/nowhere //v1/models /v1/models/ /V1/models {CHAT}/ /health/ /metrics/ /v1/../x"
    allowed = {(path["method"], path["path"]) for path in plugin.api_paths("server")}
    for path in (*paths.split(), *(path for _, path in allowed)):
        answer = server.ask(path, b"{}" if method != "GET" else b"", method=method)
        if (method, path) in allowed:
            assert answer.status in (200, 400), path
        else:
            assert answer.refuses(404, "There is only", f"POST {CHAT}", "GET /health"), path


def test_only_the_list_of_the_gateway_and_what_the_host_asks_is_served() -> None:
    served = {path["path"] for path in plugin.api_paths("server")}
    assert served - {path["path"] for path in plugin.api_paths("gateway")} == {"/metrics", "/version"}
    with pytest.raises(AnsibleFilterError, match=r"'proxy'\. Fix: gateway or server"):
        plugin.api_paths("proxy")


@pytest.mark.attack("no key, a wrong one, two, another scheme", "401 before the body is read")
def test_key_is_needed_before_anything_is_read(server: Server) -> None:
    for path, method in ((CHAT, "POST"), ("/v1/models", "GET")):
        for key in (None, "wrong", KEY[:-1], KEY + "x", f"{KEY} {KEY}"):
            # A body that never comes: who has no key is not waited for.
            answer = server.ask(path, [], method=method, key=key)
            assert answer.refuses(401, "API key"), key
            assert answer.headers[b"www-authenticate"] == b"Bearer"
        twice = [(b"authorization", b"Bearer wrong"), (b"authorization", f"Bearer {KEY}".encode())]
        assert server.ask(path, [], method=method, key=None, headers=twice).refuses(401)
        halves = [(b"authorization", f"Bearer {KEY[:9]}".encode()), (b"authorization", KEY[9:].encode())]
        assert server.ask(path, [], method=method, key=None, headers=halves).refuses(401)
        basic = [(b"authorization", f"Basic {KEY}".encode())]
        assert server.ask(path, [], method=method, key=None, headers=basic).refuses(401)
    for path in ("/", "/health", "/metrics", "/version"):
        assert server.ask(path, method="GET", key=None).status == 200


def test_page_for_people_says_whether_vllm_is_healthy_and_asks_it_for_nothing_else(server: Server) -> None:
    for status, state in ((200, "ready · готов"), (503, "not ready · не готов")):
        server.status = status
        answer = server.ask("/", method="GET", key=None, headers=[(b"cookie", b"x")])
        assert (answer.status, answer.content) == (200, f"<p>{state}</p>")
        assert answer.seen == [("/health", {}, b"")]
        assert b"default-src 'none'" in answer.headers[b"content-security-policy"]
        assert int(answer.headers[b"content-length"]) == len(answer.content.encode())


def test_server_without_a_key_asks_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert Server(tmp_path).ask(CHAT, page(), key=None).status == 200


@pytest.mark.attack("headers that vLLM acts upon", "not passed on")
def test_vllm_sees_no_header_that_it_would_act_upon(server: Server) -> None:
    more = [(b"x-request-id", b"mine"), (b"x-data-parallel-rank", b"9"), (b"origin", b"http://x"), (b"host", b"h")]
    ((_, headers, _),) = server.ask(CHAT, page(), headers=more).seen
    assert set(headers) == {b"content-type", b"content-length", b"authorization", b"host"}


def test_lifespan_passes_and_websockets_do_not(server: Server) -> None:
    assert server.send({"type": "lifespan"}, []).seen == [("lifespan", {}, b"")]
    for path in ("/v1/realtime", CHAT, "/health"):
        answer = server.send({"type": "websocket", "path": path, "headers": []}, [{"type": "websocket.connect"}])
        assert not answer.seen


# Each was sent to the real vLLM 0.32: what ended its engine (logprobs, echo, use_beam_search), what kept it from all
# other pages for a minute (structured_outputs), what it answers with 500, and what OCR has no use for.
@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (True, 1, "x", "false", 0)) for name in ("logprobs", "echo", "use_beam_search")),
        ("top_logprobs", (1, 5, -1, "0", False)),
        ("prompt_logprobs", (0, 1, -1)),
        ("logprob_token_ids", ([1],)),
        *((name, (2, 10**30, -1, 0, "1", True, 1.0)) for name in ("n", "best_of")),
        ("structured_outputs", ({"regex": "(.{1,1000}){1,1000}"}, {"choice": ["a"]}, {})),
        *((name, ("x", ["a"], {})) for name in ("guided_regex", "guided_grammar", "guided_choice", "guided_json")),
        ("response_format", ({"type": "json_object"}, {"type": "json_schema"}, {"type": "structural_tag"}, "text", {})),
        ("tools", ([{"type": "function"}],)),
        ("tool_choice", ("required", {"type": "function"})),
        *((name, (0, -1, 2**31, 10**30, "5", 1.5, True, [1])) for name in ("max_tokens", "max_completion_tokens")),
        ("min_tokens", (-1, 10**30, "1")),
        ("temperature", (-0.1, 2.1, 1e308, 10**400, "x", True, [1])),
        ("top_p", (0, -1, 1.1, "x")),
        ("top_k", (-2, 10**18, 1.5)),
        ("min_p", (-1, 2)),
        ("repetition_penalty", (0, -1, 1e38, 11)),
        *((name, (-2.5, 3, 1e300, "x")) for name in ("frequency_penalty", "presence_penalty")),
        ("seed", (2**63, -(2**63) - 1, 1.5, "1")),
        ("stop", ("", [""], ["a"] * 17, "x" * 1001, ["x" * 1001], [1], {}, 5, "\ud800")),
        ("stop_token_ids", ([-1], [2**70], [151_936], [1] * 65, [True], "1")),
        ("stream", ("yes", 1, 0)),
        ("stream_options", ({"include_usage": 1}, {"else": True}, [], True)),
        ("repetition_detection", ({"max_pattern_size": 2**70}, {"min_count": -1}, {"x": 1}, 5)),
        ("model", ("x" * 257, 5, ["dots.ocr"])),
        ("user", ("x" * 1001, 5)),
        *(
            (name, ({"max_pixels": 10**9},))
            for name in ("mm_processor_kwargs", "chat_template_kwargs", "media_io_kwargs")
        ),
        ("chat_template", ("{% for i in range(10**9) %}x{% endfor %}",)),
        *(
            (name, (1, "x", {"x": 1}))
            for name in ("logit_bias", "bad_words", "allowed_token_ids", "truncate_prompt_tokens")
        ),
        *(
            (name, (1, "x", {"x": 1}))
            for name in ("kv_transfer_params", "request_id", "priority", "vllm_xargs", "nobody")
        ),
    ],
)
@pytest.mark.attack(
    "parameters that end, block or fill the engine: logprobs, grammars, tools, huge or odd values",
    "400 with the parameter's name",
)
def test_key_of_the_body_that_reading_does_not_need_is_refused_by_name(
    name: str, values: tuple[Any, ...], server: Server
) -> None:
    for value in values:
        assert server.ask(CHAT, page(**{name: value})).refuses(400, name, param=name), value


@pytest.mark.parametrize("name", ["x" * 100_000, "\ud800\u00e9\u2028", '"\n'])
def test_odd_name_is_shown_in_short(name: str, server: Server) -> None:
    answer = server.ask(CHAT, page(**{name: 1}))
    assert (answer.status, answer.seen) == (400, [])
    assert len(answer.content["error"]["message"]) < 300
    assert answer.content["error"]["param"].isascii()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{nonsense", b"[]", b"null", b'"text"', b"5", b"\xff\xfe", b'{"model": NaN}', b'{"seed": -Infinity}'),
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"messages": [' + b"[]," * 60_000 + b"[]]}",
        b"{" + b",".join(b'"k%d":null' % number for number in range(100_001)) + b"}",
    ],
    ids=lambda body: body[:20].decode("latin-1"),
)
@pytest.mark.attack("a body that is no chat request: nested, enormous, no JSON", "400")
def test_what_is_no_request_is_refused(body: bytes, server: Server) -> None:
    assert server.ask(CHAT, body).refuses(400)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_body_is_read_as_vllm_reads_it(encoding: str, server: Server) -> None:
    assert server.ask(CHAT, json.dumps(page()).encode(encoding)).status == 200
    assert server.ask(CHAT, json.dumps(page(echo=True)).encode(encoding)).refuses(400, param="echo")
    twice = b'{"echo": true, ' + json.dumps(page(echo=False)).encode()[1:]
    assert server.ask(CHAT, twice).status == 200  # the last one counts, for vLLM too
    assert server.ask(CHAT, json.dumps(page()).encode()[:-1] + b', "echo": true}').refuses(400, param="echo")


@pytest.mark.parametrize(
    "messages",
    [
        *("hi", 5, {}, ["hi"], [[]], None),
        [{"role": "user", "content": "a"}] * 257,
        [{"role": "tool", "content": "a"}],
        [{"content": "a"}],
        [{"role": ["user"], "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"type": "text"}}],
        [{"role": "user", "content": "a", "tool_calls": []}],
        [{"role": "user", "content": "a", "name": 5}],
        [{"role": "user", "content": "a\ud800"}],
        [{"role": "user", "content": "<|imgpad|>"}],
        [{"role": "user", "content": "a" * 600_000}] * 2,
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * 600}],
        [{"role": "user", "content": [{"type": "text", "text": ["a"]}]}],
        [{"role": "user", "content": [{"text": "a"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "data:"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ["data:"]}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "uuid": "a"}}]}],
        [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [None, 5]}],
    ],
)
@pytest.mark.attack("messages with anything but texts and one picture", "400")
def test_messages_that_are_not_texts_and_a_picture_are_refused(messages: Any, server: Server) -> None:
    assert server.ask(CHAT, page(messages=messages)).refuses(400, param="messages")


def test_second_picture_is_refused_before_any_is_looked_at(server: Server) -> None:
    image = page("data:image/png;base64,broken")["messages"][0]["content"][0]
    assert server.ask(CHAT, parts(image, image)).refuses(400, "At most 1 image(s)", param="image")
    assert server.ask(CHAT, parts(*[image] * 9_000)).refuses(400, "At most 1 image(s)", param="image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WebP"])
def test_pictures_of_all_sizes_that_can_be_read_pass(kind: str, server: Server) -> None:
    options: list[dict[str, Any]] = [{}, {"progressive": True}, {"optimize": True}]
    if kind == "WebP":
        options = [{}, {"lossless": True}, {"exif": b"x"}]
    for option in options:
        data = picture(kind, (1653, 2338), **option)
        body = json.dumps(page(url(data, kind.lower()))).encode()
        assert server.ask(CHAT, body).status == 200, option
        assert server.held[-1] == len(body) + 3 * 1653 * 2338, option
    assert server.ask(CHAT, page(url(picture(kind), "x-unknown"))).status == 200


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so often."""
    data = picture("JPEG", (64, 64), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def enlarged(data: bytes, side: int) -> bytes:
    """Return a progressive JPEG that says that it is so wide and high."""
    place = data.index(b"\xff\xc2") + 5
    return data[:place] + side.to_bytes(2, "big") * 2 + data[place + 4 :]


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a part of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


PNG, JPEG = picture(), picture("JPEG")
LARGE = picture(size=(9500, 9500))[8:33]  # its head
SOF = b"\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00"  # names a size


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_names_another_size_before_is_a_picture_to_pillow() -> None:
    for data in (PNG[:8] + chunk(b"tEXt", b"\0\0\0\1\0\0\0\1") + LARGE + PNG[8:], PNG[:33] + LARGE + PNG[33:]):
        assert Image.open(io.BytesIO(data)).format == "PNG"
    assert Image.open(io.BytesIO(JPEG[:20] + b"junk\xff\x00\xff\xff\xff\xd0" + JPEG[20:])).format == "JPEG"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8000/health", "domain"),
        ("https://example.org/page.png", "domain"),
        ("file:///etc/passwd", "domain"),
        ("page.png", "domain"),
        ("", "domain"),
        ("data:image/png,AAAA", "domain"),
        ("data:image/png;base64,canary", "base64"),
        ("data:image/png;base64,AAAA#BBBB", "base64"),
        ("data:image/png;base64,AAA", "base64"),
        ("data:image/png;base64,AA\nAA", "base64"),
        ("data:image/png;base64,\u00e9\u00e9", "base64"),
        ("data:image/png;base64,====", "base64"),
        ("data:image/png;base64,", "PNG"),
        (url(b"hello"), "PNG"),
        (url(picture("TIFF"), "tiff"), "PNG"),
        (url(picture("GIF"), "gif"), "PNG"),
        (url(PNG[:8] + chunk(b"tEXt", b"\0\0\0\1\0\0\0\1") + LARGE + PNG[8:]), "9500 x 9500"),
        (url(PNG[:33] + LARGE + PNG[33:]), "9500 x 9500"),
        (url(PNG[:8] + chunk(b"tEXt", b"") * 10_000 + PNG[8:]), "chunks"),
        (url(JPEG[:2] + SOF + JPEG[2:], "jpeg"), "65535 x 65535"),
        (url(JPEG[:20] + b"junk\xff\x00\xff\xff\xff\xd0" + SOF + JPEG[20:], "jpeg"), "65535 x 65535"),
        (url(JPEG[:2] + b"\xff\xd0" * 10_000 + JPEG[2:], "jpeg"), "segments"),
        (url(scans(101), "jpeg"), "scans"),
        (url(enlarged(scans(40), 9000), "jpeg"), "scans"),
    ],
    ids=lambda value: value[:40],
)
@pytest.mark.attack("pictures as traps: thousands of scans, 169 megapixels, addresses, other formats", "400")
def test_picture_that_is_none_or_a_trap_is_refused(address: str, words: str, server: Server) -> None:
    assert server.ask(CHAT, parts({"type": "image_url", "image_url": {"url": address}})).refuses(
        400, words, param="image_url"
    )


def test_jpeg_with_the_usual_scans_passes(server: Server) -> None:
    assert server.ask(CHAT, page(url(scans(80), "jpeg"))).status == 200
    assert server.ask(CHAT, page(url(enlarged(scans(1), 9000), "jpeg"))).status == 200


@pytest.mark.attack("a body that is too large", "413 before it has come")
def test_body_that_is_too_large_is_refused_before_it_has_come(server: Server) -> None:
    for length in (b"2097153", b"9" * 18, b"9" * 19, b"-1", b"x"):
        assert server.ask(CHAT, [], headers=[(b"content-length", length)]).refuses(413, "2 MiB")
    piece = {"type": "http.request", "body": b" " * MIB, "more_body": True}
    assert server.ask(CHAT, [dict(piece) for _ in range(3)]).refuses(413, "2 MiB")


@pytest.mark.attack("a body that stops", "408")
def test_body_that_stops_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"authorization", f"Bearer {KEY}".encode())]}
    assert server.send(scope, [{"type": "http.request", "body": b"{", "more_body": True}]).refuses(408)
    monkeypatch.setattr(gate, "BODY_SECONDS", -1000)
    trickle = [{"type": "http.request", "body": b" ", "more_body": True} for _ in range(9)]
    assert server.ask(CHAT, trickle).refuses(408)


def test_client_that_hangs_up_gets_no_answer(server: Server) -> None:
    answer = server.ask(CHAT, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert (answer.status, answer.seen) == (0, [])


@pytest.mark.attack("requests that fill the memory together", "503 beyond a quarter of it")
def test_requests_in_flight_take_no_more_than_their_share_of_memory(server: Server) -> None:
    server.gate.room = 10 * MIB
    large = page(url(picture(size=(2000, 2000))))
    assert server.ask(CHAT, large).status == 200  # alone it passes, however large
    server.gate.held = 5 * MIB  # another one
    answer = server.ask(CHAT, large)
    assert answer.refuses(503, "Too many pages")
    assert answer.headers[b"retry-after"] == b"5"
    assert server.ask(CHAT, page()).status == 200
    assert server.gate.held == 5 * MIB
    server.gate.held = 0


@pytest.mark.parametrize(
    ("text", "found"), [("17179869184\n", 16 << 30), ("max\n", 16 << 30), (None, 16 << 30), ("8", 8)]
)
def test_memory_is_that_of_the_container(
    text: str | None, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.max"
    if text:
        file.write_text(text)
    monkeypatch.setattr(gate, "MEMORY", file)
    assert gate.memory() == found

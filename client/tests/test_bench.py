from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from support import LINES, FakeServer, pdf_of

from dots_ocr_client import Answer, EngineMissing, InputError, Limiter, NotApplicable, PageImage, Task, VLLMEngine
from dots_ocr_client.apps.bench import pages
from dots_ocr_client.apps.bench.measure import Load, Measurement, measure, percentile, ratios
from dots_ocr_client.apps.bench.pages import A4, GIVEN, BenchmarkPage, generate_pages, load_pages
from dots_ocr_client.apps.bench.report import BenchmarkReport, describe_machine
from dots_ocr_client.cli import main
from dots_ocr_client.engines.base import Engine
from dots_ocr_client.engines.server import REHEARSAL, REHEARSES
from dots_ocr_client.errors import EngineError, UnusableAnswer
from dots_ocr_client.prompts import Mode

TRUTH = "ten  letters"


class Scripted:
    """Answers after some time with a text, or raises; remembers what it was given."""

    modes: frozenset[Mode] = frozenset({"text"})
    expected_seconds = 0.0

    def __init__(
        self,
        text: str = TRUTH,
        *,
        name: str = "scripted",
        slots: int = 4,
        seconds: float = 0.0,
        loading: float = 0.0,
        tokens: int | None = None,
        errors: Sequence[EngineError | None] = (),
        probed: EngineError | None = None,
    ) -> None:
        self.name = name
        self.limiter = Limiter(slots, slots)
        self.given: list[PageImage] = []
        self.most = self._now = 0
        self._text, self._seconds, self._loading, self._tokens = text, seconds, loading, tokens
        self._errors, self._probed = list(errors), probed

    async def probe(self, seconds: float) -> None:
        if self._probed is not None:
            raise self._probed

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        self.given.append(page)
        error = self._errors.pop(0) if self._errors else None
        if error is not None:
            raise error
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await asyncio.sleep(self._seconds + self._loading)
        finally:
            self._now -= 1
            self._loading = 0.0
        return Answer(mode="text", text=self._text, model="made up", completion_tokens=self._tokens)

    async def aclose(self) -> None:
        pass


def sheets(count: int, truth: str | None = TRUTH, language: str = "English") -> list[BenchmarkPage]:
    picture = Image.new("RGB", (56, 56), "white")
    return [
        BenchmarkPage(f"{language} {number}", language, PageImage.of(number, picture), truth)
        for number in range(1, count + 1)
    ]


def measured(
    engine: Engine, pages: Sequence[BenchmarkPage], *levels: int, mode: Mode = "text", seconds: float = 20.0
) -> Measurement:
    return asyncio.run(measure(engine, pages, levels or (1,), mode=mode, seconds=seconds))


def test_rehearsal_is_called_one_instead_of_measured(server: FakeServer) -> None:
    server.models = {"dots.ocr": 16_384, REHEARSAL: 16_384}
    server.text = "a " * 2000
    assert measured(VLLMEngine(server.base_url), generate_pages(1)).unavailable == REHEARSES


# times and rates


@pytest.mark.parametrize(
    ("count", "part", "expected"), [(1, 0.5, 1), (2, 0.5, 1), (3, 0.5, 2), (20, 0.95, 19), (21, 0.95, 20), (8, 0.95, 8)]
)
def test_percentiles_are_by_nearest_rank(count: int, part: float, expected: int) -> None:
    assert percentile(range(1, count + 1), part) == expected


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None


def test_rates_grow_with_concurrency_and_times_do_not() -> None:
    engine = Scripted(seconds=1.0, tokens=30)  # long beside what a busy machine adds
    result = measured(engine, sheets(4), 1, 4)
    one, four = result.loads
    assert (one.at_once, one.read, four.at_once, four.read) == (1, 4, 4, 8)
    assert 0.45 < one.pages_per_second <= 1.0
    assert 1.5 * one.pages_per_second < four.pages_per_second <= 4.0
    for load in (one, four):
        assert 1.0 <= (load.p50 or 0) <= (load.p95 or 0) < 2.0
        assert load.tokens_per_second == pytest.approx(30 * load.pages_per_second)
    assert result.best is four


def test_no_more_pages_at_once_than_the_engine_takes() -> None:
    engine = Scripted(slots=2, seconds=0.02)
    result = measured(engine, sheets(3), 1, 2, 4, 8)
    assert ([load.at_once for load in result.loads], engine.most) == ([1, 2], 2)


def test_loading_is_told_from_reading() -> None:
    result = measured(Scripted(seconds=0.1, loading=3.0), sheets(1))
    assert (result.first_seconds or 0) >= 3.1
    assert 1.8 < (result.load_seconds or 0) < (result.first_seconds or 0)
    assert (result.loads[0].p95 or 3) < 2.5  # the page that waited for loading is in no other number


def test_the_engines_that_read_behind_a_server_are_named() -> None:
    class Behind(Scripted):
        async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
            answer = await super().read(page, task, seconds)
            blank = replace(answer, text="", model="nobody")
            return (answer, replace(answer, engine="tesseract", model="eng"), blank)[page.number - 1]

    assert measured(Behind(name="vllm"), sheets(3)).model == "made up, tesseract (eng)"


def test_every_reading_has_an_image_of_its_own() -> None:
    engine = Scripted()
    pages = sheets(2)
    measured(engine, pages, 1, 4)
    assert len(engine.given) == 2 + 2 + 8
    assert len({page.png for page in engine.given if page.number == 1}) == 2 + 1 + 4
    difference = ImageChops.difference(pages[0].image.image, pages[0].variant(60).image)
    assert difference.getbbox() == (4, 1, 5, 2)
    assert difference.getextrema() == ((0, 1), (0, 1), (0, 1))  # grey, which is sent as such, stays grey


def test_pages_that_fail_are_counted_and_not_timed() -> None:
    errors = [None, None, *[UnusableAnswer("nonsense")] * 3]  # at once, which must not look fast
    load = measured(Scripted(seconds=0.1, tokens=30, errors=errors), sheets(4)).loads[0]
    assert (load.read, load.failures) == (1, {"UnusableAnswer": 3})
    assert load.pages_per_second == pytest.approx(1 / load.seconds)
    assert load.tokens_per_second == pytest.approx(30 / load.seconds)
    assert (load.p50 or 0) >= 0.1


def test_a_page_that_takes_too_long_has_failed() -> None:
    result = measured(Scripted(seconds=5), sheets(1), seconds=0.05)
    load = result.loads[0]
    assert (load.failures, load.pages_per_second, load.p50, result.first_seconds) == (
        {"DeadlineExceeded": 2},
        0,
        None,
        None,
    )
    assert result.failed == 2


def test_memory_is_that_of_a_python_process() -> None:
    result = measured(Scripted(), sheets(1))
    assert 10 < (result.process_mib or 0) < 50_000


# characters


@pytest.mark.parametrize(
    ("text", "rate"),
    [("ten\nletters\n", 0), ("ten letter", 1 / 11), ("tan litters", 2 / 11), ("", 1), ("ten letters or more", 8 / 11)],
)
def test_character_errors_are_edits_by_letters(text: str, rate: float) -> None:
    result = measured(Scripted(text), sheets(2))
    assert (result.character_errors, result.compared) == ({"English": rate, "all": rate}, 2)


def test_character_errors_are_of_pages_that_were_read_and_known() -> None:
    pages = [*sheets(2), *sheets(1, "ten", "Russian"), *sheets(1, None, GIVEN)]
    errors = [None, None, None, UnusableAnswer("nonsense")]  # the second page, where every page is read once
    result = measured(Scripted("ten letters", errors=errors), pages)
    assert result.compared == 2
    assert result.character_errors == {"English": 0, "Russian": 8 / 3, "all": 8 / 14}


def test_without_rapidfuzz_there_are_no_character_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    result = measured(Scripted(), sheets(1))
    assert (result.character_errors, result.loads[0].read) == ({}, 2)


# engines that are not there


@pytest.mark.parametrize(
    "engine", [Scripted(probed=EngineMissing("not there")), Scripted(errors=[EngineMissing("not there")])]
)
def test_an_engine_that_is_missing_has_a_reason_instead_of_numbers(engine: Scripted) -> None:
    assert measured(engine, sheets(2)) == Measurement("scripted", "not there")


def test_an_engine_that_has_no_such_mode_is_not_asked() -> None:
    engine = Scripted()
    assert "layout" in (measured(engine, sheets(1), mode="layout").unavailable or "")
    assert engine.given == []


def test_an_engine_is_measured_with_the_pages_that_are_something_for_it() -> None:
    nothing = NotApplicable("no PDF")
    assert measured(Scripted(errors=[nothing] * 2), sheets(2)).unavailable == "no PDF"
    result = measured(Scripted(errors=[nothing, None, None, nothing, None]), sheets(2))
    load = result.loads[0]
    assert (load.read, load.failures, result.failed) == (1, {"NotApplicable": 1}, 0)


def test_a_server_that_is_not_there_is_not_available() -> None:
    async def run() -> Measurement:
        engine = VLLMEngine("http://127.0.0.1:9/v1")
        try:
            return await measure(engine, sheets(1), [1])
        finally:
            await engine.aclose()

    assert "127.0.0.1:9" in (asyncio.run(run()).unavailable or "")


# pages


def test_generated_pages_are_full_different_and_the_same_each_time() -> None:
    pages = generate_pages(4)
    assert [page.language for page in pages] == ["English", "Russian"] * 2
    assert {(page.image.sent_width, page.image.sent_height) for page in pages} == {A4}
    assert len({page.truth for page in pages}) == 4
    assert [page.truth for page in generate_pages(4)] == [page.truth for page in pages]
    for page in pages:
        assert len(page.truth or "") > 1500
        left, top, right, bottom = ImageChops.invert(page.image.image).getbbox() or (0, 0, 0, 0)
        assert (left >= 100, right <= A4[0] - 60, top >= 100, A4[1] // 2 < bottom <= A4[1] - 60) == (True,) * 4


def test_without_a_font_that_has_cyrillic_all_pages_are_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_FONT", "missing.ttf")
    assert [page.language for page in generate_pages(2)] == ["English", "English"]


def test_pages_of_documents_come_with_the_texts_beside_them(tmp_path: Path, sheet_file: Path) -> None:
    pdf = tmp_path / "two.pdf"
    pdf.write_bytes(pdf_of((200, 100), (100, 200)))
    pdf.with_suffix(".txt").write_text("first\fsecond\f")
    pages = load_pages([pdf, sheet_file])
    assert [page.truth for page in pages] == ["first", "second", None]
    assert [page.name for page in pages] == [f"{pdf}, page 1", f"{pdf}, page 2", str(sheet_file)]
    origins = [page.image.origin for page in pages]
    assert [origin and origin.number for origin in origins] == [1, 2, None]


@pytest.mark.parametrize(("text", "why"), [(b"first\fsecond", "2 parts"), (b"\xff", "cannot read")])
def test_a_text_that_does_not_fit_its_document_is_refused(sheet_file: Path, text: bytes, why: str) -> None:
    sheet_file.with_suffix(".txt").write_bytes(text)
    with pytest.raises(InputError, match=why):
        load_pages([sheet_file])


def test_too_many_pages_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    pdf = tmp_path / "long.pdf"
    pdf.write_bytes(pdf_of(*[(10, 10)] * 201))
    with pytest.raises(InputError, match="200 pages at most"):
        load_pages([pdf])


# reports


def load(at_once: int, rate: float, p50: float | None) -> Load:
    return Load(at_once, 4, {}, 4 / rate, rate, p50, p50, None)


def report_of(*measurements: Measurement) -> BenchmarkReport:
    return BenchmarkReport(measurements, sheets(2), "text", describe_machine())


def test_ratios_are_to_the_first_engine_that_was_measured() -> None:
    first = Measurement("fast", model="m", loads=(load(1, 2.0, 0.5), load(2, 4.0, 0.5)))
    second = Measurement("slow", model="m", loads=(load(1, 0.5, 2.0),))
    values = report_of(Measurement("gone", "it is not there"), first, second).to_dict()["engines"]
    assert [one["ratios"] for one in values] == [
        {},
        {"p50": 1.0, "pages_per_second": 1.0},
        {"p50": 4.0, "pages_per_second": 0.125},
    ]
    assert (
        ratios(second, Measurement("all failed", loads=(Load(1, 0, {"EngineError": 1}, 1.0, 0.0, None, None, None),)))
        == {}
    )


def test_markdown_has_a_row_for_every_engine() -> None:
    failed = Load(1, 3, {"UnusableAnswer": 1}, 2.0, 1.5, 0.5, 0.6, 120.0)
    one = Measurement("vllm", None, "dots|ocr", 2.0, 1.5, (failed,), {"English": 0.01, "Russian": 0.03, "all": 0.02}, 3)
    lines = report_of(one, Measurement("qwen", "no torch:\npip install | it")).markdown().splitlines()
    rows = {line.split(" | ")[0]: line for line in reversed(lines) if line.startswith("| ")}
    assert "| vllm | dots\\|ocr | 2.00 | 1.50 | 0.50 | 0.60 | 1.00 | 1.50 (1) | 1.00 | 120 " in rows["| vllm"]
    assert "| 2.00% (English 1.00%, Russian 3.00%) | 1 of 4 (1 UnusableAnswer) |" in rows["| vllm"]
    assert "| not available: no torch: pip install \\| it |" in rows["| qwen"]
    header = next(line for line in lines if line.startswith("| engine | model"))
    for row in (rows["| vllm"], rows["| qwen"]):
        assert row.replace("\\|", "").count("|") == header.count("|")


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["processors"] >= 1
    assert machine["processor"]
    assert machine["python"].startswith("3.")
    assert "pillow" in machine["packages"]
    assert machine["processor"] in report_of().markdown()


# the command


def test_the_command_measures_vllm_and_tesseract_on_the_same_pages(
    server: FakeServer, tmp_path: Path, sheet: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    server.text = "\n".join(LINES)
    files = [tmp_path / f"{number}.png" for number in (1, 2)]
    for file in files:
        sheet.save(file)
        file.with_suffix(".txt").write_text(server.text)
    out = tmp_path / "out"
    options = ["--engine=vllm", "--engine=textlayer", "--engine=tesseract", "--concurrency=1,2", "--languages=eng"]
    status = main(["bench", *options, f"--base-url={server.base_url}", f"--out={out}", *map(str, files)])
    output, messages = capsys.readouterr()
    assert (status, "vllm: 4 pages, 2 at once" in messages) == (0, True)
    values = json.loads((out / "bench.json").read_text())
    vllm, textlayer, tesseract = values["engines"]
    assert [page["characters"] for page in values["pages"]] == [len(" ".join(LINES))] * 2
    assert [load["read"] for load in vllm["loads"]] == [2, 4]
    assert (vllm["character_errors"]["all"], vllm["compared"], vllm["model"]) == (0, 2, "dots.ocr")
    assert vllm["loads"][0]["tokens_per_second"] > 0
    assert textlayer["unavailable"]
    assert (tesseract["loads"][0]["read"], tesseract["loads"][0]["tokens_per_second"]) == (2, None)
    assert 0 <= tesseract["character_errors"]["all"] < 0.1
    assert tesseract["child_mib"] > 5
    assert tesseract["ratios"]["p50"] == tesseract["loads"][0]["p50"] / vllm["loads"][0]["p50"]
    assert len(server.requests) == 1 + 1 + 2 + 4
    assert (out / "bench.md").read_text() == output


def test_the_command_reads_pages_of_its_own_as_layout(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--engine=vllm", f"--base-url={server.base_url}", "--pages=1", "--concurrency=1", "--json"]
    assert main([*command, "--mode=layout"]) == 0
    values = json.loads(capsys.readouterr()[0])
    assert (values["mode"], values["pages"][0]["language"]) == ("layout", "English")
    assert values["engines"][0]["character_errors"]["all"] > 0.9
    assert "layout information" in server.bodies[0]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize("fault", ["away", "refuses"])
def test_the_command_ends_with_1_when_nothing_can_be_read(
    server: FakeServer, capsys: pytest.CaptureFixture[str], sheet_file: Path, fault: str
) -> None:
    base_url = "http://127.0.0.1:9/v1" if fault == "away" else server.base_url
    server.fail_with(400, "no pictures today")
    assert main(["bench", "--engine=vllm", f"--base-url={base_url}", "--concurrency=1", str(sheet_file)]) == 1
    expected = "not available: " if fault == "away" else "2 of 2 (2 RequestRejected)"
    assert expected in capsys.readouterr()[0]


@pytest.mark.parametrize("levels", ["0", "1,", "two", "-1"])
def test_concurrency_is_checked_first(capsys: pytest.CaptureFixture[str], levels: str) -> None:
    assert main(["bench", f"--concurrency={levels}"]) == 2
    assert "list of whole numbers" in capsys.readouterr()[1]

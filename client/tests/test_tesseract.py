from __future__ import annotations

import asyncio
import gc
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from support import LINES

from dots_ocr_client import (
    Answer,
    Box,
    EngineError,
    EngineMissing,
    Page,
    PageImage,
    RequestRejected,
    Task,
    TesseractEngine,
    UnusableAnswer,
)
from dots_ocr_client.chain.fallback import Chain
from dots_ocr_client.prompts import MODES, Mode

FakeTesseract = Callable[[str], Path]


def read(page: PageImage, task: Task | Mode = "text", languages: str = "eng", seconds: float = 60.0) -> Answer:
    async def run() -> Answer:
        async with asyncio.timeout(seconds):
            asked = task if isinstance(task, Task) else Task(task)
            return await TesseractEngine(languages).read(page, asked, seconds)

    return asyncio.run(run())


def lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line)


def test_it_reads_a_rendered_page(page: PageImage) -> None:
    answer = read(page)
    assert lines(answer.text) == LINES
    assert (answer.mode, answer.model, answer.warnings) == ("text", "eng", ())


@pytest.fixture
def letter() -> Image.Image:
    """A page of two paragraphs of two lines, as wide as a letter."""
    image = Image.new("RGB", (1240, 900), "white")
    draw = ImageDraw.Draw(image)
    rows = {120: LINES[0], 170: LINES[1], 420: LINES[2], 470: LINES[0]}
    for top, line in rows.items():
        draw.text((150, top), line, "black", font=ImageFont.load_default(36))
    return image


@pytest.mark.parametrize("own", [(1240, 900), (4960, 3600)])
def test_a_layout_has_a_cell_for_each_paragraph_in_pixels_of_the_page(
    own: tuple[int, int], letter: Image.Image
) -> None:
    sent = PageImage.of(1, letter)
    page = PageImage(1, *own, sent.png, sent.sent_width, sent.sent_height)
    answer = read(page, "layout")
    assert [cell.text for cell in answer.cells] == ["\n".join(LINES[:2]), f"{LINES[2]}\n{LINES[0]}"]
    assert {cell.category for cell in answer.cells} == {"Text"}
    times = own[0] / letter.width
    for cell, (top, bottom) in zip(answer.cells, ((120, 210), (420, 510)), strict=True):
        ink = letter.crop((0, top, 1240, bottom)).convert("L").point(lambda level: 255 * (level < 128)).getbbox()
        assert ink is not None
        expected = (ink[0], ink[1] + top, ink[2], ink[3] + top)
        assert cell.box == pytest.approx([times * value for value in expected], abs=4 * times)


def test_a_layout_says_what_the_text_says(letter: Image.Image) -> None:
    page = PageImage.of(1, letter)
    layout = read(page, "layout")
    assert (layout.mode, layout.warnings) == ("layout", ())
    assert layout.text == read(page, "text").text == "\n\n".join(cell.text for cell in layout.cells)


def test_a_picture_is_no_cell(letter: Image.Image) -> None:
    for row in range(560, 860, 3):
        letter.paste(Image.linear_gradient("L").resize((900, 3)).convert("RGB"), (150, row))
    assert [cell.text[:7] for cell in read(PageImage.of(1, letter), "layout").cells] == ["Invoice", "Thank y"]


@pytest.mark.parametrize("own", [(784, 224), (7840, 2240)])
def test_a_box_is_read_alone(own: tuple[int, int], page: PageImage) -> None:
    width, height = own
    page = PageImage(1, width, height, page.png, page.sent_width, page.sent_height)
    box = Box(0, height * 70 // 224, width, height * 130 // 224)
    answer = read(page, Task("grounding", box=box))
    assert (answer.mode, lines(answer.text), answer.warnings) == ("grounding", (LINES[1],), ())


def test_a_box_that_hangs_over_the_edge_is_cut_off_there(page: PageImage) -> None:
    assert lines(read(page, Task("grounding", box=Box(-50, -50, 9_000, 65))).text) == LINES[:1]


@pytest.mark.parametrize("box", [Box(800, 0, 900, 50), Box(10, 10, 10, 50)])
def test_a_box_without_any_part_of_the_page_is_refused(box: Box, page: PageImage) -> None:
    with pytest.raises(RequestRejected, match="outside the page of 784 x 224 px"):
        read(page, Task("grounding", box=box))


def test_it_knows_the_modes_that_need_no_model() -> None:
    assert TesseractEngine().modes == {"text", "layout", "grounding"}
    assert TesseractEngine().modes < set(MODES)


def test_it_reads_as_many_pages_at_once_as_there_are_processors() -> None:
    assert TesseractEngine().limiter.limit == len(os.sched_getaffinity(0))


def test_there_are_never_more_processes_than_processors(
    fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    running = tmp_path / "running"
    running.mkdir()
    count = f"ls {running} | wc -l >> {tmp_path}/counts"
    fake_tesseract(f"touch {running}/$$; {count}; cat > /dev/null; sleep 0.3; {count}; rm {running}/$$; echo text")

    async def run() -> list[Page]:
        chain = Chain([TesseractEngine()], 60.0)
        return await asyncio.gather(*(chain.ask(page, Task("text")) for _ in range(8)))

    assert [page.text for page in asyncio.run(run())] == ["text"] * 8
    assert max(map(int, (tmp_path / "counts").read_text().split())) == 3


def test_it_reads_widely_spaced_letters_in_a_strip() -> None:
    """One letter in each 28 x 28 px cell, as on the sample page of the rehearsal."""
    rows = ("INVOICE 2026-1047", "Date: 23.11.2026", "Customer: Smith & Sons", "Paper    2 x 14.50    29.00")
    image = Image.new("RGB", (784, 224), "white")
    for row, line in enumerate(rows):
        for column, letter in enumerate(line):
            centre = (column * 28 + 14, row * 28 + 14)
            ImageDraw.Draw(image).text(centre, letter, "black", ImageFont.load_default(26), anchor="mm")
    words = read(PageImage.of(1, image)).text.split()
    assert [word for row in rows for word in row.split()] == words


def test_it_is_killed_at_the_deadline(fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path) -> None:
    fake_tesseract(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        read(page, seconds=0.7)
    assert time.monotonic() - started < 10
    process = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{process}").exists(), "it was left running"


def test_cancelled_twice_it_leaves_nothing_open_behind_the_loop(
    fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path
) -> None:
    # It has begun when it has the page; a program of its own keeps the other ends of the pipes open.
    fake_tesseract(
        f"cat >/dev/null; sleep 20 & echo $$ > {tmp_path}/begun; mv {tmp_path}/begun {tmp_path}/pid; exec sleep 60"
    )

    async def run() -> None:
        reading = asyncio.create_task(TesseractEngine().read(page, Task(), 60.0))
        while not (tmp_path / "pid").exists():
            assert not reading.done(), reading
            await asyncio.sleep(0.01)
        reading.cancel()
        while Path("/proc", (tmp_path / "pid").read_text().strip()).exists():
            await asyncio.sleep(0.01)
        reading.cancel()  # as the end of a loop does
        await asyncio.wait([reading], timeout=0)

    asyncio.run(run())
    gc.collect()  # of pipes that are open beside a closed loop asyncio complains, and pytest hands that on


def test_it_gets_the_page_one_thread_and_no_languages_but_those_asked_for(
    fake_tesseract: FakeTesseract, page: PageImage, tmp_path: Path
) -> None:
    fake_tesseract(f'env > {tmp_path}/env; echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/page.png; echo text')
    answer = read(page, languages="rus+eng")
    assert (answer.text, answer.model) == ("text", "rus+eng")
    assert "OMP_THREAD_LIMIT=1" in (tmp_path / "env").read_text().splitlines()
    assert (tmp_path / "arguments").read_text().startswith("stdin stdout -l rus+eng --psm ")
    assert (tmp_path / "page.png").read_bytes() == page.png


def test_missing_it_says_how_to_install_it(page: PageImage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineMissing, match="apt-get install tesseract-ocr tesseract-ocr-eng"):
        read(page)


@pytest.mark.parametrize("languages", ["tlh", "eng+chi_sim_vert_nonsense"])
def test_a_missing_language_says_how_to_install_it(languages: str, page: PageImage) -> None:
    package = languages.split("+")[-1].replace("_", "-")
    with pytest.raises(EngineMissing, match=f"tesseract-ocr-{package}"):
        read(page, languages=languages)


def probe(languages: str = "eng") -> None:
    asyncio.run(TesseractEngine(languages).probe(10))


def test_a_probe_finds_what_is_installed() -> None:
    probe("eng+rus")


def test_a_probe_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match=r"language data for 'tlh'\. Fix: apt-get install tesseract-ocr-tlh"):
        probe("eng+tlh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineMissing, match="no tesseract on the PATH"):
        probe()


def test_a_program_that_cannot_be_run_is_an_error_of_the_engine(fake_tesseract: FakeTesseract, page: PageImage) -> None:
    fake_tesseract("").write_bytes(b"\x7fELF no program")
    with pytest.raises(EngineError, match="does not run"):
        probe()
    with pytest.raises(EngineError, match="does not run"):
        read(page)


def test_failing_it_is_told_with_its_last_words(fake_tesseract: FakeTesseract, page: PageImage) -> None:
    fake_tesseract("echo first >&2; echo out of ink >&2; exit 3")
    with pytest.raises(EngineError, match="status 3: out of ink"):
        read(page)


def test_no_text_on_a_page_that_is_not_blank_is_a_warning(fake_tesseract: FakeTesseract, page: PageImage) -> None:
    fake_tesseract("cat > /dev/null")
    assert read(page).warnings == ("the page is not blank, but no text was found on it",)
    assert read(PageImage.of(1, Image.new("RGB", (100, 100), "white"))).warnings == ()


# Whether it is sure


WRITTEN = {
    "en": "The quick brown fox jumps over the lazy dog while seven wise men count.",
    "ru": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "el": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, και το τιμολόγιο πληρώθηκε.",
    "ar": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
}


def written(*lines: str) -> Image.Image:
    image = Image.new("RGB", (1240, 100 + 48 * max(12, len(lines))), "white")
    font = ImageFont.truetype("DejaVuSans.ttf", 28)
    for row, language in enumerate(lines):
        words = WRITTEN[language].split()
        words = words[row % 5 :] + words[: row % 5]  # equal lines look like columns
        ImageDraw.Draw(image).text((60, 50 + 48 * row), " ".join(words), "black", font=font)
    return image


@pytest.mark.parametrize(
    ("language", "languages", "script", "fix"),
    [
        ("ru", "eng", "Cyrillic", "read with --languages eng+rus (languages=)"),
        ("en", "rus", "Latin", "read with --languages rus+eng (languages=)"),
        ("el", "rus+eng", "Greek", "apt-get install tesseract-ocr-ell, and read with --languages rus+eng+ell"),
        ("ar", "eng", "Arabic", "apt-get install tesseract-ocr-ara (or fas, urd), and read with --languages eng+ara"),
    ],
)
def test_a_page_in_a_script_that_it_does_not_know_is_not_read_and_the_package_named(
    language: str, languages: str, script: str, fix: str
) -> None:
    with pytest.raises(UnusableAnswer) as caught:
        read(PageImage.of(1, written(*[language] * 4)), languages=languages)
    assert re.fullmatch(
        rf"tesseract is not sure of \d+ of \d+ letters, which seem to be {script}\. Fix: {re.escape(fix)}.*",
        str(caught.value),
    )


def test_some_lines_in_another_script_are_named_and_the_others_read() -> None:
    answer = read(PageImage.of(1, written(*["en"] * 6, "ru")), "layout")
    assert answer.text.count("seven wise") == 6
    (warning,) = answer.warnings
    assert "which seem to be Cyrillic. Fix: read with --languages eng+rus" in warning
    both = read(PageImage.of(1, written("ru", "en")), languages="rus+eng")
    assert (lines(both.text)[0], both.warnings) == (WRITTEN["ru"], ())


def test_a_page_upside_down_is_not_read_and_says_so() -> None:
    with pytest.raises(UnusableAnswer, match=r"side or head\. Fix: turn it by 180 degrees clockwise"):
        read(PageImage.of(1, written(*["en"] * 3).rotate(180)))


def table(*words: tuple[str, float]) -> str:
    rows = [f"5\t1\t1\t1\t1\t{number}\t9\t9\t9\t9\t{sure}\t{word}" for number, (word, sure) in enumerate(words)]
    return "\n".join(["level\t" * 11 + "text", *rows, " ".join(word for word, _ in words)])


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        ([("sure", 96.0), ("surely", 60.0)], ""),
        ([("s" * 98, 96.0), ("no", 10.0)], ""),
        ([("s" * 97, 96.0), ("not", 10.0)], "warning"),
        ([("sure", 90.0), ("unsure", 40.1)], "warning"),
        ([("sure", 90.0), ("unsure", 39.9)], "failure"),
        ([("x", 99.0), ("garbage", 50.0)], "failure"),
    ],
)
@pytest.mark.parametrize("directions", ["exit 1", "exec sleep 60", "echo 'Script: Klingon'", "echo 'Rotate: 0'"])
def test_words_that_it_is_not_sure_of_decide(
    words: list[tuple[str, float]], outcome: str, directions: str, fake_tesseract: FakeTesseract, page: PageImage
) -> None:
    fake_tesseract(f'case "$*" in *osd*) {directions};; esac; cat > /dev/null; cat <<"END"\n{table(*words)}\nEND')
    said = ". Fix: name the page's languages (--languages, languages=), or scan it with 300 dpi"
    if outcome == "failure":
        with pytest.raises(UnusableAnswer, match="not sure of [67] of (8|10) letters" + re.escape(said)):
            read(page, seconds=1.0)
    else:
        answer = read(page, seconds=1.0)
        assert answer.text == " ".join(word for word, _ in words)
        assert [warning.endswith(f"letters{said}") for warning in answer.warnings] == [True] * (outcome == "warning")


# Names of languages


@pytest.mark.parametrize(
    ("given", "languages"),
    [
        ("russian", "rus"),
        ("Russian+English", "rus+eng"),
        ("rus, eng", "rus+eng"),
        ("german french+CHINESE", "deu+fra+chi_sim"),
        ("chi-sim", "chi_sim"),
        ("rus+eng", "rus+eng"),
        ("eng_best", "eng_best"),
    ],
)
def test_names_of_languages_are_understood(given: str, languages: str) -> None:
    assert TesseractEngine(given).languages == languages


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("rusian", "write rus for rusian"),
        ("ukrainian", "apt-get install tesseract-ocr-ukr"),
        ("eng+germann+chi_sim_vert", "apt-get install tesseract-ocr-chi-sim-vert; write deu for germann"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_right_one(given: str, fix: str) -> None:
    with pytest.raises(EngineMissing) as caught:
        probe(given)
    assert str(caught.value).endswith(f". Fix: {fix}")

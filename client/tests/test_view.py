from __future__ import annotations

import os
import platform
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from dots_ocr_client import TesseractEngine
from dots_ocr_client.apps import serve
from dots_ocr_client.apps.view import write_view
from dots_ocr_client.pages.documents import PageImage
from dots_ocr_client.results import Attempt, Box, Cell, Document, FailedPage, Page

WIDTH, HEIGHT = 1000, 1400
CELLS = (
    Cell("Title", Box(100, 50, 900, 150), "Annual report"),
    Cell("Picture", Box(100, 200, 500, 600)),
    Cell("Caption", Box(120, 540, 480, 590), "The house in May"),
    Cell("Table", Box(100, 700, 1000, 900), "<table><tr><td>first</td><td>second</td></tr></table>"),
    Cell("Text", None, "The model gave no box for this."),
    Cell("Text", Box(0, 1300, 1000, 1400), "Last words"),
)

HOSTILE = (
    "<script>document.title='x'</script>",
    "<img src=x onerror=\"document.title='x'\">",
    "</script><script>document.title='x'</script>",
    "</style></title></textarea>--><svg onload=document.title='x'>",
    "\" autofocus onfocus=\"document.title='x'\" '",
    "[click](javascript:document.title='x') ![](http://127.0.0.1:9/picture.png)",
    "<iframe src='http://127.0.0.1:9/'></iframe><link rel=stylesheet href='http://127.0.0.1:9/'>",
    "<base href='http://127.0.0.1:9/'><meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
)


def page_of(number: int, *cells: Cell, text: str = "", **more: Any) -> Page:
    return Page(number, WIDTH, HEIGHT, "layout", text, cells, "vllm", "dots.ocr", 1.5, **more)


def picture_of(number: int, width: int = WIDTH, height: int = HEIGHT) -> PageImage:
    image = Image.new("RGB", (width, height), "white")
    for cell in CELLS:
        if cell.box is not None:
            ImageDraw.Draw(image).rectangle(cell.box, outline="black", width=3)
    return PageImage.of(number, image)


ATTEMPT = Attempt("vllm", "failed", "ServerUnavailable", "cannot reach it", 0.5)
REPORT = Document(
    "report.pdf",
    (
        page_of(1, *CELLS, warnings=("a box was clamped",)),
        FailedPage(2, "AllEnginesFailed", "no engine could read page 2", (ATTEMPT,)),
        replace(page_of(3, text="Plain text & no layout"), engine="tesseract"),
    ),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        if platform.freedesktop_os_release()["ID"] == "ubuntu":
            pytest.skip("Ubuntu has Chromium as a snap only, which these tests cannot drive")
        pytest.fail("these tests need Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(20)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("view") / "report.html"
    write_view(REPORT, map(picture_of, (1, 2, 3)), file)
    return file


@pytest.fixture
def shown(browser: webdriver.Chrome, report_file: Path) -> webdriver.Chrome:
    return show(browser, report_file)


def show(browser: webdriver.Chrome, file: Path) -> webdriver.Chrome:
    console(browser)  # forget what was before
    browser.get("about:blank")  # a file that differs in its fragment only would not be loaded anew
    browser.get(file.as_uri())
    return browser


def console(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    """What it has said since the last call."""
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]  # selenium's own


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def class_of(browser: webdriver.Chrome, selector: str) -> list[str]:
    return str(find(browser, selector).get_attribute("class")).split()


def rectangle(browser: webdriver.Chrome, selector: str) -> list[float]:
    script = (
        "const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom]"
    )
    return [float(side) for side in browser.execute_script(script, selector)]


def assert_quiet(browser: webdriver.Chrome) -> None:
    """Nothing was fetched, nothing was refused, and nothing went wrong."""
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert console(browser) == []


@pytest.mark.parametrize("index", [index for index, cell in enumerate(CELLS) if cell.box])
def test_boxes_lie_over_the_picture_where_the_model_saw_them(shown: webdriver.Chrome, index: int) -> None:
    left, top, right, bottom = rectangle(shown, "#page-1 img")
    across, down = (right - left) / WIDTH, (bottom - top) / HEIGHT
    box = CELLS[index].box
    assert box is not None
    expected = (left + box.left * across, top + box.top * down, left + box.right * across, top + box.bottom * down)
    assert rectangle(shown, f"#box-1-{index}") == pytest.approx(expected, abs=0.5)


def test_the_picture_has_the_proportions_of_the_page(shown: webdriver.Chrome) -> None:
    left, top, right, bottom = rectangle(shown, "#page-1 img")
    assert (right - left) / (bottom - top) == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    assert find(shown, "#page-1 img").get_property("naturalWidth") == WIDTH


def test_the_text_stands_beside_the_picture_in_reading_order(shown: webdriver.Chrome) -> None:
    assert rectangle(shown, "#page-1 .v_text")[0] >= rectangle(shown, "#page-1 .v_sheet")[2]
    text = find(shown, "#page-1 .v_text").text
    words = ["Annual report", "The house in May", "first", "second", "gave no box", "Last words"]
    assert sorted(words, key=text.index) == words


def test_it_says_what_read_each_page_and_what_to_know_about_it(shown: webdriver.Chrome) -> None:
    assert "vllm (dots.ocr), mode layout, 1.5 s" in find(shown, "#page-1 .v_facts").text
    assert find(shown, "#page-1 .v_notes").text == "a box was clamped"
    assert "Plain text & no layout" in find(shown, "#page-3").text


def test_a_failed_page_says_why_and_shows_its_picture(shown: webdriver.Chrome) -> None:
    text = find(shown, "#page-2").text
    assert "AllEnginesFailed: no engine could read page 2" in text
    assert str(ATTEMPT) in text
    assert find(shown, "#page-2 img").is_displayed()


def test_the_pointer_on_a_box_lights_its_text_and_the_reverse(shown: webdriver.Chrome) -> None:
    for here, there in (("#box-1-0", "#text-1-0"), ("#text-1-0", "#box-1-0")):
        ActionChains(shown).move_to_element(find(shown, here)).perform()
        assert "v_on" in class_of(shown, there)
        assert "v_on" not in class_of(shown, "#text-1-3")
        ActionChains(shown).move_to_element(find(shown, "header")).perform()
        assert "v_on" not in class_of(shown, there)


def test_a_small_box_inside_a_large_one_can_be_reached(shown: webdriver.Chrome) -> None:
    ActionChains(shown).move_to_element(find(shown, "#box-1-2")).perform()
    assert "v_on" in class_of(shown, "#text-1-2")


def test_the_keyboard_reaches_boxes_in_reading_order_and_their_texts(shown: webdriver.Chrome) -> None:
    shown.execute_script("document.querySelector('nav a:last-of-type').focus()")
    ActionChains(shown).send_keys(Keys.TAB).perform()
    assert shown.switch_to.active_element.get_attribute("id") == "box-1-0"
    assert "v_on" in class_of(shown, "#text-1-0")
    ActionChains(shown).send_keys(Keys.TAB, Keys.TAB, Keys.ENTER).perform()
    assert shown.execute_script("return document.querySelector(':target').id") == "text-1-2"


def test_boxes_have_names_for_screen_readers(shown: webdriver.Chrome) -> None:
    assert find(shown, "#box-1-0").accessible_name == "Title: Annual report"


def test_a_category_that_is_switched_off_hides_its_boxes_and_texts(shown: webdriver.Chrome) -> None:
    def visible() -> list[bool]:
        names = ("#box-1-0", "#text-1-0", "#box-1-3", "#text-1-3")
        return [find(shown, name).is_displayed() for name in names]

    find(shown, "summary").click()
    choice = find(shown, "fieldset input[data-category=Title]")
    choice.click()
    assert visible() == [False, False, True, True]
    choice.click()
    assert visible() == [True] * 4


def pages_shown(browser: webdriver.Chrome) -> list[str]:
    """The pages that are shown, which must be those of the list of pages."""
    shown = [page.get_attribute("id") for page in browser.find_elements(By.CSS_SELECTOR, ".v_page:not([hidden])")]
    listed = [link.text for link in browser.find_elements(By.CSS_SELECTOR, "nav a") if link.is_displayed()]
    assert [f"page-{number}" for number in listed] == shown
    return listed


def test_search_shows_the_pages_that_say_it_and_marks_where(shown: webdriver.Chrome) -> None:
    find(shown, "#v_search").send_keys("ANNUAL rep")
    assert pages_shown(shown) == ["1"]
    assert find(shown, "#v_count").text == "1 of 3 pages"
    assert shown.execute_script("return [...CSS.highlights.get('v_found')].map(String)") == ["Annual rep"]
    find(shown, "#v_search").send_keys(Keys.CONTROL, "a", Keys.DELETE)
    assert pages_shown(shown) == ["1", "2", "3"]


@pytest.mark.parametrize(("only", "pages"), [("fallback", ["3"]), ("noted", ["1"]), ("failed", ["2"])])
def test_pages_can_be_chosen_by_what_became_of_them(only: str, pages: list[str], shown: webdriver.Chrome) -> None:
    find(shown, f"#v_only option[value={only}]").click()
    assert pages_shown(shown) == pages


def test_all_boxes_can_be_switched_off(shown: webdriver.Chrome) -> None:
    find(shown, "#v_boxes").click()
    assert [find(shown, name).is_displayed() for name in ("#box-1-0", "#text-1-0", "#page-1 img")] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("width", [390, 800, 1400])
def test_what_a_link_leads_to_is_not_under_the_bar(width: int, browser: webdriver.Chrome, report_file: Path) -> None:
    size = {"width": width, "height": 500, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    shown = show(browser, report_file)
    find(shown, 'nav a[href="#page-3"]').click()
    top, bar = rectangle(shown, "#page-3 h2")[1], rectangle(shown, ".v_bar")[3]
    across = shown.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert bar <= top < 500
    assert across <= width


def test_boxes_are_drawn_outside_of_what_they_frame(shown: webdriver.Chrome) -> None:
    style = shown.execute_script("return {...getComputedStyle(document.querySelector('#box-1-0'))}")
    assert (style["borderTopWidth"], style["outlineStyle"], style["outlineOffset"]) == ("0px", "solid", "2px")


def test_pages_out_of_sight_cost_nothing(browser: webdriver.Chrome, tmp_path: Path) -> None:
    many = Document("long.pdf", tuple(page_of(number, text=f"Page {number}") for number in range(1, 301)))
    write_view(many, (picture_of(number, 50, 70) for number in range(1, 301)), tmp_path / "view.html")
    show(browser, tmp_path / "view.html")
    script = (
        "return [...document.querySelectorAll('.v_page')].filter(page => "
        "page.firstElementChild.checkVisibility({contentVisibilityAuto: true})).length"
    )
    assert 1 <= browser.execute_script(script) < 10
    find(browser, 'nav a[href="#page-250"]').click()
    assert 0 < rectangle(browser, "#page-250 h2")[1] < 900


def test_it_needs_no_network_and_meets_its_own_policy(shown: webdriver.Chrome) -> None:
    assert_quiet(shown)


def test_scripts_of_others_do_not_run_even_if_they_get_in(
    browser: webdriver.Chrome, report_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "changed.html"
    injected = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\"></main>"
    file.write_text(report_file.read_text().replace("</main>", injected))
    assert show(browser, file).title == "report.pdf"
    assert "Content Security Policy" in str(console(browser))


@pytest.fixture(scope="module")
def hostile(browser: webdriver.Chrome, tmp_path_factory: pytest.TempPathFactory) -> webdriver.Chrome:
    """A document in which everything that others write is an attack."""
    everything = "".join(HOSTILE)
    cells = [
        Cell(category, Box(0, 0, 9, 9), text) for text in HOSTILE for category in ("Text", "Table", "Formula", text)
    ]
    attempt = Attempt(everything, "failed", everything, everything, 1.0)
    read = Page(1, WIDTH, HEIGHT, "layout", everything, tuple(cells), everything, everything, 1.0, attempts=(attempt,))
    plain = Page(2, WIDTH, HEIGHT, "text", everything, (), "vllm", "m", 1.0, warnings=HOSTILE)
    failed = FailedPage(3, everything, everything, (attempt,))
    file = tmp_path_factory.mktemp("hostile") / "view.html"
    write_view(Document(everything, (read, plain, failed)), [], file)
    show(browser, file)
    find(browser, "summary").click()
    for element in browser.find_elements(By.CSS_SELECTOR, "fieldset input")[:4]:
        element.click()
    return browser


def test_attacks_do_nothing(hostile: webdriver.Chrome) -> None:
    assert hostile.title == "".join(HOSTILE)
    assert hostile.current_url.startswith("file:")
    assert_quiet(hostile)


def test_attacks_leave_no_element_that_could_act(hostile: webdriver.Chrome) -> None:
    acting = "script, img, iframe, svg, link, base, object, embed, form, [onerror], [onload], [onfocus], [autofocus]"
    found = hostile.find_elements(By.CSS_SELECTOR, acting)
    assert [element.tag_name for element in found] == ["script"]  # ours
    targets = hostile.execute_script("return [...document.links].map(link => link.href)")
    assert [target for target in targets if not target.startswith("file:")] == []


@pytest.mark.parametrize(
    "where", ["h1", "fieldset", "#page-1 .v_facts", "#page-1 .v_notes", "#page-2 .v_text", "#page-3"]
)
def test_attacks_can_be_read_as_text(hostile: webdriver.Chrome, where: str) -> None:
    text = str(find(hostile, where).get_property("textContent"))
    assert [attack for attack in HOSTILE if attack not in text] == []


def emulate(browser: webdriver.Chrome, **media: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def test_it_is_dark_where_the_reader_wants_it_dark(shown: webdriver.Chrome) -> None:
    script = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    brightness = {}
    for scheme in ("light", "dark"):
        emulate(shown, features=[{"name": "prefers-color-scheme", "value": scheme}])
        brightness[scheme] = max(shown.execute_script(script))
    emulate(shown)
    assert brightness["dark"] < 64 < 192 < brightness["light"]


def test_printed_it_has_boxes_and_texts_but_no_switches(shown: webdriver.Chrome) -> None:
    emulate(shown, media="print")
    visible = [find(shown, name).is_displayed() for name in (".v_bar", "nav", "#box-1-0", "#text-1-0")]
    emulate(shown, media="")
    assert visible == [False, False, True, True]


def test_without_pictures_the_boxes_are_on_an_empty_sheet(browser: webdriver.Chrome, tmp_path: Path) -> None:
    write_view(REPORT, [], tmp_path / "view.html")
    show(browser, tmp_path / "view.html")
    left, top, right, bottom = rectangle(browser, "#page-1 .v_sheet")
    assert (right - left) / (bottom - top) == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    assert rectangle(browser, "#box-1-0")[0] == pytest.approx(left + (right - left) / 10, abs=0.5)
    assert browser.find_elements(By.TAG_NAME, "img") == []


def test_large_pictures_are_made_smaller(tmp_path: Path, browser: webdriver.Chrome) -> None:
    write_view(REPORT, [picture_of(1, 2000, 2800)], tmp_path / "view.html")
    show(browser, tmp_path / "view.html")
    assert find(browser, "img").get_property("naturalHeight") == 1600


def test_a_picture_of_another_shape_is_reported(tmp_path: Path) -> None:
    write_view(REPORT, [picture_of(1, 1400, 1000)], tmp_path / "view.html")
    assert "other proportions" in (tmp_path / "view.html").read_text()


def test_pictures_go_to_their_pages_whichever_are_there(tmp_path: Path) -> None:
    write_view(REPORT, map(picture_of, (0, 3, 4)), tmp_path / "view.html")
    text = (tmp_path / "view.html").read_text()
    assert [f"Picture of page {number}" in text for number in range(5)] == [False, False, False, True, False]


def test_names_that_are_no_utf_8_are_written_as_escapes(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff\n.pdf")
    write_view(Document(name, (page_of(1, text="a \udcff b"),)), [], tmp_path / "view.html")
    assert "<title>a\\udcff\\n.pdf</title>" in (tmp_path / "view.html").read_text(encoding="utf-8")


def test_pictures_are_taken_one_at_a_time(tmp_path: Path) -> None:
    written: list[int] = []

    def pictures() -> Iterator[PageImage]:
        for number in range(1, 4):
            written.append(sum(file.stat().st_size for file in tmp_path.iterdir()))
            yield picture_of(number, 700, 980)

    noise = "".join(chr(33 + i * i % 89) for i in range(20_000))  # so much that buffers are written out
    pages = tuple(page_of(number, text=noise) for number in range(1, 4))
    write_view(Document("x.pdf", pages), pictures(), tmp_path / "view.html")
    assert written[1] < written[2]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def breaks() -> Iterator[PageImage]:
        yield picture_of(1)
        raise InterruptedError

    file = tmp_path / "view.html"
    file.write_text("before")
    with pytest.raises(InterruptedError):
        write_view(REPORT, breaks(), file)
    assert (file.read_text(), list(tmp_path.iterdir())) == ("before", [file])
    write_view(REPORT, [], file)
    assert (file.read_text()[:15], list(tmp_path.iterdir())) == ("<!doctype html>", [file])


def test_a_browser_shows_the_page_of_the_service(browser: webdriver.Chrome) -> None:
    listener = serve.listen("127.0.0.1", 0, public=False)
    server = serve.make_server(serve.Service([TesseractEngine()]), 10)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        console(browser)
        browser.get(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        assert browser.title == "dots.ocr server"
        assert find(browser, "#state").text == "ready · готов"
        assert find(browser, "body").value_of_css_property("max-width") == "768px"  # the policy lets the style pass
        assert not [entry for entry in console(browser) if "favicon" not in entry["message"]]
    finally:
        browser.get("about:blank")
        server.should_exit = True
        thread.join()

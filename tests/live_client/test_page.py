"""The application chatvlmllm with what the role writes: its page in a browser, its models and its scripts."""

# ruff: noqa: RUF001  # Russian

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import jinja2
import pytest
import yaml
from PIL import Image
from pytest_httpserver import HTTPServer
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from rehearsal.shell import REPOSITORY

from .. import packages

ROLE = REPOSITORY / "roles/chatvlmllm"
APPLICATION = REPOSITORY / "molecule/cpu/application"
LOCK = Path(__file__).with_name("requirements.lock")
PATIENCE = 30.0
READ_BY_TESSERACT = "Страницу прочитал Tesseract"

Sheets = list[tuple[Image.Image, str]]
Settle = Callable[[str, str | None], None]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An application with the real one's file names, and with the files that the role writes."""
    place = tmp_path_factory.mktemp("application")
    shutil.copytree(APPLICATION, place, dirs_exist_ok=True)
    for name in (APPLICATION / "files.txt").read_text().split():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    (place / "docker").mkdir()
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string((ROLE / "templates/module.py.j2").read_text())
    for module in variables["_chatvlmllm_modules"]:
        text = template.render(item=module, _chatvlmllm_mark=variables["_chatvlmllm_mark"])
        (place / module["path"]).write_text(text, encoding="utf-8")
    for patch in variables["_chatvlmllm_patches"]:
        file = place / patch["path"]
        lines = environment.from_string("\n".join(patch["lines"])).render()
        found = re.search(patch["behind"], file.read_text(encoding="utf-8"))
        assert found is not None
        file.write_text(f"{found.string[: found.end()]}\n{lines}{found.string[found.end() :]}", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def settle(checkout: Path, base_url: str, api_key: str) -> Settle:
    """Write the settings as the role does; `None` is the right key."""

    def write(url: str = base_url, key: str | None = None) -> None:
        lines = (f"DOTS_OCR_BASE_URL={url}", f"DOTS_OCR_API_KEY={api_key if key is None else key}")
        (checkout / ".dots-ocr.env").write_text("\n".join(lines))

    write()
    return write


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without settings of its own; a systemd that has the service active."""
    programs = tmp_path_factory.mktemp("bin")
    (programs / "systemctl").write_text("#!/bin/sh\necho active\n")
    (programs / "systemctl").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOTS_OCR_")}
    return {**kept, "PATH": f"{programs}:{os.environ['PATH']}"}


class Page:
    """The application's page in a browser."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def text(self, place: str = "body") -> str:
        return self.browser.find_element(By.CSS_SELECTOR, place).text

    def wait_for(self, words: str, place: str = "body") -> str:
        """Return the text of a place once it has these words and the page is at rest."""
        busy = '[data-testid="stStatusWidget"], [data-testid="stSpinner"]'
        waiting = WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[Exception])
        try:
            waiting.until(
                lambda browser: words in self.text(place) and not browser.find_elements(By.CSS_SELECTOR, busy)
            )
        except Exception:
            raise AssertionError(f"no {words!r} on the page:\n{self.text()}") from None
        return self.text(place)

    def click(self, words: str) -> None:
        """Click what has these words, once it can be clicked."""

        def click(browser: webdriver.Chrome) -> bool:
            place = f"//*[self::button or self::label][contains(., '{words}')]"
            browser.find_element(By.XPATH, place).click()
            return True

        WebDriverWait(self.browser, PATIENCE, ignored_exceptions=[Exception]).until(click)

    def write(self, place: str, words: str) -> None:
        """Write into a field and press Enter."""
        field = self.browser.find_element(By.CSS_SELECTOR, place)
        field.send_keys(words, Keys.ENTER)

    def read(self, words: str) -> str:
        """Have the picture read in OCR mode; return the result, in which these words have to come."""
        self.click("Извлечь текст")
        return self.wait_for(words, '[data-testid="stCode"]')


@pytest.fixture(scope="module")
def page(
    checkout: Path,
    settle: Settle,
    environment: dict[str, str],
    sheets: Sheets,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Page]:
    """The page with a picture uploaded."""
    driver = Path("/usr/bin/chromedriver")
    if not driver.exists() and platform.freedesktop_os_release()["ID"] == "ubuntu":
        pytest.skip("Ubuntu has Chromium as a snap only, which these tests cannot drive")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    picture = tmp_path_factory.mktemp("picture") / "page.png"
    sheets[0][0].save(picture)
    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,2000"):
        options.add_argument(f"--{option}")
    command = [sys.executable, "-m", "streamlit", "run", "app.py", f"--server.port={port}", "--server.headless=true"]
    command += ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false", "--server.fileWatcherType=none"]
    command += ["--global.developmentMode=false"]  # which it takes from the folder that it is installed in
    places = {"PYTHONPATH": str(packages.folder(LOCK))}
    with subprocess.Popen(command, cwd=checkout, env={**environment, **places}) as running:
        try:
            for _ in range(300):
                time.sleep(0.1)
                with socket.socket() as knocking:
                    if knocking.connect_ex(("127.0.0.1", port)) == 0:
                        break
            browser = webdriver.Chrome(options, Service(str(driver)))
            try:
                shown = Page(browser)
                for last in (False, False, True):  # now and then Chromium shows nothing of it
                    browser.get(f"http://127.0.0.1:{port}/")
                    with suppress(*() if last else (AssertionError,)):
                        shown.wait_for("Изображение")
                        break
                browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(picture))
                shown.wait_for("Извлечь текст")
                yield shown
            finally:
                browser.quit()
        finally:
            running.kill()  # told to end, it may wait for a script


def run(checkout: Path, environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_status_comes_from_the_server(page: Page) -> None:
    text = page.wait_for("Активная модель: dots.ocr")
    assert re.search(r"контекст 8192 токенов; в работе 0, в очереди 0", text)


def test_ocr_mode(page: Page, sheets: Sheets) -> None:
    text = page.read("Order No. 2026")
    assert "".join(text.split()) == "".join(sheets[0][1].split())
    assert "passport" in page.browser.page_source, "document types"


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("http://127.0.0.1:9/v1", None, "сервер запускается: модель загружается несколько минут"),
        (None, "wrong", "задайте верный в переменной DOTS_OCR_API_KEY или в файле .dots-ocr.env"),
        ("length", None, "ответ не поместился: увеличьте max_tokens или --max-model-len сервера"),
        ("refused", None, "сервер отклонил запрос"),
    ],
)
def test_errors_stay_visible(
    page: Page, settle: Settle, base_url: str, httpserver: HTTPServer, url: str | None, key: str | None, said: str
) -> None:
    if url in ("length", "refused"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "Page"}, "finish_reason": "length"}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "dots.ocr", "choices": [choice]}
        card = {"id": "dots.ocr", "object": "model", "max_model_len": 8192}
        httpserver.expect_request("/health").respond_with_data("")
        httpserver.expect_request("/version").respond_with_json({"version": "0.32.0"})
        httpserver.expect_request("/v1/models").respond_with_json({"object": "list", "data": [card]})
        completion = httpserver.expect_request("/v1/chat/completions")
        if url == "length":
            completion.respond_with_json(answer)
        else:
            completion.respond_with_json({"error": {"message": "no"}}, status=422)
        url = httpserver.url_for("/v1")
    settle(url or base_url, key)
    try:
        text = page.read(said)
    finally:
        settle(base_url, None)
    if key is None:
        assert READ_BY_TESSERACT in text
        assert "Order No. 2026" in text
    else:
        assert READ_BY_TESSERACT not in text, "a wrong key is not to be hidden"


def test_prompt_button_draws_boxes(page: Page) -> None:
    page.click("Чат")
    page.click("Только обнаружение")
    page.wait_for("Рамок: 1")


def test_chat(page: Page, settle: Settle, base_url: str, sheets: Sheets) -> None:
    page.write('[data-testid="stChatInput"] textarea', "Сколько слов?")
    page.wait_for(f"В тексте примерно {len(sheets[0][1].split())} слов.")


def test_error_in_a_chat_stays_visible(page: Page, settle: Settle, base_url: str) -> None:
    settle("http://127.0.0.1:9/v1", None)
    try:
        page.write('[data-testid="stChatInput"] textarea', "Сколько строк?")
        text = page.wait_for(READ_BY_TESSERACT)
    finally:
        settle(base_url, None)
    assert "сервер запускается" in text


def test_model_of_the_mode_transformers(page: Page) -> None:
    page.click("Transformers")
    page.click("OCR")
    page.read("Page 1 of 10")
    assert "dots_ocr" in page.browser.page_source


def test_clash_of_names(checkout: Path, environment: dict[str, str], sheets: Sheets, tmp_path: Path) -> None:
    document = tmp_path / "two.tiff"  # several pages are drawn in a process of their own
    sheets[0][0].copy().save(document, save_all=True, append_images=[sheets[1][0].copy()])
    text = run(checkout, environment, "-c", "from dots_ocr_client import DotsOCRClient; print(DotsOCRClient)")
    assert text.startswith("<class 'dots_ocr_client.DotsOCRClient'>")
    read = f"""
import json
from vllm_dots_ocr_client import get_vllm_dots_ocr_client
print(json.dumps(get_vllm_dots_ocr_client().process_image({str(document)!r})))
"""
    result = json.loads(run(checkout, environment, "-c", read))
    assert result["success"], result
    for number in (1, 2):
        assert f"--- Страница {number} из 2 ---" in result["content"]
        assert "".join(sheets[number - 1][1].split()) in "".join(result["content"].split())


@pytest.mark.parametrize("script", ["vllm_streamlit_adapter.py", "single_container_manager.py"])
def test_pages_of_our_own_run_to_their_end(checkout: Path, environment: dict[str, str], script: str) -> None:
    look = f"""
from streamlit.testing.v1 import AppTest
shown = AppTest.from_file({str(checkout / script)!r}, default_timeout=30).run()
assert not shown.exception, shown.exception
print([one.value for one in (*shown.header, *shown.title)])
"""
    places = {"PYTHONPATH": str(packages.folder(LOCK))}
    assert "dots.ocr" in run(checkout, {**environment, **places}, "-c", look)


@pytest.mark.parametrize("script", ["quick_vllm_test.py", "setup_vllm_dots_ocr.py"])
def test_scripts_check_the_server(checkout: Path, environment: dict[str, str], script: str) -> None:
    text = run(checkout, environment, script)
    assert "warning  model: this is the server of a rehearsal" in text
    assert "ok       key:" in text

"""The engine with torch and transformers themselves, in a container without a network: see tests/qwen.py."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen  # before everything that imports transformers
import torch
from PIL import Image, ImageDraw, ImageFont

from dots_ocr_client import (
    Answer,
    Box,
    ConfigurationError,
    CutOff,
    DeadlineExceeded,
    DotsOCR,
    EngineError,
    EngineMissing,
    NotApplicable,
    Page,
    PageImage,
    Repetition,
    RequestRejected,
    ServerUnavailable,
    Task,
    UnusableAnswer,
)
from dots_ocr_client.engines import qwen
from dots_ocr_client.engines.qwen import Gpu, QwenEngine, choose_gpu
from dots_ocr_client.pages import images

SECONDS = 120.0
PAD = "<|image_pad|>"


@pytest.fixture(scope="session", autouse=True)
def looking_for_models_is_quick(qwen2: Path) -> None:
    """Torch and transformers consist of a million objects, which `live` need not look at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def qwen2(models: Path) -> Path:
    return tiny_qwen.make(models / "qwen2")


@pytest.fixture(scope="session")
def qwen3(models: Path) -> Path:
    return tiny_qwen.make(models / "qwen3", generation=3)


@pytest.fixture(scope="session")
def looping(models: Path) -> Path:
    return tiny_qwen.make(models / "looping", "ab", for_ever=True)


@pytest.fixture
def engine(qwen2: Path) -> QwenEngine:
    return QwenEngine(folder=qwen2, device="cpu")


@pytest.fixture
def page() -> PageImage:
    return page_of(784, 1120)


class Watch:
    """Looks at what goes through the models.

    Attributes:
        prompts: Token ids of every prompt.
        pixels: What the vision model got, for each page.
        models: Which vision models those were.
        tokens: How many were generated.
        at_vision: Called before the vision model runs.
        token_seconds: How long each token takes in addition.
    """

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.pixels: list[Any] = []
        self.models: list[Any] = []
        self.tokens = 0
        self.at_vision: Callable[[], None] = lambda: None
        self.token_seconds = 0.0

    def __call__(self, module: Any, arguments: Any) -> None:
        kind = type(module).__name__
        if kind in ("Qwen2VisionTransformerPretrainedModel", "Qwen3VLVisionModel"):
            self.pixels.append(arguments[0])
            self.models.append(id(module))
            self.at_vision()
        elif kind == "Embedding" and module.embedding_dim == tiny_qwen.WIDTH and arguments[0].shape[1] > 1:
            self.prompts += arguments[0].tolist()
        elif kind == "Linear" and (module.in_features, module.out_features) == tiny_qwen.OUTPUT_LAYER:
            self.tokens += 1
            time.sleep(self.token_seconds)


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    yield watch
    handle.remove()


@pytest.fixture(autouse=True)
def nothing_is_left_in_memory() -> Iterator[None]:
    yield
    gc.collect()
    assert live() == 0


def page_of(width: int, height: int) -> PageImage:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text((20, height // 2), "Total: 97", "black", ImageFont.load_default(40))
    return PageImage.of(1, image)


BLANK = PageImage.of(1, Image.new("RGB", (784, 224), "white"))


def live() -> int:
    """How many models are in memory."""
    return sum(type(thing).__name__.endswith("VLForConditionalGeneration") for thing in gc.get_objects())


async def ask(engine: QwenEngine, page: PageImage, task: Task | None = None, seconds: float = SECONDS) -> Answer:
    async with asyncio.timeout(SECONDS):
        return await engine.read(page, task or Task("text"), seconds)


def read(engine: QwenEngine, page: PageImage, task: Task | None = None, seconds: float = SECONDS) -> Answer:
    async def run() -> Answer:
        try:
            return await ask(engine, page, task, seconds)
        finally:
            await engine.aclose()

    return asyncio.run(run())


def probe(engine: QwenEngine) -> None:
    asyncio.run(engine.probe(5))


def written(prompt: list[int]) -> str:
    """The text of a prompt, with one placeholder for all of an image."""
    text: str = tiny_qwen.make_tokenizer(None).decode(prompt)
    return text.replace(PAD * text.count(PAD), PAD)


def pads(prompt: list[int]) -> int:
    return tiny_qwen.make_tokenizer(None).decode(prompt).count(PAD)  # type: ignore[no-any-return]


# Reading


@pytest.mark.parametrize(("model", "factor"), [("qwen2", 28), ("qwen3", 32)])
def test_it_reads_with_the_real_architectures(
    model: str, factor: int, page: PageImage, watch: Watch, request: pytest.FixtureRequest
) -> None:
    answer = read(QwenEngine("tiny", folder=request.getfixturevalue(model), device="cpu"), page)
    assert (answer.text, answer.mode, answer.model, answer.warnings) == (tiny_qwen.SAYS, "text", "tiny", ())
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(watch.prompts[0]), len(tiny_qwen.SAYS) + 1)
    assert answer.finish_reason == "stop"
    assert pads(watch.prompts[0]) == (784 // factor) * (1120 // factor)


def test_torchvision_is_not_needed(engine: QwenEngine, page: PageImage) -> None:
    with pytest.raises(ImportError):
        importlib.import_module("torchvision")
    assert read(engine, page).text == tiny_qwen.SAYS


def test_the_model_sees_the_page(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    dark = PageImage.of(1, Image.eval(page.image, lambda value: 255 - value))
    read(engine, page)
    read(engine, dark)
    light, dark_pixels = (float(pixels.mean()) for pixels in watch.pixels)
    assert light > 1 > -1 > dark_pixels  # normalized: white is about 2, black -1.8


def test_the_prompt_is_that_of_the_models_own_template(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    read(engine, page)
    assert written(watch.prompts[0]) == (
        "<|im_start|>system\nTiny.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{PAD}<|vision_end|>{qwen.PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [None, "{% for message in messages %}no place for images{% endfor %}"])
def test_without_a_template_for_images_it_is_chatml(
    template: str | None, page: PageImage, watch: Watch, tmp_path: Path
) -> None:
    assert read(QwenEngine(folder=tiny_qwen.make(tmp_path, template=template), device="cpu"), page).text
    assert written(watch.prompts[0]) == (
        f"<|im_start|>user\n<|vision_start|>{PAD}<|vision_end|>{qwen.PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_question_is_asked(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    answer = read(engine, page, Task("general", question="What does it cost?"))
    assert (answer.mode, answer.text) == ("general", tiny_qwen.SAYS)
    assert "<|vision_end|>What does it cost?<|im_end|>" in written(watch.prompts[0])


def test_a_question_with_a_placeholder_is_refused(engine: QwenEngine, page: PageImage) -> None:
    with pytest.raises(RequestRejected, match="image_pad"):
        read(engine, page, Task("general", question=f"What is {PAD}?"))


def test_a_layout_comes_as_text_with_a_warning(engine: QwenEngine, page: PageImage) -> None:
    answer = read(engine, page, Task("layout"))
    assert (answer.mode, answer.cells, answer.warnings) == ("text", (), ("qwen reads text without layout",))


def test_a_box_is_cut_out(engine: QwenEngine, watch: Watch) -> None:
    page = PageImage.of(1, Image.new("RGB", (1000, 1000), "white"))
    picture = page.image
    ImageDraw.Draw(picture).rectangle((500, 500, 1000, 1000), "black")
    ImageDraw.Draw(picture).line((500, 750, 1000, 750), "white", 60)
    page = PageImage.of(1, picture)
    page = PageImage(1, 2000, 2000, page.png, page.sent_width, page.sent_height)  # boxes are in the page's own pixels
    answer = read(engine, page, Task("grounding", box=Box(1000, 1000, 2000, 2000)))
    assert answer.mode == "grounding"
    assert float(watch.pixels[0].mean()) < -0.8  # all of the black, and nothing of the white beside it
    assert pads(watch.prompts[0]) == 18 * 18  # 500 / 28 = 17.9


@pytest.mark.parametrize(
    ("box", "reason"), [(Box(800, 0, 900, 50), "outside the page"), (Box(0, 560, 784, 562), "too narrow")]
)
def test_a_box_that_shows_nothing_is_refused(box: Box, reason: str, engine: QwenEngine, page: PageImage) -> None:
    with pytest.raises(RequestRejected, match=reason):
        read(engine, page, Task("grounding", box=box))


def test_a_blank_page_is_not_shown_to_the_model(engine: QwenEngine, watch: Watch) -> None:
    assert read(engine, BLANK).text == ""
    assert watch.pixels == []
    assert read(engine, BLANK, Task("general", question="What is it?")).text == tiny_qwen.SAYS


@pytest.mark.parametrize("limit", [qwen.MAX_PIXELS, 300_000])
def test_large_pages_are_shrunk(limit: int, qwen2: Path, watch: Watch) -> None:
    read(QwenEngine(folder=qwen2, device="cpu", max_pixels=limit), page_of(1654, 2339))
    width, height = images.smart_resize(1654, 2339, max_pixels=limit)
    assert pads(watch.prompts[0]) == width * height // 28**2 <= limit // 28**2
    assert watch.pixels[0].shape[0] * 14**2 == width * height


def test_small_images_are_enlarged(engine: QwenEngine, watch: Watch) -> None:
    read(engine, page_of(280, 112))
    assert 256 <= pads(watch.prompts[0]) < 300


def test_it_is_greedy_whatever_the_model_prefers(engine: QwenEngine, page: PageImage) -> None:
    """The model's own settings are sampling at temperature 1, which hardly ever gives this text, and a penalty."""
    assert {read(engine, page).text for _ in range(3)} == {tiny_qwen.SAYS}


# Answers of no use


def test_a_loop_is_ended_early(looping: Path, page: PageImage, watch: Watch) -> None:
    with pytest.raises(Repetition, match="without end"):
        read(QwenEngine(folder=looping, device="cpu", max_new_tokens=20_000), page)
    assert watch.tokens < 2_100


def test_an_answer_that_is_too_long_is_cut_off(qwen2: Path, page: PageImage) -> None:
    with pytest.raises(CutOff, match="after 5 tokens"):
        read(QwenEngine(folder=qwen2, device="cpu", max_new_tokens=5), page)
    just_enough = len(tiny_qwen.SAYS) + 1
    assert read(QwenEngine(folder=qwen2, device="cpu", max_new_tokens=just_enough), page).text == tiny_qwen.SAYS


def test_no_answer_is_of_no_use(tmp_path: Path, page: PageImage) -> None:
    silent = QwenEngine(folder=tiny_qwen.make(tmp_path, ""), device="cpu")
    with pytest.raises(UnusableAnswer, match="wrote nothing"):
        read(silent, page)
    stain = Image.new("L", (560, 560), "white")
    stain.paste(224, (100, 100, 200, 200))
    assert read(silent, PageImage.of(1, stain)).text == ""


# Memory and time


def test_pages_at_the_same_time_share_one_model(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    async def run() -> None:
        answers = await asyncio.gather(*(ask(engine, page) for _ in range(4)))
        assert [answer.text for answer in answers] == [tiny_qwen.SAYS] * 4
        assert (len(watch.models), len(set(watch.models)), live()) == (4, 1, 1)
        await engine.aclose()

    asyncio.run(run())


def test_the_event_loop_goes_on_meanwhile(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    watch.token_seconds = 0.05
    longest = 0.0

    async def run() -> None:
        nonlocal longest
        reading = asyncio.create_task(ask(engine, page))
        await asyncio.sleep(0)
        while not watch.tokens:
            await asyncio.sleep(0.01)
        while not reading.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)
        await engine.aclose()

    asyncio.run(run())
    assert watch.tokens == len(tiny_qwen.SAYS) + 1
    assert 0 < longest < 0.4  # the tokens take 0.5 s


def test_an_idle_model_is_dropped_and_loaded_again(qwen2: Path, page: PageImage) -> None:
    async def run() -> None:
        engine = QwenEngine(folder=qwen2, device="cpu", idle_seconds=0.4)
        for _ in range(2):
            assert (await ask(engine, page)).text == tiny_qwen.SAYS
            assert live() == 1
            async with asyncio.timeout(SECONDS):
                while live():
                    await asyncio.sleep(0.1)
        await engine.aclose()

    asyncio.run(run())


def test_a_model_in_use_is_not_dropped(qwen2: Path, page: PageImage, watch: Watch) -> None:
    async def run() -> None:
        engine = QwenEngine(folder=qwen2, device="cpu", idle_seconds=0.2)
        await ask(engine, page)
        watch.token_seconds = 0.05  # the page takes longer than a model may be idle
        await ask(engine, page)
        await ask(engine, page)
        assert len(set(watch.models)) == 1
        await engine.aclose()

    asyncio.run(run())


def test_closing_drops_the_model(engine: QwenEngine, page: PageImage) -> None:
    async def run() -> None:
        await ask(engine, page)
        assert live() == 1
        await engine.aclose()
        assert live() == 0

    asyncio.run(run())


def test_a_cancelled_page_sets_the_model_free(looping: Path, page: PageImage, watch: Watch) -> None:
    watch.token_seconds = 0.02  # 40 s until the loop is noticed

    async def run() -> None:
        engine = QwenEngine(folder=looping, device="cpu", max_new_tokens=20_000)
        reading = asyncio.create_task(ask(engine, page))
        while watch.tokens < 3:
            await asyncio.sleep(0.01)
        begin = time.monotonic()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert time.monotonic() - begin < 0.5
        await ask(engine, BLANK)  # goes through the same thread
        assert time.monotonic() - begin < 2
        assert live() == 1
        await engine.aclose()

    asyncio.run(run())


def test_a_page_can_be_cancelled_before_its_first_token(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert go_on.wait(SECONDS)

    watch.at_vision = hold

    async def run() -> None:
        reading = asyncio.create_task(ask(engine, page))
        await asyncio.to_thread(entered.wait, SECONDS)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go_on.set()
        await ask(engine, BLANK)
        assert watch.tokens == 0
        await engine.aclose()

    asyncio.run(run())


def test_it_keeps_the_deadline_by_itself(looping: Path, page: PageImage, watch: Watch) -> None:
    watch.token_seconds = 0.02
    engine = QwenEngine(folder=looping, device="cpu", max_new_tokens=20_000)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="within 1 s"):
        read(engine, page, seconds=1.0)
    assert time.monotonic() - begin < 5


def test_without_memory_the_model_is_dropped(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    async def run() -> None:
        watch.at_vision = fail
        with pytest.raises(ServerUnavailable, match="memory does not suffice") as caught:
            await ask(engine, page)
        assert caught.value.__context__ is None  # a traceback would hold the memory
        assert live() == 0
        watch.at_vision = lambda: None
        assert (await ask(engine, page)).text == tiny_qwen.SAYS
        await engine.aclose()

    asyncio.run(run())


def test_whatever_fails_becomes_an_error_of_ours(engine: QwenEngine, page: PageImage, watch: Watch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error:\ndevice-side assert triggered")

    watch.at_vision = fail
    with pytest.raises(EngineError, match="RuntimeError: CUDA error: device-side assert triggered"):
        read(engine, page)


# What has to be there


def test_it_is_imported_without_torch() -> None:
    code = """
import sys
from dots_ocr_client.engines.qwen import QwenEngine
QwenEngine()
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["torch", "transformers"])
@pytest.mark.parametrize("call", ["probe(5)", "read(page, Task('text'), 5)"])
def test_missing_packages_are_named(package: str, call: str) -> None:
    code = f"""
import asyncio, sys
sys.modules[{package!r}] = None
from PIL import Image
from dots_ocr_client import EngineMissing, PageImage, Task
from dots_ocr_client.engines.qwen import QwenEngine
picture = Image.new("L", (99, 99))
picture.paste(255, (9, 9, 50, 50))
page = PageImage.of(1, picture)
try:
    asyncio.run(QwenEngine(device="cpu").{call})
except EngineMissing as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert f"there is no {package}" in done.stdout
    assert "pip install 'dots-ocr-client[qwen]'" in done.stdout


def test_a_model_that_is_not_there_is_not_downloaded(page: PageImage) -> None:
    engine = QwenEngine(device="cpu")
    with pytest.raises(EngineMissing, match=r"not in the local .* cache: hf download Qwen/Qwen2-VL-2B-Instruct$"):
        read(engine, page)
    with pytest.raises(EngineMissing, match="not in the local"):
        probe(engine)


def test_a_download_that_fails_says_so(page: PageImage) -> None:
    with pytest.raises(EngineMissing, match="could not be downloaded"):
        read(QwenEngine(device="cpu", download=True), page)


def test_a_model_in_the_cache_is_found(qwen2: Path, page: PageImage) -> None:
    cached = Path(os.environ["HF_HOME"], "hub/models--some--tiny")
    shutil.copytree(qwen2, cached / "snapshots/1234")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("1234")
    try:
        engine = QwenEngine("some/tiny", device="cpu")
        probe(engine)
        assert read(engine, page).text == tiny_qwen.SAYS
    finally:
        shutil.rmtree(cached)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match=f"no model in {tmp_path}: hf download some/model --local-dir {tmp_path}"):
        probe(QwenEngine("some/model", folder=tmp_path, device="cpu"))


def test_a_folder_without_weights_is_not_complete(qwen2: Path, page: PageImage, tmp_path: Path) -> None:
    shutil.copytree(qwen2, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(EngineMissing, match="is not complete"):
        read(QwenEngine(folder=tmp_path, device="cpu"), page)


# Where it runs


@pytest.mark.parametrize(
    ("free", "keep_free", "chosen"),
    [
        ([], 0, None),
        ([80_000, 80_000], None, None),  # vLLM may come back on any of them
        ([5_999], 0, None),
        ([6_000], 0, 0),
        ([15_999], 10_000, None),
        ([16_000], 10_000, 0),
        ([7_000, 20_000, 9_000], 10_000, 1),
    ],
)
def test_a_gpu_is_taken_only_beside_what_vllm_needs(free: list[int], keep_free: int | None, chosen: int | None) -> None:
    gpus = [Gpu(f"GPU-{index}", mib) for index, mib in enumerate(free)]
    assert choose_gpu(gpus, 6_000, keep_free) == (None if chosen is None else gpus[chosen])


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with 16,000 MiB free."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\n[ "$*" = "--query-gpu=uuid,memory.free --format=csv,noheader,nounits" ] || exit 6\n'
        'echo "GPU-0a1b, 16000"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("nvidia_smi")
def test_by_default_gpus_are_left_to_vllm(qwen2: Path, page: PageImage) -> None:
    engine = QwenEngine(folder=qwen2)
    for call in (probe, lambda engine: read(engine, page)):
        with pytest.raises(NotApplicable, match=r"all of each GPU is kept for a vLLM .* device='cpu'"):
            call(engine)


@pytest.mark.usefixtures("nvidia_smi")
def test_memory_beside_vllm_is_asked_for(qwen2: Path) -> None:
    needed = qwen.WORKING_MIB + sum(file.stat().st_size for file in qwen2.glob("*.safetensors")) // 2**20
    probe(QwenEngine(folder=qwen2, keep_free_mib=16_000 - needed))
    with pytest.raises(NotApplicable, match=f"needs {needed} MiB"):
        probe(QwenEngine(folder=qwen2, keep_free_mib=16_001 - needed))


@pytest.mark.usefixtures("nvidia_smi")
def test_a_gpu_that_torch_does_not_see_is_named(qwen2: Path, page: PageImage) -> None:
    with pytest.raises(EngineMissing, match="torch does not see GPU-0a1b"):
        read(QwenEngine(folder=qwen2, keep_free_mib=0), page)


def test_no_gpu_at_all_is_not_applicable(qwen2: Path) -> None:
    with pytest.raises(NotApplicable, match="GPU memory"):
        probe(QwenEngine(folder=qwen2, keep_free_mib=0))


def test_torch_without_cuda_is_named(qwen2: Path, page: PageImage) -> None:
    with pytest.raises(EngineMissing, match="CUDA build"):
        read(QwenEngine(folder=qwen2, device="cuda"), page)


def test_the_environment_chooses_the_device(monkeypatch: pytest.MonkeyPatch, qwen2: Path, page: PageImage) -> None:
    monkeypatch.setenv("DOTS_OCR_QWEN_DEVICE", "cpu")
    assert read(QwenEngine(folder=qwen2), page).text == tiny_qwen.SAYS


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", " cpu"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a device for qwen"):
        QwenEngine(device=device)


@pytest.mark.parametrize("name", ["max_pixels", "max_new_tokens", "idle_seconds"])
def test_numbers_have_to_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        QwenEngine(**{name: 0})  # type: ignore[arg-type]


def test_a_cpu_is_expected_to_take_minutes() -> None:
    assert QwenEngine(device="cpu").expected_seconds > 120 > QwenEngine(device="cuda").expected_seconds


# In the chain


def test_the_client_reads_a_document_with_it(engine: QwenEngine, page: PageImage) -> None:
    with DotsOCR(engines=[engine]) as ocr:
        read = ocr.read(page.image).pages[0]
    assert isinstance(read, Page)
    assert (read.text, read.engine) == (tiny_qwen.SAYS, "qwen")

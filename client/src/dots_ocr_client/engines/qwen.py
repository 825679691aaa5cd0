"""Qwen's vision models in this process, with torch and transformers: they read without a server, and answer questions.

The tokenizer, the image processor and the model are loaded one by one. Transformers' processor for all three would need
torchvision, whose usual build does not go with a torch for CPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from PIL import Image

from .. import errors
from ..pages import images
from ..pages.documents import PageImage
from ..prompts import Mode
from .admission import Limiter
from .base import Answer, Task, cut_out
from .server import LOOP_CHUNKS, LOOP_TAIL, is_loop

DEFAULT_MODEL: Final = "Qwen/Qwen2-VL-2B-Instruct"  # 4.4 GB of weights, Apache 2.0
PROMPT: Final = (
    "Transcribe all text in this image, exactly as it is written, in reading order. Keep its line breaks. "
    "Do not translate, explain or add anything."
)
MIN_PIXELS: Final = 256 * 28 * 28  # smaller images are enlarged; as ChatVLMLLM does
# Larger images are shrunk; as ChatVLMLLM does. For Qwen2-VL this is 1,280 tokens. An A4 page at 200 dpi would be 4,956,
# which a CPU takes minutes to look at.
MAX_PIXELS: Final = 1280 * 28 * 28
# Longest answer, in tokens (our own choice: an A4 page of 3,800 characters takes about 1,000 in English, 1,700 in
# Russian).
MAX_NEW_TOKENS: Final = 2_048
# How long the model stays in memory without a page (our own choice: longer than a reader looks at one).
IDLE_SECONDS: Final = 300.0
# A page of 1,300 tokens on two cores with AVX-512, from 27 s until the first token and then 2.75 tokens/s, as measured
# with Qwen2-VL-2B's architecture, random weights and 704 image tokens.
CPU_SECONDS: Final = 480.0
GPU_SECONDS: Final = 30.0  # the same on a GPU (our own estimate, at 40 to 50 tokens/s; not measured)
# GPU memory beside the weights: CUDA itself, the picture's activations, the cache (our own estimate).
WORKING_MIB: Final = 2_048

_CHATML = (
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"  # Qwen's format
)
_MIB = 2**20
_SMI_SECONDS = 10  # nvidia-smi takes a second or two when it has to wake the driver up

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as ``nvidia-smi`` sees it."""

    uuid: str  # names it whatever the order in which CUDA counts
    free_mib: int  # memory that nobody uses, in MiB


def choose_gpu(gpus: Sequence[Gpu], needed_mib: int, keep_free_mib: int | None) -> Gpu | None:
    """Choose the GPU with the most free memory, if that is enough for the model and a vLLM which comes back, in MiB.

    ``None`` MiB to keep free leaves every GPU to vLLM, as a whole.
    """
    if keep_free_mib is None:
        return None
    best = max(gpus, key=lambda gpu: gpu.free_mib, default=None)
    return best if best and best.free_mib >= needed_mib + keep_free_mib else None


class QwenEngine:
    """Reads pages with Qwen2-VL, Qwen2.5-VL or Qwen3-VL in a thread of its own, one after the other.

    It loads the model for the first page, and drops it when no page has come for a while.
    """

    name = "qwen"
    modes: frozenset[Mode] = frozenset({"text", "layout", "grounding", "general"})

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        folder: str | os.PathLike[str] | None = None,
        device: str | None = None,
        keep_free_mib: int | None = None,
        max_pixels: int = MAX_PIXELS,
        max_new_tokens: int = MAX_NEW_TOKENS,
        idle_seconds: float = IDLE_SECONDS,
        download: bool = False,
    ) -> None:
        """Choose the model and where it runs; nothing is imported or loaded yet.

        Args:
            model: Its name on the Hugging Face Hub, such as ``Qwen/Qwen3-VL-2B-Instruct``.
            folder: Where its files are. Default: the local Hugging Face cache.
            device: ``cpu``, which takes minutes for a page; ``cuda`` or ``cuda:1``; or ``auto``: the GPU with the most
                free memory, if that is enough for the model and `keep_free_mib`. Default: ``DOTS_OCR_QWEN_DEVICE`` of
                the environment, or ``auto``.
            keep_free_mib: For ``auto``: what the model must leave free, in MiB: all that vLLM takes when it comes back.
                Default: the whole GPU, because this project's server takes all GPUs and nearly all of their memory.
            max_pixels: Larger images are shrunk to this.
            max_new_tokens: Longest answer.
            idle_seconds: How long the model stays in memory without a page.
            download: Fetch missing files from the Hub, while a page waits.

        Raises:
            ConfigurationError: There is no such device.
            ValueError: A number is not positive.
        """
        device = device or os.environ.get("DOTS_OCR_QWEN_DEVICE") or "auto"
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
            raise errors.ConfigurationError(f"{device!r} is not a device for qwen: write auto, cpu, cuda or cuda:1")
        numbers = {"max_pixels": max_pixels, "max_new_tokens": max_new_tokens, "idle_seconds": idle_seconds}
        for name, number in numbers.items():
            if not number > 0:
                raise ValueError(f"{name} must be positive, not {number!r}")
        self.model = model
        self.limiter = Limiter(start=1, cap=1)
        self._folder = None if folder is None else Path(folder)
        self._device = device
        self._keep_free_mib = keep_free_mib
        self._size = {"shortest_edge": min(MIN_PIXELS, max_pixels), "longest_edge": max_pixels}  # pixels, despite names
        self._max_new_tokens = max_new_tokens
        self._idle_seconds = idle_seconds
        self._download = download
        # All that has to do with the model happens in this one thread, so nothing is loaded twice or dropped in use.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dots-ocr-qwen")
        self._loaded: _Loaded | None = None
        self._jobs: set[_Job] = set()
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def expected_seconds(self) -> float:
        """`CPU_SECONDS` or `GPU_SECONDS`."""
        return CPU_SECONDS if self._device == "cpu" else GPU_SECONDS

    async def probe(self, seconds: float) -> None:
        """Look for the packages, the model's files and a GPU; nothing is loaded."""
        await self._run(self._check)

    async def read(self, page: PageImage, task: Task, seconds: float) -> Answer:
        """Read one page, or answer a question about it.

        When this call is cancelled, the model stops within one of its layers, and a model that is being loaded is kept
        for the next page. A layout comes as text without cells, and a warning says so. A blank page is not shown to the
        model, which would invent a text.

        Raises:
            EngineMissing: Packages or the model's files are missing.
            NotApplicable: No GPU has enough free memory.
            ServerUnavailable: The memory did not suffice.
            DeadlineExceeded: `seconds` were over before the answer was.
            RequestRejected: The box lies outside the page or is too narrow, or the question holds a control token.
            Repetition, CutOff, UnusableAnswer: The answer is of no use.
            EngineError: The model could not be loaded, or failed.
        """
        job = _Job(seconds)
        self._jobs.add(job)
        if self._idle_timer:
            self._idle_timer.cancel()
        try:
            return await self._run(self._transcribe, page, task, job)
        finally:
            job.cancel()
            self._jobs.discard(job)
            if not self._jobs:
                loop = asyncio.get_running_loop()
                self._idle_timer = loop.call_later(self._idle_seconds, self._thread.submit, self._unload)

    async def aclose(self) -> None:
        """Drop the model."""
        for job in self._jobs:
            job.cancel()
        if self._idle_timer:
            self._idle_timer.cancel()
        await self._run(self._unload)

    async def _run(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # What follows runs in the thread.

    def _transcribe(self, page: PageImage, task: Task, job: _Job) -> Answer:
        job.check()
        picture = page.image if task.box is None else cut_out(page, task.box)
        if task.box is not None and max(picture.size) >= images.MAX_ASPECT * min(picture.size):
            raise errors.RequestRejected(
                f"the box {list(task.box)} is too narrow: the model takes aspect ratios below 200"
            )
        mode: Mode = "text" if task.mode == "layout" else task.mode
        warnings = ("qwen reads text without layout",) if task.mode == "layout" else ()
        if task.mode != "general" and images.is_empty(picture):
            return Answer(mode=mode, text="", model=self.model, warnings=warnings)
        prompt = task.question if task.mode == "general" and task.question else PROMPT
        try:
            self._loaded = self._loaded or self._load()
            text, prompt_tokens, completion_tokens = self._generate(self._loaded, picture, prompt, job)
        except errors.EngineError:
            raise
        except Exception as error:  # torch and transformers raise nearly anything
            failure = self._explain(error)
        else:
            return Answer(
                mode=mode,
                text=text,
                model=self.model,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                finish_reason="stop",
                warnings=warnings,
            )
        # Only here, where no traceback holds on to tensors any more, the memory is given back.
        self._unload()
        raise failure

    def _generate(self, loaded: _Loaded, picture: Image.Image, prompt: str, job: _Job) -> tuple[str, int, int]:
        """Return the answer and the numbers of tokens of the prompt, with the image, and of the answer."""
        pixels = loaded.image_processor(images=[picture], size=self._size, return_tensors="pt")
        image_tokens = int(pixels["image_grid_thw"].prod()) // loaded.image_processor.merge_size**2
        text = _prompt(loaded, prompt, image_tokens)
        ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        inputs = {
            "input_ids": ids,
            "attention_mask": loaded.torch.ones_like(ids),
            "mm_token_type_ids": (ids == loaded.model.config.image_token_id).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }

        def answer_of(sequence: Any, last: int = 0) -> str:
            """Return the text of an answer, or of so many of its last tokens."""
            return str(loaded.tokenizer.decode(sequence[0, ids.shape[1] :][-last:], skip_special_tokens=True))

        def stops(sequence: Any, *_: object, **__: object) -> bool:
            """Tell now and then whether the answer has become a loop."""
            count = sequence.shape[1] - ids.shape[1]
            return bool(count % LOOP_CHUNKS == 0) and is_loop(answer_of(sequence, LOOP_TAIL))

        with contextlib.ExitStack() as hooks:
            for module in loaded.model.modules():  # the prompt alone takes a CPU half a minute
                hooks.enter_context(module.register_forward_pre_hook(lambda *_: job.check()))
            sequence = loaded.model.generate(
                **{name: tensor.to(loaded.model.device) for name, tensor in inputs.items()},
                stopping_criteria=[stops],
                max_new_tokens=self._max_new_tokens,
                # Greedy, whatever the model's own settings are. Penalties would ruin tables.
                **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0},
            )
        text, count = answer_of(sequence), int(sequence.shape[1] - ids.shape[1])
        if is_loop(text) or is_loop(text := text.strip()):
            raise errors.Repetition(
                "the model repeated itself without end: try another model, or another resolution (max_pixels=)"
            )
        if count >= self._max_new_tokens and int(sequence[0, -1]) not in loaded.end_tokens:
            raise errors.CutOff(
                f"the answer was cut off after {self._max_new_tokens} tokens: allow more (max_new_tokens=)"
            )
        if not text and not images.is_blank(picture):
            raise errors.UnusableAnswer("the model wrote nothing, though the page is not blank: try another model")
        return text, int(ids.shape[1]), count

    def _load(self) -> _Loaded:
        """Load the model."""
        folder, gpu = self._check()
        try:
            torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        except ImportError as error:
            raise _packages_missing(error) from error
        device = self._device if gpu is None else _cuda_device(torch, gpu)
        if device != "cpu" and not torch.cuda.is_available():
            raise errors.EngineMissing(
                "torch finds no GPU that it can use: install its CUDA build, or choose device='cpu'"
            )
        try:
            with contextlib.ExitStack() as afterwards:
                logging = transformers.utils.logging
                if logging.is_progress_bar_enabled():
                    logging.disable_progress_bar()
                    afterwards.callback(logging.enable_progress_bar)
                options = {"local_files_only": True}
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
                image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
                model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
        except OSError as error:
            raise self._files_missing(f"{folder} is not complete ({_short(error)})") from error
        ends = model.generation_config.eos_token_id
        end_tokens = frozenset([ends] if isinstance(ends, int) else ends or [])
        return _Loaded(torch, tokenizer, image_processor, model.to(device).eval(), end_tokens)

    def _check(self) -> tuple[Path, Gpu | None]:
        """Find the model's files, and the GPU if one has to be chosen."""
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise _packages_missing(f"there is no {package}")
        folder = self._find_files()
        if self._device != "auto" or self._loaded is not None:
            return folder, None
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        needed = weights // _MIB + WORKING_MIB
        gpu = choose_gpu([] if self._keep_free_mib is None else _gpus(), needed, self._keep_free_mib)
        if gpu is None:
            kept = "all" if self._keep_free_mib is None else f"{self._keep_free_mib} MiB"
            raise errors.NotApplicable(
                f"{self.model} needs {needed} MiB of GPU memory, and {kept} of each GPU is kept for a vLLM that comes "
                "back: give keep_free_mib= what vLLM takes; or choose device='cuda' if vLLM does not run there, or "
                "device='cpu', which takes minutes for a page (or set DOTS_OCR_QWEN_DEVICE)"
            )
        return folder, gpu

    def _find_files(self) -> Path:
        """Return the folder with the model's files."""
        if self._folder is not None:
            if not (self._folder / "config.json").is_file():
                raise self._files_missing(f"there is no model in {self._folder}")
            return self._folder
        hub: Any = importlib.import_module("huggingface_hub")
        try:
            return Path(hub.snapshot_download(self.model, local_files_only=not self._download))
        except Exception as error:  # the Hub's client raises its own errors and those of its HTTP library
            if self._download:
                raise self._files_missing(f"{self.model} could not be downloaded ({_short(error)})") from error
            raise self._files_missing(f"{self.model} is not in the local Hugging Face cache") from error

    def _files_missing(self, what: str) -> errors.EngineMissing:
        where = "" if self._folder is None else f" --local-dir {self._folder}"
        return errors.EngineMissing(f"{what}: hf download {self.model}{where}")

    def _explain(self, error: Exception) -> errors.EngineError:
        """Say what an unexpected error means. Its own traceback must not be kept: it would hold the memory."""
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported yet
            or "can't allocate memory" in str(error)  # torch's for the CPU
        ):
            full = errors.ServerUnavailable(
                f"the memory does not suffice for {self.model}: free some, or choose a smaller max_pixels= or model"
            )
            full.passing = False
            return full
        return errors.EngineError(f"{self.model} failed with {type(error).__name__}: {_short(error)}")

    def _unload(self) -> None:
        if self._loaded is None:
            return
        torch, self._loaded = self._loaded.torch, None
        gc.collect()  # modules refer to each other
        torch.cuda.empty_cache()  # does nothing without CUDA


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What it takes to read; none of it has types."""

    torch: Any
    tokenizer: Any
    image_processor: Any
    model: Any
    end_tokens: frozenset[int]


class _Job:
    """One page's time, which another thread may end."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise `DeadlineExceeded` if no time is left, or nobody waits any more."""
        if self._cancelled.is_set() or time.monotonic() >= self._end:
            raise errors.DeadlineExceeded(f"no answer within {self._seconds:.0f} s: allow more time, or use a GPU")


def _prompt(loaded: _Loaded, text: str, image_tokens: int) -> str:
    """Write the prompt in the model's own format, with as many placeholders as the image has tokens."""
    tokenizer = loaded.tokenizer
    image = tokenizer.convert_ids_to_tokens(loaded.model.config.image_token_id)
    if image in text:
        raise errors.RequestRejected(f"the question contains {image}, which stands for an image: leave it out")
    prompt = ""
    if tokenizer.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if image not in prompt:  # no template, or one that knows of no images
        prompt = _CHATML.format(image=image, text=text)
    return prompt.replace(image, image * image_tokens)


def _gpus() -> list[Gpu]:
    """Ask ``nvidia-smi``: torch would take hundreds of MiB on each GPU only to look at it."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [Gpu(row[0], int(row[1])) for row in rows if len(row) == 2 and row[1].isdecimal()]


def _cuda_device(torch: Any, gpu: Gpu) -> str:
    """Return torch's name for a GPU."""
    for index in range(torch.cuda.device_count()):
        if f"GPU-{torch.cuda.get_device_properties(index).uuid}" == gpu.uuid:
            return f"cuda:{index}"
    raise errors.EngineMissing(
        f"torch does not see {gpu.uuid}: install its CUDA build, or correct CUDA_VISIBLE_DEVICES"
    )


def _packages_missing(reason: object) -> errors.EngineMissing:
    return errors.EngineMissing(
        f"qwen needs torch and transformers ({reason}): pip install 'dots-ocr-client[qwen]'; without an NVIDIA GPU, "
        "install torch from PyTorch's index of CPU builds first, which are far smaller"
    )


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]

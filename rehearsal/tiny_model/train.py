"""Train the tiny dots.ocr from nothing and write it as a model folder that vLLM serves.

    python train.py OUT_DIR [--font FONT] [--seed N] [--budget SECONDS]

The network learns three things: which character a cell shows, to answer with cell i a constant number of tokens after
it (page size and prompts are fixed), and which of the two prompts it was asked, which decides how a line break is
written. The answers alone teach the first and the last only after minutes, so each has a loss of its own: the image
tokens have to name their characters, and every answer position has to name the prompt. The second starts from an
attention head that already looks back by the right distance.

Once the weights are saved they are loaded again and have to read unseen pages by greedy decoding without a single wrong
character. If they do not, training goes on, until the time budget ends and the script fails.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

# isort: split
import checkpoint
from model import CHANNELS, MERGE, PATCH, TEXT_WIDTH, TinyDotsOCR
from page import (
    ALPHABET,
    CELL,
    COLUMNS,
    DEFAULT_FONT,
    GOLDEN_LINES,
    ROWS,
    PageError,
    load_font,
    pad_lines,
    render_cell,
    render_page,
)
from prompts import (
    LAYOUT_PREFIX,
    LAYOUT_SUFFIX,
    PROMPT_LAYOUT_ALL_EN,
    PROMPT_OCR,
    layout_answer,
    ocr_answer,
)

CELLS = COLUMNS * ROWS
LAST_COLUMN = torch.arange(CELLS) % COLUMNS == COLUMNS - 1
THREADS = 2  # fixed, because the order of summation, and so the weights, depends on it
BATCH = 8  # pages, half of them in each mode
LEARNING_RATE = 2e-3
WARM_UP = 50  # steps
LOOK_BACK_STRENGTH = 4.0
FAULTLESS = 10  # batches in a row, until the rate decays
DECAY = 100  # steps
BLANK_SHARE = 0.25  # of cells are blank on top of the random ones, as on real pages
LINE_END_SHARE = 0.1  # of cells end a line on top of those in the last column
NOISE = 0.03  # standard deviation, in units of full scale
EVALUATION_PAGES = 64
IGNORED = -100  # cross_entropy's target for positions without one

PROMPTS = {"prompt_ocr": PROMPT_OCR, "prompt_layout_all_en": PROMPT_LAYOUT_ALL_EN}
ANSWERS = {PROMPT_OCR: ocr_answer, PROMPT_LAYOUT_ALL_EN: layout_answer}


class TrainingError(Exception):
    """The model does not read as it must."""


def normalised_patches(cells: Tensor) -> Tensor:
    """Do to grey cells what the image processor does to a page.

    Args:
        cells: (pages, cells, CELL, CELL), 0 (black) to 1 (white).

    Returns:
        (pages, cells, 4, 588): the 2 x 2 patches of each cell in row order, channel first, normalised.
    """
    pages, count = cells.shape[:2]
    mean = torch.tensor(checkpoint.IMAGE_MEAN).view(CHANNELS, 1)
    std = torch.tensor(checkpoint.IMAGE_STD).view(CHANNELS, 1)
    patches = cells.view(pages, count, MERGE, PATCH, MERGE, PATCH).transpose(3, 4)
    return ((patches.reshape(pages, count, MERGE**2, 1, PATCH**2) - mean) / std).flatten(3)


def page_cells(page: Image.Image) -> Tensor:
    """Cut a page image into (CELLS, CELL, CELL) grey cells, 0 to 1."""
    pixels = torch.from_numpy(np.array(page.convert("L"))).float() / 255
    return pixels.view(ROWS, CELL, COLUMNS, CELL).transpose(1, 2).reshape(CELLS, CELL, CELL)


@dataclass(frozen=True)
class Mode:
    """One prompt, in token ids.

    Attributes:
        prompt: (tokens,) the rendered prompt, with one placeholder id per image token.
        character: (2, characters) the id of each character of the alphabet: within a line, and with a line break.
        before: ids before the first character.
        after: ids after the last character, with the end token.
    """

    prompt: Tensor
    character: Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]

    def answer(self, characters: Tensor, line_ends: Tensor) -> Tensor:
        """Return the (pages, tokens) ids of the whole answer.

        Args:
            characters: (pages, CELLS) indices into the alphabet.
            line_ends: (pages, CELLS) 1 where the cell ends a line, 0 elsewhere.
        """
        pages = len(characters)
        before = torch.tensor(self.before, dtype=torch.long).expand(pages, -1)
        after = torch.tensor(self.after, dtype=torch.long).expand(pages, -1)
        return torch.cat([before, self.character[line_ends, characters], after], 1)


def build_modes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Mode]:
    """Return the mode of each prompt, after checking that the copying distance is the same in all."""
    end = tokenizer.eos_token_id
    frames: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        PROMPT_OCR: ((), (end,)),
        PROMPT_LAYOUT_ALL_EN: (
            (checkpoint.token_id(tokenizer, LAYOUT_PREFIX),),
            (checkpoint.token_id(tokenizer, LAYOUT_SUFFIX), end),
        ),
    }
    modes = {}
    for prompt, (before, after) in frames.items():
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": checkpoint.PLACEHOLDER + prompt}], tokenize=False
        )
        rendered = rendered.replace(checkpoint.IMAGE_PAD, checkpoint.IMAGE_PAD * CELLS)
        inner = [checkpoint.token_id(tokenizer, character) for character in ALPHABET]
        last = [checkpoint.token_id(tokenizer, character + checkpoint.LINE_BREAKS[prompt]) for character in ALPHABET]
        modes[prompt] = Mode(
            prompt=torch.tensor(tokenizer.encode(rendered)),
            character=torch.tensor([inner, last]),
            before=before,
            after=after,
        )
    if len({len(mode.prompt) + len(mode.before) for mode in modes.values()}) != 1:
        raise TrainingError("the modes need the same number of tokens before the first character")
    return modes


def glyph_table(font_file: Path) -> Tensor:
    """Render the alphabet, within a line and with the margin rule: (2, characters, CELL, CELL) grey cells, 0 to 1."""
    font = load_font(font_file)

    cells = [[render_cell(character, font, last_column=last) for character in ALPHABET] for last in (False, True)]
    return torch.from_numpy(np.array([[np.array(cell) for cell in row] for row in cells])).float() / 255


class Trainer:
    """Optimises one network on random pages in all modes."""

    def __init__(self, modes: dict[str, Mode], vocabulary: int, image_start: int, font_file: Path) -> None:
        self.modes = list(modes.values())
        self.glyphs = glyph_table(font_file)
        self.image_start = image_start
        self.network = TinyDotsOCR(vocabulary)
        # Found by training alone too, but after 150 to 700 steps of chance, depending on the seed.
        first = self.modes[0]
        distance = len(first.prompt) + len(first.before) - 1 - image_start
        self.network.model.layers[0].self_attn.look_back(distance, LOOK_BACK_STRENGTH)
        self.mode_head = nn.Linear(TEXT_WIDTH, len(self.modes))  # for training only
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        weights += self.mode_head.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.01)

    def random_pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pages: (BATCH, CELLS) characters and line ends as in `Mode.answer`, and the pixels that show them.

        Here lines end anywhere, more often than on a page: otherwise the vocabulary entries with a line break are too
        rare to be learned in time.
        """
        characters = torch.randint(len(ALPHABET), (BATCH, CELLS))
        characters[torch.rand(BATCH, CELLS) < BLANK_SHARE] = ALPHABET.index(" ")
        line_ends = ((torch.rand(BATCH, CELLS) < LINE_END_SHARE) | LAST_COLUMN).long()
        cells = self.glyphs[line_ends, characters]
        return characters, line_ends, normalised_patches((cells + NOISE * torch.randn_like(cells)).clamp(0, 1))

    def sequences(self, characters: Tensor, line_ends: Tensor) -> tuple[Tensor, Tensor]:
        """Build (BATCH, tokens) input ids and the target of each position."""
        rows = []
        parts = (characters.chunk(len(self.modes)), line_ends.chunk(len(self.modes)))
        for mode, *part in zip(self.modes, *parts, strict=True):
            rows += [torch.cat([mode.prompt, answer]) for answer in mode.answer(*part)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        targets = ids[:, 1:].clone()
        for row, mode in enumerate(mode for mode in self.modes for _ in range(BATCH // len(self.modes))):
            targets[row, : len(mode.prompt) - 1] = IGNORED
        return ids[:, :-1].clamp(min=0), targets

    def step(self, learning_rate: float) -> tuple[float, float]:
        """Take one step; return the loss and the share of answer tokens that were right."""
        characters, line_ends, patches = self.random_pages()
        ids, targets = self.sequences(characters, line_ends)
        image_tokens = self.network.vision_tower(patches)
        hidden, _ = self.network.model(self.network.embed(image_tokens, ids, self.image_start))
        shortest_prompt = min(len(mode.prompt) for mode in self.modes)
        hidden = hidden[:, shortest_prompt - 1 :]
        answered = self.network.lm_head(hidden).flatten(0, 1)
        asked = torch.arange(len(self.modes)).repeat_interleave(hidden.shape[1] * BATCH // len(self.modes))
        targets = targets[:, shortest_prompt - 1 :].flatten()
        seen = self.network.lm_head(self.network.model.norm(image_tokens)).flatten(0, 1)
        shown = self.modes[0].character[line_ends, characters].flatten()
        loss = (
            F.cross_entropy(answered, targets, ignore_index=IGNORED)
            + F.cross_entropy(seen, shown)
            + F.cross_entropy(self.mode_head(hidden).flatten(0, 1), asked)
        )

        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        counted = targets != IGNORED
        right = (answered.argmax(-1) == targets)[counted]
        return loss.item(), right.float().mean().item()

    def train(self, deadline: float) -> int:
        """Train at a constant rate until it reads, then let the rate decay; return the number of steps."""
        start = time.monotonic()
        step, faultless, steps_left = 0, 0, None
        while steps_left != 0:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"it did not learn to read in time (step {step}): try another --seed or a longer --budget"
                )
            decay = 1.0 if steps_left is None else steps_left / DECAY
            loss, right = self.step(LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * decay)
            step += 1
            if steps_left is not None:
                steps_left -= 1
            else:
                faultless = faultless + 1 if right == 1.0 else 0
                if faultless == FAULTLESS:
                    steps_left = DECAY
            if step % 50 == 0:
                elapsed = time.monotonic() - start
                print(f"step {step}: {elapsed:.0f} s, loss {loss:.4f}, right {right:.4%}", flush=True)
        return step


def save_weights(network: TinyDotsOCR, folder: Path) -> int:
    """Write model.safetensors; return the number of parameters."""
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    file = folder / "model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)  # save_file leaves 0600, and another user may serve the folder
    return sum(weight.numel() for weight in weights.values())


def random_lines(generator: random.Random) -> list[str]:
    """Draw eight full lines of random text."""
    return ["".join(generator.choices(ALPHABET, k=COLUMNS)) for _ in range(ROWS)]


def evaluate(
    folder: Path, modes: dict[str, Mode], image_start: int, pages: Sequence[Sequence[str]], font_file: Path
) -> bool:
    """Read the pages with the saved weights and the saved tokenizer; return whether every answer is exact."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    network = TinyDotsOCR(len(tokenizer))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    patches = normalised_patches(torch.stack([page_cells(render_page(lines, font_file)) for lines in pages]))
    faultless = True
    for name, prompt in PROMPTS.items():
        ids = network.generate(
            patches, modes[prompt].prompt, image_start, tokenizer.eos_token_id, most_tokens=CELLS + 8
        )
        exact = [tokenizer.decode(answer) == ANSWERS[prompt](lines) for answer, lines in zip(ids, pages, strict=True)]
        print(f"{name}: {sum(exact)} of {len(pages)} pages read without a fault", flush=True)
        faultless &= all(exact)
    return faultless


def main() -> None:
    """Train, save, evaluate."""
    parser = argparse.ArgumentParser(description="Train the tiny dots.ocr and write it as a model folder for vLLM.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--font", type=Path, default=DEFAULT_FONT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="most time for training")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    deadline = start + arguments.budget
    try:
        tokenizer = checkpoint.build_tokenizer()
        modes = build_modes(tokenizer)
        image_start = modes[PROMPT_OCR].prompt.tolist().index(tokenizer.convert_tokens_to_ids(checkpoint.IMAGE_PAD))
        trainer = Trainer(modes, len(tokenizer), image_start, arguments.font)
        arguments.out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_model_folder(arguments.out_dir, tokenizer)
        generator = random.Random(f"evaluation {arguments.seed}")
        steps = 0
        reads = False
        while not reads:
            steps += trainer.train(deadline)
            parameters = save_weights(trainer.network, arguments.out_dir)
            pages = [pad_lines(GOLDEN_LINES), *(random_lines(generator) for _ in range(EVALUATION_PAGES))]
            reads = evaluate(arguments.out_dir, modes, image_start, pages, arguments.font)
    except (TrainingError, PageError) as error:
        raise SystemExit(f"train.py: {error}") from None
    print(f"{parameters} parameters in {arguments.out_dir}: {steps} steps, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()

"""Everything in the model folder except the weights: tokenizer, chat template, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# isort: split
import model
from page import ALPHABET
from prompts import (
    LAYOUT_PREFIX,
    LAYOUT_SUFFIX,
    LINE_BREAK_LAYOUT,
    LINE_BREAK_OCR,
    PROMPT_LAYOUT_ALL_EN,
    PROMPT_OCR,
)

IMAGE_START, IMAGE_PAD, IMAGE_END = "<|img|>", "<|imgpad|>", "<|endofimg|>"
PLACEHOLDER = IMAGE_START + IMAGE_PAD + IMAGE_END
USER, USER_END = "<|user|>", "<|endofuser|>"
ASSISTANT, ASSISTANT_END = "<|assistant|>", "<|endofassistant|>"
END_OF_TEXT = "<|endoftext|>"
# The last four are not dots.ocr's: vLLM's processor (Qwen2.5-VL's) looks them up.
SPECIAL_TOKENS = (
    END_OF_TEXT, IMAGE_START, IMAGE_PAD, IMAGE_END, USER, USER_END, ASSISTANT, ASSISTANT_END,
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# prompt_ocr is two tokens and prompt_layout_all_en is one, because the layout answer has one token (the prefix) before
# the first character: so the distance from an image token to its character is the same number in both modes.
PROMPT_TOKENS = {
    PROMPT_OCR: ("Extract the text content", " from this image."),
    PROMPT_LAYOUT_ALL_EN: (PROMPT_LAYOUT_ALL_EN,),
}

# The last character of a line and its line break are one token, so that the distance holds on every line.
LINE_BREAKS = {PROMPT_OCR: LINE_BREAK_OCR, PROMPT_LAYOUT_ALL_EN: LINE_BREAK_LAYOUT}

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>' }}
        {%- if message.content is string %}
            {{- message.content }}
        {%- else %}
            {%- for part in message.content %}
                {%- if part.type == 'image' %}
                    {{- '<|img|><|imgpad|><|endofimg|>' }}
                {%- elif part.type == 'text' %}
                    {{- part.text }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|endofuser|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' + message.content + '<|endofassistant|>' }}
    {%- endif %}
{%- endfor %}
{%- if messages[-1].role != 'assistant' %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

CONFIGURATION_SHIM = '''\
"""Use the configuration class that vLLM itself ships."""

from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig as _Config


class DotsOCRConfig(_Config):
    model_type = "dots_ocr"
'''


def _byte_level(text: str) -> str:
    """Spell text in the byte-level alphabet of the vocabulary."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in splitter.pre_tokenize_str(text))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without merges, with whole tokens for prompts and answer parts.

    Answer parts are plain vocabulary entries: without merges the encoder never produces them, so no user's text turns
    into one. Prompts are added tokens, so the encoder does find them.
    """
    answer_parts = [LAYOUT_PREFIX, LAYOUT_SUFFIX]
    answer_parts += [character + line_break for line_break in LINE_BREAKS.values() for character in ALPHABET]
    entries = [
        *SPECIAL_TOKENS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(_byte_level(part) for part in answer_parts),
    ]
    tokenizer = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for tokens in PROMPT_TOKENS.values() for token in tokens])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=ASSISTANT_END, pad_token=END_OF_TEXT)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the id of the vocabulary entry that stands for the whole text."""
    return tokenizer.get_vocab()[_byte_level(text)]


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the content of config.json."""
    special_id = tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["DotsOCRForCausalLM"],
        "model_type": "dots_ocr",
        "auto_map": {"AutoConfig": "configuration_dots.DotsOCRConfig"},
        "hidden_size": model.TEXT_WIDTH,
        "intermediate_size": model.TEXT_FEED_FORWARD,
        "num_hidden_layers": model.TEXT_LAYERS,
        "num_attention_heads": model.TEXT_HEADS,
        "num_key_value_heads": model.TEXT_KEY_VALUE_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": model.TEXT_NORM_EPS,
        "rope_theta": model.ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.ROPE_THETA},
        "attention_bias": True,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": len(tokenizer),
        "image_token_id": special_id(IMAGE_PAD),
        "video_token_id": special_id("<|video_pad|>"),
        "bos_token_id": special_id(END_OF_TEXT),
        "eos_token_id": special_id(ASSISTANT_END),
        "vision_config": {
            "model_type": "dots_vit",
            "embed_dim": model.VISION_WIDTH,
            "hidden_size": model.TEXT_WIDTH,
            "intermediate_size": model.VISION_FEED_FORWARD,
            "num_hidden_layers": 1,
            "num_attention_heads": model.VISION_HEADS,
            "num_channels": model.CHANNELS,
            "patch_size": model.PATCH,
            "spatial_merge_size": model.MERGE,
            "temporal_patch_size": 1,
            "post_norm": True,
            "rms_norm_eps": model.VISION_NORM_EPS,
            "use_bias": False,
        },
    }


PREPROCESSOR_CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 11289600,
    "patch_size": model.PATCH,
    "temporal_patch_size": 1,
    "merge_size": model.MERGE,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}


def write_model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write all files but the weights."""

    def write_json(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    tokenizer.save_pretrained(folder)
    write_json("config.json", model_config(tokenizer))
    write_json("preprocessor_config.json", PREPROCESSOR_CONFIG)
    write_json("generation_config.json", {"eos_token_id": [tokenizer.convert_tokens_to_ids(ASSISTANT_END)]})
    (folder / "configuration_dots.py").write_text(CONFIGURATION_SHIM, encoding="utf-8")

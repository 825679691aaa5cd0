"""Makes Qwen models of a few hundred kilobytes whose architecture is real and whose answer is known beforehand.

The text model's layers add nothing, and every token has a dimension of its own. So the output layer alone decides what
follows upon a token, and always the same does. The vision model has random weights.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.modules["torchvision"] = None  # type: ignore[assignment]  # as if it were not installed

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SAYS = "Total: 97"
END = "<|im_end|>"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "<|im_start|>system\nTiny.<|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 320  # more than there are tokens
OUTPUT_LAYER = (WIDTH, 256 + len(SPECIAL))


def make(
    folder: Path,
    says: str = SAYS,
    *,
    generation: Literal[2, 3] = 2,
    for_ever: bool = False,
    template: str | None = TEMPLATE,
) -> Path:
    """Write a model folder and return it.

    Args:
        folder: Where; it is made.
        says: The answer to everything, of characters that all differ.
        generation: Of Qwen-VL.
        for_ever: Whether the answer begins anew when it has ended.
        template: For chats.
    """
    tokenizer = make_tokenizer(template)
    (newline,) = tokenizer.encode("\n")
    path = [newline, *tokenizer.encode(says)]
    assert len(set(path)) == len(path)
    path.append(path[1] if for_ever else tokenizer.convert_tokens_to_ids(END))
    torch.manual_seed(1)
    model = make_model(tokenizer, generation)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(len(tokenizer), WIDTH))
        model.lm_head.weight.zero_()
        for before, after in pairwise(path):
            model.lm_head.weight[after, before] = 0.1  # little enough for sampling to say something else
    model.generation_config = GenerationConfig(
        **{"do_sample": True, "temperature": 1.0, "top_k": 50, "repetition_penalty": 1.3},
        eos_token_id=[tokenizer.convert_tokens_to_ids(END), tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14 if generation == 2 else 16,
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16_384},  # as in the real models
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_tokenizer(template: str | None) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_only = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], bytes_only)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=SPECIAL[0], chat_template=template
    )


def make_model(tokenizer: Any, generation: Literal[2, 3]) -> Any:
    text: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 16, 16]}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, SPECIAL[3:], strict=True)}
    vision: dict[str, Any]
    if generation == 2:
        vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
        )
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH},
        **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    }
    text |= {"head_dim": WIDTH // 4, "rope_parameters": {**rope, "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))

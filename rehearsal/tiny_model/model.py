"""The network: `DotsOCRForCausalLM` in miniature, in plain PyTorch.

Modules are named and shaped as vLLM's checkpoint loader expects, so `state_dict()` is the checkpoint and the evaluation
loads exactly what vLLM loads. Two shortcuts keep training to a minute or two; neither changes what is computed from the
saved weights: the vision attention is all zeros (a cell is read on its own), and the patch convolution is written as a
matrix product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14  # px
MERGE = 2  # patches per side of an image token
CHANNELS = 3

VISION_WIDTH = 64
VISION_FEED_FORWARD = 128
VISION_HEADS = 2
VISION_NORM_EPS = 1e-5

TEXT_WIDTH = 128
TEXT_FEED_FORWARD = 256
TEXT_LAYERS = 2
TEXT_HEADS = 2
TEXT_KEY_VALUE_HEADS = 1
HEAD_WIDTH = TEXT_WIDTH // TEXT_HEADS
TEXT_NORM_EPS = 1e-6
ROPE_THETA = 10000.0

KeyValue = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Patchifier(nn.Module):
    """Embed 14 x 14 px patches."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, VISION_WIDTH, PATCH, stride=PATCH)
        self.norm = RMSNorm(VISION_WIDTH, VISION_NORM_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (..., 588) normalised pixels, channel first, to (..., VISION_WIDTH)."""
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class GatedFeedForward(nn.Module):
    """SwiGLU feed-forward network with the vision tower's names: fc1 gates fc3."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(VISION_WIDTH, VISION_FEED_FORWARD, bias=False)
        self.fc3 = nn.Linear(VISION_WIDTH, VISION_FEED_FORWARD, bias=False)
        self.fc2 = nn.Linear(VISION_FEED_FORWARD, VISION_WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class ZeroAttention(nn.Module):
    """Vision attention that contributes nothing; its weights exist for the checkpoint only."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(VISION_WIDTH, 3 * VISION_WIDTH, bias=False)
        self.proj = nn.Linear(VISION_WIDTH, VISION_WIDTH, bias=False)
        for weight in self.parameters():
            nn.init.zeros_(weight)
            weight.requires_grad_(False)


class VisionBlock(nn.Module):
    """One transformer block of the vision tower, without the attention that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = RMSNorm(VISION_WIDTH, VISION_NORM_EPS)
        self.norm1.requires_grad_(False)
        self.attn = ZeroAttention()
        self.norm2 = RMSNorm(VISION_WIDTH, VISION_NORM_EPS)
        self.mlp = GatedFeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Join the 2 x 2 patches of a cell into one image token."""

    def __init__(self) -> None:
        super().__init__()
        merged = VISION_WIDTH * MERGE**2
        self.ln_q = nn.LayerNorm(VISION_WIDTH, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, TEXT_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., 4, VISION_WIDTH) to (..., TEXT_WIDTH)."""
        return self.mlp(self.ln_q(x).flatten(-2))


class VisionTower(nn.Module):
    """Pixels of cells to image tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"patchifier": Patchifier()})
        self.blocks = nn.ModuleList([VisionBlock()])
        self.post_trunk_norm = RMSNorm(VISION_WIDTH, VISION_NORM_EPS)
        self.merger = PatchMerger()

    def forward(self, patches: Tensor) -> Tensor:
        """Map (pages, cells, 4, 588) normalised pixels to (pages, cells, TEXT_WIDTH)."""
        x = self.patch_embed["patchifier"](patches)
        for block in self.blocks:
            x = block(x)
        return self.merger(self.post_trunk_norm(x))


def rotary_frequencies() -> Tensor:
    """Return (HEAD_WIDTH / 2,) radians per position."""
    return ROPE_THETA ** (-torch.arange(0, HEAD_WIDTH, 2, dtype=torch.float32) / HEAD_WIDTH)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary position embedding (half-split form) to (pages, heads, tokens, HEAD_WIDTH)."""
    angles = positions.float()[:, None] * rotary_frequencies()
    cosine = torch.cat([angles.cos(), angles.cos()], -1).to(x.dtype)
    sine = torch.cat([angles.sin(), angles.sin()], -1).to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(TEXT_WIDTH, TEXT_HEADS * HEAD_WIDTH)
        self.k_proj = nn.Linear(TEXT_WIDTH, TEXT_KEY_VALUE_HEADS * HEAD_WIDTH)
        self.v_proj = nn.Linear(TEXT_WIDTH, TEXT_KEY_VALUE_HEADS * HEAD_WIDTH)
        self.o_proj = nn.Linear(TEXT_HEADS * HEAD_WIDTH, TEXT_WIDTH, bias=False)

    @torch.no_grad()
    def look_back(self, distance: int, strength: float) -> None:
        """Initialise the biases so that the first head attends to the token a constant distance before.

        Rotary embedding turns constant query and key vectors into a function of the distance alone. A query turned back
        by `distance` makes each frequency contribute strength**2 * cos(frequency * (actual distance - distance)).
        """
        angles = distance * rotary_frequencies()
        self.q_proj.bias[:HEAD_WIDTH] = strength * torch.cat([angles.cos(), -angles.sin()])
        self.k_proj.bias[:] = strength * torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])

    def forward(self, x: Tensor, positions: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Attend from (pages, tokens, TEXT_WIDTH) to itself, or, given a past, from one token to all before it."""
        pages, tokens, _ = x.shape
        heads = (pages, tokens, -1, HEAD_WIDTH)
        query = rotate(self.q_proj(x).view(heads).transpose(1, 2), positions)
        key = rotate(self.k_proj(x).view(heads).transpose(1, 2), positions)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        repeat = (-1, TEXT_HEADS, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key.expand(repeat), value.expand(repeat), is_causal=past is None)
        return self.o_proj(mixed.transpose(1, 2).reshape(pages, tokens, -1)), (key, value)


class FeedForward(nn.Module):
    """SwiGLU feed-forward network with the language model's names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(TEXT_WIDTH, TEXT_FEED_FORWARD, bias=False)
        self.up_proj = nn.Linear(TEXT_WIDTH, TEXT_FEED_FORWARD, bias=False)
        self.down_proj = nn.Linear(TEXT_FEED_FORWARD, TEXT_WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One Qwen2 decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(TEXT_WIDTH, TEXT_NORM_EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm(TEXT_WIDTH, TEXT_NORM_EPS)
        self.mlp = FeedForward()

    def forward(self, x: Tensor, positions: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        attended, present = self.self_attn(self.input_layernorm(x), positions, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class LanguageModel(nn.Module):
    """The decoder below the output head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(TEXT_LAYERS)])
        self.norm = RMSNorm(TEXT_WIDTH, TEXT_NORM_EPS)

    def forward(
        self, x: Tensor, first_position: int = 0, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run (pages, tokens, TEXT_WIDTH) embeddings through the layers; return hidden states and key-value cache."""
        positions = torch.arange(first_position, first_position + x.shape[1])
        present: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, key_value = layer(x, positions, past[index] if past else None)
            present.append(key_value)
        return self.norm(x), present


class TinyDotsOCR(nn.Module):
    """Vision tower, language model and output head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision_tower = VisionTower()
        self.model = LanguageModel(vocabulary)
        self.lm_head = nn.Linear(TEXT_WIDTH, vocabulary, bias=False)

    def embed(self, image_tokens: Tensor, token_ids: Tensor, image_start: int) -> Tensor:
        """Embed (pages, tokens) ids, with the image tokens (pages, cells, TEXT_WIDTH) put in at `image_start`."""
        embedded = self.model.embed_tokens(token_ids)
        image_end = image_start + image_tokens.shape[1]
        return torch.cat([embedded[:, :image_start], image_tokens, embedded[:, image_end:]], 1)

    @torch.inference_mode()
    def generate(
        self, patches: Tensor, prompt_ids: Tensor, image_start: int, end_id: int, most_tokens: int
    ) -> list[list[int]]:
        """Decode greedily, each token from the model's own answer so far.

        Args:
            patches: (pages, cells, 4, 588) normalised pixels.
            prompt_ids: (tokens,) ids of the rendered prompt, with one placeholder id per image token.
            image_start: index of the first placeholder.
            end_id: the token that ends an answer.
            most_tokens: where to cut an answer that does not end.

        Returns:
            The token ids of each page's answer, without the end token.
        """
        x = self.embed(self.vision_tower(patches), prompt_ids.expand(len(patches), -1), image_start)
        hidden, past = self.model(x)
        generated: list[Tensor] = []
        ended = torch.zeros(len(patches), dtype=torch.bool)
        while len(generated) < most_tokens and not bool(ended.all()):
            following = self.lm_head(hidden[:, -1]).argmax(-1)
            ended |= following == end_id
            position = len(prompt_ids) + len(generated)
            generated.append(following)
            hidden, past = self.model(self.model.embed_tokens(following)[:, None], position, past)
        answers = torch.stack(generated, 1).tolist()
        return [answer[: answer.index(end_id)] if end_id in answer else answer for answer in answers]

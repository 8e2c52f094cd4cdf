"""A small GPT: each token's distribution, given those before it."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fedmom.errors import InputError
from fedmom.tasks.models.options import ModelOptions, Shape


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)): a layer of GPT-2 (Radford et al., 2019), without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """h [B, T, d] -> [B, T, d]; no token sees a later one."""
        apart = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, d / heads]
        q, k, v = apart.permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(y.transpose(1, 2).flatten(2))
        return h + self.narrow(nn.functional.gelu(self.wide(self.norm2(h))))


class GPT(nn.Module):
    """Words and learned positions, layers, a norm, and logits by the words' own vectors (Press, Wolf, EACL 2017)."""

    def __init__(self, length: int, words: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        for name, parameter in self.named_parameters():  # GPT-2's: what is added to h is smaller, the more layers add
            added = name.endswith(("project.weight", "narrow.weight"))
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, V]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.words(tokens) + self.places(places))))
        return logits


def gpt(input_shape: Shape, num_classes: int, options: ModelOptions) -> nn.Module:
    """Of token ids [T]: model.hidden is its width, num_classes how many tokens there are."""
    width, heads = options.hidden, options.heads
    if len(input_shape) != 1:
        raise InputError(f"model.name = 'gpt': needs token ids [T], the examples have shape {list(input_shape)}")
    if width % heads:
        raise InputError(f"model.heads = {heads}: must divide model.hidden = {width}")
    return GPT(input_shape[0], num_classes, width, options.layers, heads)

"""nn.MultiheadAttention for K clients: between its products every example is by itself."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import _canonical_mask, _none_or_dtype, scaled_dot_product_attention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedmom.engine.stacked.folded.clients import Clients, FoldError
from fedmom.engine.stacked.folded.dense import FoldedLinear


class FoldedAttention(nn.Module):
    """nn.MultiheadAttention in training, without dropout, added biases or added zeros (Vaswani et al., NIPS 2017)."""

    def __init__(self, clients: Clients, layer: nn.MultiheadAttention, names: dict[str, str]) -> None:
        super().__init__()
        for option, on in (("dropout", layer.dropout), ("add_bias_kv", layer.bias_k is not None)):
            if on:
                raise FoldError(f"a MultiheadAttention with {option}")
        if layer.add_zero_attn:
            raise FoldError("a MultiheadAttention with add_zero_attn")
        if type(layer.out_proj) is not NonDynamicallyQuantizableLinear:
            raise FoldError("a MultiheadAttention with another out_proj")
        # What other modules of torch read.
        self.num_heads, self.embed_dim, self.head_dim = layer.num_heads, layer.embed_dim, layer.head_dim
        self.batch_first, self._qkv_same_embed_dim = layer.batch_first, layer._qkv_same_embed_dim

        def dense(weight: str, bias: str) -> FoldedLinear:
            parts = {"weight": names[weight], **({"bias": names[bias]} if bias in names else {})}
            return FoldedLinear(clients, layer, parts)

        self.out = dense("out_proj.weight", "out_proj.bias")
        if layer._qkv_same_embed_dim:
            self.inputs = dense("in_proj_weight", "in_proj_bias")
        else:
            self.each = nn.ModuleList(dense(f"{part}_proj_weight", "") for part in "qkv")
            self.bias = clients, names.get("in_proj_bias", "")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's, of K·B examples in one batch."""
        if query.dim() != 3:
            raise FoldError("a MultiheadAttention of an input without a batch axis")
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))  # [N, heads, T, width]
        mask, causal = _mask(q, k, key_padding_mask, attn_mask, is_causal, need_weights)
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-1, -2)
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
        y = self.out(y.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values [N, T, E]: of one input in one product."""
        whole = query is key and key is value and self._qkv_same_embed_dim
        inputs = [query] if whole else [query, key, value]
        inputs = inputs if self.batch_first else [x.transpose(0, 1) for x in inputs]
        if whole:
            return list(self.inputs(inputs[0]).chunk(3, -1))
        if self._qkv_same_embed_dim:
            return [self.inputs.part(x, i, 3) for i, x in enumerate(inputs)]
        found = [layer(x) for layer, x in zip(self.each, inputs, strict=True)]
        clients, name = self.bias
        biases = clients.param(name).chunk(3, 1) if name else ()
        return [y + clients.each(bias)[:, None] for y, bias in zip(found, biases, strict=True)] if biases else found

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _mask(
    q: Tensor, k: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool, need_weights: bool
) -> tuple[Tensor | None, bool]:
    """(what is added to the scores [N, heads, L, S], whether the kernel masks the future instead).

    As torch.nn.functional.multi_head_attention_forward settles it.
    """
    N, heads, L, S = *q.shape[:3], k.shape[2]
    padding = _canonical_mask(padding, "key_padding_mask", _none_or_dtype(mask), "attn_mask", q.dtype)
    if is_causal and mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    if is_causal and padding is None and not need_weights:
        return None, True
    mask = _canonical_mask(mask, "attn_mask", None, "", q.dtype, check_other=False)
    if mask is not None:
        mask = mask.view(N, heads, L, S) if mask.dim() == 3 and len(mask) != 1 else mask.expand(1, 1, L, S)
    if padding is not None:
        apart = padding.view(N, 1, 1, S)
        mask = apart if mask is None else mask + apart
    return mask, False

"""Transformers: attention in its forms, positions of each kind, and what is frozen in part."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from zoo.parts import LENGTH, SIZE, WORDS, Fn, conv, embed, head, model, pooled, seq


@model("cross-attention, examples second, weights kept, masks of −∞ and of padding", data="tokens")
def attention_cross(shape, classes):
    def forward(m, x):
        h, other = m.embed(x), m.embed(x)[:, :4]
        absent, mask = (x == 0)[:, :4].to(h.dtype) * -9.0, m.mask[:, :4].clone()
        mask[:, 0] = 0
        q, k = h.transpose(0, 1), other.transpose(0, 1)
        y, weights = m.attend(q, k, k, key_padding_mask=absent, attn_mask=mask)
        _, each = m.attend(q, k, k, average_attn_weights=False)
        return m.out(h + y.transpose(0, 1)) + weights.mean((1, 2))[:, None] + each.square().sum((1, 2, 3))[:, None]

    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    return Fn(forward, embed=embed(), attend=nn.MultiheadAttention(4, 2), out=pooled(), mask=mask)


@model("attention with keys and values of other widths, and three masks per head", data="tokens")
def attention_widths(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        mask = (x[:, :, None] < x[:, None]).repeat_interleave(2, 0)
        mask = mask & ~torch.eye(LENGTH, dtype=torch.bool)
        y = m.attend(h, h[..., :3], h[..., 1:], attn_mask=mask, need_weights=False)[0]
        return m.out(h + m.bare(y, h[..., :3], h[..., 1:])[0])

    attend, bare = (nn.MultiheadAttention(4, 2, kdim=3, vdim=3, bias=bias, batch_first=True) for bias in (True, False))
    return Fn(forward, embed=embed(), attend=attend, bare=bare, out=pooled())


@model("attention with added biases", data="tokens", stack="a MultiheadAttention with add_bias_kv")
def attention_added(shape, classes):
    attend = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
    return Fn(lambda m, x: m.out(m.attend(*[m.embed(x)] * 3)[0]), embed=embed(), attend=attend, out=pooled())


@model("TransformerEncoder, norms first, with a causal mask and one of padding", data="tokens", vmap=".item()")
def encoder_masks(shape, classes):
    def forward(m, x):
        absent = (x == 0) & (torch.arange(LENGTH) > 0)
        return m.out(m.encode(m.embed(x), mask=m.mask, src_key_padding_mask=absent))

    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True)
    encode = nn.TransformerEncoder(layer, 2, nn.LayerNorm(4), enable_nested_tensor=False)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return Fn(forward, embed=embed(), encode=encode, out=pooled(), mask=mask)


@model("TransformerEncoder, is_causal said, without biases", data="tokens")
def encoder_causal(shape, classes):
    def forward(m, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return m.out(m.encode(m.embed(x), mask=mask, is_causal=True))

    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, bias=False)
    return Fn(forward, embed=embed(), encode=nn.TransformerEncoder(layer, 1), out=pooled())


@model("TransformerEncoderLayer with examples second", data="tokens", stack="has the examples second")
def encoder_second(shape, classes):
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0)
    return seq(embed(), lambda h: h.transpose(0, 1), layer, lambda h: h.transpose(0, 1), pooled())


@model("TransformerDecoderLayer without dropout", data="tokens")
def decoder(shape, classes):
    layer = nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True)
    return Fn(
        lambda m, x: m.out(m.decode(m.embed(x), m.other(x))), embed=embed(), other=embed(), decode=layer, out=pooled()
    )


# --- positions ------------------------------------------------------------------------------------------------


def _causal(m: nn.Module, h: Tensor) -> Tensor:
    q, k, v = m.qkv(m.norm(h)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    return h + m.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def _parts(**more: object) -> dict[str, object]:
    return {"norm": nn.LayerNorm(4), "qkv": nn.Linear(4, 12, bias=False), "project": nn.Linear(4, 4), **more}


@model("GPT: positions of an Embedding, the output tied to the words", data="tokens")
def positions_tied(shape, classes):
    def forward(m, x):
        x = x.long()
        h = m.words(x) + m.places(torch.arange(x.shape[1]))
        return m.out(_causal(m, h))[:, -1, :classes]

    made = Fn(forward, words=nn.Embedding(WORDS, 4), places=nn.Embedding(9, 4), **_parts())
    made.out = nn.Linear(4, WORDS, bias=False)
    made.out.weight = made.words.weight
    return made


@model("positions [1, T] of an Embedding, with padding_idx", data="tokens")
def positions_row(shape, classes):
    def forward(m, x):
        return m.out(_causal(m, m.embed(x) + m.places(input=torch.arange(x.shape[1]).unsqueeze(0))))

    return Fn(forward, embed=embed(padding_idx=0), places=nn.Embedding(9, 4, padding_idx=2), out=pooled(), **_parts())


@model("positions expanded to the batch, and with the words in one row", data="tokens")
def positions_expanded(shape, classes):
    def forward(m, x):
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        flat_words = m.words(x.long().reshape(-1)).unflatten(0, x.shape)
        return m.out(_causal(m, flat_words + m.places(places)))

    return Fn(forward, words=nn.Embedding(WORDS, 4), places=nn.Embedding(9, 4), out=pooled(), **_parts())


@model("positions [1, T, d] and a class token held by the module", data="tokens")
def positions_held(shape, classes):
    def forward(m, x):
        h = torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1)
        return m.out(_causal(m, h + m.places[:, : h.shape[1]]))

    held = {"token": nn.Parameter(torch.randn(1, 1, 4)), "places": nn.Parameter(torch.randn(1, 9, 4))}
    return Fn(forward, embed=embed(), out=pooled(), **held, **_parts())


@model("sinusoidal positions, a buffer and computed", data="tokens")
def positions_sinusoidal(shape, classes):
    def forward(m, x):
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 100 ** (torch.arange(4, dtype=x.dtype) / 4)
        return m.out(_causal(m, m.embed(x) + m.places[: x.shape[1]] + angles.cos()))

    angles = torch.arange(9)[:, None] * torch.exp(torch.arange(0, 4) * (-math.log(100.0) / 4))
    return Fn(forward, embed=embed(), places=angles.sin(), out=pooled(), **_parts())


@model(
    "one Embedding for words and for positions",
    data="tokens",
    stack="is used both for each example and for all in common",
)
def positions_both(shape, classes):
    def forward(m, x):
        return m.out(_causal(m, m.words(x.long()) + m.words(torch.arange(x.shape[1]))))

    return Fn(forward, words=nn.Embedding(WORDS, 4), out=pooled(), **_parts())


@model("an Embedding of places by pairs [T, T]", data="tokens")
def positions_pairs(shape, classes):
    def forward(m, x):
        places = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) + LENGTH
        bias, h = m.places(places)[..., 0], m.embed(x)
        return m.out(torch.softmax(h @ h.transpose(1, 2) + bias, -1) @ h)

    return Fn(forward, embed=embed(), places=nn.Embedding(2 * LENGTH, 1), out=pooled())


# --- frozen in part -------------------------------------------------------------------------------------------


@model("only biases are trained, and statistics move (BitFit)")
def frozen_weights(shape, classes):
    body = seq(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, groups=2), nn.GroupNorm(2, 4), nn.ReLU())
    made = seq(body, nn.Flatten(), nn.Linear(2 * SIZE, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, classes))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return made


@model("only weights are trained")
def frozen_biases(shape, classes):
    body = seq(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.GroupNorm(2, 4), nn.ReLU())
    made = seq(body, head(4), nn.LayerNorm(classes), nn.Linear(classes, classes))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    return made


@model("attention frozen in part, frozen words, a frozen encoder layer", data="tokens")
def frozen_attention(shape, classes):
    def forward(m, x):
        h = m.encode(m.embed(x)) + m.token
        h = h + m.attend(h, h, h)[0]
        return m.out(h + m.cross(h, h[:, :3], h[:, :3], need_weights=False)[0])

    attend, cross = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
    for name, parameter in [*attend.named_parameters(), *cross.named_parameters()]:
        parameter.requires_grad_(name in ("out_proj.weight", "in_proj_bias"))
    encode = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).requires_grad_(False)
    token = nn.Parameter(torch.randn(1, 1, 4), requires_grad=False)
    parts = {"embed": embed().requires_grad_(False), "encode": encode, "token": token}
    return Fn(forward, **parts, attend=attend, cross=cross, out=pooled())


@model("a backbone in evaluation mode, whose BatchNorm is trained in part")
def evaluated_backbone(shape, classes):
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    backbone = Backbone(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU())
    backbone[0].requires_grad_(False)
    backbone[1].running_mean.normal_()
    return seq(backbone, head(4))

"""Some eighty small models of what people train, each with what must become of it on every path of the engine.

A model is `zoo:NAME` in a config and takes images [2, 8, 8], or 6 token ids below 11. `expected` says where it trains
as plain torch does (""), and elsewhere a word of the reason why not.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fedmom.datasets import Dataset

SHAPE, CLASSES, LENGTH, WORDS = (2, 8, 8), 3, 6, 11
SIZE = 2 * 8 * 8
PATHS = ("loop", "vmap", "stack", "factors")


class Model(NamedTuple):
    """One model and what must become of it."""

    build: Callable[[tuple[int, ...], int], nn.Module]
    group: str
    what: str  # in one line, for the table
    data: str  # a data set of this file
    refused: dict[str, str]  # {path: a part of the reason}; other paths must be right
    digits: float  # how near plain torch must be, of the step's norm


ZOO: dict[str, Model] = {}
_group = ""


def group(name: str) -> None:
    """The models that follow belong to it."""
    global _group
    _group = name


def model(what: str, *, data: str = "images", everywhere: str = "", digits: float = 1e-9, **refused: str) -> Any:
    """Put a function that builds a model into the zoo; `everywhere`: refused on every path, with this word."""

    def put(build: Callable) -> Callable:
        where = dict.fromkeys(PATHS, everywhere) if everywhere else refused
        if "stack" in where:
            where = {"factors": where["stack"], **where}
        ZOO[build.__name__] = Model(build, _group, what, data, where, digits)
        return build

    return put


# --- data -----------------------------------------------------------------------------------------------------------


def images() -> Dataset:
    """Learnable images of three classes."""
    rng = np.random.default_rng(5)
    y = torch.from_numpy(np.arange(40) % CLASSES)
    x = rng.normal(size=(CLASSES, *SHAPE))[y] + rng.normal(size=(40, *SHAPE))
    return _split(torch.from_numpy(x), y)


def tokens() -> Dataset:
    """Sentences whose class is the sum of their words."""
    x = torch.from_numpy(np.random.default_rng(6).integers(WORDS, size=(40, LENGTH)))
    return _split(x.double(), x.sum(1) % CLASSES)


def many_tests() -> Dataset:
    """Images, 501 of them for the test: one more than are judged at once."""
    data = images()
    places = torch.arange(501) % len(data.x_test)
    return data._replace(x_test=data.x_test[places], y_test=data.y_test[places])


def _split(x: Tensor, y: Tensor) -> Dataset:
    return Dataset(x[:30], y[:30], x[30:], y[30:], CLASSES, (), (), "none")


# --- parts ----------------------------------------------------------------------------------------------------------


class Fn(nn.Module):
    """A forward function with the layers, parameters and buffers that it uses."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def seq(*layers: Any) -> nn.Sequential:
    """Layers one after the other; plain functions too."""
    return nn.Sequential(*(layer if isinstance(layer, nn.Module) else Fn(_plain(layer)) for layer in layers))


def _plain(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda _, x: function(x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def head(channels: int) -> nn.Sequential:
    """From a feature map to logits."""
    return seq(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def flat(width: int) -> nn.Sequential:
    return seq(nn.Flatten(), nn.Linear(SIZE, width))


def embed(width: int = 4, **options: Any) -> nn.Sequential:
    """Token ids -> [B, 6, width]."""
    return seq(Tensor.long, nn.Embedding(WORDS, width, **options))


def pooled(width: int = 4) -> nn.Sequential:
    """[B, 6, width] -> logits."""
    return seq(lambda h: h.mean(1), nn.Linear(width, CLASSES))


def normed(norm: nn.Module, **options: Any) -> nn.Sequential:
    """A small CNN of four channels with the norm in its middle."""
    return seq(conv(2, 4, **options), norm, nn.ReLU(), head(4))


# --- models ---------------------------------------------------------------------------------------------------------
group("Layers")


@model("Linear with bias, ReLU")
def mlp(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))


@model("one Linear layer")
def logistic(shape, classes):
    return flat(classes)


@model("Bilinear", stack="Bilinear")
def bilinear(shape, classes):
    return Fn(
        lambda m, x: m.join(m.a(x[:, 0].flatten(1)), m.b(x[:, 1].flatten(1))),
        a=nn.Linear(64, 4), b=nn.Linear(64, 4), join=nn.Bilinear(4, 4, classes),
    )  # fmt: skip


@model("Conv1d, strided and dilated")
def conv1d(shape, classes):
    layers = (nn.Conv1d(2, 4, 5, stride=2), nn.ReLU(), nn.Conv1d(4, 4, 3, dilation=2))
    return seq(lambda x: x.flatten(2), *layers, lambda h: h.mean(2), nn.Linear(4, classes))


@model("Conv2d, max pooling (LeNet)")
def conv2d(shape, classes):
    layers = (conv(2, 4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 6), nn.ReLU(), nn.MaxPool2d(2))
    return seq(*layers, nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, classes))


@model("Conv3d")
def conv3d(shape, classes):
    layers = (nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, classes))
    return seq(lambda x: x.reshape(-1, 2, 4, 4, 4), *layers)


@model("ConvTranspose2d", stack="ConvTranspose2d")
def conv_transpose(shape, classes):
    return seq(conv(2, 4, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), nn.ReLU(), head(3))


@model("ConvTranspose1d with groups and output padding", stack="ConvTranspose1d")
def conv_transpose_groups(shape, classes):
    up = nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2, output_padding=1, dilation=2)
    return seq(lambda x: x.flatten(2), nn.Conv1d(2, 4, 3, stride=4), up, lambda h: h.mean(2), nn.Linear(4, classes))


@model("depthwise separable convolution, SiLU (MobileNet)")
def separable(shape, classes):
    layers = (conv(2, 4, 1), nn.SiLU(), conv(4, 4, groups=4, bias=False), conv(4, 6, 1), nn.Hardswish())
    return seq(*layers, head(6))


@model("Conv2d with padding modes reflect, circular, replicate", stack="padding")
def padding_modes(shape, classes):
    modes = ("reflect", "circular", "replicate")
    return seq(*(conv(2, 2, padding_mode=mode) for mode in modes), nn.Tanh(), head(2))


@model("Conv2d with padding = 'same', dilated", stack="padding")
def same_padding(shape, classes):
    return seq(nn.Conv2d(2, 4, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 2, padding="valid"), head(4))


@model("adaptive, average, fractional-free and Lp pooling")
def pooling(shape, classes):
    layers = (conv(2, 4), nn.AvgPool2d(2, padding=1), nn.LPPool2d(2, 2, stride=1), nn.AdaptiveMaxPool2d(2))
    return seq(*layers, nn.Flatten(), nn.Linear(16, classes))


@model("max pooling with indices, unpooling")
def unpooling(shape, classes):
    def forward(m, x):
        y, places = m.pool(m.conv(x))
        return m.head(m.unpool(y, places))

    parts = {"pool": nn.MaxPool2d(2, return_indices=True), "unpool": nn.MaxUnpool2d(2)}
    return Fn(forward, conv=conv(2, 4), head=head(4), **parts)


@model("U-Net: bilinear and nearest upsampling, skips")
def unet(shape, classes):
    def forward(m, x):
        a = F.relu(m.down(x))
        b = F.relu(m.deep(F.max_pool2d(a, 2)))
        up = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return m.head(m.near(F.relu(m.up(torch.cat([a, up], 1)))))

    parts = {"down": conv(2, 4), "deep": conv(4, 4), "up": conv(8, 4), "near": nn.Upsample(scale_factor=2)}
    return Fn(forward, head=head(4), **parts)


@model("PixelShuffle and PixelUnshuffle")
def pixel_shuffle(shape, classes):
    return seq(nn.PixelUnshuffle(2), conv(8, 8), nn.ReLU(), nn.PixelShuffle(2), head(2))


@model("grouped convolutions with a channel shuffle (ShuffleNet)")
def channel_shuffle(shape, classes):
    return seq(conv(2, 4, groups=2), nn.ReLU(), nn.ChannelShuffle(2), conv(4, 4, groups=2), nn.ReLU(), head(4))


@model("dense skips (DenseNet)")
def dense_skips(shape, classes):
    def forward(m, x):
        for layer in m.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return m.head(x)

    return Fn(forward, layers=nn.ModuleList([conv(2, 2), conv(4, 2), conv(6, 2)]), head=head(8))


@model("residual block with BatchNorm and in-place ReLU, x += shortcut")
def residual(shape, classes):
    def forward(m, x):
        h = m.stem(x)
        out = m.block(h)
        out += h
        return m.head(F.relu(out, inplace=True))

    block = seq(conv(4, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4, 4), nn.BatchNorm2d(4))
    return Fn(forward, stem=conv(2, 4), block=block, head=head(4))


@model("squeeze and excitation")
def squeeze_excite(shape, classes):
    def forward(m, x):
        h = m.conv(x)
        return m.head(h * torch.sigmoid(m.gate(h.mean((2, 3))))[..., None, None])

    return Fn(forward, conv=conv(2, 4), gate=seq(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)), head=head(4))


@model("MLP-Mixer: Linear over transposed axes, LayerNorm, GELU")
def mixer(shape, classes):
    def forward(m, x):
        h = m.patch(x).flatten(2).transpose(1, 2)  # [B, 16, 4]
        h = h + m.across(m.n1(h).transpose(1, 2)).transpose(1, 2)
        return m.out((h + m.within(m.n2(h))).mean(1))

    parts = {"patch": nn.Conv2d(2, 4, 2, stride=2), "n1": nn.LayerNorm(4), "n2": nn.LayerNorm(4)}
    mixing = {"across": seq(nn.Linear(16, 4), nn.GELU(), nn.Linear(4, 16)), "within": nn.Linear(4, 4)}
    return Fn(forward, **parts, **mixing, out=nn.Linear(4, classes))


@model("ConvNeXt: LayerNorm over channels, a layer scale", stack="gamma")
def convnext(shape, classes):
    def forward(m, x):
        h = m.stem(x)
        y = m.wide(m.norm(m.depth(h).permute(0, 2, 3, 1)))
        return m.head(h + (m.gamma * y).permute(0, 3, 1, 2))

    parts = {"stem": conv(2, 4), "depth": conv(4, 4, 5, groups=4), "norm": nn.LayerNorm(4, eps=1e-6)}
    wide = seq(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return Fn(forward, **parts, wide=wide, gamma=nn.Parameter(torch.full((4,), 0.1)), head=head(4))


@model("PReLU, LeakyReLU, Softplus, GLU, Hardtanh", stack="PReLU")
def activations(shape, classes):
    layers = (flat(16), nn.PReLU(), nn.GLU(), nn.PReLU(8), nn.LeakyReLU(), nn.Softplus(), nn.Hardtanh(), nn.CELU())
    return seq(*layers, nn.Linear(8, classes))


@model("Unfold and Linear: a convolution written out")
def unfold(shape, classes):
    return seq(nn.Unfold(3, padding=1), lambda h: h.transpose(1, 2), nn.Linear(18, 4), nn.ReLU(), pooled())


@model("maxout, Flatten of some axes, view(x.size(0), -1)")
def maxout(shape, classes):
    views = (nn.Flatten(2), lambda h: h.view(h.size(0), -1))
    return seq(*views, nn.Linear(SIZE, 16), nn.Unflatten(1, (8, 2)), lambda h: h.amax(2), nn.Linear(8, classes))


@model("cosine classifier with a learned temperature", stack="scale")
def cosine(shape, classes):
    def forward(m, x):
        return m.scale.exp() * F.linear(F.normalize(m.body(x)), F.normalize(m.centres))

    parts = {"body": flat(6), "centres": nn.Parameter(torch.randn(classes, 6)), "scale": nn.Parameter(torch.zeros(()))}
    return Fn(forward, **parts)


group("Normalisation")


@model("BatchNorm2d after a convolution with bias")
def batch_norm(shape, classes):
    return normed(nn.BatchNorm2d(4))


@model("BatchNorm1d after a Linear with bias")
def batch_norm_dense(shape, classes):
    return seq(flat(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


@model("BatchNorm with momentum = None (a cumulative mean)", stack="momentum None", vmap="batch_norm|vmap")
def batch_norm_cumulative(shape, classes):
    return normed(nn.BatchNorm2d(4, momentum=None))


@model("BatchNorm without statistics or weights")
def batch_norm_plain(shape, classes):
    return normed(nn.BatchNorm2d(4, track_running_stats=False, affine=False))


@model("SyncBatchNorm in one process", stack="SyncBatchNorm")
def batch_norm_sync(shape, classes):
    return normed(nn.SyncBatchNorm(4))


@model("a BatchNorm that stays in evaluation mode (fine-tuning)", stack="evaluation")
def batch_norm_frozen(shape, classes):
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    norm = Frozen(4)
    norm.running_mean.normal_()
    return normed(norm)


@model("a whole backbone with BatchNorm in evaluation mode, frozen", stack="not trained|evaluation")
def frozen_backbone(shape, classes):
    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    backbone = Backbone(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU()).requires_grad_(False)
    return seq(backbone, head(4))


@model("GroupNorm")
def group_norm(shape, classes):
    return normed(nn.GroupNorm(2, 4))


@model("LayerNorm over an image")
def layer_norm(shape, classes):
    return normed(nn.LayerNorm([4, 8, 8]))


@model("InstanceNorm2d")
def instance_norm(shape, classes):
    return normed(nn.InstanceNorm2d(4))


@model("InstanceNorm2d with weights and statistics", stack="InstanceNorm2d")
def instance_norm_tracking(shape, classes):
    return normed(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@model("RMSNorm", stack="RMSNorm")
def rms_norm(shape, classes):
    return seq(flat(8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, classes))


@model("LocalResponseNorm (AlexNet)")
def local_response(shape, classes):
    return normed(nn.LocalResponseNorm(3))


@model("weight norm by parametrization", stack="Parametr")
def weight_norm(shape, classes):
    return seq(parametrizations.weight_norm(conv(2, 4)), nn.ReLU(), head(4))


@model("weight norm in the old style (weight_g, weight_v)", stack="weight_")
def weight_norm_old(shape, classes):
    layer = torch.nn.utils.weight_norm(nn.Linear(SIZE, 8))
    return seq(nn.Flatten(), layer, nn.ReLU(), nn.Linear(8, classes))


@model("spectral norm by parametrization", stack="Parametr")
def spectral_norm(shape, classes):
    return seq(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(SIZE, 8)), nn.ReLU(), nn.Linear(8, classes))


@model("an orthogonal weight by parametrization", stack="Parametr")
def orthogonal(shape, classes):
    layer = parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley")
    return seq(flat(8), layer, nn.Tanh(), nn.Linear(8, classes))


@model("a parametrization of one's own (symmetric)", stack="Parametr")
def own_parametrization(shape, classes):
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", seq(lambda w: w.triu() + w.triu(1).T))
    return seq(flat(8), layer, nn.Tanh(), nn.Linear(8, classes))


@model("weight standardisation in forward", stack="weight")
def weight_standardised(shape, classes):
    def forward(m, x):
        w = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
        return m.rest(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1))

    weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    return Fn(forward, weight=weight, rest=seq(nn.GroupNorm(2, 4), nn.ReLU(), head(4)))


group("Attention")


@model("MultiheadAttention", data="tokens", stack="MultiheadAttention")
def attention(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        return m.out(h + m.attend(h, h, h, need_weights=False)[0])

    return Fn(forward, embed=embed(), attend=nn.MultiheadAttention(4, 2, batch_first=True), out=pooled())


@model("TransformerEncoder without dropout", data="tokens", stack="MultiheadAttention")
def transformer(shape, classes):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return seq(embed(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), pooled())


@model("TransformerEncoderLayer with its dropout", data="tokens", everywhere="random")
def transformer_dropout(shape, classes):
    return seq(embed(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), pooled())


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


@model("GPT: a causal mask of −inf as a buffer, positions, output tied to the embedding", data="tokens", stack="holds")
def gpt(shape, classes):
    def forward(m, x):
        h = m.words(x.long()) + m.places
        h = h + m.project(_attend(*m.qkv(m.n1(h)).chunk(3, -1), m.mask))
        return F.linear(m.n2(h)[:, -1], m.words.weight[:classes])

    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    parts = {"words": nn.Embedding(WORDS, 4), "places": nn.Parameter(torch.randn(LENGTH, 4)), "mask": mask}
    layers = {"qkv": nn.Linear(4, 12), "project": nn.Linear(4, 4), "n1": nn.LayerNorm(4), "n2": nn.LayerNorm(4)}
    return Fn(forward, **parts, **layers)


@model("scaled_dot_product_attention, is_causal, many heads", data="tokens")
def sdpa(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        q, k, v = m.qkv(h).reshape(*h.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.out(h + y.transpose(1, 2).flatten(2))

    return Fn(forward, embed=embed(), qkv=nn.Linear(4, 12), out=pooled())


@model("vision transformer: class token, positions", stack="holds")
def vit(shape, classes):
    def forward(m, x):
        h = m.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.token.expand(len(h), -1, -1), h], 1) + m.places
        h = h + _attend(*m.qkv(m.norm(h)).chunk(3, -1))
        return m.out((h + m.wide(h))[:, 0])

    tokens = {"token": nn.Parameter(torch.zeros(1, 1, 4)), "places": nn.Parameter(torch.randn(1, 5, 4) * 0.02)}
    parts = {"patch": nn.Conv2d(2, 4, 4, stride=4), "norm": nn.LayerNorm(4), "qkv": nn.Linear(4, 12)}
    wide = seq(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return Fn(forward, **tokens, **parts, wide=wide, out=nn.Linear(4, classes))


@model("Hopfield layer: learned patterns, iterated", stack="patterns")
def hopfield(shape, classes):
    def forward(m, x):
        h = m.body(x)
        for _ in range(3):
            h = torch.softmax(h @ m.patterns.T, -1) @ m.patterns
        return m.out(h)

    return Fn(forward, body=flat(4), patterns=nn.Parameter(torch.randn(6, 4)), out=nn.Linear(4, classes))


group("Recurrence")


@model("RNN over token ids", data="tokens", stack="RNN", vmap="stacked")
def rnn(shape, classes):
    return seq(embed(), nn.RNN(4, 4, batch_first=True), lambda out: out[0][:, -1], nn.Linear(4, classes))


@model("LSTM of two layers", data="tokens", stack="LSTM", vmap="stacked")
def lstm(shape, classes):
    return seq(embed(), nn.LSTM(4, 3, 2, batch_first=True), lambda out: out[1][0][-1], nn.Linear(3, classes))


@model("LSTM with dropout between its layers", data="tokens", everywhere="random")
def lstm_dropout(shape, classes):
    return seq(
        embed(), nn.LSTM(4, 3, 2, batch_first=True, dropout=0.3), lambda out: out[0][:, -1], nn.Linear(3, classes)
    )


@model("bidirectional GRU over image rows", stack="GRU", vmap="stacked")
def gru(shape, classes):
    recurrent = nn.GRU(16, 3, batch_first=True, bidirectional=True)
    return seq(lambda x: x.transpose(1, 2).flatten(2), recurrent, lambda out: out[0].mean(1), nn.Linear(6, classes))


@model("LSTMCell and GRUCell in a loop of one's own", data="tokens", stack="Cell", vmap="stacked|differ")
def cells(shape, classes):
    def forward(m, x):
        words = m.embed(x)
        h, c, g = (torch.zeros(len(x), 3, dtype=words.dtype) for _ in range(3))
        for t in range(words.shape[1]):
            h, c = m.lstm(words[:, t], (h, c))
            g = m.gru(h, g)
        return m.out(torch.cat([h, g], 1))

    return Fn(forward, embed=embed(), lstm=nn.LSTMCell(4, 3), gru=nn.GRUCell(3, 3), out=nn.Linear(6, classes))


@model("a recurrence of one's own out of Linear layers", data="tokens")
def own_recurrence(shape, classes):
    def forward(m, x):
        words = m.embed(x)
        h = words.new_zeros(len(x), 4)
        for t in range(words.shape[1]):
            h = torch.tanh(m.input(words[:, t]) + m.hidden(h))
        return m.out(h)

    return Fn(
        forward, embed=embed(), input=nn.Linear(4, 4), hidden=nn.Linear(4, 4, bias=False), out=nn.Linear(4, classes)
    )


group("Embeddings")


@model("Embedding, mean of words", data="tokens")
def embedding(shape, classes):
    return seq(embed(), pooled())


@model("Embedding with padding_idx", data="tokens", stack="padding_idx")
def embedding_padding(shape, classes):
    return seq(embed(padding_idx=0), pooled())


@model("Embedding with max_norm, which writes into its weights", data="tokens", everywhere="max_norm")
def embedding_max_norm(shape, classes):
    return seq(embed(max_norm=1.0), pooled())


@model("Embedding with sparse gradients", data="tokens", stack="sparse", vmap="stacked")
def embedding_sparse(shape, classes):
    return seq(embed(sparse=True), pooled())


@model("EmbeddingBag", data="tokens", stack="EmbeddingBag", vmap="stacked")
def embedding_bag(shape, classes):
    return seq(Tensor.long, nn.EmbeddingBag(WORDS, 4, mode="mean"), nn.Linear(4, classes))


@model("output tied to the embedding", data="tokens", stack="")
def embedding_tied(shape, classes):
    def forward(m, x):
        return m.out(m.words(x.long()).mean(1))[:, :classes]

    made = Fn(forward, words=nn.Embedding(WORDS, 4), out=nn.Linear(4, WORDS, bias=False))
    made.out.weight = made.words.weight
    return made


group("Weights")


@model("a weight used again, transposed (tied autoencoder)", stack="")
def tied_transpose(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.down(x))
        return m.out(torch.tanh(m.down[1](torch.sigmoid(F.linear(h, m.down[1].weight.T)))))

    return Fn(forward, down=flat(6), out=nn.Linear(6, classes))


@model("some layers frozen (fine-tuning)", stack="not trained")
def frozen(shape, classes):
    body = flat(8).requires_grad_(False)
    return seq(body, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))


@model("low-rank adapters beside frozen weights (LoRA)", stack="not trained")
def lora(shape, classes):
    def forward(m, x):
        h = torch.relu(m.body(x))
        return m.base(h) + m.up(m.down(h))

    adapters = {"down": nn.Linear(8, 2, bias=False), "up": nn.Linear(2, classes, bias=False)}
    frozen = {"body": flat(8).requires_grad_(False), "base": nn.Linear(8, classes).requires_grad_(False)}
    return Fn(forward, **frozen, **adapters)


@model("a module under two names")
def two_names(shape, classes):
    shared = nn.Linear(8, 8)
    return nn.Sequential(flat(8), shared, nn.ReLU(), shared, nn.Linear(8, classes))


@model("a module called twice, with two normalisations (ALBERT)")
def called_twice(shape, classes):
    def forward(m, x):
        h = m.body(x)
        for norm in m.norms:
            h = torch.tanh(norm(m.layer(h)))
        return m.out(h)

    norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
    return Fn(forward, body=flat(8), layer=nn.Linear(8, 8), norms=norms, out=nn.Linear(8, classes))


@model("BatchNorm called twice in a pass")
def norm_twice(shape, classes):
    return Fn(
        lambda m, x: m.out(m.norm(m.norm(m.body(x)).relu())), body=flat(8), norm=nn.BatchNorm1d(8), out=nn.Linear(8, 3)
    )


@model("layers that no example reaches")
def unused(shape, classes):
    return Fn(
        lambda m, x: m.out(torch.relu(m.body(x))), body=flat(8), auxiliary=nn.Linear(8, 5), out=nn.Linear(8, classes)
    )


@model("parameters outside of layers: scale, ParameterList, ParameterDict", stack="holds")
def bare_parameters(shape, classes):
    def forward(m, x):
        h = m.body(x) * m.scale
        for shift in m.shifts:
            h = torch.tanh(h + shift)
        return h @ m.maps["out"]

    shifts = nn.ParameterList([torch.zeros(8), torch.ones(8)])
    maps = nn.ParameterDict({"out": torch.randn(8, classes)})
    return Fn(forward, body=flat(8), scale=nn.Parameter(torch.ones(())), shifts=shifts, maps=maps)


@model("pruned weights (torch.nn.utils.prune)", stack="holds|prun|weight_")
def pruned(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    prune.l1_unstructured(made[0][1], "weight", amount=0.5)
    prune.random_structured(made[2], "weight", amount=1, dim=1)
    return made


@model("complex parameters (Fourier filter, cfloat)", everywhere="complex")
def complex_filter(shape, classes):
    def forward(m, x):
        return m.head(torch.fft.irfft2(torch.fft.rfft2(x) * m.filter, s=x.shape[-2:]))

    return Fn(forward, filter=nn.Parameter(torch.randn(2, 8, 5, dtype=torch.cfloat)), head=head(2))


@model("a Fourier filter of two real numbers (view_as_complex)", stack="filter")
def fourier_filter(shape, classes):
    def forward(m, x):
        return m.head(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.filter), s=x.shape[-2:]))

    return Fn(forward, filter=nn.Parameter(torch.randn(2, 8, 5, 2)), head=head(2))


@model("FNet: Fourier transforms instead of attention", data="tokens")
def fnet(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        return m.out(m.wide(m.norm(h + torch.fft.fft2(h).real)))

    return Fn(forward, embed=embed(), norm=nn.LayerNorm(4), wide=nn.Linear(4, 4), out=pooled())


@model("random Fourier features as a buffer", stack="holds")
def fourier_features(shape, classes):
    def forward(m, x):
        h = x.flatten(1) @ m.directions
        return m.out(torch.cat([h.sin(), h.cos()], 1))

    return Fn(forward, directions=torch.randn(SIZE, 8) * 0.1, out=nn.Linear(16, classes))


@model("a hypernetwork makes a layer's weights of an embedding", stack="code")
def hypernetwork(shape, classes):
    def forward(m, x):
        return F.linear(torch.tanh(m.body(x)), m.weights(m.code).reshape(classes, 8))

    return Fn(forward, body=flat(8), code=nn.Parameter(torch.randn(4)), weights=nn.Linear(4, 8 * classes))


@model("mixture of experts: the best two of four")
def experts(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.body(x))
        best, which = m.gate(h).topk(2, dim=1)
        outs = torch.stack([expert(h) for expert in m.experts], 1)
        chosen = outs.gather(1, which[..., None].expand(-1, -1, outs.shape[2]))
        return (torch.softmax(best, 1)[..., None] * chosen).sum(1)

    four = nn.ModuleList(nn.Linear(8, classes) for _ in range(4))
    return Fn(forward, body=flat(8), gate=nn.Linear(8, 4), experts=four)


@model("mixture of experts that sends rows by a mask", vmap="stacked", stack="")
def experts_by_mask(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.body(x))
        weights, which = torch.softmax(m.gate(h), 1).max(1)
        out = h.new_zeros(len(h), classes)
        for k, expert in enumerate(m.experts):
            rows = (which == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(h[rows]) * weights[rows, None])
        return out

    return Fn(
        forward, body=flat(8), gate=nn.Linear(8, 2), experts=nn.ModuleList(nn.Linear(8, classes) for _ in range(2))
    )


group("Autograd")


@model("checkpoint(use_reentrant=False) around convolutions", vmap="checkpoint|stacked")
def checkpoint_conv(shape, classes):
    block = seq(conv(4, 4), nn.ReLU(), conv(4, 4))
    return Fn(
        lambda m, x: m.head(checkpoint(m.block, m.stem(x), use_reentrant=False)),
        stem=conv(2, 4),
        block=block,
        head=head(4),
    )


@model("checkpoint(use_reentrant=False) around a Linear layer", vmap="checkpoint|stacked")
def checkpoint_dense(shape, classes):
    block = seq(nn.Linear(8, 8), nn.Tanh())
    return Fn(
        lambda m, x: m.out(checkpoint(m.block, m.body(x), use_reentrant=False)),
        body=flat(8),
        block=block,
        out=nn.Linear(8, 3),
    )


@model("checkpoint(use_reentrant=True)", everywhere="reentrant")
def checkpoint_reentrant(shape, classes):
    block = seq(nn.Linear(8, 8), nn.Tanh())
    return Fn(
        lambda m, x: m.out(checkpoint(m.block, m.body(x), use_reentrant=True)),
        body=flat(8),
        block=block,
        out=nn.Linear(8, 3),
    )


@model("a branch behind detach()")
def detached(shape, classes):
    def forward(m, x):
        h = m.body(x)
        return m.out(h + torch.tanh(m.side(h)).detach())

    return Fn(forward, body=flat(8), side=nn.Linear(8, 8), out=nn.Linear(8, classes))


@model("a teacher under no_grad")
def teacher(shape, classes):
    def forward(m, x):
        with torch.no_grad():
            target = torch.tanh(m.teacher(x))
        h = torch.tanh(m.student(x))
        return m.out(h * target)

    return Fn(forward, student=flat(8), teacher=flat(8), out=nn.Linear(8, classes))


@model("straight-through rounding (a quantised layer)")
def straight_through(shape, classes):
    def forward(m, x):
        h = torch.sigmoid(m.body(x))
        return m.out(h + ((h > 0.5).to(h.dtype) - h).detach())

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("vector quantisation: the nearest code, straight through", stack="codes")
def vector_quantised(shape, classes):
    def forward(m, x):
        h = m.body(x)
        near = m.codes[torch.cdist(h, m.codes).argmin(1)]
        return m.out(h + (near - h).detach() + 0.1 * (near - near.detach()))

    return Fn(forward, body=flat(4), codes=nn.Parameter(torch.randn(6, 4)), out=nn.Linear(4, classes))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -0.5 * grads[0]


@model("gradient reversal by an autograd.Function", vmap="vmap")
def gradient_reversal(shape, classes):
    return seq(flat(8), nn.Tanh(), _Reversed.apply, nn.Linear(8, classes))


class _Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


@model("an autograd.Function with a rule for vmap")
def function_with_rule(shape, classes):
    return seq(flat(8), nn.Tanh(), _Cube.apply, nn.Linear(8, classes))


@model("an autograd.Function that goes through NumPy", vmap="vmap|numpy", stack="")
def function_in_numpy(shape, classes):
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(np.sin(x.detach().numpy()))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.saved_tensors[0].cos()

    return seq(flat(8), Sine.apply, nn.Linear(8, classes))


@model("deep equilibrium: iterations under no_grad, one step with gradients")
def equilibrium(shape, classes):
    def forward(m, x):
        u = m.body(x)
        with torch.no_grad():
            h = torch.zeros_like(u)
            for _ in range(8):
                h = torch.tanh(m.step(h) + u)
        return m.out(torch.tanh(m.step(h) + u))

    return Fn(forward, body=flat(6), step=nn.Linear(6, 6), out=nn.Linear(6, classes))


@model("a gradient within forward (energy model)", vmap="", stack="")
def inner_gradient(shape, classes):
    def forward(m, x):
        h = m.body(x)
        with torch.enable_grad():
            h = h if h.requires_grad else h.requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(m.energy(h)).sum(), h, create_graph=True)
        return m.out(h - 0.1 * force)

    return Fn(forward, body=flat(6), energy=nn.Linear(6, 1), out=nn.Linear(6, classes))


@model("a hook on a parameter's gradient (clamp)", everywhere="hook")
def parameter_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    for p in made.parameters():
        p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return made


@model("register_post_accumulate_grad_hook on a parameter", everywhere="hook")
def accumulate_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))

    def shrink(p: Tensor) -> None:
        p.grad.mul_(0.1)

    made[2].weight.register_post_accumulate_grad_hook(shrink)
    return made


@model("a hook on an activation's gradient")
def activation_hook(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return m.out(torch.tanh(h))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("forward hooks on modules that change what comes out")
def forward_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made[0][1].register_forward_hook(lambda m, args, out: 2 * out)
    made[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return made


@model("full backward hooks on modules", vmap="")
def backward_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made[1].register_full_backward_hook(lambda m, before, after: (before[0] * 0.5,))
    made[2].register_full_backward_hook(lambda m, before, after: (before[0] * 0.5,))
    return made


@model("torch.jit.script", stack="Script|script", vmap="")
def scripted(shape, classes):
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, classes)))


@model("torch.jit.trace of a part", stack="Script|script|Trac|trac", vmap="")
def traced(shape, classes):
    part = torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.zeros(2, 8))
    return seq(flat(8), part, nn.Linear(8, classes))


@model("torch.compile around a part", stack="compile|Optimized", vmap="")
def compiled(shape, classes):
    part = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="eager")
    return seq(flat(8), part, nn.Linear(8, classes))


group("Random numbers and state")


@model("Dropout and Dropout2d")
def dropout(shape, classes):
    return seq(conv(2, 4), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, classes))


@model("AlphaDropout", everywhere="random")
def alpha_dropout(shape, classes):
    return seq(flat(8), nn.SELU(), nn.AlphaDropout(0.3), nn.Linear(8, classes))


@model("FeatureAlphaDropout", everywhere="random")
def feature_alpha_dropout(shape, classes):
    return seq(conv(2, 4), nn.SELU(), nn.FeatureAlphaDropout(0.3), head(4))


@model("dropout by a function, F.dropout", everywhere="random")
def functional_dropout(shape, classes):
    return Fn(
        lambda m, x: m.out(F.dropout(torch.relu(m.body(x)), 0.3, m.training)), body=flat(8), out=nn.Linear(8, classes)
    )


@model("Gumbel softmax", everywhere="random")
def gumbel(shape, classes):
    return seq(flat(8), lambda h: F.gumbel_softmax(h, hard=True), nn.Linear(8, classes))


def _stochastic_depth(draw: Callable[[], float]) -> nn.Module:
    def forward(m, x):
        h = m.body(x)
        if not m.training or draw() < 0.5:
            h = h + torch.relu(m.block(h))
        return m.out(h)

    return Fn(forward, body=flat(8), block=nn.Linear(8, 8), out=nn.Linear(8, CLASSES))


@model("stochastic depth by torch's numbers", everywhere="random")
def depth_torch(shape, classes):
    return _stochastic_depth(lambda: torch.rand(()).item())


@model("stochastic depth by NumPy's numbers", everywhere="random")
def depth_numpy(shape, classes):
    return _stochastic_depth(np.random.rand)


@model("stochastic depth by Python's random", everywhere="random")
def depth_random(shape, classes):
    return _stochastic_depth(random.random)


@model("a generator of the model's own", everywhere="random|_generator|generator")
def own_generator(shape, classes):
    def forward(m, x):
        noise = torch.randn(x.shape, generator=m.source, dtype=x.dtype)
        return m.out(x + 0.1 * noise if m.training else x)

    return Fn(forward, source=torch.Generator(), out=flat(classes))


@model("a Python counter on the module (an annealed temperature)", everywhere="steps")
def counter(shape, classes):
    def forward(m, x):
        if m.training:
            m.steps += 1
        return m.out(x) / (1 + m.steps)

    return Fn(forward, out=flat(classes), steps=0)


@model("a counter as a buffer", stack="holds", vmap="")
def counter_buffer(shape, classes):
    def forward(m, x):
        if m.training:
            m.steps += 1
        return m.out(x) / (1 + 0.1 * m.steps)

    return Fn(forward, out=flat(classes), steps=torch.zeros((), dtype=torch.int64))


@model("a running mean of one's own, written in place into a buffer", stack="holds")
def own_average(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if m.training:
            with torch.no_grad():
                m.centre.mul_(0.9).add_(0.1 * h.mean(0))
        return m.out(h - m.centre)

    return Fn(forward, body=flat(8), centre=torch.zeros(8), out=nn.Linear(8, classes))


@model("a running mean of one's own, assigned to a buffer", stack="holds")
def assigned_average(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if m.training:
            m.centre = 0.9 * m.centre + 0.1 * h.mean(0).detach()
        return m.out(h - m.centre)

    return Fn(forward, body=flat(8), centre=torch.zeros(8), out=nn.Linear(8, classes))


@model("activations kept on the module for a later look", everywhere="")
def kept_activations(shape, classes):
    def forward(m, x):
        m.seen = m.body(x)
        return m.out(torch.relu(m.seen))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("a target network that follows by moving averages", stack="holds|not trained")
def momentum_encoder(shape, classes):
    def forward(m, x):
        if m.training:
            with torch.no_grad():
                m.shadow.lerp_(m.body[1].weight, 0.1)
        return m.out(torch.tanh(m.body(x)) + F.linear(x.flatten(1), m.shadow))

    return Fn(forward, body=flat(8), shadow=torch.zeros(8, SIZE), out=nn.Linear(8, classes))


group("What a batch is")


@model("1 % of the batch in the logits", stack="differ")
def batch_mean(shape, classes):
    return Fn(lambda m, x: (lambda y: y - 0.01 * y.mean(0))(m.out(x)), out=flat(classes))


@model("features divided by the largest of the batch", stack="differ")
def batch_max(shape, classes):
    return Fn(lambda m, x: (lambda h: m.out(h / h.abs().max()))(m.body(x)), body=flat(8), out=nn.Linear(8, classes))


@model("logits less the batch's maximum, which changes no loss")
def shifted(shape, classes):
    return Fn(lambda m, x: (lambda y: y - y.max())(m.out(x)), out=flat(classes))


@model("mixup with the batch rolled by one", stack="differ")
def rolled(shape, classes):
    return Fn(lambda m, x: m.out(0.9 * x + 0.1 * x.roll(1, 0) if m.training else x), out=flat(classes))


@model("minibatch discrimination: distances within the batch", stack="differ")
def discrimination(shape, classes):
    def forward(m, x):
        h = m.body(x)
        return m.out(torch.cat([h, torch.exp(-(h[:, None] - h[None]).abs().sum(2)).sum(1, keepdim=True)], 1))

    return Fn(forward, body=flat(4), out=nn.Linear(5, classes))


@model("a branch on a value of the batch", vmap="stacked", stack="values")
def branch(shape, classes):
    return Fn(lambda m, x: m.a(x) if x.mean() > 0 else m.b(x), a=flat(classes), b=flat(classes))


@model(".item() within forward", vmap="stacked", stack="values")
def item(shape, classes):
    return Fn(lambda m, x: m.out(x / (1 + x.std().item())), out=flat(classes))


@model("a branch on a parameter's value", vmap="stacked", stack="values|holds")
def branch_on_parameter(shape, classes):
    return Fn(lambda m, x: m.out(x) * (2 if m.gate > 0 else 1), out=flat(classes), gate=nn.Parameter(torch.ones(())))


group("What comes out")


@model("logits in training, (logits, features) in evaluation", everywhere="evaluation")
def two_outputs(shape, classes):
    def forward(m, x):
        h = torch.relu(m.body(x))
        return m.out(h) if m.training else (m.out(h), h)

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("an auxiliary head in training alone, (logits, auxiliary)", everywhere="logits")
def auxiliary_head(shape, classes):
    def forward(m, x):
        h = torch.relu(m.body(x))
        return (m.out(h), m.other(h)) if m.training else m.out(h)

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes), other=nn.Linear(8, classes))


@model(".squeeze() in forward, and 501 examples for the test", data="many_tests")
def squeezed(shape, classes):
    def forward(m, x):
        return m.out(m.body(x)[..., None, None].squeeze())

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("LazyLinear and LazyConv2d", everywhere="lazy")
def lazy(shape, classes):
    return seq(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes))


@model("logits in float32, whatever the run's dtype", digits=1e-5)
def float32_logits(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, classes), Tensor.float)


@model("logits in bfloat16 under autocast", digits=0.05)
def autocast(shape, classes):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.layers(x)

    return Fn(forward, layers=seq(flat(8), nn.ReLU(), nn.Linear(8, classes)))


@model("logits in float64, whatever the run's dtype")
def float64_logits(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, classes), Tensor.double)


@model("logits of another shape, [B, 3, 1]", everywhere="logits")
def extra_axis(shape, classes):
    return seq(flat(classes), lambda y: y[..., None])


@model("log-probabilities instead of logits")
def log_probabilities(shape, classes):
    return seq(flat(classes), nn.LogSoftmax(1))


def build(name: str) -> nn.Module:
    """A model of the zoo, float32, as its function makes it."""
    made = ZOO[name]
    return made.build(SHAPE if made.data != "tokens" else (LENGTH,), CLASSES)

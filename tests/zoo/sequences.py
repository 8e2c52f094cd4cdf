"""Attention, recurrence and embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from zoo.parts import LENGTH, WORDS, Fn, embed, flat, model, pooled, seq


@model("MultiheadAttention", data="tokens")
def attention(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        return m.out(h + m.attend(h, h, h, need_weights=False)[0])

    return Fn(forward, embed=embed(), attend=nn.MultiheadAttention(4, 2, batch_first=True), out=pooled())


@model("TransformerEncoder without dropout", data="tokens")
def transformer(shape, classes):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return seq(embed(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), pooled())


@model("TransformerEncoderLayer with its dropout", data="tokens", everywhere="draws random numbers")
def transformer_dropout(shape, classes):
    return seq(embed(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), pooled())


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


@model(
    "GPT: a causal mask of −inf as a buffer, positions, output tied to the embedding",
    data="tokens",
    stack="Fn holds places itself",
)
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


@model("vision transformer: class token, positions")
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


@model("Hopfield layer: learned patterns, iterated", stack="Fn holds patterns itself")
def hopfield(shape, classes):
    def forward(m, x):
        h = m.body(x)
        for _ in range(3):
            h = torch.softmax(h @ m.patterns.T, -1) @ m.patterns
        return m.out(h)

    return Fn(forward, body=flat(4), patterns=nn.Parameter(torch.randn(6, 4)), out=nn.Linear(4, classes))


@model("RNN over token ids", data="tokens", stack="RNN holds weight_ih_l0 itself")
def rnn(shape, classes):
    return seq(embed(), nn.RNN(4, 4, batch_first=True), lambda out: out[0][:, -1], nn.Linear(4, classes))


@model("LSTM of two layers", data="tokens", stack="LSTM holds weight_ih_l0 itself")
def lstm(shape, classes):
    return seq(embed(), nn.LSTM(4, 3, 2, batch_first=True), lambda out: out[1][0][-1], nn.Linear(3, classes))


@model("LSTM with dropout between its layers", data="tokens", everywhere="draws random numbers")
def lstm_dropout(shape, classes):
    return seq(
        embed(), nn.LSTM(4, 3, 2, batch_first=True, dropout=0.3), lambda out: out[0][:, -1], nn.Linear(3, classes)
    )


@model("bidirectional GRU over image rows", stack="GRU holds weight_ih_l0 itself")
def gru(shape, classes):
    recurrent = nn.GRU(16, 3, batch_first=True, bidirectional=True)
    return seq(lambda x: x.transpose(1, 2).flatten(2), recurrent, lambda out: out[0].mean(1), nn.Linear(6, classes))


@model("LSTMCell and GRUCell in a loop of one's own", data="tokens", stack="LSTMCell holds weight_ih itself")
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


@model("Embedding, mean of words", data="tokens")
def embedding(shape, classes):
    return seq(embed(), pooled())


@model("Embedding with padding_idx", data="tokens")
def embedding_padding(shape, classes):
    return seq(embed(padding_idx=0), pooled())


@model("Embedding with max_norm, which writes into its weights", data="tokens", everywhere="writes into the parameter")
def embedding_max_norm(shape, classes):
    return seq(embed(max_norm=1.0), pooled())


@model(
    "Embedding with sparse gradients",
    data="tokens",
    vmap="cannot be stacked",
    stack="an Embedding with max_norm, sparse or scale_grad_by_freq",
)
def embedding_sparse(shape, classes):
    return seq(embed(sparse=True), pooled())


@model("EmbeddingBag", data="tokens", stack="EmbeddingBag holds weight itself")
def embedding_bag(shape, classes):
    return seq(Tensor.long, nn.EmbeddingBag(WORDS, 4, mode="mean"), nn.Linear(4, classes))


@model("output tied to the embedding", data="tokens")
def embedding_tied(shape, classes):
    def forward(m, x):
        return m.out(m.words(x.long()).mean(1))[:, :classes]

    made = Fn(forward, words=nn.Embedding(WORDS, 4), out=nn.Linear(4, WORDS, bias=False))
    made.out.weight = made.words.weight
    return made


@model(
    "rotary positions, made at the first pass and kept",
    data="tokens",
    stack="device cpu is not on the expected device meta",
)
def rotary(shape, classes):
    def forward(m, x):
        q, k, v = m.qkv(m.embed(x)).chunk(3, -1)
        if m.angles is None or len(m.angles) != x.shape[1]:
            m.angles = torch.arange(x.shape[1], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=q.dtype)
        cos, sin = m.angles.cos(), m.angles.sin()

        def turn(h):
            a, b = h.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        return m.out(_attend(turn(q), turn(k), v))

    return Fn(forward, embed=embed(), qkv=nn.Linear(4, 12), out=pooled(), angles=None)


@model("attention that masks padding", data="tokens")
def padding_mask(shape, classes):
    def forward(m, x):
        h, absent = m.embed(x), x == 0
        h = m.attend(h, h, h, key_padding_mask=absent, need_weights=False)[0]
        return m.out(h.masked_fill(absent[..., None], 0.0))

    attend = nn.MultiheadAttention(4, 2, batch_first=True)
    return Fn(forward, embed=embed(padding_idx=0), attend=attend, out=pooled())


@model("windowed attention with shifts and a table of relative places (Swin)", stack="Fn holds table itself")
def swin(shape, classes):
    def forward(m, x):
        h = torch.roll(m.patch(x), (1, 1), (2, 3)).flatten(2).transpose(1, 2)
        q, k, v = m.qkv(m.norm(h)).chunk(3, -1)
        return m.out(h + torch.softmax(q @ k.transpose(1, 2) + m.table[m.places], -1) @ v)

    places = torch.arange(4)[:, None] - torch.arange(4) + 3
    parts = {"patch": nn.Conv2d(2, 4, 4, stride=4), "norm": nn.LayerNorm(4), "qkv": nn.Linear(4, 12), "out": pooled()}
    return Fn(forward, table=nn.Parameter(torch.randn(7)), places=places, **parts)


@model(
    "GRU over packed sequences of unequal lengths",
    data="tokens",
    vmap="cannot be stacked",
    stack="GRU holds weight_ih_l0 itself",
)
def packed(shape, classes):
    def forward(m, x):
        lengths = (x != 0).sum(1).clamp(min=1).cpu()
        pack = nn.utils.rnn.pack_padded_sequence
        _, last = m.recurrent(pack(m.embed(x), lengths, batch_first=True, enforce_sorted=False))
        return m.out(last[-1])

    return Fn(forward, embed=embed(), recurrent=nn.GRU(4, 3, batch_first=True), out=nn.Linear(3, classes))


@model("an embedding that is not trained (word vectors)", data="tokens")
def embedding_frozen(shape, classes):
    return seq(Tensor.long, nn.Embedding.from_pretrained(torch.randn(WORDS, 4)), pooled())

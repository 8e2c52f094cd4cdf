"""Tied, frozen, shared, unused, bare, pruned, complex and made weights; experts."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import prune

from zoo.parts import SIZE, Fn, embed, flat, head, model, pooled, seq


@model("a weight used again, transposed (tied autoencoder)", stack="no attribute 'weight'")
def tied_transpose(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.down(x))
        return m.out(torch.tanh(m.down[1](torch.sigmoid(F.linear(h, m.down[1].weight.T)))))

    return Fn(forward, down=flat(6), out=nn.Linear(6, classes))


@model("some layers frozen (fine-tuning)")
def frozen(shape, classes):
    body = flat(8).requires_grad_(False)
    return seq(body, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))


@model("low-rank adapters beside frozen weights (LoRA)")
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


@model("parameters outside of layers: scale, ParameterList, ParameterDict", stack="Fn holds scale itself")
def bare_parameters(shape, classes):
    def forward(m, x):
        h = m.body(x) * m.scale
        for shift in m.shifts:
            h = torch.tanh(h + shift)
        return h @ m.maps["out"]

    shifts = nn.ParameterList([torch.zeros(8), torch.ones(8)])
    maps = nn.ParameterDict({"out": torch.randn(8, classes)})
    return Fn(forward, body=flat(8), scale=nn.Parameter(torch.ones(())), shifts=shifts, maps=maps)


@model("pruned weights (torch.nn.utils.prune)", stack="has forward pre hooks of its own")
def pruned(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    prune.l1_unstructured(made[0][1], "weight", amount=0.5)
    prune.random_structured(made[2], "weight", amount=1, dim=1)
    return made


@model("complex parameters (Fourier filter, cfloat)", stack="Fn holds filter itself")
def complex_filter(shape, classes):
    def forward(m, x):
        return m.head(F.relu(torch.fft.irfft2(torch.fft.rfft2(x) * m.filter, s=x.shape[-2:])))

    return Fn(forward, filter=nn.Parameter(torch.randn(2, 8, 5, dtype=torch.cfloat)), head=head(2))


@model("a Fourier filter of two real numbers (view_as_complex)", stack="Fn holds filter itself")
def fourier_filter(shape, classes):
    def forward(m, x):
        return m.head(F.relu(torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.filter), s=x.shape[-2:])))

    return Fn(forward, filter=nn.Parameter(torch.randn(2, 8, 5, 2)), head=head(2))


@model("FNet: Fourier transforms instead of attention", data="tokens")
def fnet(shape, classes):
    def forward(m, x):
        h = m.embed(x)
        return m.out(m.wide(m.norm(h + torch.fft.fft2(h).real)))

    return Fn(forward, embed=embed(), norm=nn.LayerNorm(4), wide=nn.Linear(4, 4), out=pooled())


@model("random Fourier features as a buffer")
def fourier_features(shape, classes):
    def forward(m, x):
        h = x.flatten(1) @ m.directions
        return m.out(torch.cat([h.sin(), h.cos()], 1))

    return Fn(forward, directions=torch.randn(SIZE, 8) * 0.1, out=nn.Linear(16, classes))


@model("a hypernetwork makes a layer's weights of an embedding", stack="Fn holds code itself")
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


@model("mixture of experts that sends rows by a mask", vmap="aten::nonzero", stack="asks for values")
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


@model("weights clamped in place in every pass", everywhere="writes into the parameter")
def clamped_weight(shape, classes):
    def forward(m, x):
        with torch.no_grad():
            m.body[1].weight.clamp_(-0.05, 0.05)
        return m.out(torch.relu(m.body(x)))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("weights written through .data in every pass", everywhere="writes into the parameter")
def written_data(shape, classes):
    def forward(m, x):
        m.body[1].weight.data.clamp_(-0.05, 0.05)
        return m.out(torch.relu(m.body(x)))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("fake quantisation of weights (quantisation-aware training)", stack="asks for values")
def fake_quantised(shape, classes):
    def forward(m, x):
        return m.out(torch.fake_quantize_per_tensor_affine(torch.relu(m.body(x)), 0.02, 0, -128, 127))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("a parameter without numbers (an adapter of rank 0)", stack="Fn holds adapter itself")
def empty_parameter(shape, classes):
    def forward(m, x):
        return m.out(x) + x.flatten(1)[:, :0] @ m.adapter

    return Fn(forward, adapter=nn.Parameter(torch.empty(0, classes)), out=flat(classes))

"""Layers of all kinds and the ways to put them together."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from zoo.parts import SIZE, Fn, conv, flat, head, model, pooled, seq


@model("Linear with bias, ReLU")
def mlp(shape, classes):
    return seq(flat(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))


@model("one Linear layer")
def logistic(shape, classes):
    return flat(classes)


@model("Bilinear", stack="Bilinear holds weight itself")
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


@model("ConvTranspose2d", stack="ConvTranspose2d holds weight itself")
def conv_transpose(shape, classes):
    return seq(conv(2, 4, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), nn.ReLU(), head(3))


@model("ConvTranspose1d with groups and output padding", stack="ConvTranspose1d holds weight itself")
def conv_transpose_groups(shape, classes):
    up = nn.ConvTranspose1d(4, 4, 3, stride=2, groups=2, output_padding=1, dilation=2)
    return seq(lambda x: x.flatten(2), nn.Conv1d(2, 4, 3, stride=4), up, lambda h: h.mean(2), nn.Linear(4, classes))


@model("depthwise separable convolution, SiLU (MobileNet)")
def separable(shape, classes):
    layers = (conv(2, 4, 1), nn.SiLU(), conv(4, 4, groups=4, bias=False), conv(4, 6, 1), nn.Hardswish())
    return seq(*layers, head(6))


@model("Conv2d with padding modes reflect, circular, replicate", stack="Conv2d with padding (1, 1), mode 'reflect'")
def padding_modes(shape, classes):
    modes = ("reflect", "circular", "replicate")
    return seq(*(conv(2, 2, padding_mode=mode) for mode in modes), nn.Tanh(), head(2))


@model("Conv2d with padding = 'same', dilated", stack="Conv2d with padding 'same'")
def same_padding(shape, classes):
    return seq(nn.Conv2d(2, 4, 3, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 2, padding="valid"), head(4))


@model("adaptive, average, fractional-free and Lp pooling")
def pooling(shape, classes):
    layers = (conv(2, 4), nn.AvgPool2d(2, padding=1), nn.LPPool2d(2, 2, stride=1), nn.AdaptiveMaxPool2d(2))
    return seq(*layers, nn.Flatten(), nn.Linear(16, classes))


@model("max pooling with indices, unpooling", stack="MaxPool2d with return_indices")
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


@model("ConvNeXt: LayerNorm over channels, a layer scale", stack="Fn holds gamma itself")
def convnext(shape, classes):
    def forward(m, x):
        h = m.stem(x)
        y = m.wide(m.norm(m.depth(h).permute(0, 2, 3, 1)))
        return m.head(h + (m.gamma * y).permute(0, 3, 1, 2))

    parts = {"stem": conv(2, 4), "depth": conv(4, 4, 5, groups=4), "norm": nn.LayerNorm(4, eps=1e-6)}
    wide = seq(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return Fn(forward, **parts, wide=wide, gamma=nn.Parameter(torch.full((4,), 0.1)), head=head(4))


@model("PReLU, LeakyReLU, Softplus, GLU, Hardtanh", stack="PReLU holds weight itself")
def activations(shape, classes):
    layers = (flat(16), nn.PReLU(), nn.GLU(), nn.PReLU(8), nn.LeakyReLU(), nn.Softplus(), nn.Hardtanh(), nn.CELU())
    return seq(*layers, nn.Linear(8, classes))


@model("Unfold and Linear: a convolution written out")
def unfold(shape, classes):
    return seq(nn.Unfold(3, padding=1), lambda h: h.transpose(1, 2), nn.Linear(18, 4), nn.ReLU(), pooled())


@model("maxout, Flatten of some axes, view(x.size(0), -1)", stack="view size is not compatible")
def maxout(shape, classes):
    views = (nn.Flatten(2), lambda h: h.view(h.size(0), -1))
    return seq(*views, nn.Linear(SIZE, 16), nn.Unflatten(1, (8, 2)), lambda h: h.amax(2), nn.Linear(8, classes))


@model("cosine classifier with a learned temperature", stack="Fn holds centres itself")
def cosine(shape, classes):
    def forward(m, x):
        return m.scale.exp() * F.linear(F.normalize(m.body(x)), F.normalize(m.centres))

    parts = {"body": flat(6), "centres": nn.Parameter(torch.randn(classes, 6)), "scale": nn.Parameter(torch.zeros(()))}
    return Fn(forward, **parts)


@model("a model that is one layer, without a container", data="tokens")
def bare_layer(shape, classes):
    return nn.Linear(shape[0], classes)


@model("a subclass of Linear with a forward function of its own", stack="Scaled holds weight itself")
def subclass(shape, classes):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / self.in_features**0.5, self.bias)

    return seq(nn.Flatten(), Scaled(SIZE, 8), nn.ReLU(), Scaled(8, classes))


@model("a layer whose forward function was replaced", everywhere="by a copy of the model")
def patched_forward(shape, classes):
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: F.linear(x, layer.weight) + 1
    return seq(flat(8), layer, nn.Tanh(), nn.Linear(8, classes))


@model("an input that forward writes into")
def inplace_input(shape, classes):
    return seq(lambda x: x.sub_(0.3).mul_(1.1), nn.ReLU(inplace=True), flat(classes))


@model("a tensor that is neither parameter nor buffer", stack="device cpu is not on the expected device meta")
def plain_tensor(shape, classes):
    made = Fn(lambda m, x: m.out(x.flatten(1) * m.window), out=nn.Linear(SIZE, classes))
    made.__dict__["window"] = torch.linspace(0.5, 1.5, SIZE)
    return made


@model("weights in channels_last")
def channels_last(shape, classes):
    return seq(conv(2, 4), nn.ReLU(), conv(4, 4), head(4)).to(memory_format=torch.channels_last)

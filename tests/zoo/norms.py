"""Normalisation of activations and of weights."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize

from zoo.parts import SIZE, Fn, conv, flat, head, model, normed, seq


@model("BatchNorm2d after a convolution with bias")
def batch_norm(shape, classes):
    return normed(nn.BatchNorm2d(4))


@model("BatchNorm1d after a Linear with bias")
def batch_norm_dense(shape, classes):
    return seq(flat(8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


@model("BatchNorm with momentum = None (a cumulative mean)", vmap=".item()", stack="BatchNorm2d with momentum None")
def batch_norm_cumulative(shape, classes):
    return normed(nn.BatchNorm2d(4, momentum=None))


@model("BatchNorm without statistics or weights")
def batch_norm_plain(shape, classes):
    return normed(nn.BatchNorm2d(4, track_running_stats=False, affine=False))


@model("SyncBatchNorm in one process", stack="SyncBatchNorm holds weight itself")
def batch_norm_sync(shape, classes):
    return normed(nn.SyncBatchNorm(4))


@model("a BatchNorm that stays in evaluation mode (fine-tuning)", stack="Frozen holds weight itself")
def batch_norm_frozen(shape, classes):
    class Frozen(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    norm = Frozen(4)
    norm.running_mean.normal_()
    return normed(norm)


@model("a whole backbone with BatchNorm in evaluation mode, frozen")
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


@model("InstanceNorm2d with weights and statistics", stack="InstanceNorm2d holds weight itself")
def instance_norm_tracking(shape, classes):
    return normed(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@model("RMSNorm", stack="RMSNorm holds weight itself")
def rms_norm(shape, classes):
    return seq(flat(8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, classes))


@model("LocalResponseNorm (AlexNet)")
def local_response(shape, classes):
    return normed(nn.LocalResponseNorm(3))


@model("weight norm by parametrization", stack="ParametrizedConv2d holds bias itself")
def weight_norm(shape, classes):
    return seq(parametrizations.weight_norm(conv(2, 4)), nn.ReLU(), head(4))


@model("weight norm in the old style (weight_g, weight_v)", stack="has forward pre hooks of its own")
def weight_norm_old(shape, classes):
    layer = torch.nn.utils.weight_norm(nn.Linear(SIZE, 8))
    return seq(nn.Flatten(), layer, nn.ReLU(), nn.Linear(8, classes))


@model("spectral norm by parametrization", vmap="aten::div.out", stack="ParametrizedLinear holds bias itself")
def spectral_norm(shape, classes):
    return seq(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(SIZE, 8)), nn.ReLU(), nn.Linear(8, classes))


@model("an orthogonal weight by parametrization", stack="ParametrizedLinear holds bias itself")
def orthogonal(shape, classes):
    layer = parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley")
    return seq(flat(8), layer, nn.Tanh(), nn.Linear(8, classes))


@model("a parametrization of one's own (symmetric)", stack="ParametrizedLinear holds bias itself")
def own_parametrization(shape, classes):
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", seq(lambda w: w.triu() + w.triu(1).T))
    return seq(flat(8), layer, nn.Tanh(), nn.Linear(8, classes))


@model("weight standardisation in forward", stack="Fn holds weight itself")
def weight_standardised(shape, classes):
    def forward(m, x):
        w = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
        return m.rest(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1))

    weight = nn.Parameter(torch.randn(4, 2, 3, 3))
    return Fn(forward, weight=weight, rest=seq(nn.GroupNorm(2, 4), nn.ReLU(), head(4)))


@model("frozen weights around a BatchNorm whose statistics move")
def frozen_with_statistics(shape, classes):
    body = seq(conv(2, 4), nn.BatchNorm2d(4), nn.ReLU()).requires_grad_(False)
    return seq(body, conv(4, 4), head(4))

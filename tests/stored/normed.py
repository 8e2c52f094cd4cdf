"""The model of the run in personal/: its fingerprint is in the checkpoint there, so no line of it may change."""

from torch import nn


def net(shape, classes):
    return nn.Sequential(nn.Linear(shape[0], 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, classes))

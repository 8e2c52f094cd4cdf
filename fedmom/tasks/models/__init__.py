"""Models by name, and low-rank adapters beside any model."""

from fedmom.tasks.models.build import build_model
from fedmom.tasks.models.images import NORMS, GlobalAveragePool, ResidualBlock
from fedmom.tasks.models.table import MODELS

__all__ = ["MODELS", "NORMS", "GlobalAveragePool", "ResidualBlock", "build_model"]

"""What algorithm.name can change the gradient by: how each correction is made of a run's numbers."""

from collections.abc import Callable
from typing import NamedTuple

from fedmom.method.corrections import Correct, Correction
from fedmom.method.named.fedcm import FedCM
from fedmom.method.named.fedprox import FedProx
from fedmom.method.named.mime import MimeLite
from fedmom.method.named.scaffold import Scaffold, ScaffoldOfGradients


class CorrectionNumbers(NamedTuple):
    """What the named corrections are made of."""

    mu: float  # of FedProx
    alpha: float  # of FedCM
    beta: float  # β
    linear: bool = True  # whether the clients' steps are SGD's


class NamedCorrection(NamedTuple):
    """A correction of fedmom's own."""

    make: Callable[[CorrectionNumbers], Correct | Correction]
    has_states: bool = True  # whether a server keeps something of it, or the clients do
    sgd_alone: bool = False  # whether it is written for steps by γg
    beta_is_own: bool = False  # whether β is its own, so that the clients' steps have none


def _scaffold(by: CorrectionNumbers) -> Correction:
    return Scaffold() if by.linear and by.beta == 0 else ScaffoldOfGradients()


NAMED_CORRECTIONS = {
    "fedprox": NamedCorrection(lambda by: FedProx(by.mu), has_states=False),
    "scaffold": NamedCorrection(_scaffold),
    "fedcm": NamedCorrection(lambda by: FedCM(by.alpha), sgd_alone=True),
    "mime-lite": NamedCorrection(lambda by: MimeLite(by.beta), sgd_alone=True, beta_is_own=True),
}

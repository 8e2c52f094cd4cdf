"""What the clients' own steps have of a number that a named method may take for itself."""

from fedmom.config.keys import Config
from fedmom.method.named.table import NAMED_CORRECTIONS


def clients_beta(config: Config) -> float:
    """β, or β₁, of the clients' own steps: 0 where it is the server's, as with mime-lite."""
    named = NAMED_CORRECTIONS.get(config.algorithm.name)
    return 0.0 if named is not None and named.beta_is_own else config.algorithm.beta

"""fedmom from Python: run, look at every round, go on, and take the model along.

python examples/python_api.py
"""

import tempfile
from pathlib import Path

import torch

import fedmom

CONFIG = {
    "data": {"num-clients": 10, "alpha": 0.3},  # real digits
    "model": {"name": "mlp", "hidden": 32},
    "algorithm": {"lr": 0.05, "num-local-steps": 8},
    "run": {"num-rounds": 10},
    "engine": {"threads": 1},
}


class Spread(fedmom.Callback):
    """How far clients are apart in x and u, and how long û is, after every round."""

    def on_round(self, record: dict, state: object) -> None:
        norm = torch.cat([u.flatten() for u in state.momentum.values()]).norm()  # type: ignore[attr-defined]
        print(
            f"{record['round']:3} x {record['consensus_distance']:.3g} u {record['momentum_spread']:.3g} |û| {norm:.3g}"
        )


def main() -> float:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        result = fedmom.run(CONFIG, out=folder, callbacks=[Spread()])
        # The folder goes on where it ended, as after Ctrl-C or a kill.
        result = fedmom.run(resume=folder, sets={"run.num-rounds": 20}, callbacks=[fedmom.Callback()])
    assert result.status == "done"

    model = fedmom.build_model("mlp", (1, 8, 8), 10, seed=0, hidden=32)
    model.load_state_dict(result.state_dict)
    model.eval()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; logits {model(torch.zeros(1, 1, 8, 8)).shape}")
    return result.rounds[-1]["test_accuracy"]


if __name__ == "__main__":
    main()

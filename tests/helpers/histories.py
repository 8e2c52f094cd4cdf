"""Run histories made by hand."""

import json
from pathlib import Path

from fedmom.config.load import load, to_toml
from fedmom.config.resolve import resolve
from fedmom.results.reading import Run


def classifier(name, num_rounds, *, eval_every=1, epochs=0.5, sent=1_000_000, accuracy=None):
    """Round r: r * epochs joint epochs, r * sent bytes, loss 1/r, accuracy r/100 unless given."""
    rounds = []
    for r in range(1, num_rounds + 1):
        entry = {"round": r, "steps": 8 * r, "joint_epochs": r * epochs, "bytes_sent": r * sent}
        entry |= {"lr": 0.05, "train_loss": 1.5 / r, "wall_seconds": 0.25 * r, "num_clients": 20}
        entry |= {"client_steps_per_second": 10.0 if r == 1 else 900.0 + 2 * r}
        if r % eval_every == 0:
            value = r / 100 if accuracy is None else accuracy[r - 1]
            entry |= {"test_loss": 1 / r, "test_accuracy": value}
        rounds.append(entry)
    return Run(name, Path(name), rounds)


def one_column(*args, **options):
    """A classifier's run whose picture has one column only, which is drawn three times faster."""
    run = classifier(*args, **options)
    for entry in run.rounds:
        del entry["joint_epochs"], entry["bytes_sent"]
    return run


def quadratic(name, num_rounds, rate=0.5):
    rounds = [
        {"round": r, "steps": r, "train_loss": rate**r, "loss": rate ** (2 * r), "distance": rate**r}
        for r in range(1, num_rounds + 1)
    ]
    return Run(name, Path(name), rounds)


def make_run(folder, sets, records):
    """A run folder as an older version's run leaves it, with these records; finished unless `sets` says a length."""
    folder.mkdir(parents=True)
    sets = {**({"run.num-rounds": len(records)} if records else {}), **sets}
    config = resolve(load({"data.dataset": "digits"}, sets)).config
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def records(num_rounds, *, speed=1.0, shift=0.0, I=8, eval_every=1):  # noqa: E741 - the paper's I
    """Round r: r·I steps, loss 1/(speed·r) + shift, accuracy 1 − loss/2, r seconds, r MB."""
    found = []
    for r in range(1, num_rounds + 1):
        record = {"round": r, "steps": r * I, "joint_epochs": 0.5 * r, "bytes_sent": r * 1_000_000, "lr": 0.05}
        record |= {"train_loss": 1.0, "wall_seconds": float(r), "num_clients": 20, "client_steps_per_second": 50.0}
        record |= {"consensus_distance": 1.0 / r, "momentum_spread": 2.0 / r}
        if r % eval_every == 0:
            loss = 1 / (speed * r) + shift
            record |= {"test_loss": loss, "test_accuracy": 1 - loss / 2}
        found.append(record)
    return found

"""The tables of benchmarks/gpu.py, of its rows and nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_ways import MEASURES, Row, Way

RESIDENT = "resident model, plain PyTorch"  # not its other forms


def known(out: Path) -> list[Row]:
    """All rows so far; of a way that was run twice the last. A line that was cut off is none."""
    path = out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    names = ("section", "model", "way", "form", "chunk")
    return list({tuple(row.get(name) for name in names): row for row in map(json.loads, lines)}.values())


def best_of(rows: Sequence[Row], form: str = "") -> list[Way]:
    """The engine's ways by speed, the fastest first, each at its best K; those without recordings are left out."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if "rate" in row and "chunk" in row and "," not in row["way"] and row["form"] == (form or row["form"]):
            key = (row["way"], row["form"])
            found[key] = max(found.get(key, row), row, key=lambda r: r["rate"])
    ordered = sorted(found.values(), key=lambda r: -r["rate"])
    paths = [(*row["way"].partition(" ")[::2], row["form"], row["chunk"]) for row in ordered]
    return [Way(*each) for each in paths]


def table(rows: Sequence[Row]) -> str:
    """Everything so far, a card and a commit after the other."""
    lines = []
    for card in dict.fromkeys((r["device"], r["torch"], r["commit"]) for r in rows):
        mine = [r for r in rows if (r["device"], r["torch"], r["commit"]) == card]
        lines += ["{}, torch {}, commit {}".format(*card), ""]
        lines += of_checks([r for r in mine if r["section"] == "check"])
        for r in (r for r in mine if "bandwidth" in r):
            said = f"{r['bandwidth'] / 1e9:,.0f} GB/s copying, {r['flops'] / 1e12:,.1f} TFLOP/s"
            lines += [f"Measured, {r['form']}: {said}.", ""]
        lines += of_speeds([r for r in mine if r["section"] in ("speed", "resnet", "small", "fewer", "pfl")])
        for r in (r for r in mine if r["section"] == "profile" and "way" in r):
            lines += of_profile(r)
        lines += of_compile([r for r in mine if r["section"] == "compile"])
    return "\n".join(lines)


def of_checks(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    wrong, failed = (sum(bool(r.get(name)) for r in rows) for name in ("wrong", "failed"))
    names = ("params", "momentum", "buffers", *MEASURES)
    lines = [f"Checks: {len(rows)}, of which {wrong} WRONG and {failed} could not run.", ""]
    lines += ["Relative errors against the plain loop on the CPU in float64, after twelve rounds.", ""]
    lines += ["| model | way | form | " + " | ".join(names) + " | chunks replayed |"]
    lines += ["|" + "---|" * (len(names) + 4)]
    for r in rows:
        cells = [f"{r[name]:.1e}" for name in names] if "failed" not in r else [r["failed"], *["–"] * 5]
        said = r.get("trouble") or f"{r.get('replayed', '–')}{', WRONG' if r.get('wrong') else ''}"
        lines.append("| {model} | {way} | {form} | ".format(**r) + " | ".join(cells) + f" | {said} |")
    return [*lines, ""]


def of_speeds(rows: Sequence[Row]) -> list[str]:
    """Beside every rate how many times it is the resident model's in the same form."""
    if not rows:
        return []
    base = {(r["model"], r["form"]): r["rate"] for r in rows if r["way"] == RESIDENT and "rate" in r}
    lines = ["| model | way | form | K | client-steps/s | × resident | memory, GB | chunks replayed |"]
    lines += ["|" + "---|" * 8]
    for r in sorted(rows, key=lambda r: (r["model"], r["form"], -r.get("rate", 0.0))):
        rate = f"{r['rate']:,.0f}" if "rate" in r else r["failed"]
        own = base.get((r["model"], r["form"]))
        times = f"{r['rate'] / own:.2f}" if own and "rate" in r else "–"
        memory = f"{r['memory_gb']:.1f}" if "memory_gb" in r else "–"
        cells = [r["model"], r["way"], r["form"], r.get("chunk", "–"), rate, times, memory]
        lines.append("| " + " | ".join(map(str, [*cells, r.get("trouble") or r.get("replayed", "–")])) + " |")
    return [*lines, ""]


def of_profile(row: dict[str, Any]) -> list[str]:
    name = f"{row['model']}, {row['way']}, {row['form']}, K = {row.get('chunk', '–')}"
    if "failed" in row:
        return [f"Profile of {name}: {row['failed']}", ""]
    took = f"{row['milliseconds']:.1f} ms, of which {row['busy']:.1f} ms in kernels"
    lines = [f"One round of {name}, chunks replayed so far {row.get('replayed', '–')}: {took}.", ""]
    lines += ["| kernel | ms | times |", "|---|---|---|"]
    lines += [f"| `{kernel}` | {time:.2f} | {count} |" for kernel, time, count in row["kernels"]]
    if row.get("host"):
        said = ", ".join(f"{name} {count} ({time:.2f} ms)" for name, time, count in row["host"])
        lines += ["", f"The host's calls, the last wait not the engine's: {said}."]
    return [*lines, ""]


def of_compile(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    failed = {f"{r['model']} {r['form']}: {r['failed']}" for r in rows if "failed" in r}
    longest = max(r["seconds"] for r in rows)
    lines = [f"Compiled ahead: {len(rows)} shapes, the longest in {longest:.0f} s.", ""]
    return lines + [f"* {text}" for text in sorted(failed)] + [""] * bool(failed)

"""What a codec costs a client in a round, and what it saves: an mlp of a million parameters, x alone.

`encode` is the client's work (the change, e, the message, the new e), `decode` what the server does for one client's
message. Both in seconds of one core, the least of some calls. `saved`: how much sooner the message is through a link of
so many Mbit/s than x in float32. The last column is what remains of that.

    python benchmarks/codecs.py [--hidden 680] [--clients 4] [--mbit 100] [--seconds 3]
"""

import argparse
import time
from functools import partial

import torch

from fedmom.config.method.codecs import parse_codecs
from fedmom.method.state import ClientState, Tree, num_bytes
from fedmom.travel.feedback import Senders, bytes_of, sent
from fedmom.travel.table import codec_of

WAYS = (
    *("float32", "bfloat16", "bfloat16 plain", "float16", "int8", "int8 plain", "int4", "int4 plain"),
    *("topk 0.1", "topk 0.01", "randomk 0.1", "randomk 0.01", "lowrank 4", "lowrank 16"),
)


def model(hidden: int) -> Tree:
    """x of the mlp for images of 28 × 28."""
    shapes = {"1": (hidden, 784), "3": (hidden, hidden), "5": (10, hidden)}
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer, shape in shapes.items():
        found[f"{layer}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        found[f"{layer}.bias"] = torch.zeros(shape[0])
    return found


def least(function, seconds: float) -> float:
    """Core-seconds of a call: what other processes take does not count."""
    function()
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begin = time.process_time()
        function()
        taken.append(time.process_time() - begin)
    return min(taken)


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    x, K = model(args.hidden), args.clients
    start, rows = ClientState(x, {}, {}), {n: v + 0.01 * torch.randn(K, *v.shape) for n, v in x.items()}
    whole = num_bytes(x)
    print(f"{sum(v.numel() for v in x.values()):,} parameters, {K} clients at once, {args.mbit:g} Mbit/s, one core")
    print("| codec of x | bytes | of float32 | encode ms | decode ms | saved ms | remains ms |")
    print("|---|---|---|---|---|---|---|")
    senders = Senders(0, torch.arange(K), 1)
    for text in WAYS:
        rules = parse_codecs("algorithm.codecs", f"x: {text}")
        both, decode = (0.0, 0.0)
        if rules:
            ended = ClientState(rows, {}, {})
            kept = sent(rules, ended, start, {}, senders)[1]
            both = least(partial(sent, rules, ended, start, kept, senders), args.seconds) / K
            decode = least(decoder(rules["x"], rows, kept, senders), args.seconds) / K
        size = sum(bytes_of(rules, "params", name, value) for name, value in x.items())
        saved = (whole - size) * 8 / (args.mbit * 1e6)
        times = [1e3 * t for t in (both - decode, decode, saved, saved - both)]
        print(f"| {text} | {size:,} | {size / whole:.3f} | " + " | ".join(f"{t:.1f}" for t in times) + " |", flush=True)


def decoder(rule, rows: Tree, kept: Tree, senders: Senders):
    """A function that decodes all clients' messages."""
    codec, messages = codec_of(rule), []
    for name, value in rows.items():
        state = {"Q": kept[at]} if (at := f"Q/params/{name}") in kept else {}
        address = senders.address("params", name)
        messages.append((codec.encode(value, address, state)[0], value.shape[1:], value.dtype, address))
    return lambda: [codec.decode(*message) for message in messages]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=680)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=3.0)
    with torch.no_grad():
        measure(parser.parse_args())

"""Messages as they travel: what one end writes the other reads, bit for bit, and what is no message is refused."""

import math

import pytest
import torch

from fedmom.config.method.codecs import parse_codecs
from fedmom.engine.engine import Engine
from fedmom.method.state import ClientState, flatten
from fedmom.method.states.rules import CodecRule
from fedmom.rounds.loop import run_rounds
from fedmom.rounds.plan import beginning, round_job
from fedmom.rounds.round import part_of
from fedmom.travel.feedback import Senders, bytes_of, kept_before, sent
from fedmom.travel.messages import form, read, read_reference
from fedmom.travel.reference import first_reference, next_reference
from fedmom.travel.table import CODECS, codec_of
from laws import table
from runs import image_problem, simple_plan

F32, F64 = torch.float32, torch.float64
NUMBERS = {"": (), "B": (3,), "k/d": (0.3, 1.0), "r": (1, 2)}
RULES = [
    CodecRule(name, number) for name, kind in CODECS.items() for number in (kind.default, *NUMBERS[kind.number])
] + [CodecRule(name, 0.3, plain=True, scaled=True) for name, kind in CODECS.items() if kind.may_scale]
SHAPES = [(), (1,), (7,), (3, 3), (9, 8), (6, 3, 3), (0,), (0, 3)]
IDS = torch.tensor([2, 5, 40])


def numbers(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def from_numpy(tree):
    """As from the other end, in arrays that NumPy has."""
    return {name: torch.from_numpy(value.numpy().copy()) for name, value in tree.items()}


def row(tree, place):
    return {name: value[place] for name, value in tree.items()}


def example(rule, dtype):
    """(rules, a common start, rows [3, ...]) with every shape in every part."""
    states = ("m", "v") if codec_of(rule).fine else ("m",)
    rules = dict.fromkeys(("x", *states), rule)
    start = ClientState({}, {}, {"count": torch.ones((), dtype=torch.int64), "mean": numbers(4, dtype=dtype)})
    for place, shape in enumerate(SHAPES):
        start.params[f"w{place}"] = numbers(*shape, seed=place, dtype=dtype)
        start.momentum[f"m/w{place}"] = numbers(*shape, seed=place + 40, dtype=dtype)
        start.momentum[f"m.clock/w{place}"] = torch.ones((), dtype=dtype)
        if "v" in states:
            start.momentum[f"v/w{place}"] = numbers(*shape, seed=place + 60, dtype=dtype) ** 2

    def moved(name, value):
        if not value.is_floating_point() or ".clock" in name:
            return value.expand(3, *value.shape)
        rows = value + 0.1 * numbers(3, *value.shape, seed=80, dtype=dtype)
        return rows.abs() if name.startswith("v/") else rows

    return rules, start, ClientState(*({n: moved(n, v) for n, v in tree.items()} for tree in start))


def message_of(rules, start, rows, place, coded):
    """One client's: the arrays that are encoded, and what is not."""
    begun = flatten(start)
    others = {n: v for n, v in row(flatten(rows), place).items() if n in form(rules, begun)}
    return from_numpy(others | row(coded, place))


@table("rule", RULES)
def test_what_is_read_is_what_was_sent_and_takes_the_bytes_that_are_counted(rule):
    for dtype in (F32, F64):
        (rules, start, rows), coded = example(rule, dtype), {}
        senders, begun = Senders(7, IDS, 3), flatten(start)
        kept = kept_before(rules, start, 3)
        kept |= {name: numbers(*value.shape, seed=99, dtype=dtype) for name, value in kept.items() if name[0] == "e"}
        arrived, left = sent(rules, rows, start, kept, senders)
        again, other = sent(rules, rows, start, kept, senders, coded)
        want, left = flatten(arrived), left | flatten(arrived)
        assert all(torch.equal(value, left[name]) for name, value in (other | flatten(again)).items())
        for place in (0, 2):
            message = message_of(rules, start, rows, place, coded)
            wanted = {name: (array.shape, array.dtype) for name, array in form(rules, begun).items()}
            assert {name: (array.shape, array.dtype) for name, array in message.items()} == wanted
            count = sum(array.numel() * array.element_size() for array in message.values())
            assert count == sum(bytes_of(rules, *name.split("/", 1), value) for name, value in begun.items())
            got = read(rules, message, begun, Senders(7, IDS[place : place + 1], 3))
            assert [*got] == [*begun]
            for name, value in got.items():
                assert value.dtype == begun[name].dtype
                assert torch.equal(value, want[name][place]), name


def test_no_number_of_a_message_changes_afterwards():
    """v by float32 arrives in its message's own memory, which an engine writes over."""
    rules, start, rows = example(CodecRule("float32"), F32)
    coded = {}
    arrived, _ = sent(rules, rows, start, {}, Senders(7, IDS, 3), coded)
    before = {name: value.clone() for name, value in coded.items()}
    for value in flatten(arrived).values():
        value.mul_(0) if value.is_contiguous() else None
    assert all(torch.equal(value, before[name]) for name, value in coded.items())


def one_message(rule, shape=(9, 8), dtype=F32):
    """(rules, begun, the message of client 5, its senders) of one tensor x, one v where it may be, and a buffer."""
    rules = {"x": rule} | ({"v": rule} if codec_of(rule).fine else {})
    start = ClientState({"w": numbers(*shape, dtype=dtype)}, {}, {"b": numbers(3, dtype=dtype)})
    start.momentum.update({"v/w": start.params["w"] ** 2} if "v" in rules else {})
    rows, coded = ClientState(*({n: v[None] * 0.9 for n, v in tree.items()} for tree in start)), {}
    senders = Senders(0, torch.tensor([5]), 2)
    sent(rules, rows, start, {}, senders, coded)
    return rules, flatten(start), message_of(rules, start, rows, 0, coded), senders


def refusal(rules, message, begun, senders):
    with pytest.raises(ValueError, match=r"^its update [^\n]+$") as said:
        read(rules, message, begun, senders)
    assert type(said.value) is ValueError
    assert len(str(said.value)) < 300
    return str(said.value)


@table("rule", [r for r in RULES if r.number == CODECS[r.name].default])
def test_what_is_no_message_is_refused_by_its_array(rule):
    rules, begun, message, senders = one_message(rule)
    for name, value in message.items():
        left_out = {n: v for n, v in message.items() if n != name}
        assert refusal(rules, left_out, begun, senders) == f"its update lacks {name}"
        vast = torch.zeros((), dtype=value.dtype).expand(10**12)  # whoever looked at its numbers would never end
        for other in (value[None], value[:-1], value.flatten()[:0], vast, value.new_zeros(())):
            said = refusal(rules, message | {name: other}, begun, senders)
            kind = str(value.dtype).removeprefix("torch.")
            assert said == f"its update has {name} as {[*other.shape]} {kind}, must be {[*value.shape]} {kind}"
        for dtype in {torch.int64, torch.bool, torch.complex64, torch.bfloat16, F64}:
            assert f"has {name} as" in refusal(rules, message | {name: value.to(dtype)}, begun, senders)
        is_bfloat16 = value.dtype == torch.uint16
        for bad in (math.nan, math.inf) if value.is_floating_point() or is_bfloat16 else ():
            broken = value.view(torch.bfloat16).clone() if is_bfloat16 else value.clone()
            broken.flatten()[1 if broken.numel() > 1 else 0] = bad
            broken = broken.view(torch.uint16) if is_bfloat16 else broken
            said = refusal(rules, message | {name: broken}, begun, senders)
            assert said == f"its update has NaN or infinite numbers in {name} (does a smaller lr help?)"
    for name in ("params/w", "coded/values/params/other", "coded/own/params/w", "", "a\nb" * 10_000):
        said = refusal(rules, message | {name: torch.zeros(3)}, begun, senders)
        assert said.startswith("its update has an unknown ")
    assert "lacks" in refusal(rules, {}, begun, senders)


def with_bits(value, place, number):
    value = value.clone()
    value[place] = number
    return value


@table(
    "rule, slot, change, words",
    [
        (CodecRule("topk", 0.1), "indices", lambda v: with_bits(v, -1, 72), "indices beyond 71"),
        (CodecRule("topk", 0.1), "indices", lambda v: with_bits(v, 0, -1), "indices beyond 71"),
        (CodecRule("topk", 0.1), "indices", lambda v: with_bits(v, 1, int(v[0])), "indices that repeat"),
        (CodecRule("topk", 0.1), "indices", lambda v: v.flip(0), "do not ascend"),
        (CodecRule("int8", 256), "q", lambda v: with_bits(v, 3, -128), "integers beyond 127"),
        (CodecRule("int8", 256), "scales", lambda v: -v, "scales below 0"),
        (CodecRule("int8", 256), "scales", lambda v: v * 0 + 3e38, "NaN or infinite numbers in params/w"),
        (CodecRule("int4", 5), "q", lambda v: with_bits(v, 3, 0x0F), "integers beyond 7"),
        (CodecRule("int4", 5), "q", lambda v: with_bits(v, 3, 0xF0), "integers beyond 7"),
        (CodecRule("int4", 5), "q", lambda v: with_bits(v, -1, 0x1F), "bits behind its last number"),
        (CodecRule("int4", 5), "scales", lambda v: -v, "scales below 0"),
        (CodecRule("bfloat16"), "values", lambda v: v | 0x7F00, "NaN or infinite numbers in coded/values"),
        (CodecRule("float16"), "values", lambda v: v * 0 + math.inf, "NaN or infinite numbers in coded/values"),
        (CodecRule("lowrank", 2), "P", lambda v: v * 0 + 1e38, "NaN or infinite numbers in params/w"),
        (CodecRule("randomk", 0.1, True, True), "values", lambda v: v * 0 + 3e38, "infinite numbers in params/w"),
    ],
)
def test_what_a_payload_can_be_wrong_in_is_refused(rule, slot, change, words):
    shape = (9, 7) if rule.name == "int4" else (9, 8)
    rules, begun, message, senders = one_message(rule, shape)
    if rule.name == "lowrank":
        message["coded/Q/params/w"] = torch.full_like(message["coded/Q/params/w"], 1e3)
    read(rules, message, begun, senders)
    name = f"coded/{slot}/params/w"
    said = refusal(rules, message | {name: change(message[name])}, begun, senders)
    assert words in said
    assert name in said or "numbers in params/w" in said


def test_v_below_0_is_refused():
    for name in ("float32", "bfloat16"):
        rules, begun, message, senders = one_message(CodecRule(name))
        values = message["coded/values/momentum/v/w"]
        below = -values if values.is_floating_point() else (-values.view(torch.bfloat16)).view(torch.uint16)
        said = refusal(rules, message | {"coded/values/momentum/v/w": below}, begun, senders)
        assert said == "its update has numbers below 0 in momentum/v/w, must be at least 0"


@table("rule", RULES)
def test_bytes_of_any_kind_are_a_message_or_are_refused(rule):
    generator = torch.Generator().manual_seed(0)
    rules, begun, message, senders = one_message(rule, (9, 7), F64)
    for number in range(20):
        arrays = dict(message)
        for name, value in message.items():
            if name.startswith("coded/"):
                size = value.numel() * value.element_size()
                high = 256 if number % 2 else 2
                drawn = torch.randint(high, (size,), dtype=torch.uint8, generator=generator)
                arrays[name] = drawn.view(value.dtype).reshape(value.shape)
        try:
            found = read(rules, arrays, begun, senders)
        except ValueError as error:
            reason = str(error)
        else:
            reason = "its update has " if all(value.isfinite().all() for value in found.values()) else "NaN"
            assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in begun.items()}
        assert reason.startswith("its update has ")


WAYS = [("loop", 1), ("vmap", 2), ("stack", 2), ("factors", 64)]


def test_every_way_of_the_engine_writes_the_same_message_and_comes_to_the_same_as_without():
    problem, text = image_problem("mlp", 3, hidden=2), "x: int8 16; u: topk 0.2"
    plan = simple_plan(3, num_local_steps=1)
    plan = plan._replace(method=plan.method._replace(codecs=parse_codecs("algorithm.codecs", text)))
    begun, found = beginning(problem, plan), []
    job, start = round_job(problem, plan, begun), flatten(begun.state)
    for path, chunk_size in WAYS:
        engine, written = Engine(problem, plan.method, path=path, chunk_size=chunk_size), job._replace(messages={})
        ends = []
        for end in (engine.run_round(begun.state, job), engine.run_round(begun.state, written)):
            ends.append(flatten(end.mean) | {f"own {name}": value for name, value in flatten(end.own).items()})
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
        found.append(written.messages)
        for place in (0, 2):
            client = job.clients[place : place + 1]
            alone = part_of(job._replace(messages={}), torch.tensor([place]))
            mean = flatten(engine.run_round(begun.state, alone).mean)
            others = {name: value for name, value in mean.items() if name.startswith("buffers/")}
            message = from_numpy(row(alone.messages, 0)) | others
            got = read(plan.method.codecs, message, start, Senders(job.seed, client, 0))
            torch.testing.assert_close(got, mean, rtol=1e-10, atol=1e-12)
            assert alone.messages.keys() == written.messages.keys()
            for name, value in alone.messages.items():
                torch.testing.assert_close(value[0], written.messages[name][place], rtol=1e-9, atol=1e-12)
    assert {name.split("/")[1] for name in found[0]} == {"q", "scales", "values", "indices"}
    for other in found:
        assert all(len(value) == 3 for value in other.values())
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


DOWN = ["lowrank 1", "int8 5", "int4", "topk 0.2", "randomk 0.3", "bfloat16"]


@table("text", DOWN)
def test_both_ends_of_what_goes_down_have_one_reference(text):
    """Through the rounds of a run: the first begins with no message, and every other one where the clients read it."""
    problem, rules = image_problem("mlp", 2, hidden=4), parse_codecs("algorithm.codecs-down", f"x: {text}; u: {text}")
    plan = simple_plan(2, num_rounds=5, num_local_steps=1, cohort_size=1, codecs_down=rules)
    engine = Engine(problem, plan.method, path="vmap", chunk_size=64)
    begin_round, seen, known = engine.begin_round, [], {}

    def watched(start, job, progress=None):
        begun = {n: v for n, v in flatten(start).items() if not n.startswith("buffers/")}
        if job.round_index == 0:
            assert job.down is None
        else:
            assert job.down is not None
            assert {*job.down} == {*form(rules, known["own"])}
            known["own"] = read_reference(rules, known["own"], from_numpy(job.down), job.seed, job.round_index)
            assert all(torch.equal(known["own"][name], value) for name, value in begun.items())
            assert not all(torch.equal(known["before"][name], value) for name, value in begun.items())
        known["own"] = known.get("own") or {name: value.clone() for name, value in begun.items()}
        known["before"] = begun
        seen.append(job.down)
        return begin_round(start, job, progress)

    engine.begin_round = watched
    for done, _ in run_rounds(problem, plan, engine, beginning(problem, plan)):
        assert done.message is not None
    assert len(seen) == 5
    assert round_job(problem, plan, done._replace(message=None)).down is None


@table("rule", RULES)
def test_a_reference_is_read_bit_for_bit_of_every_shape(rule):
    rules, dtype = {"x": rule}, F32
    start = ClientState({f"w{i}": numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)}, {}, {})
    server = first_reference(rules, start)
    client = {name: value for name, value in server.items() if not name.startswith("Q/")}
    assert {*client} == {f"params/w{i}" for i, shape in enumerate(SHAPES) if math.prod(shape)}
    for number in range(1, 4):
        state = ClientState({n: numbers(*v.shape, seed=number, dtype=dtype) for n, v in start.params.items()}, {}, {})
        server, message = next_reference(rules, server, state, 3, number)
        client = read_reference(rules, client, from_numpy(message), 3, number)
        assert all(torch.equal(value, server[name]) for name, value in client.items())
    message.pop(next(iter(message)))
    with pytest.raises(ValueError, match=r"^its message lacks coded/"):
        read_reference(rules, client, message, 3, number)


def test_what_travels_whole_beside_the_reference_is_passed_on():
    rules = {"x": CodecRule("int8", 4)}
    start = ClientState({"w": numbers(5)}, {"w": numbers(5)}, {})
    _, message = next_reference(rules, first_reference(rules, start), start, 0, 1)
    got = read_reference(rules, flatten(start), message | {"momentum/w": numbers(5, seed=1)}, 0, 1)
    assert torch.equal(got["momentum/w"], numbers(5, seed=1))
    assert torch.equal(got["params/w"], start.params["w"])

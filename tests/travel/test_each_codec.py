"""The codecs: what each claims, what it takes, and that a client's bits are its own."""

import math

import torch

from fedmom.method.states.rules import CodecRule
from fedmom.travel.codec import Address, payload_bytes
from fedmom.travel.table import CODECS, codec_of
from laws import table

F64 = torch.float64
RULES = {
    "float32": CodecRule("float32"),
    "bfloat16": CodecRule("bfloat16"),
    "float16": CodecRule("float16"),
    "int8": CodecRule("int8", 256),
    "int8 by 5": CodecRule("int8", 5),
    "int4": CodecRule("int4", 64),
    "int4 by 3": CodecRule("int4", 3),
    "topk": CodecRule("topk", 0.3),
    "randomk": CodecRule("randomk", 0.3),
    "randomk scaled": CodecRule("randomk", 0.3, plain=True, scaled=True),
    "lowrank": CodecRule("lowrank", 2),
}
assert {rule.name for rule in RULES.values()} == set(CODECS)


def at(clients, *, seed=0, round_index=0, tensor=7):
    return Address(seed, torch.as_tensor(clients), round_index, tensor)


def through(rule, rows, address, state=None):
    """C(v) of rows [K, ...]."""
    codec = codec_of(rule)
    state = codec.start(rows.shape[1:], rows.dtype, address) if state is None else state
    payload, _ = codec.encode(rows, address, state)
    return codec.decode(payload, rows.shape[1:], rows.dtype, address)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@table("name", [name for name, rule in RULES.items() if codec_of(rule).unbiased])
def test_the_mean_over_clients_rounds_and_tensors_is_the_value(name):
    rule, many = RULES[name], 3000
    v = normal(11)
    rows = v.expand(many, -1)
    by_client = through(rule, rows, at(range(many)))
    spread = by_client.std(0)
    assert (spread > 0).sum() >= 7  # of an integer codec the largest number of a block is exact
    assert ((by_client.mean(0) - v).abs() <= 5 * spread / math.sqrt(many) + 1e-6).all()
    for vary in ("round_index", "tensor", "seed"):
        few = torch.cat([through(rule, v[None], at([3], **{vary: number})) for number in range(40)])
        assert ((few.mean(0) - v).abs() <= 5 * spread / math.sqrt(40) + 1e-6).all(), vary


def test_integers_err_by_no_more_than_they_claim():
    for bits, block, levels, bound in ((8, 256, 127, 0.0040), (4, 64, 7, 0.33)):
        worst = torch.full((block,), 0.5 / levels, dtype=F64)  # half a step each, and one number that sets the step
        worst[0] = -1.0
        for v, least in ((worst, 0.7), (normal(block), 0.01)):
            got = through(CodecRule(f"int{bits}", block), v.expand(500, -1), at(range(500)))
            error = ((got - v) ** 2).sum(1).mean() / (v @ v)
            assert least * bound < error < block / (4 * levels**2) < 1.01 * bound
            assert ((got - v).abs() <= v.abs().max() / levels * 1.0001).all()


def test_casts_keep_every_numbers_digits():
    v = normal(1, 1000) * 10.0 ** torch.randint(-3, 4, (1000,))
    for name, most in (("bfloat16", 2**-8), ("float16", 2**-11)):
        away = ((through(RULES[name], v, at([0])) - v) / v).abs()
        assert 0 < away[v.abs() > 1e-4].max() <= most
    even = through(RULES["bfloat16"], torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8]]), at([0]))
    assert even.tolist() == [[1.0, 1 + 2**-6]]
    assert torch.equal(through(RULES["float32"], v, at([0])), v)


def test_top_k_is_contractive_and_takes_the_lower_of_equal_numbers():
    for v in (normal(9), torch.ones(9, dtype=F64), torch.zeros(9, dtype=F64), torch.eye(9, dtype=F64)[4]):
        got = through(CodecRule("topk", 3 / 9), v[None], at([0]))[0]
        assert ((got - v) ** 2).sum() <= (1 - 3 / 9) * (v @ v) + 1e-12
    tied = torch.tensor([[1.0, -2.0, 2.0, 3.0, -2.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    got = through(CodecRule("topk", 0.5), tied, at([0, 1]))
    assert got.tolist() == [[0, -2, 2, 3, 0, 0], [5, 5, 5, 0, 0, 0]]


def test_random_k_draws_every_place_alike_and_errs_by_what_it_claims():
    v, many = normal(4), 8000
    got = through(CodecRule("randomk", 0.25), v.expand(many, -1), at(range(many)))
    assert (((got != 0).sum(1)) == 1).all()
    assert torch.isin(got, torch.cat([v, v.new_zeros(1)])).all()
    assert ((got != 0).double().mean(0) - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / many)
    error = ((got - v) ** 2).sum(1).mean() / (v @ v)
    assert abs(error - 0.75) < 0.02


def test_low_rank_is_a_projection_and_goes_to_the_svd():
    rule, address = CodecRule("lowrank", 2), at([0, 1])
    left, right = (torch.linalg.qr(normal(2, n, 7, seed=n)).Q for n in (8, 7))
    codec, M = codec_of(rule), left * 3.0 ** -torch.arange(7, dtype=F64) @ right
    state, best = codec.start((8, 7), F64, address), torch.linalg.svdvals(M)[:, 2:].square().sum(1)
    for count in range(12):
        payload, state = codec.encode(M, address, state)
        C = codec.decode(payload, (8, 7), F64, address)
        parts = [(T**2).sum((1, 2)) for T in (M, C, M - C)]
        torch.testing.assert_close(parts[0], parts[1] + parts[2], rtol=1e-10, atol=0)
        assert count or (parts[2] > 1.001 * best).all()
    torch.testing.assert_close(parts[2], best, rtol=1e-6, atol=0)
    again, _ = codec.encode(torch.zeros_like(M), address, state)
    lost = {"Q": codec.encode(torch.zeros_like(M), address, state)[1]["Q"]}
    assert not codec.decode(again, (8, 7), F64, address).any()
    assert not lost["Q"].any()
    low = torch.zeros(2, 8, 7, dtype=F64)
    low[:, 5:] = M[:, 5:] * torch.tensor([1.0, 0, 0], dtype=F64)[:, None]  # rank 1, below the first rows
    payload, _ = codec.encode(low, address, lost)
    torch.testing.assert_close(codec.decode(payload, (8, 7), F64, address), low)


@table(
    "name, shape, exact",
    [
        ("topk 1", (5, 4), True),
        ("randomk 1", (5, 4), True),
        ("lowrank", (9, 8), True),
        ("lowrank", (5, 2), True),
        ("lowrank", (7,), True),
        ("lowrank", (), True),
        ("topk", (5, 4), False),
        ("int8", (5, 4), False),
    ],
)
def test_what_comes_back_exactly(name, shape, exact):
    rule = CodecRule(name.split()[0], 1.0) if name.endswith("1") else RULES[name]
    rows = normal(3, *shape)
    if shape == (9, 8):
        rows = normal(3, 9, 2) @ normal(3, 2, 8, seed=1)
    got = through(rule, rows, at([0, 1, 2]))
    assert got.shape == rows.shape
    assert torch.allclose(got, rows, rtol=1e-10, atol=1e-12) == exact


def by_hand(name, d, item, matrix):
    """Bytes as docs say: of d numbers of `item` bytes; matrix: (n, m) of one that low rank takes apart."""
    k = math.ceil(0.3 * d)
    return {
        "float32": item * d,
        "bfloat16": 2 * d,
        "float16": 2 * d,
        "int8": d + 4 * math.ceil(d / 256),
        "int8 by 5": d + 4 * math.ceil(d / 5),
        "int4": math.ceil(d / 2) + 4 * math.ceil(d / 64),
        "int4 by 3": math.ceil(d / 2) + 4 * math.ceil(d / 3),
        "topk": (item + 4) * k,
        "randomk": item * k,
        "randomk scaled": item * k,
        "lowrank": item * (2 * sum(matrix) if matrix else d),
    }[name]


@table("shape, matrix", [((), None), ((1,), None), ((7,), None), ((3, 3), None), ((9, 8), (9, 8)), ((6, 3, 3), (6, 9))])
def test_a_message_takes_the_bytes_that_are_counted(shape, matrix):
    for name, rule in RULES.items():
        for dtype, item in ((torch.float32, 4), (F64, 8), (torch.bfloat16, 2)):
            codec, rows = codec_of(rule), normal(3, *shape, dtype=dtype)
            payload, _ = codec.encode(rows, at([0, 1, 2]), codec.start(shape, dtype, at([0, 1, 2])))
            want = by_hand(name, math.prod(shape), item, matrix)
            assert payload_bytes(payload) == codec.num_bytes(shape, dtype) == want, (name, dtype)
            assert codec.decode(payload, shape, dtype, at([0, 1, 2])).dtype == dtype


@table("name", RULES)
def test_a_clients_bits_do_not_depend_on_who_stands_beside_it(name):
    rows, ids = normal(5, 9, 8, dtype=torch.float32), torch.tensor([2, 3, 5, 11, 40])
    whole = through(RULES[name], rows, at(ids))
    alone = [through(RULES[name], rows[i : i + 1], at(ids[i : i + 1])) for i in range(5)]
    assert torch.equal(whole, torch.cat(alone))
    other = torch.tensor([4, 0, 2])
    assert torch.equal(through(RULES[name], rows[other], at(ids[other])), whole[other])


@table("name", RULES)
def test_what_is_no_number_is_seen_at_the_other_end(name):
    for bad in (math.nan, math.inf):
        rows = normal(2, 9, 8, dtype=torch.float32)
        rows[1, 3, 3] = bad
        got = through(RULES[name], rows, at([0, 1]))
        assert torch.isfinite(got[0]).all()
        if "randomk" not in name:  # which may not have drawn the place; then e holds it
            assert not torch.isfinite(got[1]).all()


def test_a_block_is_no_larger_than_the_tensor():
    rule = CodecRule("int8", 2_000_000_000, plain=True)
    codec, rows = codec_of(rule), normal(2, 5)
    payload, _ = codec.encode(rows, at([0, 1]), {})
    assert payload_bytes(payload) == codec.num_bytes((5,), F64) == 5 + 4
    torch.testing.assert_close(codec.decode(payload, (5,), F64, at([0, 1])), rows, rtol=0, atol=0.04)

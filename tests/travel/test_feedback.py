"""Feedback of what a codec leaves behind: its law, and examples that can be followed by hand."""

import torch

from fedmom.method.state import ClientState
from fedmom.method.states.rules import CodecRule
from fedmom.travel.feedback import Senders, bytes_of, is_kept, kept_before, sent
from laws import table

F64 = torch.float64
A = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=F64)


def senders(count, round_index):
    return Senders(0, torch.arange(count), round_index)


def state(**tensors):
    """x of these, u of those whose names begin with u_, other states by their own names."""
    own = {n: v for n, v in tensors.items() if n.startswith(("u_", "m_", "v_"))}
    momentum = {n.removeprefix("u_").replace("m_", "m/").replace("v_", "v/"): v for n, v in own.items()}
    return ClientState({n: v for n, v in tensors.items() if n not in own}, momentum, {})


LAW = {
    "bfloat16": CodecRule("bfloat16"),
    "int8": CodecRule("int8", 4),
    "int4": CodecRule("int4", 4),
    "topk": CodecRule("topk", 0.3),
    "randomk": CodecRule("randomk", 0.3),
    "lowrank": CodecRule("lowrank", 1),
}


@table("name", LAW)
def test_what_is_common_and_what_is_kept_move_together_by_the_mean_change(name):
    """ŝ + Σ p_i e_i moves by exactly Σ p_i (s_i − ŝ), in x and in u, over rounds and with unequal weights."""
    N, p = 3, torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    rules, generator = {"x": LAW[name], "u": LAW[name]}, torch.Generator().manual_seed(1)
    common = {n: torch.randn(5, 4, generator=generator, dtype=F64) for n in ("w", "u_w")}
    kept = kept_before(rules, state(**common), N)
    assert {"e/params/w", "e/momentum/w"} <= {*kept}
    assert all(map(is_kept, kept))
    for round_index in range(4):
        e = {"w": kept["e/params/w"], "u_w": kept["e/momentum/w"]}
        ended = {n: v + 0.1 * torch.randn(N, 5, 4, generator=generator, dtype=F64) for n, v in common.items()}
        arrived, kept = sent(rules, state(**ended), state(**common), kept, senders(N, round_index))
        for n, tree, slot in (("w", arrived.params, "params"), ("u_w", arrived.momentum, "momentum")):
            after, left = torch.tensordot(p, tree["w"], 1), torch.tensordot(p, kept[f"e/{slot}/w"], 1)
            change = torch.tensordot(p, ended[n] - common[n], 1)
            torch.testing.assert_close(
                after + left - common[n] - torch.tensordot(p, e[n], 1), change, rtol=0, atol=1e-12
            )
            assert left.abs().max() > 1e-6
            common[n] = after


def three_clients(rule, rounds, lr):
    """f_i = (a_i·x)² + |x|²/4 from (1, 1, 1), one step per round -> x after each."""
    x, kept, path = torch.ones(3, dtype=F64), {}, []
    for round_index in range(rounds):
        ended = x - lr * (2 * A * (A @ x)[:, None] + x / 2)
        arrived, kept = sent({"x": rule}, state(w=ended), state(w=x), kept, senders(3, round_index))
        x = arrived.params["w"].mean(0)
        path.append(x)
    return path


def test_top_1_goes_the_wrong_way_alone_and_ends_right_with_feedback():
    lr = 0.02
    alone = three_clients(CodecRule("topk", 1 / 3, plain=True), 3, lr)
    torch.testing.assert_close(alone[-1], torch.full((3,), (1 + 11 * lr / 6) ** 3, dtype=F64), rtol=1e-10, atol=0)
    path = three_clients(CodecRule("topk", 1 / 3), 300, lr)
    want = torch.tensor([0.914467, 0.975567, 1.036667], dtype=F64)
    torch.testing.assert_close(path[1], want, rtol=0, atol=5e-7)
    assert path[-1].norm() < 0.02


def test_scaled_random_k_explodes_with_feedback_and_as_it_is_does_not():
    h = torch.tensor([[0.5, 1, 2], [2, 0.5, 1], [1, 2, 0.5]], dtype=F64)
    c = torch.tensor([[-1.0, 2, 0], [3, 0, 1], [0, 1, -2]], dtype=F64)
    sizes = {}
    for scaled in (False, True):
        x, kept = torch.zeros(3, dtype=F64), {}
        for round_index in range(60):
            rule = CodecRule("randomk", 1 / 3, scaled=scaled)
            arrived, kept = sent(
                {"x": rule}, state(w=x - 0.05 * h * (x - c)), state(w=x), kept, senders(3, round_index)
            )
            x = arrived.params["w"].mean(0)
        sizes[scaled] = kept["e/params/w"].norm()
    assert sizes[False] < 10
    assert sizes[True] > 1e5


def test_x_in_few_bits_moves_by_changes_that_its_format_would_lose():
    """−0.001 a round from 1: x itself in bfloat16 would stay at 1."""
    x, kept = torch.ones(1), {}
    for round_index in range(100):
        rules = {"x": CodecRule("bfloat16", plain=True)}
        arrived, kept = sent(rules, state(w=x[None] - 0.001), state(w=x), kept, senders(1, round_index))
        x = arrived.params["w"][0]
    assert abs(float(x) - 0.9) < 1e-3
    assert not kept
    assert (torch.ones(1).bfloat16() - 0.001).bfloat16() == 1


def test_v_stays_positive_and_keeps_its_small_numbers():
    """v falls far at one client and is tiny at another: its change in bfloat16 would take it to 0 or below."""
    rules = {"v": CodecRule("bfloat16")}
    begun = torch.tensor([1.001, 1.0, 1e-6], dtype=F64)
    ended = torch.tensor([[1e-6, 2.0, 1.1e-6], [0.9, 1e-3, 0.0]], dtype=F64)
    change = (ended - begun).bfloat16().double()
    assert (begun + change)[ended > 0].min() < 1e-7  # the trap
    kept, common = kept_before(rules, state(v_w=begun), 2), begun
    for round_index in range(3):
        e = kept["e/momentum/v/w"]
        arrived, kept = sent(rules, state(v_w=ended), state(v_w=common), kept, senders(2, round_index))
        got = arrived.momentum["v/w"]
        assert (got >= 0.49 * ended).all()
        assert ((got > 0) == (ended > 0)).all()
        left = kept["e/momentum/v/w"]
        torch.testing.assert_close(got + left, ended + e, rtol=1e-12, atol=0)
        common = got.mean(0)
    plain = sent({"v": CodecRule("bfloat16", plain=True)}, state(v_w=ended), state(v_w=begun), {}, senders(2, 0))[0]
    torch.testing.assert_close(plain.momentum["v/w"], ended, rtol=2**-8, atol=0)


def test_what_is_no_real_tensor_of_a_named_state_travels_as_it_is():
    clock, count, empty = torch.ones(()), torch.ones((), dtype=torch.int64), torch.zeros(0)
    assert [
        *sent(
            {"x": CodecRule("topk", 0.25)},
            state(**{"a.clock/b": torch.ones(1, 4)}),
            state(**{"a.clock/b": torch.zeros(4)}),
            {},
            senders(1, 0),
        )[1]
    ] == ["e/params/a.clock/b"]
    one = ClientState({"w": torch.ones(4), "none": empty}, {"m/w": torch.ones(4), "m.clock/w": clock}, {"n": count})
    rules = {"x": CodecRule("topk", 0.25), "m": CodecRule("int8", 4)}
    rows = ClientState(*({n: v[None] for n, v in tree.items()} for tree in one))
    assert {*kept_before(rules, one, 1)} == {"e/params/w", "e/momentum/m/w"}
    arrived, _ = sent(rules, rows, one, {}, senders(1, 0))
    assert [*arrived.momentum] == ["m/w", "m.clock/w"]
    assert torch.equal(arrived.momentum["m.clock/w"], clock[None])
    assert torch.equal(arrived.buffers["n"], count[None])
    assert arrived.params["none"].shape == (1, 0)
    counted = {f"{p}/{n}": bytes_of(rules, p, n, v) for p, tree in one._asdict().items() for n, v in tree.items()}
    want = {"params/w": 8, "params/none": 0, "momentum/m/w": 8, "momentum/m.clock/w": 4, "buffers/n": 8}
    assert counted == want


def test_one_client_alone_sends_what_it_sends_among_others():
    rules, start = {"x": LAW["int8"], "u": LAW["lowrank"]}, state(w=torch.ones(5, 4), u_w=torch.zeros(5, 4))
    rows = state(w=torch.randn(4, 5, 4), u_w=torch.randn(4, 5, 4))
    whole, kept = sent(rules, rows, start, {}, senders(4, 3))
    for i in range(4):
        row = ClientState(*({n: v[i : i + 1] for n, v in tree.items()} for tree in rows))
        alone, own = sent(rules, row, start, {}, Senders(0, torch.tensor([i]), 3))
        assert torch.equal(alone.params["w"][0], whole.params["w"][i])
        assert all(torch.equal(own[n][0], kept[n][i]) for n in kept)

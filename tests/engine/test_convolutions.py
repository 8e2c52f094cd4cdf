"""Every way to convolve with clients' own weights is one convolution per client; the fastest is found once."""

import itertools
import json

import pytest
import torch

from fedmom.engine.stacked.convolutions import CONVOLUTIONS, Ways
from fedmom.engine.stacked.timings import Timings
from laws import table

# (K, B, in, height, width, out, kernel, stride, padding, dilation, bias)
SHAPES = {
    "plain": (2, 3, 3, 8, 7, 5, 3, 1, 1, 1, True),
    "one client": (1, 2, 4, 6, 6, 17, 3, 2, 1, 1, False),
    "1x1 with stride": (3, 1, 2, 9, 9, 4, 1, 2, 0, 1, True),
    "dilated": (2, 2, 3, 9, 8, 6, 3, 1, 2, 2, True),
    "one position": (2, 2, 1, 3, 3, 1, 3, 1, 0, 1, False),
    "more channels than a tile": (2, 1, 70, 4, 4, 70, 3, 1, 1, 1, False),
}

FOLDED = [name for name in CONVOLUTIONS if name != "loop"]


def operands(shape, dtype, shared):
    K, B, size_in, H, W, out, kernel, stride, padding, dilation, has_bias = shape
    generator = torch.Generator().manual_seed(0)

    def drawn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    def rows(*size):
        return drawn(1, *size).expand(K, *size) if shared else drawn(K, *size)

    x = drawn(K * B, size_in, H, W).contiguous(memory_format=torch.channels_last)
    weight, bias = rows(out, size_in, kernel, kernel), rows(out) if has_bias else None
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    return leaves, ((stride,) * 2, (padding,) * 2, (dilation,) * 2, False, [0, 0], 1)


def passed(convolve, leaves, shared, options):
    """The result and the gradients of all operands."""
    y = convolve(*leaves, shared, options)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], torch.cos(y.detach()))


# Every way with every shape in some dtype, with clients' own weights and with shared ones in both dtypes.
KINDS = itertools.cycle([(torch.float64, False), (torch.float64, True), (torch.float32, False), (torch.float32, True)])


@pytest.mark.slow  # a fast one, in a model: test_stacked.py
@table("name, shape, kind", [(*pair, next(KINDS)) for pair in itertools.product(FOLDED, SHAPES)])
def test_every_way_is_one_convolution_per_client(name, shape, kind):
    """The plain way: torch's own convolution on each client's examples and weights."""
    dtype, shared = kind
    tolerance = 1e-12 if dtype == torch.float64 else 5e-5
    leaves, options = operands(SHAPES[shape], dtype, shared)
    found = passed(CONVOLUTIONS[name], leaves, shared, options)
    want = passed(CONVOLUTIONS["loop"], leaves, False, options)
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def test_the_loop_is_torchs_convolution():
    leaves, options = operands(SHAPES["plain"], torch.float64, False)
    x, weight, bias = leaves
    apart = [torch.nn.functional.conv2d(*row, padding=1) for row in zip(x.chunk(2), weight, bias, strict=True)]
    torch.testing.assert_close(CONVOLUTIONS["loop"](*leaves, False, options), torch.cat(apart))


@table("name, geometry", itertools.product(FOLDED, [((1, 2), (0, 0), (1, 1)), ((1, 1), (0, 1), (1, 1))]))
def test_directions_may_differ(name, geometry):
    leaves, _ = operands(SHAPES["plain"], torch.float64, False)
    options = (*geometry, False, [0, 0], 1)
    found, want = (passed(CONVOLUTIONS[way], leaves, False, options) for way in (name, "loop"))
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right)


def test_without_a_gpu_the_kernels_say_so(monkeypatch):
    leaves, options = operands(SHAPES["plain"], torch.float32, False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA"):
        CONVOLUTIONS["implicit"](*leaves, False, options)


# Choosing


@pytest.fixture
def no_triton(monkeypatch):
    """Interpreted kernels would take their time to lose."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpus_choice_does_not_depend_on_timing():
    """Small images in groups, large ones one by one; the same in every run."""
    for side, want in ((8, "grouped"), (32, "loop")):
        leaves, options = operands((2, 1, 1, side, side, 1, 3, 1, 1, 1, False), torch.float32, False)
        assert Ways().way(*leaves, False, options) == want


def test_the_fastest_is_found_once_and_kept_on_disk(tmp_path, monkeypatch, no_triton):
    path = tmp_path / "new" / "timings.json"
    leaves, options = operands(SHAPES["plain"], torch.float32, False)
    ways = Ways(Timings(path))
    chosen = ways.way(*leaves, False, options)
    (shape,), known = ways.chosen, json.loads(path.read_text())
    assert known[shape][chosen] == min(known[shape].values())
    assert {"loop", "grouped", "unfold"} <= known[shape].keys()  # implicit: no device, so it is no candidate
    assert "implicit" not in known[shape]
    known[shape]["unfold"] = 0.0
    path.write_text(json.dumps(known))
    monkeypatch.setattr(Timings, "measure", lambda *_: pytest.fail("measured again"))
    assert Ways(Timings(path)).way(*leaves, False, options) == "unfold"


def test_shared_weights_and_another_size_are_shapes_of_their_own(tmp_path, no_triton):
    ways = Ways(Timings(tmp_path / "timings.json"))
    for shape in ("plain", "dilated"):
        for shared in (False, True):
            leaves, options = operands(SHAPES[shape], torch.float32, shared)
            ways.way(*leaves, shared, options)
    assert len(ways.chosen) == 4


def test_a_broken_file_is_made_anew(tmp_path):
    path = tmp_path / "timings.json"
    for text in ("", "{", "[]", '{"a": 1}', '{"a": {"loop": "fast"}}'):
        path.write_text(text)
        timings = Timings(path)
        assert timings.known == {}
        timings.put("shape", {"loop": 1.0})
        assert Timings(path).get("shape") == {"loop": 1.0}


def test_what_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    timings = Timings(tmp_path / "file" / "timings.json")
    timings.put("shape", {"loop": 1.0})
    assert timings.get("shape") == {"loop": 1.0}


def test_two_processes_keep_what_the_other_wrote(tmp_path):
    one, other = Timings(tmp_path / "t.json"), Timings(tmp_path / "t.json")
    one.put("a", {"loop": 1.0})
    other.put("b", {"loop": 2.0})
    assert set(Timings(tmp_path / "t.json").known) == {"a", "b"}

"""2d convolutions with the weights of K clients as Triton kernels: matrix products whose operands are never unfolded.

Rows are positions of the result, columns its channels, and the sum runs over (kernel row, kernel column, channel), the
channel fastest, as activations lie in channels-last memory. Needs CUDA, or Triton's interpreter for tests
(TRITON_INTERPRET=1). Sums are float32, or float64 for float64 operands.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmom.machine.precision import convolves_in_tf32


@triton.jit
def _convolve(
    source, weight, bias, result, B, M, HEIGHT, WIDTH, ROWS, COLUMNS,
    s_image, s_channel, s_row, s_column, w_client, w_result, w_source, r_image, r_channel, r_row, r_column,
    CHANNELS: tl.constexpr, RESULTS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    PAD: tl.constexpr, DILATION: tl.constexpr, BACK: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """result[k, b, n, y, x] = Σ_{r,q,c} source[k, b, c, ·, ·] weight[k, n, c, r, q]: HEIGHT × WIDTH -> ROWS × COLUMNS.

    BACK: the gradient of the activations, where n and c have changed places and so has the stride.
    """
    client = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    image, place = m // (ROWS * COLUMNS), m % (ROWS * COLUMNS)
    row, column = place // COLUMNS, place % COLUMNS
    image = client * B + image
    total = tl.zeros((BM, BN), dtype=SUM)
    for first in range(0, CHANNELS * KH * KW, BK):
        p = first + tl.arange(0, BK)
        channel, tap = p % CHANNELS, p // CHANNELS
        r, q = tap // KW, tap % KW
        if BACK:
            y = row[:, None] + PAD - r[None, :] * DILATION
            x = column[:, None] + PAD - q[None, :] * DILATION
            there = (y >= 0) & (x >= 0) & (y % STRIDE == 0) & (x % STRIDE == 0)
            y, x = y // STRIDE, x // STRIDE
        else:
            y = row[:, None] * STRIDE - PAD + r[None, :] * DILATION
            x = column[:, None] * STRIDE - PAD + q[None, :] * DILATION
            there = (y >= 0) & (x >= 0)
        there = there & (y < HEIGHT) & (x < WIDTH) & (m < M)[:, None] & (p < CHANNELS * KH * KW)[None, :]
        at = image[:, None] * s_image + channel[None, :] * s_channel + y * s_row + x * s_column
        a = tl.load(source + at, mask=there, other=0.0)
        at = client * w_client + n[None, :] * w_result + channel[:, None] * w_source + tap[:, None]
        b = tl.load(weight + at, mask=(n < RESULTS)[None, :] & (p < CHANNELS * KH * KW)[:, None], other=0.0)
        total += tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)
    if BIAS:
        total += tl.load(bias + client * RESULTS + n, mask=n < RESULTS, other=0.0)[None, :]
    at = image[:, None] * r_image + n[None, :] * r_channel + row[:, None] * r_row + column[:, None] * r_column
    tl.store(result + at, total, mask=(m < M)[:, None] & (n < RESULTS)[None, :])


@triton.jit
def _weights(
    source, gradient, result, B, M, HEIGHT, WIDTH, ROWS, COLUMNS,
    s_image, s_channel, s_row, s_column, g_image, g_channel, g_row, g_column,
    CHANNELS: tl.constexpr, RESULTS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr,
    PAD: tl.constexpr, DILATION: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """result[k, n, c, r, q] = Σ_{b,y,x} gradient[k, b, n, y, x] source[k, b, c, ·, ·]."""
    client = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    channel, tap = p % CHANNELS, p // CHANNELS
    r, q = tap // KW, tap % KW
    total = tl.zeros((BM, BN), dtype=SUM)
    for first in range(0, M, BK):
        m = first + tl.arange(0, BK)
        image, place = m // (ROWS * COLUMNS), m % (ROWS * COLUMNS)
        row, column = place // COLUMNS, place % COLUMNS
        image = client * B + image
        at = image[None, :] * g_image + n[:, None] * g_channel + row[None, :] * g_row + column[None, :] * g_column
        a = tl.load(gradient + at, mask=(n < RESULTS)[:, None] & (m < M)[None, :], other=0.0)
        y = row[:, None] * STRIDE - PAD + r[None, :] * DILATION
        x = column[:, None] * STRIDE - PAD + q[None, :] * DILATION
        there = (y >= 0) & (x >= 0) & (y < HEIGHT) & (x < WIDTH)
        there = there & (m < M)[:, None] & (p < CHANNELS * KH * KW)[None, :]
        at = image[:, None] * s_image + channel[None, :] * s_channel + y * s_row + x * s_column
        b = tl.load(source + at, mask=there, other=0.0)
        total += tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)
    at = (client * RESULTS + n[:, None]) * (CHANNELS * KH * KW) + channel[None, :] * (KH * KW) + tap[None, :]
    tl.store(result + at, total, mask=(n < RESULTS)[:, None] & (p < CHANNELS * KH * KW)[None, :])


class Implicit(torch.autograd.Function):
    """x [K·B, in, H, W], weight [K, out, in, kh, kw], bias [K, out] or None -> [K·B, out, H', W'].

    Stride, padding and dilation are the same in both directions, and there are no groups.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool, options: Any) -> Tensor:
        stride, padding, dilation = options[:3]
        ctx.geometry = (stride[0], padding[0], dilation[0])
        ctx.shared, ctx.options, ctx.has_bias = shared, options, bias is not None
        ctx.save_for_backward(x, weight)
        if shared:
            return torch.convolution(x, weight[0], None if bias is None else bias[0], *options)
        sides = zip(x.shape[2:], weight.shape[3:], strict=True)
        size = [(n + 2 * padding[0] - dilation[0] * (k - 1) - 1) // stride[0] + 1 for n, k in sides]
        shape = (len(x), weight.shape[1], *size)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return _launch(x, weight.contiguous(), bias, y, ctx.geometry, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d,), (x, weight) = grads, ctx.saved_tensors
        before = None
        if ctx.needs_input_grad[0] and ctx.shared:
            ask = [True, False, False]
            before = torch.ops.aten.convolution_backward(d, x, weight[0], None, *ctx.options, ask)[0]
        elif ctx.needs_input_grad[0]:
            before = torch.empty_like(x, memory_format=torch.channels_last)
            _launch(d, weight.contiguous(), None, before, ctx.geometry, back=True)
        own = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        _launch_weights(x, d, own, ctx.geometry)
        bias = d.reshape(len(weight), -1, *d.shape[1:]).sum((1, 3, 4)) if ctx.has_bias else None
        return before, own, bias, None, None


def _launch(
    source: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, geometry: Any, *, back: bool
) -> Tensor:
    K, out, size_in, KH, KW = weight.shape
    channels, results = (out, size_in) if back else (size_in, out)
    B, (ROWS, COLUMNS) = len(source) // K, result.shape[2:]
    M = B * ROWS * COLUMNS
    apart = (size_in * KH * KW, KH * KW)  # from one of weight's output channels, input channels, to the next
    strides = (*source.stride(), out * apart[0], *(apart[::-1] if back else apart), *result.stride())
    BM, BN, BK = 64, min(64, max(16, triton.next_power_of_2(results))), 32
    grid = (triton.cdiv(M, BM), triton.cdiv(results, BN), K)
    bias = weight if bias is None or back else bias.contiguous()
    _convolve[grid](
        source, weight, bias, result, B, M, *source.shape[2:], ROWS, COLUMNS, *strides,
        channels, results, KH, KW, *geometry, back, bias is not weight, *_sums(source), BM, BN, BK,
    )  # fmt: skip
    return result


def _launch_weights(source: Tensor, gradient: Tensor, result: Tensor, geometry: Any) -> None:
    K, out, size_in, KH, KW = result.shape
    B, (ROWS, COLUMNS) = len(source) // K, gradient.shape[2:]
    BM, BN, BK = min(64, max(16, triton.next_power_of_2(out))), 64, 32
    grid = (triton.cdiv(out, BM), triton.cdiv(size_in * KH * KW, BN), K)
    _weights[grid](
        source, gradient, result, B, B * ROWS * COLUMNS, *source.shape[2:], ROWS, COLUMNS,
        *source.stride(), *gradient.stride(), size_in, out, KH, KW, *geometry, *_sums(source), BM, BN, BK,
    )  # fmt: skip


def _sums(operand: Tensor) -> tuple[Any, str]:
    """What sums are held in, and how exact a product is: as torch's own convolutions are asked to be."""
    precision = "tf32" if convolves_in_tf32(operand) else "ieee"
    return tl.float64 if operand.dtype == torch.float64 else tl.float32, precision

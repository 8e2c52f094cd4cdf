"""What people do to the backward pass: checkpoints, detach, functions of their own, hooks, scripts."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.parts import CLASSES, SIZE, Fn, conv, flat, head, model, seq


def _checkpointed(block: nn.Module, *, use_reentrant: bool) -> nn.Module:
    def forward(m, x):
        return m.out(checkpoint(m.block, m.body(x), use_reentrant=use_reentrant))

    return Fn(forward, body=flat(8), block=block, out=nn.Linear(8, CLASSES))


@model("checkpoint(use_reentrant=False) around convolutions", vmap="saved tensor hooks")
def checkpoint_conv(shape, classes):
    def forward(m, x):
        return m.head(checkpoint(m.block, m.stem(x), use_reentrant=False))

    return Fn(forward, stem=conv(2, 4), block=seq(conv(4, 4), nn.ReLU(), conv(4, 4)), head=head(4))


@model("checkpoint(use_reentrant=False) around a Linear layer", vmap="saved tensor hooks")
def checkpoint_dense(shape, classes):
    return _checkpointed(seq(nn.Linear(8, 8), nn.Tanh()), use_reentrant=False)


@model("checkpoint(use_reentrant=True)", vmap="setup_context")
def checkpoint_reentrant(shape, classes):
    return _checkpointed(seq(nn.Linear(8, 8), nn.Tanh()), use_reentrant=True)


@model("a branch behind detach()")
def detached(shape, classes):
    def forward(m, x):
        h = m.body(x)
        return m.out(h + torch.tanh(m.side(h)).detach())

    return Fn(forward, body=flat(8), side=nn.Linear(8, 8), out=nn.Linear(8, classes))


@model("a teacher under no_grad")
def teacher(shape, classes):
    def forward(m, x):
        with torch.no_grad():
            target = torch.tanh(m.teacher(x))
        h = torch.tanh(m.student(x))
        return m.out(h * target)

    return Fn(forward, student=flat(8), teacher=flat(8), out=nn.Linear(8, classes))


@model("straight-through rounding (a quantised layer)")
def straight_through(shape, classes):
    def forward(m, x):
        h = torch.sigmoid(m.body(x))
        return m.out(h + ((h > 0.5).to(h.dtype) - h).detach())

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("vector quantisation: the nearest code, straight through", stack="Fn holds codes itself")
def vector_quantised(shape, classes):
    def forward(m, x):
        h = m.body(x)
        near = m.codes[torch.cdist(h, m.codes).argmin(1)]
        return m.out(h + (near - h).detach() + 0.1 * (near - near.detach()))

    return Fn(forward, body=flat(4), codes=nn.Parameter(torch.randn(6, 4)), out=nn.Linear(4, classes))


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -0.5 * grads[0]


@model("gradient reversal by an autograd.Function", vmap="setup_context")
def gradient_reversal(shape, classes):
    return seq(flat(8), nn.Tanh(), _Reversed.apply, nn.Linear(8, classes))


class _Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


@model("an autograd.Function with a rule for vmap")
def function_with_rule(shape, classes):
    return seq(flat(8), nn.Tanh(), _Cube.apply, nn.Linear(8, classes))


@model("an autograd.Function that goes through NumPy", vmap="setup_context", stack="asks for values")
def function_in_numpy(shape, classes):
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(np.sin(x.detach().numpy()))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.saved_tensors[0].cos()

    return seq(flat(8), Sine.apply, nn.Linear(8, classes))


@model("deep equilibrium: iterations under no_grad, one step with gradients")
def equilibrium(shape, classes):
    def forward(m, x):
        u = m.body(x)
        with torch.no_grad():
            h = torch.zeros_like(u)
            for _ in range(8):
                h = torch.tanh(m.step(h) + u)
        return m.out(torch.tanh(m.step(h) + u))

    return Fn(forward, body=flat(6), step=nn.Linear(6, 6), out=nn.Linear(6, classes))


@model("a gradient within forward (energy model)", stack="differ")
def inner_gradient(shape, classes):
    def forward(m, x):
        h = m.body(x)
        with torch.enable_grad():
            h = h if h.requires_grad else h.requires_grad_()
            (force,) = torch.autograd.grad(torch.tanh(m.energy(h)).sum(), h, create_graph=True)
        return m.out(h - 0.1 * force)

    return Fn(forward, body=flat(6), energy=nn.Linear(6, 1), out=nn.Linear(6, classes))


@model("a hook on a parameter's gradient (clamp)", vmap="differs from plain torch's", stack="a hook on the parameter")
def parameter_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    for p in made.parameters():
        p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return made


@model(
    "register_post_accumulate_grad_hook on a parameter",
    vmap="differs from plain torch's",
    stack="a hook on the parameter",
)
def accumulate_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))

    def shrink(p: Tensor) -> None:
        p.grad.mul_(0.1)

    made[2].weight.register_post_accumulate_grad_hook(shrink)
    return made


@model("a hook on an activation's gradient")
def activation_hook(shape, classes):
    def forward(m, x):
        h = m.body(x)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return m.out(torch.tanh(h))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("forward hooks on modules that change what comes out", stack="has forward hooks of its own")
def forward_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made[0][1].register_forward_hook(lambda m, args, out: 2 * out)
    made[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return made


@model("full backward hooks on modules", vmap="setup_context", stack="has backward hooks of its own")
def backward_hook(shape, classes):
    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made[1].register_full_backward_hook(lambda m, before, after: (before[0] * 0.5,))
    made[2].register_full_backward_hook(lambda m, before, after: (before[0] * 0.5,))
    return made


@model("torch.jit.script", everywhere="scripted by torch.jit")
def scripted(shape, classes):
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, classes)))


@model("torch.jit.trace of a part", everywhere="scripted by torch.jit")
def traced(shape, classes):
    part = torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.zeros(2, 8))
    return seq(flat(8), part, nn.Linear(8, classes))


@model("torch.compile around a part", vmap="cannot be stacked")
def compiled(shape, classes):
    part = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), backend="eager")
    return seq(flat(8), part, nn.Linear(8, classes))


@model("checkpoint(use_reentrant=False) around dropout", vmap="saved tensor hooks")
def checkpoint_dropout(shape, classes):
    block = seq(nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh())
    return _checkpointed(block, use_reentrant=False)


@model("checkpoint(use_reentrant=False) around BatchNorm, whose statistics then move twice", vmap="saved tensor hooks")
def checkpoint_norm(shape, classes):
    block = seq(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
    return _checkpointed(block, use_reentrant=False)


@model("activations saved on the CPU (save_on_cpu)", vmap="saved tensor hooks")
def saved_on_cpu(shape, classes):
    def forward(m, x):
        with torch.autograd.graph.save_on_cpu():
            h = torch.tanh(m.body(x))
        return m.out(h)

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


class _ReadsWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return h.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.layer.weight.norm(), None


@model("a backward function that reads a layer's weight", vmap="setup_context", stack="no attribute 'weight'")
def reads_weight_in_backward(shape, classes):
    return Fn(lambda m, x: m.out(_ReadsWeight.apply(m.body(x), m.out)), body=flat(8), out=nn.Linear(8, classes))


@model("logits that no gradient reaches", everywhere="does not require grad")
def no_gradient(shape, classes):
    return seq(flat(classes), Tensor.detach)


@model("features that a forward hook puts aside for the head")
def hooked_features(shape, classes):
    kept: dict[str, Tensor] = {}
    made = Fn(
        lambda m, x: m.out(m.late(m.early(x)) + kept["early"]), early=flat(8), late=nn.Tanh(), out=nn.Linear(8, classes)
    )
    made.early.register_forward_hook(lambda m, args, out: kept.update(early=out))
    return made


@model(
    "a step of gradient descent within forward (meta-learning)", stack="`inputs` argument to `grad()` cannot be empty"
)
def inner_step(shape, classes):
    def forward(m, x):
        h = torch.tanh(m.body(x))
        with torch.enable_grad():
            fast = dict(m.out.named_parameters())
            if not h.requires_grad:
                fast = {name: p.detach().requires_grad_() for name, p in fast.items()}
            loss = torch.func.functional_call(m.out, fast, (h,)).square().mean()
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        return torch.func.functional_call(m.out, fast, (h,))

    return Fn(forward, body=flat(8), out=nn.Linear(8, classes))


@model("an optimizer's step within backward (a hook that writes into weights)", everywhere="writes into the parameter")
def optimizer_in_backward(shape, classes):
    @torch.no_grad()
    def step(p: Tensor) -> None:
        p.sub_(0.1 * p.grad)
        p.grad = None

    made = seq(flat(8), nn.ReLU(), nn.Linear(8, classes))
    made[2].weight.register_post_accumulate_grad_hook(step)
    return made

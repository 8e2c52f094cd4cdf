"""docs/models.md, from the zoo: `python -m zoo.page` in tests/ writes it."""

from pathlib import Path

from zoo import GROUPS, ZOO, Model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START = """# Models that train

`model.name = "module:function"` takes any `nn.Module` that maps examples to logits.
A run either trains it as plain torch would, one client after another with `torch.optim.SGD` (in float64 to 1e-9 of \
how far all tensors moved), or refuses it in one line before the training starts.
The path changes the speed alone; `engine.path = "auto"` looks for the fastest one that is right:

| path | what it takes |
|---|---|
| `loop` | whatever torch trains repeatably |
| `vmap` | what `torch.func` and `torch.vmap` take |
| `stack`, `factors` | models made of layers that know of clients, with the examples of a batch apart |

Three things are refused on every path: random numbers that no address determines, state outside of buffers, and \
logits that no gradient reaches.
(`nn.Dropout` is allowed: its masks are replaced by addressed ones.)
fedmom looks for state in the modules, in objects that they hold, on your classes and functions, and in the global \
variables of their files.
A counter that only serves logging counts as state too: use Python's `logging` or a callback instead.

A parameter that a step does not reach has the gradient 0 in that step, on every path: u ← βu, and x moves by u; \
weight decay acts.
That is the method, and what `torch.optim.SGD` does with a `grad` of zeros.
Where `grad` is None, `torch.optim.SGD` skips the parameter; fedmom does not.

A model that splits its batch (ghost batch normalisation), or branches on the number of examples, is never stacked by \
`stack` or `factors`: `auto` takes `vmap` or `loop`.

## Transformers

`model.name = "gpt"` is a small GPT: token ids `[T]` in, a distribution over V tokens at each place out, for \
`data.task = "per-token"` alone.
`model.hidden` is its width, `model.layers` and `model.heads` how many layers and heads it has; V is the data set's \
number of classes.

In a model of your own `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` are stacked \
with `dropout=0.0` and `batch_first=True`.
`nn.MultiheadAttention` by itself may have the examples second; `add_bias_kv` and `add_zero_attn` are for `vmap`.
An `nn.Embedding` of positions is stacked when its index is the same for all examples: `[T]` or `[1, T]`.
One layer that embeds both words and positions is not.
A parameter `[1, …]` that a module holds itself (positions, a class token) is stacked; others are for `vmap`.

## Frozen parameters and adapters

`requires_grad_(False)` freezes a parameter: it is not trained, sent, averaged or counted in `bytes_sent`.
A frozen layer is one product for all stacked clients, so its memory does not grow with their number.

`model.lora-rank = r` freezes the whole model and trains an adapter beside each `nn.Linear` (Hu et al., ICLR 2022): \
W h + b becomes W h + b + B (A h), with B = 0 at the start and the scale 1.
A layer whose weight another module has too (a head that is tied to an embedding), and the inside of \
`nn.MultiheadAttention`, have no adapter.
In a `module:function` of your own, `fedmom.lora(model, rank)` does the same.

`model.start = "runs/base/final.safetensors"` begins from the x and the buffers of another run, before anything is \
frozen.
The names and shapes in the file must be the model's.
The file's content belongs to the run: a resume with another content is refused.
Every machine that trains clients needs the file under that name.

## What was tried

A test makes these tables: each of {count} small models runs on every path, for three rounds of three local steps \
with three unequal clients.
{loop} train on the loop, and {stacked} of them on a stacked path too.
"yes" means that the path gives plain torch's result; elsewhere the cell has the reason.
"""
# What torch's own words, or ours in a few, mean.
MEANINGS = {
    ".item()": "asks for a value",
    "aten::nonzero": "its shapes depend on values",
    "aten::div.out": "torch has no rule for it",
    "setup_context": "a Function without `setup_context`",
    "saved tensor hooks": "torch.func takes no saved-tensor hooks",
    "cannot be stacked": "torch has no rule for it",
    "differ": "a step differs from the loop's",
    "deepcopy protocol": "keeps tensors of a graph",
    "no attribute 'weight'": "uses a layer's weight itself",
    "view size is not compatible": "`view` wants another layout",
    "device cpu is not on the expected device meta": "a tensor that is no buffer",
}


def page() -> str:
    """The whole page."""
    trained = [made for made in ZOO.values() if "loop" not in made.refused]
    stacked = sum(len(made.refused) < 3 for made in trained)
    parts = [START.format(count=len(ZOO), loop=len(trained), stacked=stacked)]
    for group in GROUPS.values():
        rows = [_row(made) for made in trained if made.group == group]
        if rows:
            parts.append(
                "\n".join(
                    [
                        f"## {group}",
                        "",
                        "| model | `loop` | `vmap` | `stack`, `factors` |",
                        "|---|---|---|---|",
                        *rows,
                        "",
                    ]
                )
            )
    refused = [
        f"| {_cell(made.what)} | {_meaning(made.refused['loop'])} |" for made in ZOO.values() if "loop" in made.refused
    ]
    parts.append("\n".join(["## Refused on every path", "", "| model | why |", "|---|---|", *refused, ""]))
    return "\n".join(parts)


def _row(made: Model) -> str:
    vmap, stack, factors = (_meaning(made.refused.get(path, "")) for path in ("vmap", "stack", "factors"))
    both = stack if stack == factors else f"stack: {stack}; factors: {factors}"
    return f"| {_cell(made.what)} | yes | {vmap} | {both} |"


def _meaning(words: str) -> str:
    return _cell(MEANINGS.get(words, words)) or "yes"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

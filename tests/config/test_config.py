"""Configurations: TOML there and back, every key by itself, and what several keys decide together."""

import dataclasses
import math
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmom.config.keys import KEYS, LARGEST, SECTIONS, Config
from fedmom.config.load import Loaded, flat, load, parse_set, shipped, to_toml, toml_scalar
from fedmom.config.resolve import Resolved, resolve
from fedmom.errors import InputError
from fedmom.method.algorithms import ALGORITHMS, theory_interval
from fedmom.records.resume import length_keys
from laws import table

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))


def settled(**keys) -> Resolved:
    """Of {"section.key": value}, written section__key."""
    return resolve(load({name.replace("__", ".").replace("_", "-"): value for name, value in keys.items()}))


def refused(*words: str, source=None, sets=()) -> str:
    """The one line in which a configuration is refused; every word must be in it."""
    with pytest.raises(InputError) as error:
        resolve(load(source or {}, sets))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- keys ------------------------------------------------------------------------------------------------


def test_every_field_is_a_documented_key_in_kebab_case():
    fields = [(section, f) for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
    assert [f"{section}.{f.name.replace('_', '-')}" for section, f in fields] == list(KEYS) == list(flat(Config()))
    for name, key in KEYS.items():
        assert "_" not in name
        assert key.doc
        assert "\n" not in key.doc
        assert type(key.default) is key.type
    assert set(SECTIONS) == {f.name for f in dataclasses.fields(Config)}


def test_every_default_may_be_given():
    assert load(flat(Config())).config == Config()
    assert load({}).config == Config()


def test_every_named_choice_may_be_given_and_no_other():
    for name, key in KEYS.items():
        for choice in key.choices:
            assert flat(load({name: choice}).config)[name] == choice
        if key.choices:
            refused(name, "'nonsense'", next(iter(key.choices)), source={name: "nonsense"})


def test_flower_has_the_same_defaults():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tables = project["tool"]["flwr"]["app"]["config"]
    defaults = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    assert defaults == flat(Config())
    assert [type(value) for value in defaults.values()] == [type(defaults[name]) for name in flat(Config())]


# --- TOML ------------------------------------------------------------------------------------------------

ODD = ["", '"', "'", '"""', "a\nb", "\r\n", "\t", "\\n", "\x7f", "\x00", "\x1f", "é", "日本", "🎉", "\u2028", "# ="]
TEXT = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]))
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@given(TEXT, TEXT, POSITIVE, st.floats(0, 1, exclude_max=True), st.integers(0, LARGEST), st.booleans())
def test_toml_gives_the_configuration_back(tmp_path_factory, text, more, lr, beta, number, flag):
    config = load(
        {
            "data": {"data_dir": text, "centers": more, "num_clients": max(1, number)},
            "algorithm": {"lr": lr, "beta": beta, "nesterov": flag, "num_local_steps": number},
        }
    ).config
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(config, "two lines\nof comment"), encoding="utf-8")
    assert load(path) == Loaded(config, frozenset(KEYS))


@given(TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False))
def test_scalars_are_toml(value):
    back = tomllib.loads(f"value = {toml_scalar(value)}")["value"]
    assert (back, type(back)) == (value, type(value))


def test_a_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.toml").write_text("[run]\nseed = 3\n", encoding="utf-8-sig")
    assert load(tmp_path / "a.toml") == Loaded(load({"run.seed": 3}).config, frozenset({"run.seed"}))


@table(
    "content, words",
    [
        (b"", ["is empty", "data, model, algorithm"]),
        (b"# only a comment\n", ["is empty"]),
        (b"[algorithm\n", ["is not TOML", "line 1"]),
        (b"lr = 0.1\n", ["section = 'lr'", "choose one of data"]),
        (b"algorithm = 3\n", ["algorithm = 3", "[algorithm]"]),
        (b"[algorihm]\nlr = 1\n", ["'algorihm'", "did you mean algorithm?"]),
        (b"[algorithm]\nlr = 1\nlr = 2\n", ["is not TOML", "overwrite"]),
        (b"[algorithm]\nlr_min = 1.0\n", ["algorithm.lr_min is not a key", "did you mean algorithm.lr-min"]),
        (b"[data]\nlr = 1\n", ["data.lr is not a key", "did you mean algorithm.lr"]),
        (b"[data]\nxyzzy = 1\n", ["data.xyzzy is not a key", "fedmom keys"]),
        (b"[data.alpha]\nx = 1\n", ["data.alpha = {'x': 1}", "must be a number"]),
        (b"[data]\nalpha = [0.1, 0.2]\n", ["data.alpha = [0.1, 0.2]", "must be a number"]),
        (b"\xff\xfe\x00", ["cannot be read as a text file"]),
        (b"[run]\nseed = " + b"1" * 5000, ["is not TOML", "4300"]),
        (b"[run]\nseed = 0x" + b"f" * 5000, ["run.seed = (thousands of digits)", "at most"]),
        (b"[run]\nseed = [0x" + b"f" * 5000 + b"]", ["run.seed = (thousands of digits)", "whole number"]),
        (b"[run]\nseed = " + b"[" * 100_000, ["is not TOML"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, words):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    refused(str(path), *words, source=path)


def test_files_that_are_not_there(tmp_path):
    refused("no.toml", "no such file", source=tmp_path / "no.toml")
    refused(str(tmp_path), "cannot be read", source=tmp_path)


def test_a_name_that_is_no_file_is_that_of_a_shipped_configuration(in_tmp):
    for name, path in shipped().items():
        assert load(name) == load(path) == load(ROOT / "configs" / f"{name}.toml")
    assert {"quickstart", "decentralized/ring"} <= {*shipped()}
    refused("quickstrat: no such file", "did you mean quickstart?", source="quickstrat")
    refused("ring: no such file", "did you mean decentralized/ring?", source="ring")
    refused("configs/quickstart.toml: no such file", "did you mean quickstart?", source="configs/quickstart.toml")
    refused("xyzzy: no such file", "fedmom's own are", "decentralized/…, deploy", source="xyzzy")
    Path("quickstart").mkdir()  # a folder of that name is no configuration
    assert load("quickstart") == load(shipped()["quickstart"])
    Path("quickstart").rmdir()
    Path("quickstart").write_text("[run]\nseed = 3\n")
    assert load("quickstart") == load({"run.seed": 3})


def test_a_path_from_home_is_read_as_the_shell_has_it(in_tmp, monkeypatch):
    monkeypatch.setenv("HOME", str(in_tmp))
    Path("a.toml").write_text("[run]\nseed = 3\n")
    assert load("~/a.toml") == load("a.toml")


# --- one key at a time -----------------------------------------------------------------------------------


@table("name, value, right",
    [
        ("algorithm.lr", 0, "> 0"),
        ("algorithm.lr", 10**400, "> 0"),
        ("algorithm.lr", True, "a number"),
        ("algorithm.lr", "0.1", "a number"),
        ("algorithm.lr", None, "a number"),
        ("algorithm.beta", 1, "[0, 1)"),
        ("algorithm.nesterov", 1, "true or false"),
        ("algorithm.num-local-steps", 2.0, "a whole number"),
        ("algorithm.num-local-steps", True, "a whole number"),
        ("algorithm.name", 3, "a string"),
        ("algorithm.name", "pr-sgdm", "did you mean pr-sgd-m"),
        ("data.dataset", "digit", "did you mean digits"),
        ("data.dataset", "", "choose one of digits"),
        ("model.name", "weights.npz", "choose one of"),
        ("model.norm", "a:b", "choose one of batch, group"),
        ("data.num-clients", -1, ">= 0"),
        ("data.num-clients", 10**30, "at most 2147483647"),
        ("algorithm.lr", -(10**400), "> 0"),
        ("data.data-dir", "\udcff", "valid Unicode"),
        ("run.seed", -1, ">= 0"),
        ("run.seed", 2**31, "at most 2147483647"),
        ("engine.threads", 10**6, "1025"),
        ("engine.device", "gpu", "choose one of auto, cpu, cuda"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_what_is_right(name, value, right):
    message = refused(name, source={name: value})
    assert right in message
    shown = {10**400: math.inf, -(10**400): -math.inf}.get(value, value)
    assert message.startswith((f"{name} = {shown!r}", f"{name} = {shown}.0"))
    assert name in refused(source={}, sets={name: value})


def test_no_number_may_be_negative_and_none_infinite():
    for name, key in KEYS.items():
        for value in {int: [-1, 2**31], float: [-1.0, math.nan, math.inf]}.get(key.type, []):
            assert refused(name, source={name: value}).startswith(f"{name} = {value}")


def test_values_from_python_need_not_be_pythons_own():
    given = {"algorithm.lr": np.float32(0.5), "run.seed": np.int64(3), "algorithm.nesterov": np.True_}
    config = load({**given, "data.data-dir": Path("a") / "b", "data.alpha": 2}).config
    assert (config.algorithm.lr, config.run.seed, config.algorithm.nesterov) == (0.5, 3, True)
    assert (config.data.data_dir, config.data.alpha) == (str(Path("a") / "b"), 2.0)
    assert [type(v) for v in flat(config).values()] == [key.type for key in KEYS.values()]


def test_mappings_may_be_nested_or_flat_kebab_or_snake():
    forms = [
        {"algorithm": {"num_local_steps": 3}},
        {"algorithm": {"num-local-steps": 3}},
        {"algorithm.num-local-steps": 3},
    ]
    for form in forms:
        assert load(form) == load({}, form) == Loaded(load(forms[0]).config, frozenset({"algorithm.num-local-steps"}))
    assert load(load(forms[0]).config) == load(forms[0])
    refused("section = 'x'", source={"x": 1})


@table(
    "text, name, value",
    [
        ("algorithm.lr=0.1", "algorithm.lr", 0.1),
        (" algorithm.lr = 1e-3", "algorithm.lr", 0.001),
        ("run.seed=3", "run.seed", 3),
        ("algorithm.nesterov=true", "algorithm.nesterov", True),
        ("algorithm.nesterov=True", "algorithm.nesterov", True),
        ("data.dataset=digits", "data.dataset", "digits"),
        ("data.dataset='digits'", "data.dataset", "digits"),
        ("data.start=0", "data.start", "0"),
        ("data.curvatures=1;3", "data.curvatures", "1;3"),
        ("data.data-dir=a=b=c", "data.data-dir", "a=b=c"),
        ('data.data-dir="a=\\"b"', "data.data-dir", 'a="b'),
        ('data.data-dir="open', "data.data-dir", '"open'),
        ("data.data-dir=", "data.data-dir", ""),
        ("algorithm.lr=", "algorithm.lr", ""),
        ("algorithm.lr=[[[", "algorithm.lr", "[[["),
        ("run.seed=" + "1" * 5000, "run.seed", "1" * 5000),
        ("no.such=1", "no.such", 1),
        ("no.such=.5", "no.such", 0.5),
        ("algorithm.lr=0,05", "algorithm.lr", "0,05"),
        ("model.name = mlp ", "model.name", "mlp"),
        ("algorithm.lr-milestones=[.5, 0.75]", "algorithm.lr-milestones", ".5,0.75"),
        ("data.curvatures=[[1,2],[3,4]]", "data.curvatures", "1,2;3,4"),
        ("data.classes=['cat', dog]", "data.classes", "cat,dog"),
    ],
)
def test_set_forms(text, name, value):
    assert parse_set(text) == (name, value)
    assert type(parse_set(text)[1]) is type(value)


@table("form", ["{}", "+{}", "{}.", ".{}", "{}e0", "{}E+0", "0.{}e1", "1_{}", " {} "])
def test_a_number_is_read_as_it_is_typed(form):
    """Python's own reading of it, for a key that takes any number and for one that takes whole numbers."""
    text, value = form.format(25), float(form.format(25))
    found = parse_set(f"data.noise-sigma={text}")[1]
    assert (load({}, [f"data.noise-sigma={text}"]).config.data.noise_sigma, type(found) is str) == (value, False)
    if value.is_integer():
        assert load({}, [f"run.seed={text}"]).config.run.seed == int(value)
    else:
        refused("whole number", sets=[f"run.seed={text}"])


def test_keys_that_hold_lists_take_lists_and_no_others_do():
    """By their defaults and their doc; a list from TOML or Python is the string that the key holds."""
    for name, known in KEYS.items():
        said = "by commas" in known.doc or any(mark in str(known.default) for mark in ",;")
        assert bool(known.holds) == said, name
    config = load({"algorithm.lr-milestones": [0.5, 0.75], "data.curvatures": [[1, 2], (3, 4)]}).config
    assert (config.algorithm.lr_milestones, config.data.curvatures) == ("0.5,0.75", "1,2;3,4")
    refused("must be a string", source={"data.curvatures": [1, 3]})
    refused("must be a string", source={"data.data-dir": ["a"]})
    refused("closing ] is missing", sets=["data.start=[[1,2]"])


def test_a_number_that_toml_does_not_read_is_named_with_the_one_it_does(tmp_path):
    for text, right in ((".1", "0.1"), ("5.", "5.0"), ("-.5e3", "-500.0")):
        (tmp_path / "a.toml").write_text(f"\ufeff[algorithm]\nbeta = 0.5\nlr = {text} # so\n", encoding="utf-8")
        refused(f"is written {right}", source=tmp_path / "a.toml")


def test_set_needs_an_equals_sign_and_the_last_one_counts():
    refused("--set 'algorithm.lr'", "section.key=value", sets=["algorithm.lr"])
    refused("--set ''", sets=[""])
    refused("section = ''", sets=["=3"])
    refused("section = 'algoritm'", "did you mean algorithm?", sets=["algoritm.lr=0.1"])
    refused(
        "algorithm.momentum_policy", "did you mean algorithm.momentum-policy?", sets=["algorithm.momentum_policy=x"]
    )
    assert load({}, ["run.seed=1", "run.seed=2"]).config.run.seed == 2


# --- together --------------------------------------------------------------------------------------------

ODD_COMBINATIONS = [
    {"data": {"dataset": "quadratic"}},
    {"data": {"dataset": "quadratic", "curvatures": "1,2;3,4", "centers": "0,0;1,1", "start": "5,5", "num_clients": 2}},
    {"data": {"dataset": "quadratic"}, "run": {"dtype": "float32", "num_steps": 7}},
    {"algorithm": {"name": "parallel-sgd-m", "num_local_steps": 5, "interval": "theory-iid"}, "run": {"num_steps": 9}},
    {"algorithm": {"name": "parallel-sgd-m", "local_epochs": 2}, "run": {"num_steps": 9, "num_rounds": 2}},
    {"algorithm": {"name": "local-sgd", "beta": 0.5, "local_epochs": 2}},
    {"algorithm": {"name": "local-sgd", "interval": "theory-non-iid"}, "run": {"num_steps": 10**9, "num_rounds": 3}},
    {"algorithm": {"interval": "theory-iid", "cohort_size": 3, "lr_schedule": "theory"}, "run": {"num_steps": 12_345}},
    {"algorithm": {"num_local_steps": 7, "cohort_size": 20}, "run": {"num_steps": 50}},
    {"data": {"num_clients": 1}, "engine": {"path": "loop", "chunk_size": 9, "threads": 1}},
]


def check_settled(config: Config) -> None:
    """Resolving once more, as is or through a file or a mapping, changes nothing and has nothing to say."""
    for again in (Loaded(config, frozenset(KEYS)), load(flat(config)), load(config)):
        assert resolve(again) == Resolved(config, ())
    steps, run = config.algorithm.num_local_steps, config.run
    assert (steps >= 1) == (config.algorithm.local_epochs == 0)
    assert not run.num_steps or run.num_rounds == math.ceil(run.num_steps / steps)
    assert 1 <= config.algorithm.cohort_size <= config.data.num_clients
    assert run.dtype != "auto"


def test_every_file_of_configs_says_what_to_expect_and_resolves():
    assert CONFIGS
    for path in CONFIGS:
        first = path.read_text(encoding="utf-8").partition("\n\n")[0].partition("[")[0]
        assert first.startswith("# "), path
        assert len(first.splitlines()) >= 2, f"{path}: what to expect, on what hardware, in what time"
        config, notes = resolve(load(path))
        assert notes == (), path
        check_settled(config)


def test_what_is_resolved_stays_resolved():
    for source in ODD_COMBINATIONS:
        check_settled(resolve(load(source)).config)


def test_the_quadratic_brings_its_own_clients_batches_and_dtype():
    data = {"data__dataset": "quadratic", "data__curvatures": "1;2;3", "data__centers": "0;0;1"}
    config = settled(**data, data__batch_size=64, data__augment="crop-flip").config
    assert (config.data.num_clients, config.data.batch_size, config.data.augment) == (3, 1, "none")
    assert config.run.dtype == "float64"
    assert settled(**data, run__dtype="float32").config.run.dtype == "float32"
    assert settled().config.run.dtype == "float32"


@table(
    "keys, words",
    [
        ({"curvatures": "1;x"}, ["data.curvatures = '1;x'", "clients separated by ;"]),
        ({"curvatures": ""}, ["data.curvatures = ''"]),
        ({"curvatures": "nan;1"}, ["data.curvatures = 'nan;1'"]),
        ({"curvatures": "1;inf"}, ["data.curvatures = '1;inf'"]),
        ({"centers": "4;--2"}, ["data.centers = '4;--2'"]),
        ({"start": "zero"}, ["data.start = 'zero'", "commas"]),
        ({"curvatures": "1;2;3"}, ["data.centers = '4;-2'", "has 2 clients, data.curvatures 3"]),
        ({"curvatures": "1,2;3"}, ["data.curvatures = '1,2;3'", "the same number of coordinates, got [1, 2]"]),
        ({"start": "0,0"}, ["data.start = '0,0'", "the same number of coordinates, got [1, 2]"]),
        ({"num_clients": 5}, ["data.num-clients = 5", "has 2 clients"]),
        ({"curvatures": "0;0"}, ["data.curvatures = '0;0'", "sum must be > 0", "got 0"]),
        ({"curvatures": "1,0;1,0", "centers": "1,1;1,1", "start": "0,0"}, ["sum must be > 0", "got 2, 0"]),
        ({"curvatures": "1e308;1e308"}, ["sum must be > 0", "got inf"]),
    ],
)
def test_quadratics_that_are_none(keys, words):
    refused(*words, source={"data": {"dataset": "quadratic", **keys}})


def test_one_client_of_a_quadratic_may_bend_down_if_the_mean_does_not():
    assert settled(data__dataset="quadratic", data__curvatures="-1;3").config.data.num_clients == 2


@table("name", [name for name, a in ALGORITHMS.items() if a.interval or a.beta is not None])
def test_baselines_overrule_and_say_so(name):
    fixed = ALGORITHMS[name]
    source = {"algorithm": {"name": name, "num_local_steps": 5, "beta": 0.5}}
    config, notes = resolve(load(source))
    assert len(notes) == (fixed.interval is not None) + (fixed.beta is not None)
    assert config.algorithm.num_local_steps == (fixed.interval or 5)
    assert config.algorithm.beta == (0.5 if fixed.beta is None else fixed.beta)
    said = " ".join(notes)
    assert ("it overrules num-local-steps = 5" in said) == (fixed.interval is not None)
    assert ("it overrules beta = 0.5" in said) == (fixed.beta is not None)
    assert all(name in note for note in notes)
    # What nobody asked for, or what the name means anyway, is not worth a word.
    quiet = {
        "algorithm.name": name,
        "algorithm.num-local-steps": fixed.interval or 0,
        "algorithm.beta": fixed.beta or 0,
    }
    assert resolve(load(quiet)).notes == resolve(load({"algorithm.name": name})).notes == ()


def test_baselines_mean_what_their_names_say():
    """Large-batch SGD exchanges at every step, local SGD has no momentum."""
    keys = {"algorithm.num-local-steps": 8, "algorithm.beta": 0.9}
    large, local = (
        resolve(load({**keys, "algorithm.name": name})).config.algorithm for name in ("parallel-sgd-m", "local-sgd")
    )
    assert (large.num_local_steps, large.beta) == (1, 0.9)
    assert (local.num_local_steps, local.beta) == (8, 0.0)


def test_a_baseline_of_interval_one_overrules_epochs_and_theory_too():
    for key, value in [("local-epochs", 3), ("interval", "theory-iid")]:
        config, notes = resolve(load({"algorithm.name": "parallel-sgd-m", f"algorithm.{key}": value}))
        got = config.algorithm
        assert (got.num_local_steps, got.local_epochs, got.interval) == (1, 0, "fixed")
        assert len(notes) == 1
        assert key in notes[0]
        assert str(value) in notes[0]


def test_zero_local_steps_means_the_algorithms_own():
    wanted = {"pr-sgd-m": 8, "parallel-sgd-m": 1, "d-sgd-m": 1, "local-sgd": 8}
    assert {name: settled(algorithm__name=name).config.algorithm.num_local_steps for name in wanted} == wanted


@given(st.integers(1, 10**24), st.integers(1, 10**4))
def test_intervals_are_the_theorems_floors_in_exact_arithmetic(T, N):
    for kind, root, power in [("theory-iid", 2, 3), ("theory-non-iid", 4, 3)]:
        I = theory_interval(kind, T, N)  # noqa: E741
        # I = max(1, ⌊(T / N³)^(1/root)⌋)  <=>  I^root N³ <= T < (I + 1)^root N³, or I = 1 below that
        assert (I + 1) ** root * N**power > T
        assert I == 1 or I**root * N**power <= T


@given(st.integers(1, 10**5), st.integers(1, 10**3), st.sampled_from([("theory-iid", 2), ("theory-non-iid", 4)]))
def test_perfect_powers_are_not_missed(I, N, law):  # noqa: E741
    kind, root = law
    T = I**root * N**3
    assert theory_interval(kind, T, N) == I
    assert theory_interval(kind, T - 1, N) == max(1, I - 1)


@given(
    T=st.integers(1, LARGEST),
    N=st.integers(1, 50),
    cohort=st.integers(0, 50),
    interval=st.sampled_from(["fixed", "theory-iid", "theory-non-iid"]),
    steps=st.integers(0, 100),
)
def test_steps_and_rounds_of_any_run(T, N, cohort, interval, steps):
    assume(cohort <= N)
    steps = steps if interval == "fixed" else 0
    algorithm = {"interval": interval, "num_local_steps": steps, "cohort_size": cohort}
    config, notes = resolve(load({"data": {"num_clients": N}, "algorithm": algorithm, "run": {"num_steps": T}}))
    C = cohort or N
    I = (steps or 8) if interval == "fixed" else theory_interval(interval, T, C)  # noqa: E741
    assert config.algorithm.cohort_size == C
    assert config.algorithm.num_local_steps == I
    assert (config.run.num_rounds - 1) * I < T <= config.run.num_rounds * I
    assert notes == ()
    check_settled(config)


def test_the_cohort_is_the_theorems_n():
    keys = {"data__num_clients": 64, "algorithm__interval": "theory-iid", "run__num_steps": 6400}
    assert settled(**keys).config.algorithm.num_local_steps == 1  # ⌊√(6400 / 64³)⌋ = 0
    assert settled(**keys, algorithm__cohort_size=4).config.algorithm.num_local_steps == 10  # √(6400 / 4³)


def test_num_steps_overrules_num_rounds_and_says_so():
    config, notes = settled(run__num_steps=50, run__num_rounds=3, algorithm__num_local_steps=7)
    assert config.run.num_rounds == 8
    assert notes == ("run.num-steps = 50 gives 8 rounds: it overrules num-rounds",)
    assert settled(run__num_steps=50, run__num_rounds=8, algorithm__num_local_steps=7).notes == ()


def test_local_epochs_leave_the_interval_open():
    config = settled(algorithm__local_epochs=2, run__num_rounds=9).config
    assert (config.algorithm.num_local_steps, config.algorithm.local_epochs, config.run.num_rounds) == (0, 2, 9)
    check_settled(config)


@table(
    "algorithm, run, words",
    [
        ({"local_epochs": 2, "num_local_steps": 3}, {}, ["local-epochs = 2", "num-local-steps = 3", "not both"]),
        ({"local_epochs": 2, "interval": "theory-iid"}, {}, ["interval = 'theory-iid'", "not local-epochs"]),
        ({"local_epochs": 2}, {"num_steps": 5}, ["run.num-steps = 5", "run.num-rounds"]),
        ({"local_epochs": 2, "lr_schedule": "theory"}, {}, ["lr-schedule = 'theory'", "not local-epochs"]),
        ({"interval": "theory-iid"}, {}, ["interval = 'theory-iid'", "needs run.num-steps"]),
        (
            {"interval": "theory-iid", "num_local_steps": 3, "cohort_size": 1},
            {"num_steps": 100},
            ["num-local-steps = 3", "gives I = 10 for T = 100, N = 1", "leave it 0"],
        ),
        ({"cohort_size": 21}, {}, ["cohort-size = 21", "at most data.num-clients = 20"]),
        ({"lr_milestones": "80;120"}, {}, ["lr-milestones = '80;120'", "commas"]),
        ({"lr_milestones": ""}, {}, ["lr-milestones = ''"]),
        ({"lr_milestones": "0.75,0.5"}, {}, ["lr-milestones = '0.75,0.5'", "must rise"]),
        ({"lr_schedule": "step", "lr_milestones": "80,120"}, {}, ["lr-milestones = '80,120'", "joint-epochs"]),
        ({"lr_warmup": 1.5}, {}, ["lr-warmup = 1.5", "at most 1"]),
        ({"lr_schedule": "cosine", "lr": 0.1, "lr_min": 0.2}, {}, ["lr-min = 0.2", "algorithm.lr = 0.1"]),
    ],
)
def test_keys_that_disagree_are_named(algorithm, run, words):
    refused(*words, source={"algorithm": algorithm, "run": run})


def test_what_depends_on_the_length_of_the_run():
    for algorithm, names in [
        ({}, []),
        ({"lr_schedule": "cosine"}, ["algorithm.lr-schedule"]),
        ({"lr_schedule": "theory"}, ["algorithm.lr-schedule"]),
        ({"lr_schedule": "step"}, ["algorithm.lr-unit"]),
        ({"lr_schedule": "step", "lr_unit": "joint-epochs"}, []),
        ({"lr_warmup": 0.1}, ["algorithm.lr-unit"]),
        ({"lr_warmup": 2.0, "lr_unit": "joint-epochs"}, []),
        ({"interval": "theory-iid"}, ["algorithm.interval"]),
    ]:
        assert length_keys(load({"algorithm": algorithm}).config) == names, algorithm


def test_flower_takes_every_config_as_a_run_config():
    """By Flower's own rules: flattened, unknown keys refused; and it means what `fedmom run` makes of it."""
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    from fedmom.backends.trainer import settled

    for path in CONFIGS:
        run_config = get_fused_config_from_dir(ROOT, parse_config_args([str(path)]))
        assert set(run_config) == set(KEYS), path
        assert settled(run_config).config == resolve(load(path)).config, path

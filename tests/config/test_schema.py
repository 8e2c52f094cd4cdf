"""The schema that the package ships is that of KEYS, and refuses what they refuse."""

import json

from fedmom.config.keys import KEYS, Config, checked
from fedmom.config.load import flat
from fedmom.config.schema import EXAMPLES, FILE, FIRST, as_json, make_schema, read_keys


def test_the_file_is_generated_from_the_keys():
    assert FILE.read_text(encoding="utf-8") == as_json(make_schema()), "python -m fedmom.config.schema writes it"


def test_every_key_is_there_with_an_example_that_it_takes():
    known = read_keys()
    assert list(known) == list(KEYS)
    assert {name: about.default for name, about in known.items()} == flat(Config())
    for name, about in known.items():
        assert checked(name, about.example) == about.example != about.default, name
    assert {*FIRST, *EXAMPLES} <= {*KEYS}
    assert len(FIRST) == 10 == sum(about.first for about in known.values())
    assert all(meaning for key in KEYS.values() for meaning in key.choices.values())


def test_a_range_is_said_as_it_is_checked():
    for name, key in KEYS.items():
        entry = make_schema()["properties"][key.section]["properties"][name.partition(".")[2]]
        bounds = {
            word: entry[word]
            for word in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
            if word in entry
        }
        assert bool(bounds) == bool(key.check)
        for word, bound in bounds.items():
            assert (key.check(bound) is None) == (not word.startswith("exclusive")), name
            assert key.check(bound + (1e-9 if word.endswith("aximum") else -1e-9))
        assert ("enum" in entry) == bool(key.choices and not key.also)
        json.dumps(entry)

"""Every mistake of the table is noticed by the test that its row names, and by nothing but the mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_every_row_fits_the_code_and_names_a_test_that_there_is(monkeypatch):
    """Without running any: the text that a row changes is there once, and so is the test."""
    monkeypatch.syspath_prepend(str(HERE))
    from mutants import MUTANTS

    assert len(MUTANTS) > 50
    for row in MUTANTS:
        with pytest.MonkeyPatch.context() as patch:
            row.change(patch)
        file, name = row.test.split("::")
        assert f"def {name.split('[')[0]}(" in (HERE.parents[1] / file).read_text(), row.test


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutant_fails_its_test_and_the_right_program_passes(tmp_path):
    """In a process of its own: one that has threads by now, as a session of tests may have, is not to be forked."""
    words = [sys.executable, str(HERE), "--named", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) > 50

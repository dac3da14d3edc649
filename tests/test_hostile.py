"""Some of the thousands of files that nobody meant; ``make hostile`` tries them all."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import GOOD, MAKERS, Range, mutants

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


ACTING = """
import os
quiet = dataset
def dataset():
    os.system("touch RAN")
    filled = b"x" * (200 << 20)
    os.write(2, b"Traceback \\x1b[2J" + b"." * 9000)
    return quiet()
"""


def test_files_that_nobody_meant_end_as_they_should(tmp_path: Path) -> None:
    """Each kind several times, from another seed than the thousands."""
    tried = list(Range(tmp_path.resolve()).faults(mutants(seed=1, count=4 * len(MAKERS))))
    wrong = [f"{mutant.kind}: {'; '.join(faults)}" for mutant, faults in tried if faults]
    assert len(tried) == 4 * len(MAKERS)
    assert wrong == []


def test_what_is_watched_for_would_be_seen(tmp_path: Path) -> None:
    """A factory that does it all: the same watch over a folder whose code is run."""
    place = Range(tmp_path.resolve())
    assert list(place.faults([GOOD])) == [(GOOD, [])]
    with (tmp_path / "hostile_net.py").open("a") as file:
        file.write(ACTING)
    ((_, faults),) = place.faults([replace(GOOD, verdict="refuse")])
    seen = " ".join(faults)
    for fault in ("traceback", "control", "characters", "grown", "payload", "nothing can be meant"):
        assert fault in seen

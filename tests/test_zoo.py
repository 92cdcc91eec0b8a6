"""The architectures of the zoo that differ most in kind: every check of a row, from capture to a training step."""

import pytest
import zoo
from architectures import CI


@pytest.mark.slow
@pytest.mark.parametrize("name", CI)
def test_row_has_no_failure(name: str) -> None:
    row = zoo.run_row(name, limit=600)
    assert {"captured", "same", "other", "replay", "subset", "eval", "train", "text", "mor"} <= row["checks"].keys()
    assert not zoo.failures(row)

"""The architectures of the zoo that differ most in kind: every check of a row, from capture to a training step."""

import pytest
import zoo
import zoo_mor
from architectures import CI

import depthc

from .models import Spec, Stacked, ids, seeded


@pytest.mark.slow
@pytest.mark.parametrize("name", CI)
def test_row_has_no_failure(name: str) -> None:
    row = zoo.run_row(name, limit=600)
    assert {"captured", "same", "other", "replay", "subset", "eval", "train", "text", "mor"} <= row["checks"].keys()
    assert not zoo.failures(row)


def test_checks_run_alone_leave_the_others_as_they_were() -> None:
    def row(captured: str, mor: str, seconds: float) -> dict:
        return {
            "stopped": None,
            "seconds": seconds,
            "checks": {"captured": {"status": captured}, "mor": {"status": mor}},
        }

    assert zoo.merged(row("refused", "skipped", 9.0), row("ok", "ok", 4.0), ["mor"]) == row("ok", "ok", 9.0)
    assert zoo.merged(row("ok", "ok", 9.0), row("failed", "skipped", 4.0), ["mor"]) == row("failed", "skipped", 9.0)
    assert zoo.merged(row("ok", "ok", 9.0), row("ok", "failed", 4.0), []) == row("ok", "failed", 4.0)


@pytest.mark.parametrize(("depth", "title"), [(2, "cycle x2"), (3, "cycle x3"), (5, "middle_cycle x3")])
def test_loops_follow_the_depth(depth: int, title: str) -> None:
    model = seeded(lambda: Stacked(Spec(depth=depth)))
    program = depthc.capture(model, (ids(),))
    assert zoo_mor.mor(program, model, (ids(),), {}).startswith(f"{title}, ")


def test_a_step_that_does_not_help_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: Stacked(Spec(depth=4)))
    monkeypatch.setattr(zoo_mor, "PROMISE", 0.0)
    with pytest.raises(zoo_mor.Unmet, match="the loss went"):
        zoo_mor.mor(depthc.capture(model, (ids(),)), model, (ids(),), {})

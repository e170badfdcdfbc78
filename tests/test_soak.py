"""scripts/soak itself: it says ok only of what is, and its findings can be told again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from planted_bugs import BUGS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from soak.simulation import Sum, replay, run_seed  # noqa: E402 - after its folder


def soak(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "soak", *args], cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_it_runs_as_many_seeds_as_were_asked_for_and_counts_their_faults() -> None:
    done = soak("--part", "simulation", "--first", "7", "--seeds", "150")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulation: ok: seeds 150 (from 7), faults ") and "findings 0" in done.stdout


def test_a_finding_names_its_seed_and_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    total, seed = Sum(), 0
    with BUGS["release_before_reap"]():
        while not total.failures:
            run_seed(seed, total)
            seed += 1
        (found, text) = total.failures[0]
        assert found == seed - 1 and total.seeds == seed
        assert replay(found) == 1 and text in capsys.readouterr().out
    assert replay(found) == 0 and "nothing broken" in capsys.readouterr().out


@pytest.mark.parametrize("args", [("--seeds", "0"), ("--workers", "0"), ("--part", "nothing"), ("replay",)])
def test_bad_input_is_refused(args: tuple[str, ...]) -> None:
    done = soak(*args)
    assert done.returncode == 2 and "Error" in done.stderr

"""The demo is the main job: it must end with zeros, and leave nothing behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import clean_env, marked


@pytest.mark.long
def test_the_demo_ends_with_zeros_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=Path(__file__).parent.parent,
        env=clean_env(MARK="the-demo-of-the-tests"),
        capture_output=True,
        text=True,
        timeout=110,
    )
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"demo: handovers=8 overlap_ms=0 conflicts=0 lost=0 twice=0 lost_at_kill=\d+ gap_ms_median=\d+", last
    ), done.stdout[-3000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert marked(b"MARK=the-demo-of-the-tests") == []

"""Long runs that try to break the promise: the models, the simulation at scale, and faults on real processes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the simulation, the witness, the servers are the tests' own

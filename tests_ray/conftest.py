"""What needs Ray: collected by `pytest tests_ray` alone, which .ci/nightly runs; see tests/ for all else."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # its small models and helpers

"""Where things lie: the repository, its tests, the goldens."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"

"""Where things lie: the repository, its tests, the goldens."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put a text that a script makes into a page, in the place of the one between two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(before + begin + text + end + after, encoding="utf-8")

"""As `python -m miga_engine.embed`, from a checkout: python csrc/embed/build.py [FOLDER] builds the C interface."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from miga_engine.embed.__main__ import main  # noqa: E402 - found by the line above

if __name__ == "__main__":
    sys.exit(main(["--build-dir", sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "build" / "embed")]))

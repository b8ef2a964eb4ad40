"""`python -m miga_engine.embed` builds the C interface."""

import argparse
import sys
from pathlib import Path

from miga_engine.embed import CannotEmbedError, build


def main(arguments: list[str] | None = None) -> int:
    """Build into the folder named, print the library's path; 1 and a sentence where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m miga_engine.embed", description="Build the C interface for the environment of this Python."
    )
    parser.add_argument(
        "--build-dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where libmiga_embed.so, miga_embed.h and the program example go; made where it is missing",
    )
    try:
        print(build(parser.parse_args(arguments).build_dir))
    except CannotEmbedError as error:
        print(f"miga_engine: the C interface was not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

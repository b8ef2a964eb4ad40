"""Builds the C interface: python csrc/embed/build.py [FOLDER] writes libmiga_embed.so, and the example, into FOLDER.

The library is linked with the libpython of the Python that runs this, and hosts the environment of that Python.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]


class CannotEmbedError(Exception):
    """This Python is not one that a library can host; one sentence."""


def find_python() -> tuple[Path, Path]:
    """Folder of Python.h, and libpython."""
    if sys.platform != "linux":
        raise CannotEmbedError(f"the C interface is built on Linux only, and this is {sys.platform}")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise CannotEmbedError(
            f"{headers} has no Python.h: install Python's headers (python3-dev on Debian) or use a Python with them"
        )
    stem = f"libpython{sysconfig.get_config_var('LDVERSION')}.so"
    folders = [Path(folder) for name in ("LIBDIR", "LIBPL") if (folder := sysconfig.get_config_var(name))]
    folders.append(Path(sys.base_prefix) / "lib")
    for folder in folders:
        for name in (f"{stem}.1.0", stem):
            if (folder / name).is_file():
                return headers, folder / name
    raise CannotEmbedError(
        f"{stem} is in none of {', '.join(map(str, folders))}: use a Python built with --enable-shared (libpython3-dev "
        "on Debian)"
    )


def build(folder: Path) -> Path:
    """Compile the library and the example into a folder; the library's path."""
    headers, libpython = find_python()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libmiga_embed.so"
    version: dict[str, str] = {}
    exec((ROOT / "miga_engine/_version.py").read_text(encoding="utf-8"), version)
    texts = {
        "MIGA_VERSION": version["__version__"],
        "MIGA_BUILD_PYTHON": sys.executable,
        "MIGA_BUILD_ROOT": str(ROOT),
        "MIGA_PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    defines = [f'-D{name}="{text}"' for name, text in texts.items()]
    python = ["-isystem", str(headers), str(libpython), f"-Wl,-rpath,{libpython.parent}"]
    compile_cpp(HERE / "miga_embed.cpp", library, "-shared", "-fPIC", *defines, *python, "-ldl")
    compile_cpp(HERE / "example.cpp", folder / "example", str(library), "-Wl,-rpath,$ORIGIN", "-pthread")
    return library


def compile_cpp(source: Path, target: Path, *arguments: str) -> None:
    command = [os.environ.get("CXX", "g++"), *FLAGS, str(source), "-o", str(target), *arguments]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "embed"))
    except CannotEmbedError as error:
        sys.exit(f"miga_engine: the C interface was not built: {error}")

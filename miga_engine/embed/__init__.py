"""Builds the C interface, which is installed as sources: `python -m miga_engine.embed --build-dir FOLDER`.

The library is linked with the libpython of the Python that runs this, and hosts the environment of that Python. A wheel
cannot hold it ready-made: it belongs to one Python.
"""

import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from miga_engine import files
from miga_engine._version import __version__
from miga_engine.errors import MigaError

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "sources" if (HERE / "sources").is_dir() else HERE.parents[1] / "csrc" / "embed"
"""Of an installed package, or of a checkout."""
HEADER = SOURCES / "miga_embed.h"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", f"-I{SOURCES}")


class CannotEmbedError(MigaError):
    """The library cannot be built by this Python, or with this compiler."""


def find_python() -> tuple[Path, Path]:
    """Folder of Python.h, and libpython; CannotEmbedError where either is missing."""
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


def package_folder() -> str:
    """Where a hosted Python must look for the package besides its environment: a checkout; empty for an installed one.

    The library is isolated: it reads neither PYTHONPATH nor the packages of a user.
    """
    folder = str(HERE.parents[1])
    return "" if folder in map(os.path.realpath, site.getsitepackages()) else folder


def build(folder: Path) -> Path:
    """Put libmiga_embed.so, miga_embed.h and a program `example` into a folder, which may be moved; the library's path.

    CannotEmbedError where Python lacks what a host needs, or the compiler (CXX, else g++) fails.
    """
    headers, libpython = find_python()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(folder / HEADER.name, HEADER.read_bytes())
    except OSError as error:
        raise CannotEmbedError(f"cannot write to {folder} ({error.strerror}): name another folder") from None
    library = folder / "libmiga_embed.so"
    texts = {
        "MIGA_VERSION": __version__,
        "MIGA_BUILD_PYTHON": sys.executable,
        "MIGA_BUILD_ROOT": package_folder(),
        "MIGA_PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    defines = [f"-D{name}={c_string(text)}" for name, text in texts.items()]
    python = ["-isystem", str(headers), str(libpython), f"-Wl,-rpath,{libpython.parent}"]
    # Without a name of its own, the example would look for the library at the path that is given to its compiler.
    shared = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    compile_cpp(SOURCES / "miga_embed.cpp", library, *shared, *defines, *python, "-ldl")
    compile_cpp(SOURCES / "example.cpp", folder / "example", str(library), "-Wl,-rpath,$ORIGIN", "-pthread")
    return library


def c_string(text: str) -> str:
    """The text as C writes it: paths may hold quotes and backslashes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def compile_cpp(source: Path, target: Path, *arguments: str) -> None:
    """Compile one source by CXX, with CXXFLAGS behind the flags of the house; the compiler's words go to stderr."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        raise CannotEmbedError(f"there is no C++ compiler {compiler[0]}: install it, or name another one in CXX")
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    code = subprocess.run([*compiler, *flags, str(source), "-o", str(target), *arguments], check=False).returncode
    if code != 0:
        raise CannotEmbedError(
            f"{compiler[0]} failed on {source} with exit code {code}: read its words above, and see CXX and CXXFLAGS"
        )

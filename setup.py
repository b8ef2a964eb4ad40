"""What pyproject.toml cannot say: the mapping of kernels/ to miga_engine.kernels, and the optional C++ CPU kernels.

MIGA_BUILD_EXT=auto (default) builds csrc/ into miga_engine/_C.so where a C++ compiler and torch are found and installs
without it otherwise; 1 makes a missing extension an error; 0 leaves it out.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MODE = os.environ.get("MIGA_BUILD_EXT", "auto")
if MODE not in ("auto", "1", "0"):
    raise SystemExit(f"MIGA_BUILD_EXT is {MODE!r}: choose auto, 1 or 0")

SOURCES = ("csrc", "csrc/core", "csrc/bindings")  # csrc/embed is a library of its own
EMBED = "miga_engine.embed.sources"
STABLE_ABI = "0x020b000000000000"  # torch 2.11: the oldest whose stable symbols the extension may use
FIND_TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"


def find_torch() -> Path | None:
    """Folder of the torch used at run time; -I sees past pip's build isolation, and torch is never imported."""
    answer = subprocess.run(
        [sys.executable, "-I", "-c", FIND_TORCH], capture_output=True, text=True, check=False
    ).stdout.strip()
    return Path(answer) if answer and (Path(answer) / "include/torch/csrc/stable/library.h").is_file() else None


class BuildPackage(build_py):
    """The C interface is installed as sources, without what builds it from a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [] if package == EMBED else super().find_package_modules(package, package_dir)


class BuildKernels(build_ext):
    """One shared library for torch to load (no Python headers needed); in auto mode a failure is only reported."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if MODE == "1":
                raise
            say(f"the C++ CPU kernels could not be built and are left out ({type(error).__name__}: {error})")
            self.extensions.remove(ext)

    def run(self) -> None:
        self.extensions = list(self.extensions)
        super().run()

    def build_extensions(self) -> None:
        for ext in list(self.extensions):
            self.build_extension(ext)


def say(message: str) -> None:
    print(f"miga_engine: {message}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    if MODE == "0":
        return []
    torch = find_torch()
    if torch is None:
        if MODE == "1":
            raise SystemExit(
                "MIGA_BUILD_EXT=1 needs torch>=2.11, which is missing: install requirements-torch.lock first"
            )
        say("torch>=2.11 is not installed yet, so the C++ CPU kernels are left out: reinstall after torch to have them")
        return []
    return [
        Extension(
            "miga_engine._C",
            sources=sorted(str(path) for room in SOURCES for path in Path(room).glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
            include_dirs=["csrc", str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            # Without contraction the vectorised clones round exactly as eager torch does; without errno and traps
            # square roots and selections vectorise.
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            language="c++",
        )
    ]


setup(
    packages=[*find_packages(include=["miga_engine*"]), "miga_engine.kernels", EMBED],
    package_dir={
        "miga_engine": "miga_engine",
        "miga_engine.kernels": "kernels",
        EMBED: "csrc/embed",
    },
    package_data={
        "miga_engine": ["py.typed"],
        EMBED: ["*.h", "*.cpp"],
        "miga_engine.tiny": ["weights/**/*"],
        "miga_engine.integrations.server": ["page.html"],
        "miga_engine.integrations.comfyui": ["pyproject.toml", "requirements.txt", "icon.png", "example_workflows/*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # the library uses no Python symbol
)

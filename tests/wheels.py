"""The package as it is published: an sdist, the wheel that comes of it, and what that does installed, for each Python.

`make wheel-test` runs this; it takes minutes a Python, for each gets a fresh environment with torch. `--pythons` names
interpreters; one that is not here is said at the end, and so is what was left out. Exit code 1 where anything failed.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from places import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Tests of the source tree: what they read or build is not the installed package. Everything else of the fast part runs.
LEFT_OUT = {
    "tests/test_imports.py": "parses the package's source, and that of bench and tests",
    "tests/test_dialect.py": "reads the package's docstrings in the tree",
    "tests/test_docs.py": "compares pages with the package's folders in the tree",
    "tests/test_files.py": "parses the package's source in the tree",
    "tests/test_package.py": "builds the package from the tree",
    "tests/runtime/test_map.py": "parses the source of miga_engine/runtime in the tree",
    "tests/test_readme.py::test_every_file_a_page_names_exists[README.md]": "README links into miga_engine/",
}
MODULE = "import miga_engine; print(miga_engine.__file__)"


class FailedError(Exception):
    """A step that did not do what it should; one sentence."""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command, away from what leads to the source tree; FailedError with its last words."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [*map(str, command)]
    done = subprocess.run(
        words, cwd=cwd, env={**inherited, **environment}, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode != 0:
        raise FailedError(f"`{' '.join(words)}` ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def copy_tree(target: Path) -> Path:
    """The files that git knows or would take up, so that nothing built in the checkout gets into a package."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not what was deleted and is not yet committed so
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def build_wheel(scratch: Path) -> Path:
    """The wheel made from the sdist, repaired where auditwheel is; it holds what a wheel of the tree would."""
    tree = copy_tree(scratch / "tree")
    hook = "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", hook, scratch / "sdist", cwd=tree)
    (sdist,) = (scratch / "sdist").glob("*.tar.gz")
    wheels = {}
    for kind, source in (("tree", tree), ("sdist", sdist)):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        run(*command, "--wheel-dir", scratch / kind / "wheel", source, cwd=scratch, MIGA_BUILD_EXT="1")
        (wheels[kind],) = (scratch / kind / "wheel").glob("*.whl")
    names = {kind: set(zipfile.ZipFile(wheel).namelist()) for kind, wheel in wheels.items()}
    if names["tree"] != names["sdist"]:
        raise FailedError(f"the sdist's wheel and the tree's differ in {sorted(names['tree'] ^ names['sdist'])}")
    say(f"{sdist.name} and {wheels['sdist'].name} are built, {wheels['sdist'].stat().st_size / 1e6:.1f} MB")
    if shutil.which("auditwheel") is None:
        say("auditwheel is not on the PATH: the wheel is tested as it was built")
        return wheels["sdist"]
    settings = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]["linux"]
    repair = settings["repair-wheel-command"].format(dest_dir=scratch / "repaired", wheel=wheels["sdist"])
    run(*shlex.split(repair), cwd=scratch)
    (repaired,) = (scratch / "repaired").glob("*.whl")
    say(f"repaired: {repaired.name}")
    return repaired


def find_python(name: str) -> Path | None:
    """The interpreter of a name or path, also one that pyenv has and has not put on the PATH."""
    pyenv = shutil.which("pyenv")
    found = [shutil.which(name)]
    if pyenv is not None:
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout.strip()
        version = name.removeprefix("python")
        found += sorted(map(str, Path(root).glob(f"versions/{version}.*/bin/python"))) if version else []
    for place in filter(None, found):
        asked = subprocess.run(
            [place, "-I", "-c", "import sys; print(sys.executable)"], capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:  # a shim of pyenv for a version that is not chosen is none
            return Path(asked.stdout.strip())
    return None


def test_installed(python: Path, wheel: Path, tree: Path, scratch: Path) -> None:
    """Install the wheel into a fresh environment and use it there, in folders without the package's source."""
    home = scratch / "environment"
    run(python, "-m", "venv", "--clear", home, cwd=scratch)
    own = home / "bin" / "python"
    pip = [own, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    start = time.monotonic()
    for lock in ("requirements.lock", "requirements-torch.lock", "requirements-test.lock"):  # which needs torch there
        hashes = () if lock == "requirements-torch.lock" else ("--require-hashes",)
        run(*pip, *hashes, "-r", tree / lock, cwd=scratch)
    run(*pip, "--no-deps", wheel, cwd=scratch)
    run(own, "-m", "pip", "check", cwd=scratch)
    torch = run(own, "-c", "import torch; print(torch.__version__)", cwd=scratch).strip()
    say(f"  installed with the locked requirements and torch {torch} ({time.monotonic() - start:.0f} s)")
    place = Path(run(own, "-c", MODULE, cwd=tree).strip())
    if not place.is_relative_to(home):
        raise FailedError(f"the package that is imported is not the installed one but {place}")
    told = run(home / "bin" / "miga", "info", cwd=scratch)
    if f"C++ CPU kernels are loaded from {place.with_name('_C.so')}." not in " ".join(told.split()):
        raise FailedError(f"the C++ kernels are not loaded:\n{told}")
    say("  miga info: the C++ kernels are loaded")
    video = scratch / "kite.mp4"
    run(home / "bin" / "miga", "generate", "a red kite", "--num-frames", 25, "--output", video, cwd=scratch)
    say(f"  miga generate: {video.stat().st_size} bytes of 25 frames")
    embed_runs(own, scratch)
    test_fast_part(own, tree)


def embed_runs(python: Path, scratch: Path) -> None:
    """The C library built from the wheel, and the example run; its environment alone leads it to the package."""
    folder = scratch / "embed"
    run(python, "-m", "miga_engine.embed", "--build-dir", folder, cwd=scratch)
    lines = run(folder / "example", "tiny", '{"prompt": "a red kite", "num_frames": 13}', cwd=scratch).splitlines()
    if [line.split()[0] for line in lines] != [str(number) for number in range(13)]:
        raise FailedError(f"the example of the C interface gave {lines}")
    made = sorted(path.name for path in folder.iterdir())
    say(f"  python -m miga_engine.embed: {', '.join(made)}; the example gave 13 frames")


def test_fast_part(python: Path, tree: Path) -> None:
    """`pytest -m "not slow"` on the installed package: the tree has no miga_engine/ any more."""
    left_out = [word for name in LEFT_OUT for word in ("--deselect" if "::" in name else "--ignore", name)]
    start = time.monotonic()
    told = run(python, "-m", "pytest", "-m", "not slow", "-q", "-p", "no:cacheprovider", *left_out, cwd=tree)
    say(f"  {told.splitlines()[-1].strip('= ')} ({time.monotonic() - start:.0f} s)")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the wheel and test it installed, for each Python.")
    parser.add_argument("--pythons", required=True, help="names or paths, apart by blanks, such as python3.10")
    pythons = parser.parse_args().pythons.split()
    failed, missing = [], []
    with tempfile.TemporaryDirectory(prefix="miga-wheel-") as name:
        scratch = Path(name).resolve()
        wheel = build_wheel(scratch)
        shutil.rmtree(scratch / "tree" / "miga_engine")
        shutil.rmtree(scratch / "tree" / "build", ignore_errors=True)
        for asked in pythons:
            python = find_python(asked)
            if python is None:
                missing.append(asked)
                continue
            say(f"{asked}: {python}")
            place = scratch / "installed"
            place.mkdir()
            try:
                test_installed(python, wheel, scratch / "tree", place)
            except FailedError as error:
                say(f"  failed: {error}")
                failed.append(asked)
            shutil.rmtree(place)
    for test, reason in LEFT_OUT.items():
        say(f"left out: {test}: {reason}")
    if missing:
        say(f"not on this machine, and not tested: {', '.join(missing)}")
    tested = len(pythons) - len(missing)
    say(f"failed: {', '.join(failed)}" if failed else f"passed: {tested} of {len(pythons)} Pythons")
    return 1 if failed or not tested else 0


if __name__ == "__main__":
    sys.exit(main())

"""What an installed copy holds, and what importing it costs."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest

import miga_engine
from miga_engine import _extension

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def _python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path or ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_is_light() -> None:
    loaded = _python("import sys, miga_engine; print(*sorted({name.split('.')[0] for name in sys.modules}))").split()
    heavy = {
        "torch",
        "triton",
        "numpy",
        "av",
        "tokenizers",
        "transformers",
        "diffusers",
        "safetensors",
        "yaml",
        "kernels",
    }
    assert heavy.isdisjoint(loaded)


@pytest.mark.slow
def test_import_of_the_engine_needs_neither_oracles_nor_triton_nor_video() -> None:
    loaded = _python(
        "import sys; from miga_engine import Engine; print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert {"transformers", "diffusers", "accelerate", "triton", "av", "xformers"}.isdisjoint(loaded)


def test_exports_resolve() -> None:
    assert set(miga_engine.__all__) <= set(dir(miga_engine))
    for name in miga_engine.__all__:
        assert getattr(miga_engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        miga_engine.Motor  # noqa: B018


def test_kernels_resolve_in_a_checkout() -> None:
    assert _python("import miga_engine.kernels as k; print(*k.__path__)") == str(ROOT / "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installer would copy, without the compiled library."""
    folder = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "MIGA_BUILD_EXT": "0"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "build", "--build-base"]
    command += [str(folder / "temp"), "--build-lib", str(folder / "lib")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder / "lib"


def test_every_module_and_kernel_is_installed(built: Path) -> None:
    modules = {path.relative_to(ROOT) for path in ROOT.glob("miga_engine/**/*.py")}
    kernels = {Path("miga_engine") / path.relative_to(ROOT) for path in ROOT.glob("kernels/*.py")}
    assert {path.relative_to(built) for path in built.glob("**/*.py")} == modules | kernels
    assert {path.name for path in built.iterdir()} == {"miga_engine"}


def test_sources_of_the_c_interface_are_installed(built: Path) -> None:
    installed = {path.name: path.read_bytes() for path in (built / "miga_engine/embed/sources").iterdir()}
    assert set(installed) == {"miga_embed.h", "miga_embed.cpp", "example.cpp", "checks.cpp"}
    assert all((ROOT / "csrc/embed" / name).read_bytes() == content for name, content in installed.items())


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir"]
    environment = {**os.environ, "MIGA_BUILD_EXT": "0"}
    run = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for pattern in ("csrc/**/*.*", "kernels/*.py", "miga_engine/**/*.*") for path in ROOT.glob(pattern)]
    wanted = {str(path.relative_to(ROOT)) for path in sources if path.suffix not in (".so", ".pyc") and path.is_file()}
    assert {"csrc/embed/miga_embed.h", "csrc/bindings/gelu.cpp", "setup.py", "pyproject.toml"} <= held
    assert wanted <= held


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not here")
def test_what_the_kernels_link_is_of_every_linux_or_left_to_torch() -> None:
    """As the repaired wheel and cibuildwheel's are: one wheel for all Pythons, without a copy of torch in it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["build"] == "cp310-manylinux_x86_64"
    assert '"py_limited_api": "cp310"' in (ROOT / "setup.py").read_text()
    words = shlex.split(settings["linux"]["repair-wheel-command"])
    excluded = [pattern for option, pattern in itertools.pairwise(words) if option == "--exclude"]
    table = subprocess.run(["readelf", "-d", _extension.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", table))
    left_to_torch = {name for name in needed if any(fnmatch(name, pattern) for pattern in excluded)}
    assert left_to_torch >= {"libtorch_cpu.so"}
    assert needed - left_to_torch <= {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}


def test_data_is_installed(built: Path) -> None:
    weights = ROOT / "miga_engine/tiny/weights"
    expected = {path.relative_to(ROOT) for path in weights.glob("**/*") if path.is_file()}
    assert {
        path.relative_to(built) for path in built.glob("miga_engine/tiny/weights/**/*") if path.is_file()
    } == expected
    assert (built / "miga_engine/py.typed").is_file()
    assert (built / "miga_engine/integrations/server/page.html").is_file()
    pack = Path("miga_engine/integrations/comfyui")
    suffixes = (".json", ".png", ".toml", ".txt")
    files = {path.relative_to(ROOT) for path in (ROOT / pack).glob("**/*") if path.suffix in suffixes}
    installed = {path.relative_to(built) for path in (built / pack).glob("**/*") if path.suffix in suffixes}
    assert installed == files
    assert {pack / "pyproject.toml", pack / "example_workflows" / "render.json"} < files


def test_installed_copy_imports(built: Path, tmp_path: Path) -> None:
    place = _python("import miga_engine; print(miga_engine.__file__)", cwd=tmp_path, path=built)
    assert Path(place).is_relative_to(built)
    (built / "miga_engine/kernels").mkdir(exist_ok=True)
    assert "built" in _python("import miga_engine.kernels as k; print(*k.__path__)", cwd=tmp_path, path=built)


LOCK_FILES = ("requirements.lock", "requirements-torch.lock", "requirements-test.lock")


def test_lock_files_pin_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, torch, test = (_pins(name) for name in LOCK_FILES)
    extras = project["optional-dependencies"]
    assert {_name(entry) for entry in project["dependencies"]} <= runtime.keys() | torch.keys()
    assert {_name(entry) for entry in extras["test"] + extras["lint"]} <= test.keys() | runtime.keys()


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-test.lock"])
def test_what_is_locked_is_locked_by_hash(name: str) -> None:
    """As `pip install --require-hashes` wants it, which the Makefile asks for."""
    entries = _entries(name)
    assert len(entries) > 30
    for entry in entries:
        assert re.search(r"(?: --hash=sha256:[0-9a-f]{64})+$", entry), entry[:100]
    assert f"--require-hashes -r {name}" in (ROOT / "Makefile").read_text()


def test_licences_are_listed_for_what_is_locked() -> None:
    listed = {}
    for line in (ROOT / "THIRD_PARTY.md").read_text().splitlines():
        if row := re.fullmatch(r"\| (\S+) \| (\d[^|]*) \| ([^|]{3,}) \| ([^|]{3,}) \|", line):
            assert row[1] not in listed
            listed[row[1]] = set(row[2].split(", "))
    locked: dict[str, set[str]] = {}
    for name in LOCK_FILES:
        for package, versions in _pins(name).items():
            locked.setdefault(package, set()).update(versions)
    assert listed == locked


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or sys.version_info < (3, 11), reason="the list is that of another wheel"
)
def test_libraries_that_pyav_bundles_are_listed() -> None:
    import av

    text = (ROOT / "THIRD_PARTY.md").read_text()
    assert f"The Linux wheel of av {version('av')} holds FFmpeg {av.ffmpeg_version_info}," in text
    listed = set(re.findall(r"\blib[\w-]+", text.partition("| library |")[2].partition("\n\n")[0]))
    bundled = {path.name.rpartition("-")[0] for path in Path(av.__file__).parents[1].glob("av.libs/*.so*")}
    assert bundled
    assert bundled == listed


def _name(requirement: str) -> str:
    for separator in "<>=!;[ ":
        requirement = requirement.split(separator)[0]
    return requirement.lower().replace("_", "-")


def _entries(name: str) -> list[str]:
    """Requirements of a lock file with their hashes, one a line."""
    lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    return [re.sub(r" +", " ", line) for line in lines if line and not line.startswith(("#", "-r "))]


def _pins(name: str) -> dict[str, set[str]]:
    """Versions by package."""
    pins: dict[str, set[str]] = {}
    for entry in _entries(name):
        exact = re.match(r"([a-z0-9-]+)==([0-9][^ ]*)( ; [^-]+)?( --hash|$)", entry)
        assert exact, f"every line pins one exact version and names no host: {entry[:100]}"
        pins.setdefault(exact[1], set()).add(exact[2])
    return pins

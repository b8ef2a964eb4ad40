"""What an installed copy holds, and what importing it costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import miga_engine

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


def test_data_is_installed(built: Path) -> None:
    weights = ROOT / "miga_engine/tiny/weights"
    expected = {path.relative_to(ROOT) for path in weights.glob("**/*") if path.is_file()}
    assert {
        path.relative_to(built) for path in built.glob("miga_engine/tiny/weights/**/*") if path.is_file()
    } == expected
    assert (built / "miga_engine/py.typed").is_file()


def test_installed_copy_imports(built: Path, tmp_path: Path) -> None:
    place = _python("import miga_engine; print(miga_engine.__file__)", cwd=tmp_path, path=built)
    assert Path(place).is_relative_to(built)
    (built / "miga_engine/kernels").mkdir(exist_ok=True)
    assert "built" in _python("import miga_engine.kernels as k; print(*k.__path__)", cwd=tmp_path, path=built)


def test_lock_files_pin_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, test = (_pins(ROOT / name) for name in ("requirements.lock", "requirements-test.lock"))
    extras = project["optional-dependencies"]
    assert {_name(entry) for entry in project["dependencies"]} <= runtime
    assert {_name(entry) for entry in extras["test"] + extras["lint"]} <= test | runtime


def _name(requirement: str) -> str:
    for separator in "<>=!;[ ":
        requirement = requirement.split(separator)[0]
    return requirement.lower().replace("_", "-")


def _pins(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    assert all("==" in line and "://" not in line for line in lines), (
        "every line pins one exact version and names no host"
    )
    return {_name(line) for line in lines}

"""Nobody imports upward: the package's imports, parsed, against the order of its layers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From low to high. A module may import its own layer and those below it.
LAYERS = [
    ["errors", "_version", "files", "threads", "colour"],
    ["fields"],
    ["config", "device"],
    ["presets", "request"],
    ["options", "schedule", "noise", "prompts"],
    ["kernels", "_extension"],
    ["ops"],
    ["weights"],
    ["models"],
    ["runtime"],
    ["tiny"],
    ["conditions"],
    ["calls", "networks", "resolve", "resuming", "starting"],
    ["memory"],
    ["engine"],
    ["handover", "measure"],
    ["integrations", "embed"],
    ["cli"],
    ["__main__"],
]
LAYER = {part: i for i, parts in enumerate(LAYERS) for part in parts}

# Stands beside the layers: the parts it may import, the only parts that may import it, and where a layer reaches up or
# sideways inside a function (imported when called, never when loaded).
STANDS_ALONE = {"video": {"errors", "_version", "files"}}
USES_VIDEO = {"engine", "conditions", "calls", "resolve", "starting", "measure", "integrations", "cli"}
LAZY_UPWARD = {("__init__", "config"), ("__init__", "engine")}
BESIDE_THE_LAYERS = {"__init__"}  # lazy exports: imports errors and _version when loaded

# Heavy or optional: never when the package is loaded, whatever the module.
ONLY_IN_FUNCTIONS = {
    *("diffusers", "transformers", "accelerate", "xformers", "huggingface_hub", "ray", "fsspec", "cv2", "matplotlib"),
    *("starlette", "uvicorn", "websockets", "multipart", "python_multipart", "prometheus_client"),
}


LOADED_BY_ITS_HOST = {ROOT / "miga_engine/integrations/diffusers/pipeline.py": {"diffusers"}}
"""Modules that nothing of the package imports when it is loaded, and what they may import."""


def _modules() -> list[Path]:
    return sorted([*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("kernels/*.py")])


def _part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(absolute module name, runs when the module is loaded, line)."""
    package = ("miga_engine", "kernels") if path.parent.name == "kernels" else path.relative_to(ROOT).parent.parts

    def visit(node: ast.AST, is_loaded: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, is_loaded, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            yield from ((f"{module}.{alias.name}", is_loaded, node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, is_loaded)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, is_loaded and not is_function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def _every_import(path: Path) -> set[str]:
    """Names as `_imports` has them, for type checkers alone ones too."""
    package = ("miga_engine", "kernels") if path.parent.name == "kernels" else path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            found |= {".".join(filter(None, (start, node.module, alias.name))) for alias in node.names}
    return found


def _graph() -> dict[str, set[str]]:
    """Module → modules of the package that it imports anywhere: when loaded, in functions, for type checkers."""
    modules = {}
    for path in _modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("miga_engine", *parts) if parts[0] == "kernels" else parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in modules.items():
        names = _every_import(path)
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys()
        graph[module].discard(module)
    return graph


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def _violation(part: str, imported: str, is_loaded: bool) -> str | None:
    top, *rest = imported.split(".")
    if top == "kernels":
        return "the top-level name `kernels` belongs to another package: import miga_engine.kernels"
    if top in ONLY_IN_FUNCTIONS and is_loaded:
        return f"{top} is optional: import it inside the function that needs it"
    if top != "miga_engine" or not rest:
        return None
    target = rest[0]
    if target not in LAYER and target not in STANDS_ALONE:
        # A name of the package itself, such as __version__; its low parts are all that it loads.
        return None if not (ROOT / "miga_engine" / target).exists() else f"{target} has no layer: add it to LAYERS"
    if target == part or (not is_loaded and (part, target) in LAZY_UPWARD):
        return None
    if part in STANDS_ALONE:
        return None if target in STANDS_ALONE[part] else f"{part} may import {sorted(STANDS_ALONE[part])} only"
    if target in STANDS_ALONE:
        return None if part in USES_VIDEO else f"{part} may not import {target}"
    if part in BESIDE_THE_LAYERS:
        return None if LAYER[target] == 0 else f"{part} may load {LAYERS[0]} only"
    return f"{part} is below {target}" if LAYER[part] < LAYER[target] else None


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_upward(path: Path) -> None:
    part = _part(path)
    assert part in LAYER or part in STANDS_ALONE or part in BESIDE_THE_LAYERS, f"{part} has no layer: add it to LAYERS"
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}: {violation}"
        for name, is_loaded, line in _imports(path)
        if (violation := _violation(part, name, is_loaded))
        if name.split(".")[0] not in LOADED_BY_ITS_HOST.get(path, ())
    ]
    assert not found, "\n".join(found)


def test_what_a_host_loads_is_loaded_by_nothing_else() -> None:
    hosted = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in LOADED_BY_ITS_HOST}
    for path in _modules():
        for name, is_loaded, line in _imports(path):
            is_hosted = any(name == module or name.startswith(module + ".") for module in hosted)
            assert not (is_loaded and is_hosted), f"{path.relative_to(ROOT)}:{line} imports {name}"


def _family_of(path: Path) -> str | None:
    """The family whose folder a module lies in."""
    parts = path.relative_to(ROOT).parts
    return parts[2] if parts[:2] == ("miga_engine", "models") and len(parts) > 3 else None


def test_families_know_nothing_of_each_other_and_the_table_alone_knows_them() -> None:
    families = {family for path in _modules() if (family := _family_of(path))}
    assert {"wan", "videocrafter2"} <= families
    for path in _modules():
        allowed = {_family_of(path)} if path != ROOT / "miga_engine" / "models" / "loading.py" else families
        for name, _, line in _imports(path):
            top, *rest = name.split(".")
            if top == "miga_engine" and rest[0] == "models" and len(rest) > 1 and rest[1] in families:
                assert rest[1] in allowed, f"{path.relative_to(ROOT)}:{line} imports {name}"


@pytest.mark.parametrize(
    ("part", "imported", "is_loaded"),
    [
        ("ops", "miga_engine.runtime.denoise.denoise_pass", True),
        ("ops", "miga_engine.runtime.denoise.denoise_pass", False),
        ("video", "miga_engine.models.load_vae", True),
        ("runtime", "miga_engine.video.outputs.open_sink", True),
        ("tiny", "miga_engine.engine.Engine", True),
        ("models", "transformers.AutoTokenizer", True),
        ("ops", "kernels.consistency_score", False),
        ("__init__", "miga_engine.engine.Engine", True),
    ],
)
def test_the_rules_have_teeth(part: str, imported: str, is_loaded: bool) -> None:
    assert _violation(part, imported, is_loaded)


@pytest.mark.slow
def test_python_outside_the_package_never_imports_top_level_kernels() -> None:
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "kernels" for name in names), path


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Not in a function and not for a type checker either, without exception."""
    graph = _graph()
    assert _reached(graph, "miga_engine.cli.main") >= {"miga_engine.engine", "miga_engine.measure.truth"}
    circles = {module for module in graph if module in _reached(graph, module)}
    assert not circles, {module: sorted(graph[module] & circles) for module in sorted(circles)}


def test_a_circle_is_noticed() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert {module for module in graph if module in _reached(graph, module)} == {"b", "c"}


def test_research_depends_on_the_product_and_never_the_reverse() -> None:
    """Nor do tests and benchmarks under the names that they have for one another."""
    others = {"bench", "tests", *(path.stem for path in [*ROOT.glob("bench/*.py"), *ROOT.glob("tests/**/*.py")])}
    assert {"timing", "places"} < others
    for path in _modules():
        assert not {name.partition(".")[0] for name in _every_import(path)} & others, path

"""Every place that writes, renames or deletes a file is in docs/files.md; files appear whole or not at all."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from miga_engine import files

ROOT = Path(__file__).parents[1]
SAFE = ("files.", "cli.main._keep_standard_streams", "runtime.session.")

# Calls by their last name. Where a mode decides, it is looked at; `replace` and `open` are told from those of others.
WRITES = {
    *("write_text", "write_bytes", "unlink", "mkdir", "makedirs", "rmdir", "rename", "touch", "symlink_to", "symlink"),
    *("hardlink_to", "link", "remove", "removedirs", "truncate", "ftruncate", "mkfifo", "mknod", "chmod", "rmtree"),
    *("move", "copy2", "copyfile", "copytree", "copymode", "copyfileobj", "mkstemp", "mkdtemp", "NamedTemporaryFile"),
    *("TemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile", "save_file", "savetxt", "savez", "tofile"),
    *("savez_compressed", "savefig", "to_csv", "imwrite", "memmap", "open_memmap", "WholeFile", "FileIO", "create"),
    *("written_whole", "write_whole", "path_written_whole", "write_png", "write_contact_sheet", "save_session"),
}
OF_MODULES = {
    ("os", "open"),
    ("os", "replace"),
    ("torch", "save"),
    ("np", "save"),
    ("numpy", "save"),
    ("shutil", "copy"),
}
NOT_FILES = {"CodecContext.create", "hook.remove", ".rename"}


def _writes(node: ast.Call) -> bool:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if f"{owner.rpartition('.')[2]}.{name}" in NOT_FILES:
        return False
    if (owner, name) == ("os", "open"):
        return ast.unparse(node.args[1]) != "os.O_RDONLY"
    if name in WRITES or (owner, name) in OF_MODULES:
        return True
    if name == "replace":  # of a path: one argument, and no text
        return len(node.args) == 1 and not node.keywords
    if name in ("open", "open_own", "fdopen"):
        position = 0 if name == "open" and owner and owner not in ("io", "gzip", "av", "self._av") else 1
        modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] + node.args[
            position : position + 1
        ]
        mode = modes[0] if modes else ast.Constant("r")
        return not isinstance(mode, ast.Constant) or (
            isinstance(mode.value, str) and bool(set("wax+") & set(mode.value))
        )
    return False


def _sites() -> Iterator[tuple[str, str]]:
    """(module.function, call) of every call of the product that may write."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            inside = where
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{where}.{child.name}"
            if isinstance(child, ast.Call) and _writes(child):
                yield where, ast.unparse(child)
            yield from visit(child, inside)

    for path in sorted([*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("kernels/*.py")]):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("miga_engine.")
        yield from visit(ast.parse(path.read_text(encoding="utf-8")), module)


def _documented() -> set[str]:
    """Names of functions in the table of docs/files.md."""
    rows = [line for line in (ROOT / "docs" / "files.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return {name for row in rows for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row.split("|")[-2])}


def test_every_place_that_writes_is_in_the_list() -> None:
    sites = list(_sites())
    missing = [f"{where}: {call[:80]}" for where, call in sites if where not in _documented()]
    assert not missing, "not in the table of docs/files.md:\n" + "\n".join(missing)
    assert not _documented() - {where for where, _ in sites}, (
        "these write nothing any more: take them out of docs/files.md"
    )


def test_nobody_else_opens_a_name_for_writing() -> None:
    """What is written goes through `files`, which opens no link and no name that somebody uses."""
    direct = re.compile(r"(^|\.)(open|write_text|write_bytes|WholeFile|FileIO|mkstemp|NamedTemporaryFile)\(")
    found = [f"{where}: {call[:80]}" for where, call in _sites() if direct.search(call) and not where.startswith(SAFE)]
    into_files = ("VideoFileSink._open: self._av.open(self._file", "joining.join: av.open(file")
    assert [line for line in found if not any(known in line for known in into_files)] == []


def test_only_the_reader_and_the_muxers_open_media() -> None:
    for path in [*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        if path.name not in ("reading.py", "video_file.py", "joining.py"):
            assert not re.search(r"\bav\.open\(", path.read_text(encoding="utf-8")), path


def test_nobody_runs_code_of_a_file() -> None:
    """TorchScript is code, and so is a pickle that is not read as weights only."""
    for path in [*ROOT.glob("miga_engine/**/*.py"), *ROOT.glob("bench/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("eval", "exec"), (path, called)
            assert not called.endswith(("jit.load", "pickle.load", "pickle.loads", "Unpickler")), (path, called)
            if isinstance(node, ast.Call) and called == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), (path, node.lineno)


@pytest.mark.parametrize(
    "call",
    [
        *("open(a, 'w')", "a.open('wb')", "open(a, mode='x')", "a.open(mode)", "os.open(a, flags)", "a.write_text(b)"),
        *("a.replace(b)", "os.replace(a, b)", "a.unlink()", "shutil.rmtree(a)", "torch.save(a, b)", "np.save(a, b)"),
        *("av.open(a, 'w')", "save_file(a, b)", "open_own(a, 'r+')", "io.open(a, 'a')", "a.rename(b)", "a.mkdir()"),
    ],
)
def test_the_list_has_teeth(call: str) -> None:
    assert _writes(ast.parse(call, mode="eval").body)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    ["open(a)", "a.open('rb')", "a.replace('b', 'c')", "replace(a, b=1)", "av.open(a)", "os.open(a, os.O_RDONLY)"],
)
def test_what_only_reads_is_left_alone(call: str) -> None:
    assert not _writes(ast.parse(call, mode="eval").body)  # type: ignore[arg-type]


# files.py ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail() -> None:
        with files.written_whole(path) as file:
            file.write(b"half")
            raise KeyError

    def fail_by_name() -> None:
        with files.path_written_whole(path) as partial:
            partial.write_text("half")
            partial.with_name("beside").write_text("half")
            raise KeyError

    for failing in (fail, fail_by_name):
        with pytest.raises(KeyError):
            failing()
        assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]
        assert path.read_text() == "old"
    files.write_whole(path, "new — ü")
    assert path.read_text(encoding="utf-8") == "new — ü"
    with files.path_written_whole(path) as partial:
        partial.write_text("newer")
        partial.with_name("beside").write_text("what a writer leaves")
    assert path.read_text() == "newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("hours of work")
    for name in ("a.json", "b.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    files.write_whole(tmp_path / "a.json", "new")
    with files.path_written_whole(tmp_path / "b.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "precious").read_text() == "hours of work"
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text() == "new"
    for link in (tmp_path / "there", tmp_path / "nowhere"):
        link.symlink_to(tmp_path / ("precious" if link.name == "there" else "missing"))
        with pytest.raises(FileExistsError):
            files.create(link)
        with pytest.raises(OSError, match=r"it is a link|No such file"):
            files.open_own(link, "r+")
    assert not (tmp_path / "missing").exists()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is not a regular file"):
        files.open_own(tmp_path / "pipe")


def test_names_of_unfinished_files_are_told_from_others(tmp_path: Path) -> None:
    path = tmp_path / "a[1].mp4"
    names = {files.beside(path).name for _ in range(100)}
    assert len(names) == 100
    assert all(files.is_beside(name, path) for name in names)
    others = ["a[1].part.mp4", "a[1].mp4", "a1.00000000.part.mp4", "a[1].0000000g.part.mp4", "a[1].00000000.part.mkv"]
    right = "a[1].00000000.part.mp4"
    for name in (*others, f"../{right}", f"/{right}", f"{right}\n", None, 7, [right], ""):
        assert not files.is_beside(name, path), name


def test_outputs_of_every_command_leave_a_users_files_alone(tmp_path: Path) -> None:
    """Names that unfinished files once had, as links to another's file and as files of the user's."""
    import torch

    from bench.study.grid import write_csv
    from miga_engine.measure.report import write_table
    from miga_engine.models.convert import convert
    from miga_engine.video.contact_sheet import write_contact_sheet

    (tmp_path / "precious").write_text("hours of work")
    torch.save({"a": torch.zeros(3)}, tmp_path / "weights.pt")
    planted = ["rows.csv.part", "table.csv.part", "sheet.png.part", "table.part", "rows.part"]
    for name in planted:
        (tmp_path / name).symlink_to(tmp_path / "precious")
    for name in ("table.csv", "table.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    (tmp_path / ".out.safetensors.part").mkdir()
    (tmp_path / ".out.safetensors.part" / "mine").write_text("mine")
    before = {entry.name for entry in tmp_path.iterdir()}
    write_csv(tmp_path / "rows.csv", [{"method": "a", "seed": 1}])
    write_table(tmp_path / "table.csv", {})
    write_table(tmp_path / "table.json", {})
    write_contact_sheet(tmp_path / "sheet.png", [torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])
    convert(tmp_path / "weights.pt", tmp_path / "out.safetensors")
    assert (tmp_path / "precious").read_text() == "hours of work"
    assert all((tmp_path / name).is_symlink() for name in planted)
    assert (tmp_path / ".out.safetensors.part" / "mine").read_text() == "mine"
    assert {entry.name for entry in tmp_path.iterdir()} - before == {"rows.csv", "sheet.png", "out.safetensors"}

"""The rooms of src/ stand on each other: commands on top, then the method, machinery below.

python tests/test_rooms.py    # lines, longest file and function, arrows and levels of imports
"""

import ast
from functools import cache
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"
ROOMS = (
    "commands", "page", "reporting", "training", "judging", "diffusion", "network", "iclevr",
    "runtime",
)  # fmt: skip
"""From top to bottom: a room may import from itself and from those after it."""
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts): path
    for path in sorted(SRC.rglob("*.py"))
    if path.name != "__init__.py"
}


def room(module: str) -> str:
    first = module.split(".")[0]
    return first if first in ROOMS else "commands"


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of src/ that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        found |= names & MODULES.keys()
    return frozenset(found)


@cache
def level(module: str, above: frozenset[str] = frozenset()) -> int:
    """0 for a module that imports none, else one more than the highest that it imports."""
    assert module not in above, f"{module} imports itself by way of {sorted(above)}"
    return max((level(i, above | {module}) + 1 for i in imports(module)), default=0)


def arrows() -> set[tuple[str, str]]:
    """Which room imports from which."""
    return {(room(m), room(i)) for m in MODULES for i in imports(m) if room(m) != room(i)}


def functions(path: Path) -> dict[str, int]:
    """Functions of a file and their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, kinds)}


def test_no_room_imports_from_one_above():
    for module in MODULES:
        for imported in imports(module):
            assert ROOMS.index(room(module)) <= ROOMS.index(room(imported)), (module, imported)


def test_only_the_demo_calls_other_commands():
    for module in MODULES:
        called = {i for i in imports(module) if room(i) == "commands"}
        assert not called or module == "demo", (module, called)


def test_no_import_goes_round_in_a_circle():
    assert max(map(level, MODULES)) < len(MODULES)


def main() -> None:
    lines = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in MODULES.items()}
    for name in ROOMS:
        of_room = [m for m in MODULES if room(m) == name]
        print(f"{name:<10}{len(of_room):>3} files{sum(lines[m] for m in of_room):>7,} lines")
    print(f"{'all':<10}{len(lines):>3} files{sum(lines.values()):>7,} lines")
    longest = sorted(lines, key=lines.get)[-3:]
    print("longest files:", ", ".join(f"{m} {lines[m]}" for m in longest))
    found = {f"{m}.{f}": n for m, path in MODULES.items() for f, n in functions(path).items()}
    longest = sorted(found, key=found.get)[-8:]
    print("longest functions:", ", ".join(f"{f} {found[f]}" for f in longest))
    print(f"imports: {sum(len(imports(m)) for m in MODULES)} arrows between files, "
          f"{len(arrows())} between rooms, {max(map(level, MODULES)) + 1} levels")  # fmt: skip


if __name__ == "__main__":
    main()

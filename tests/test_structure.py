"""The structure of the code: layers, names, sizes and wording that the documentation promises, and a clean import."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Set, Tuple

import pytest

from tests.repository import ROOT, repository_files

PACKAGE = "longmem_fairseq"
CODE = (PACKAGE, "preprocess", "examples")
# The lowest layer first. A module imports from its own layer and from lower ones; the package's __init__, which
# registers everything, is above all of them.
LAYERS = (
    ("arguments", "files", "tensor_files", "text", "progress", "safe_load"),
    ("data",),
    ("modules",),
    ("memory",),
    ("backbones",),
    ("models",),
    ("released",),
    ("criterions", "tasks"),
    ("hub",),
    ("evaluation",),
    ("integrations",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# File names that may occur twice, and why.
SHARED_FILE_NAMES = {
    "base.py": "the contract and the registry of the folder that it is in: of backbones, and of searches",
}
MOST_LINES = {"models/longmem_decoder.py": 230, "tasks/longmem_language_modeling.py": 250}
MOST_IMPORTS = {"models/longmem_decoder.py": 10}

FRAGMENT = re.compile(r"^ +[a-z_, ]+: (of|whose|which|what|from|by|in|with|how) ")
ARGUMENT = re.compile(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)$")
# A description starts with a capital letter, or with a name that is written in small ones, and ends with a full stop.
SENTENCE = re.compile(r"^([A-Z0-9`:\"']|(fairseq|faiss|numpy|sacrebleu|torch)\b).*\.$")
BANNED = re.compile(r"\b(amid|anew|cannot be had|gives way|give way|goes on|go on)\b", re.IGNORECASE)
NO_NOUNS = {"found", "mine", "ours", "own", "said", "theirs", "told", "wanted"}

Modules = Dict[str, Path]


def python_files(*directories: str) -> List[Path]:
    return [path for path in repository_files() if path.parts[0] in directories and path.suffix == ".py"]


def modules_of(*directories: str) -> Modules:
    """Paths of the modules in some directories, relative to ``ROOT``, by their dotted names."""
    modules = {}
    for path in python_files(*directories):
        parts = path.with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def without_types(tree: ast.Module) -> ast.Module:
    """Remove the blocks ``if TYPE_CHECKING:``, which never run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    return tree


def imports_of(name: str, path: Path, modules: Modules, types: bool = True) -> Iterator[Tuple[int, str, str]]:
    """Yield (line, module, imported name or "") for every import of a known module, inside functions too.

    Args:
        name: Dotted name of the importing module.
        path: Path of the importing module.
        modules: Known modules.
        types: Whether imports that only type checkers see are included.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree_of(path) if types else without_types(tree_of(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                if submodule in modules:
                    yield node.lineno, submodule, ""
                elif module in modules:
                    yield node.lineno, module, alias.name


def rank_of(name: str) -> int:
    """Layer of a module of the package, counted from the lowest."""
    part = name.split(".")[1] if "." in name else None
    assert part is None or part in RANK, f"{name} has no place in LAYERS"
    return len(LAYERS) if part is None else RANK[part]


def circles(edges: Dict[str, Set[str]]) -> List[List[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> Set[str]:
        seen, pending = set(), [start]
        while pending:
            for target in edges.get(pending.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    pending.append(target)
        return seen

    reach = {name: reachable(name) for name in edges}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach.get(other, ())))
        for name in edges
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def test_the_import_parser_sees_every_form(tmp_path, monkeypatch):
    package = tmp_path / "p"
    (package / "q").mkdir(parents=True)
    for name in ("__init__", "a", "b", "q/__init__", "q/c"):
        (package / f"{name}.py").write_text("")
    (package / "q" / "d.py").write_text(
        "import p.a\nfrom p import b\nfrom .. import a as x\nfrom . import c\nfrom .c import f\n"
        "def g():\n    from ..b import _h\n    import os, p.q.c\n"
        "if TYPE_CHECKING:\n    import p.b\n"
    )
    modules = {".".join(path.relative_to(tmp_path).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name[: -len(".__init__")] if name.endswith("__init__") else name: path for name, path in modules.items()}
    monkeypatch.setattr("tests.test_structure.ROOT", tmp_path, raising=False)
    d = ("p.q.d", package / "q" / "d.py", modules)
    assert (10, "p.b", "") in list(imports_of(*d))
    seen = list(imports_of(*d, types=False))
    assert sorted(seen) == [
        (1, "p.a", ""),
        (2, "p.b", ""),
        (3, "p.a", ""),
        (4, "p.q.c", ""),
        (5, "p.q.c", "f"),
        (7, "p.b", "_h"),
        (8, "p.q.c", ""),
    ]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


def test_lower_layers_do_not_import_upper_ones():
    modules = modules_of(PACKAGE)
    upward = [
        f"{path}:{line} imports {target}"
        for name, path in modules.items()
        for line, target, _ in imports_of(name, path, modules)
        if rank_of(target) > rank_of(name)
    ]
    assert not upward, "\n".join(upward)


def test_scripts_import_the_package_and_not_the_other_way():
    modules = modules_of(PACKAGE, "preprocess", "examples", "tests")
    allowed = {
        PACKAGE: {PACKAGE},
        "preprocess": {PACKAGE, "preprocess"},
        "examples": {PACKAGE, "preprocess", "examples"},
    }
    backward = [
        f"{path}:{line} imports {target}"
        for name, path in modules.items()
        for line, target, _ in imports_of(name, path, modules)
        if path.parts[0] in allowed and target.split(".")[0] not in allowed[path.parts[0]]
    ]
    assert not backward, "\n".join(backward)


def test_no_module_imports_itself_through_others():
    """Imports inside functions count: they would only hide a circle."""
    modules = modules_of(PACKAGE, "preprocess")
    edges = {
        name: {target for _, target, _ in imports_of(name, path, modules, types=False) if target != name}
        for name, path in modules.items()
    }
    assert not circles(edges), "\n".join(map(str, circles(edges)))


def test_no_private_name_is_imported():
    """What ruff's SLF001 is for attributes."""
    modules = modules_of(PACKAGE, "preprocess", "examples", "tests")
    private = [
        f"{path}:{line} imports {imported} from {target}"
        for name, path in modules.items()
        for line, target, imported in imports_of(name, path, modules)
        if imported.startswith("_") and not imported.startswith("__")
    ]
    assert not private, "\n".join(private)


def test_one_class_of_a_name():
    places = defaultdict(list)
    for path in python_files(PACKAGE, "preprocess"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    shared = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not shared, "\n".join(shared)


def test_one_file_of_a_name():
    places = defaultdict(list)
    for path in python_files(PACKAGE, "preprocess"):
        if path.name not in {"__init__.py", *SHARED_FILE_NAMES}:
            places[path.name].append(str(path))
    shared = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not shared, "\n".join(shared)


@pytest.mark.parametrize("path, limit", MOST_LINES.items())
def test_file_is_short(path, limit):
    lines = (ROOT / PACKAGE / path).read_text(encoding="utf-8").count("\n")
    assert lines <= limit


@pytest.mark.parametrize("path, limit", MOST_IMPORTS.items())
def test_file_imports_from_few_modules(path, limit):
    modules = modules_of(PACKAGE)
    name = ".".join((PACKAGE, *Path(path).with_suffix("").parts))
    targets = {target for _, target, _ in imports_of(name, modules[name], modules)}
    assert len(targets) <= limit, sorted(targets)


def lines_that_match(pattern: "re.Pattern[str]", paths: Iterable[Path]) -> List[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_arguments_are_described_by_noun_phrases():
    """``path: Path of the checkpoint.``, not ``path: of the checkpoint``."""
    matches = lines_that_match(FRAGMENT, python_files(*CODE))
    assert not matches, "\n".join(matches)


def arguments_of(docstring: str) -> Iterator[Tuple[str, str]]:
    """Yield (names, description) of the entries under "Args:" and "Attributes:"."""
    entries, section = [], ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif section in ("Args:", "Attributes:") and ARGUMENT.match(line):
            entries.append(list(ARGUMENT.match(line).groups()))
        elif section in ("Args:", "Attributes:") and line.strip():
            entries[-1][1] += f" {line.strip()}"
    return map(tuple, entries)


def test_arguments_are_described_by_sentences():
    fragments = []
    for path in python_files(*CODE):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Module)):
                for names, description in arguments_of(ast.get_docstring(node) or ""):
                    if not SENTENCE.match(description):
                        fragments.append(f"{path}: {getattr(node, 'name', '')}: {names}: {description}")
    assert not fragments, "\n".join(fragments)


def test_plain_words():
    reports = ROOT / "examples" / "results"  # as they were written
    paths = [
        path
        for path in repository_files()
        if path.parts[0] in (*CODE, "tests", "docs", "README.md", "Makefile", "setup.py")
        and ROOT / path != Path(__file__)
        and path.suffix in (".py", ".cpp", ".sh", ".md", "")
        and reports not in (ROOT / path).parents
    ]
    matches = lines_that_match(BANNED, paths)
    assert not matches, "\n".join(matches)


def test_no_code_is_left_unformatted():
    matches = lines_that_match(re.compile(r"# fmt: ?(skip|off)\b"), python_files(*CODE, "tests"))
    assert not matches, "\n".join(matches)


def test_variables_are_nouns():
    named = [
        f"{path}:{node.lineno}: {node.arg if isinstance(node, ast.arg) else node.id}"
        for path in python_files(*CODE, "tests")
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.arg) and node.arg in NO_NOUNS)
        or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NO_NOUNS)
    ]
    assert not named, "\n".join(named)


def test_scripts_run_as_modules():
    """Scripts are run by ``python -m`` from the clone's root, so that none changes the path of imports."""
    changed = [
        str(path)
        for path in python_files(*CODE)
        if re.search(r"\bsys\.path(\[.*\]\s*=|\.(insert|append|extend)\b)", (ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not changed, "\n".join(changed)


# Everything that the import could change, before and after it. What fairseq does when it is imported is not counted.
IMPORT = """
import contextlib, io, json, logging, os, random, sys, threading, types, warnings
import numpy, torch
import fairseq_cli.train, fairseq_cli.interactive  # fairseq as its commands load it

def contents():
    # The members of fairseq's modules, and of the classes in them: models are registered, but nothing is exchanged.
    members = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fairseq":
            members[name] = {k: v for k, v in vars(module).items() if not isinstance(v, types.ModuleType)}
            for key, value in list(members[name].items()):
                if isinstance(value, type) and value.__module__ == name:
                    members[f"{name}.{key}"] = dict(vars(value))
    return members

def state():
    loggers = {n: l for n, l in logging.root.manager.loggerDict.items() if not n.startswith("longmem_fairseq")}
    return {
        "torch's safe globals": sorted(map(str, torch.serialization.get_safe_globals())),
        "environment": dict(os.environ),
        "warning filters": [str(f) for f in warnings.filters],
        "threads": sorted(t.name for t in threading.enumerate()),
        "path of imports": list(sys.path),
        "directory": os.getcwd(),
        "log handlers": [str(h) for h in logging.root.handlers],
        "loggers": {
            n: [l.level, l.disabled, len(l.handlers), len(l.filters)]
            for n, l in loggers.items()
            if isinstance(l, logging.Logger) and (l.level or l.disabled or l.handlers or l.filters)
        },
        "random states": [hash(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().sum().item()],
        "torch's settings": [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        ],
    }

class Records(logging.Handler):
    def emit(self, record):
        records.append(f"{record.name}: {record.getMessage()}")

records, printed = [], io.StringIO()
logging.root.addHandler(Records())
logging.root.setLevel(logging.DEBUG)
modules, members, before = set(sys.modules), contents(), state()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import longmem_fairseq
after, now = state(), contents()
print(json.dumps({
    "state": {name: [before[name], after[name]] for name in before if before[name] != after[name]},
    "members": sorted(
        f"{place}.{name}"
        for place, old in members.items()
        for name in {*old, *now[place]}
        if name not in old or now[place].get(name) is not old[name]
    ),
    "records": records,
    "printed": printed.getvalue(),
    "modules": sorted({name.split(".")[0] for name in set(sys.modules) - modules}),
}))
"""


def test_the_import_registers_and_does_nothing_else():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    effects = json.loads(done.stdout.splitlines()[-1])
    modules = effects.pop("modules")
    assert effects == {"state": {}, "members": [], "records": [], "printed": ""}
    # Packages that only some uses need are loaded by those.
    assert {"faiss", "matplotlib", "sacrebleu", "tokenizers", "transformers", "triton", "zstandard"}.isdisjoint(modules)

"""Measure how readable a checkout of qat-edge is, so that two checkouts can be compared.

    python tools/measure_readability.py [ROOT] [--json FILE] [--verbose]
    python tools/measure_readability.py [ROOT] --trace export|finetune|validate [--json FILE] [--verbose]

Without `--trace` only the text of the source files is read: their size, comments, types, imports and words. With it a
command runs on a tiny random model, and the files whose functions it calls are counted: the files that a reader
opens to follow that command. Only the Python standard library is imported here; `--trace` needs the environment of
ROOT, and puts ROOT's own source folders first on the path.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from types import FrameType
from typing import Any

SOURCE_ROOTS = ("toolkit", "exporters", "devices")
WATCHED_WORDS = (
    "asked", "beside", "say", "turned", "answers", "held", "lies", "told", "said", "settle", "looked",
)  # fmt: skip
PER_WORDS = 10_000
ODD_OPENINGS = ("What", "Whether", "Of", "How", "Is")
VERBS = ("export", "finetune", "validate")
# The commands were one module before they became a package.
COMMAND_MODULES = ("qat_edge.cli.commands", "qat_edge.cli")
# A comprehension at module level is a code object of its own, but no function that somebody calls.
COMPREHENSIONS = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One Python file of the product.

    Attributes:
        path: where it is.
        module: its dotted import name; a package's is that of its folder.
        text: its content.
    """

    path: Path
    module: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Syntax tree of the file."""
        return ast.parse(self.text, str(self.path))

    @cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, nested ones included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        """All classes, nested ones included."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]

    @cached_property
    def comments(self) -> list[tokenize.TokenInfo]:
        """All comments, those behind code included."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return [token for token in tokens if token.type == tokenize.COMMENT]

    @cached_property
    def docstrings(self) -> list[str]:
        """Docstrings of the module, its classes and its functions, where they have one."""
        found = (ast.get_docstring(node) for node in (self.tree, *self.classes, *self.functions))
        return [text for text in found if text]


def source_files(root: Path) -> list[SourceFile]:
    """Return the Python files of the three source roots of a checkout, sorted by path."""
    files = []
    for folder in (root / name for name in SOURCE_ROOTS):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            files.append(SourceFile(path, module, path.read_text(encoding="utf-8")))
    return files


# --- figures read from the text ---------------------------------------------------------------------------------


def measure(root: Path) -> dict[str, Any]:
    """Return all figures that need no run of the product.

    Args:
        root: checkout with the folders `toolkit`, `exporters` and `devices`.
    """
    files = source_files(root)
    return {
        **_pages(root),
        **_imports(files),
        **_layout(files),
        **_parameters(files),
        **_prose(files),
        "repeated_file_names": _repeated(file.path.name for file in files if file.path.name != "__init__.py"),
        "repeated_class_names": _repeated(node.name for file in files for node in file.classes),
    }


def _pages(root: Path) -> dict[str, Any]:
    """Size of the documentation, and the two files that make a package pleasant to import."""
    readme = root / "README.md"
    docs = root / "docs"
    packages = [path for name in SOURCE_ROOTS for path in sorted((root / name).glob("*")) if path.is_dir()]
    packages = [package for package in packages if (package / "__init__.py").is_file()]
    init = root / "toolkit" / "qat_edge" / "__init__.py"
    return {
        "readme_words": len(readme.read_text(encoding="utf-8").split()) if readme.is_file() else 0,
        "docs_pages": len(list(docs.rglob("*.md"))),
        "has_all": init.is_file() and "__all__" in _assigned_names(ast.parse(init.read_text(encoding="utf-8"))),
        "py_typed": {package.name: (package / "py.typed").is_file() for package in packages},
    }


def _assigned_names(tree: ast.Module) -> set[str]:
    """Names assigned at the top level of a module."""
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _imports(files: list[SourceFile]) -> dict[str, Any]:
    """Size of the import graph. Imports under `if TYPE_CHECKING` never run, so they are counted apart."""
    modules = {file.module for file in files}
    executed: dict[str, set[str]] = {}
    type_only = 0
    for file in files:
        typing_nodes = set(_type_checking_imports(file.tree))
        targets: dict[bool, set[str]] = {True: set(), False: set()}
        for node in ast.walk(file.tree):
            targets[node in typing_nodes].update(_imported(node, modules))
        executed[file.module] = targets[False] - {file.module}
        type_only += len(targets[True] - targets[False] - {file.module})
    return {
        "modules": len(files),
        "import_edges": sum(len(targets) for targets in executed.values()),
        "type_only_import_edges": type_only,
        "import_cycles": cycles(executed),
    }


def _type_checking_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes below `if TYPE_CHECKING:`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from ast.walk(statement)


def _imported(node: ast.AST, modules: set[str]) -> Iterator[str]:
    """Yield the modules of the product that one import statement names; nothing for any other node."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        for alias in node.names:
            # `from package import name`: the name is a submodule, or something defined in the package itself.
            submodule = f"{node.module}.{alias.name}"
            if submodule in modules:
                yield submodule
            elif node.module in modules:
                yield node.module


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of two or more modules that reach one another, each sorted.

    Args:
        graph: module -> modules it imports.
    """
    reachable = {module: _reachable(graph, module) for module in graph}
    found: list[list[str]] = []
    for module in sorted(graph):
        if any(module in group for group in found):
            continue
        group = sorted(other for other in reachable[module] if module in reachable.get(other, ()))
        if len(group) > 1:
            found.append(group)
    return found


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Modules that an import chain from `start` arrives at; `start` itself only through a cycle."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting.extend(new)
    return found


def _layout(files: list[SourceFile]) -> dict[str, Any]:
    """Length and density of functions, and how much of the text is comment or space."""
    functions = [function for file in files for function in file.functions]
    lengths = [(function.end_lineno or function.lineno) - function.lineno + 1 for function in functions]
    nodes = [sum(1 for _ in ast.walk(function)) for function in functions]
    lines = [line for file in files for line in file.text.splitlines()]
    comments = [token for file in files for token in file.comments]
    on_own_line = sum(not token.line[: token.start[1]].strip() for token in comments)
    return {
        "functions": len(functions),
        "function_lines_median": median(lengths) if lengths else 0,
        "function_lines_p90": _percentile_90(lengths),
        "function_lines_longest": max(lengths, default=0),
        "nodes_per_function_median": median(nodes) if nodes else 0,
        "lines": len(lines),
        "comment_lines_percent": _percent(len(comments), len(lines)),
        "comment_lines_without_code_percent": _percent(on_own_line, len(lines)),
        "blank_lines_percent": _percent(sum(not line.strip() for line in lines), len(lines)),
    }


def _percentile_90(values: list[int]) -> float:
    if len(values) < 2:
        return float(sum(values))
    return quantiles(values, n=10, method="inclusive")[-1]


def _parameters(files: list[SourceFile]) -> dict[str, Any]:
    """Count parameters without a real type; `self`, `cls`, `*args` and `**kwargs` are left out."""
    parameters = []
    for function in (function for file in files for function in file.functions):
        arguments = function.args
        parameters += [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
    untyped = [parameter for parameter in parameters if _is_any(parameter.annotation)]
    return {
        "parameters": len(parameters),
        "any_parameters": len(untyped),
        "any_parameters_percent": _percent(len(untyped), len(parameters)),
        "any_model_parameters": sum(parameter.arg == "model" for parameter in untyped),
    }


def _is_any(annotation: ast.expr | None) -> bool:
    """Return whether an annotation is `Any`, or `Any | None`."""
    if annotation is None:
        return False
    parts = [part.strip() for part in ast.unparse(annotation).split("|")]
    return "Any" in parts and set(parts) <= {"Any", "None"}


def _prose(files: list[SourceFile]) -> dict[str, Any]:
    """Opening words of docstrings, and how often each watched word occurs in docstrings and comments."""
    docstrings = [text for file in files for text in file.docstrings]
    openings = Counter(text.split()[0].rstrip(",.:;") for text in docstrings)
    remarks = [token.string for file in files for token in file.comments]
    words = Counter(word.lower() for text in (*docstrings, *remarks) for word in re.findall(r"[A-Za-z']+", text))
    total = words.total()
    rate = {word: round(words[word] * PER_WORDS / total, 1) if total else 0.0 for word in WATCHED_WORDS}
    return {
        "docstrings": len(docstrings),
        "odd_docstring_openings": {word: openings[word] for word in ODD_OPENINGS},
        "prose_words": total,
        "per_10000_words": rate,
    }


def _repeated(names: Iterable[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(Counter(names).items()) if count > 1}


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


# --- figures of a run -------------------------------------------------------------------------------------------


class FileTracer:
    """Record the files below some folders in which a function is called.

    Attributes:
        entered: paths of those files. Code that runs while a module is being imported (its top level, class bodies,
            decorators) does not count.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.entered: set[str] = set()
        self._prefixes = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
        self._is_ours: dict[str, bool] = {}

    def __enter__(self) -> FileTracer:
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        path = frame.f_code.co_filename
        if path in self.entered or not self._belongs(path):
            return
        if _is_function(frame) and not self._is_importing(frame):
            self.entered.add(path)

    def _belongs(self, path: str) -> bool:
        if path not in self._is_ours:
            self._is_ours[path] = os.path.realpath(path).startswith(self._prefixes)
        return self._is_ours[path]

    def _is_importing(self, frame: FrameType) -> bool:
        """Return whether a module of ours is being imported further up the stack."""
        caller = frame.f_back
        while caller is not None:
            if caller.f_code.co_name == "<module>" and self._belongs(caller.f_code.co_filename):
                return True
            caller = caller.f_back
        return False


def _is_function(frame: FrameType) -> bool:
    """Return whether a frame runs a function: module and class bodies keep their names in a dictionary."""
    return bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED) and frame.f_code.co_name not in COMPREHENSIONS


def trace(root: Path, verb: str) -> dict[str, Any]:
    """Run a command on a tiny model, and count the files that it enters and the modules that it imports.

    Processes that the command starts (the agent on a device) are not followed.

    Args:
        root: checkout whose commands are run.
        verb: one of VERBS.
    """
    folders = [root / name for name in SOURCE_ROOTS]
    _use(root)
    with tempfile.TemporaryDirectory(prefix="measure-house-") as name:
        work = Path(name)
        # In a process of its own, so that the commands below import everything anew.
        command = [sys.executable, str(Path(__file__).resolve()), str(root), "--prepare", verb, "--work", name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        main = _command()
        _call(main, [verb, "--help"])
        with_help = _modules()
        with FileTracer(folders) as tracer:
            _call(main, _arguments(verb, work))
    entered = sorted(str(Path(path).relative_to(root)) for path in tracer.entered)
    imported = sorted(_modules() - with_help)
    return {"verb": verb, "files_entered": len(entered), "modules_imported": len(imported),
            "entered": entered, "imported": imported}  # fmt: skip


def prepare(root: Path, verb: str, work: Path) -> None:
    """Make in `work` what a command starts from: a model and its rows; a frozen run; an exported run."""
    _use(root)
    spec = importlib.util.spec_from_file_location("measured_conftest", root / "tests" / "conftest.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{root / 'tests' / 'conftest.py'}: there is no such file. Give the root of a checkout.")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    tokenizer = conftest.make_tokenizer()
    conftest.make_model(tokenizer).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    conftest.train_run(work / "model", work)

    main, run = _command(), str(work / "run")
    if verb != "finetune":
        _call(main, ["quantize", run])
    if verb == "validate":
        _call(main, _arguments("export", work))


def _arguments(verb: str, work: Path) -> list[str]:
    """Command line of a verb, small enough to end in seconds: one artifact, no comparison with PTQ."""
    run = str(work / "run")
    rows = ["--data", str(work / "train.jsonl"), "--eval-data", str(work / "eval.jsonl")]
    training = {"steps": 4, "qat-start": 0.5, "batch-size": 4, "lora-rank": 4, "learning-rate": 0.01}
    measuring = {
        "tokens": 64, "window": 32, "prompts": 2, "max-new-tokens": 4, "prefill": 8, "decode": 4, "repeats": 1,
    }  # fmt: skip
    commands = {
        "finetune": ["--model", str(work / "model"), *rows, *_flags(training), "--out", str(work / "second")],
        "export": [run, "--target", "executorch", "--ptq", "none", "--context-length", "64"],
        "validate": [run, "--device", "local", "--target", "executorch", *_flags(measuring)],
    }
    return [verb, *commands[verb]]


def _flags(options: Mapping[str, float]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _use(root: Path) -> None:
    """Import the product from a checkout, here and in every process started from here; never from the network."""
    folders = [str(root / name) for name in SOURCE_ROOTS]
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.environ["HF_HUB_OFFLINE"] = "1"


def _command() -> Callable[..., Any]:
    """Return the click command of the checkout in use.

    Raises:
        SystemExit: it has none.
    """
    for name in COMMAND_MODULES:
        try:
            found: Callable[..., Any] = importlib.import_module(name).main
        except (ModuleNotFoundError, AttributeError):
            continue
        return found
    raise SystemExit(f"None of {', '.join(COMMAND_MODULES)} has a command `main`.")


def _call(main: Callable[..., Any], arguments: list[str]) -> None:
    """Run one command in this process, with what it prints on stderr.

    Raises:
        SystemExit: the command failed.
    """
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        main(arguments, prog_name="qat-edge")
    except SystemExit as ended:
        if ended.code:
            raise SystemExit(f"qat-edge {' '.join(arguments)} ended with exit code {ended.code}.") from ended
    finally:
        sys.stdout = stdout


def _modules() -> set[str]:
    """Modules of the product that are imported now."""
    return {name for name in sys.modules if name.split(".")[0].startswith("qat_edge")}


# --- command ----------------------------------------------------------------------------------------------------


def lines(figures: dict[str, Any], is_verbose: bool = False) -> Iterator[str]:
    """Yield one line per figure; a list is its length, followed by its elements where `is_verbose`."""
    for name, value in figures.items():
        if isinstance(value, dict) and not name.startswith("repeated"):
            yield f"{name}: " + ", ".join(f"{key} {each}" for key, each in value.items())
            continue
        if not isinstance(value, list | dict):
            yield f"{name}: {value}"
            continue
        yield f"{name}: {len(value)}"
        if is_verbose:
            yield from (f"  {' <-> '.join(each) if isinstance(each, list) else each}" for each in value)


def main() -> None:
    """Print the figures of one checkout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1], help="checkout to measure")
    parser.add_argument("--trace", choices=VERBS, help="run this command, and count the files that it enters")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--verbose", action="store_true", help="print the names behind each count")
    parser.add_argument("--prepare", choices=VERBS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    root = given.root.resolve()

    if given.prepare:
        prepare(root, given.prepare, given.work)
        return
    figures = trace(root, given.trace) if given.trace else measure(root)
    for line in lines(figures, given.verbose):
        print(line)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

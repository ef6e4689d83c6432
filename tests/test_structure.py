"""The structure of the source tree: who may import whom, and the words we write in."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {"qat_edge": "toolkit", "qat_edge_exporters": "exporters", "qat_edge_devices": "devices"}
FILES = sorted(p for package, folder in SOURCE_ROOTS.items() for p in (ROOT / folder / package).rglob("*.py"))

# Import layers, lowest first: a module imports from its own layer and from those below it.
FLOORS = (
    {
        "errors",
        "export_command",
        "python_process",
        "environment",
        "launched",
        "run",
        "run_lock",
        "path_names",
        "peak_memory",
        "previous_run",
        "option_paths",
        "stop_signals",
        "storage",
        "manifest",
        "readers",
        "field_types",
        "lazy",
        "logs",
        "remote_code",
        "progress",
        "profiles",
        "options",
        "config",
        "quant.codebook",
        "quant.ptq.method_names",
    },
    {"data", "models", "quant", "demo_data"},
    {"train", "evaluate"},
    {"diagnose", "report", "public_tasks"},
    {"verbs"},
    {"api"},
    {"cli"},
)
# What qat_edge may know of the exporters: their records and the types that these return.
DOORS = {
    "qat_edge_exporters.targets",
    "qat_edge_exporters.artifact",
    "qat_edge_exporters.executorch.diagnosis",
    "qat_edge_exporters.file_diagnosis",
    "qat_edge_exporters.planned_size",
}


def module_name(path: Path) -> str:
    """Return the dotted name of a source file."""
    folder = next(ROOT / f for f in SOURCE_ROOTS.values() if path.is_relative_to(ROOT / f))
    return ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Yield our modules that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def floor_of(module: str) -> int | None:
    """Return the floor of a module of qat_edge; None for the package itself and for other packages."""
    name = module.removeprefix("qat_edge.")
    if name == module:
        return None
    for number, floor in enumerate(FLOORS):
        if any(name == part or name.startswith(f"{part}.") for part in floor):
            return number
    raise AssertionError(f"{module} has no floor: add it to FLOORS")


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("qat_edge.") and not m.endswith("__main__")])
def test_imports_go_down(module: str) -> None:
    own = floor_of(module)
    assert own is not None
    up = [other for other in imports(MODULES[module]) if (floor_of(other) or 0) > own]
    assert up == [], f"{module} imports from floors above it"


def test_the_toolkit_knows_the_exporters_by_their_records_only() -> None:
    found = {
        (module, other)
        for module, path in MODULES.items()
        if module.split(".")[0] == "qat_edge"
        for other in imports(path)
        if other.startswith("qat_edge_exporters") and other not in DOORS
    }
    assert found == set()


def test_devices_know_nothing_of_the_other_packages() -> None:
    found = {m for m, path in MODULES.items() if m.startswith("qat_edge_devices") for m in imports(path)}
    assert {n for n in found if n.startswith("qat_edge") and not n.startswith("qat_edge_devices")} == set()


def test_names_of_files_and_classes_are_unique() -> None:
    names = [path.name for path in FILES if not path.name.startswith("__")]
    classes = [
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []
    assert sorted(n for n in set(classes) if classes.count(n) > 1) == []


def test_one_module_renders_chat_templates() -> None:
    callers = [path.name for path in FILES if ".apply_chat_template(" in path.read_text(encoding="utf-8")]
    assert callers == ["chat_template.py"], "a prompt from elsewhere may differ from that of training"


# --- words --------------------------------------------------------------------------------------------------

# Words of ours that engineers of this field do not use, and openings that name no thing.
PRIVATE_WORDS = re.compile(r"\b(turned|asked|beside|settles?|told|said|yardsticks?|partings?)\b", re.IGNORECASE)
OPENINGS = ("What ", "Whether ", "Of ", "How ", "Is ")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield docstrings, comments and messages of a file with their line numbers."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for number, line in enumerate(text.splitlines(), 1):
        if "#" in line:
            yield number, line.partition("#")[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_those_of_the_field(path: Path) -> None:
    # demo_data holds what users of an assistant say, not our prose.
    if "demo_data" in path.parts and path.stem in ("intents", "words"):
        pytest.skip("data, not prose")
    found = [f"{path.name}:{line}: {m[0]}" for line, text in prose(path) for m in PRIVATE_WORDS.finditer(text)]
    docstrings = [
        (node.lineno if hasattr(node, "lineno") else 1, ast.get_docstring(node) or "")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    found += [f"{path.name}:{line}: {text[:40]}" for line, text in docstrings if text.startswith(OPENINGS)]
    assert found == []


# --- the front door -----------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qat_edge import export, finetune, generate, load_frozen, quantize, validate, verify, Run\n"
        "heavy = {'torch', 'transformers', 'executorch', 'onnx', 'onnxruntime', 'peft', 'datasets', 'rich', 'click'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", SOURCE_ROOTS)
def test_every_package_is_typed(package: str) -> None:
    assert (ROOT / SOURCE_ROOTS[package] / package / "py.typed").is_file()


def test_rich_and_click_are_imported_by_the_command_line_only() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in FILES
        if re.search(r"^\s*(from|import) (rich|click)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert all(name.startswith("toolkit/qat_edge/cli/") for name in found), found


# --- what is read may come from anyone ------------------------------------------------------------------------

# Where JSON is parsed that no file of a user holds.
OTHER_PARSERS = {
    "qat_edge.train.run_inputs": "its own metadata, to compare it as JSON holds it",
    "qat_edge_exporters.executorch.pte.delegates": "output of flatc, with infinities",
    "qat_edge_exporters.encoder_process": "the request of its own process",
    "qat_edge_exporters.executorch.runtime_probe": "output of its own process",
    "qat_edge_exporters.file_diagnosis": "output of its own process",
    "qat_edge_exporters.runner_turns": "the prompt from its own process",
    "qat_edge_devices.device_data": "the device layer's own checks: it is installed without the toolkit",
    "qat_edge_devices.agent.agent": "the request of this program",
    "qat_edge_devices.agent.loaded_models": "genai_config.json, checked before it was sent",
    "qat_edge_devices.agent.transformers_model": "generation_config.json, checked before it was sent",
}
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load", "tomllib.load", "tomllib.loads"}
WITHOUT_CODE = ("LoraConfig", "PeftModel", "GenerationConfig")  # their from_pretrained runs no code of a model


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls in a file with their dotted names; a call of partial counts as a call of its first argument."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.args[0] if ast.unparse(node.func) == "partial" and node.args else node.func
            yield ast.unparse(function), node


@pytest.mark.parametrize("module", [m for m in MODULES if m != "qat_edge.readers"])
def test_files_are_parsed_by_the_readers(module: str) -> None:
    found = [name for name, _ in calls(MODULES[module]) if name in PARSERS]
    assert not found or module in OTHER_PARSERS, f"{module} calls {found}: use qat_edge.readers"


def test_the_exceptions_still_parse() -> None:
    assert [m for m in OTHER_PARSERS if not any(name in PARSERS for name, _ in calls(MODULES[m]))] == []


def test_every_load_says_whether_code_may_run() -> None:
    """Without the keyword, transformers asks on stdin and may run the code."""
    found = []
    for module, path in MODULES.items():
        for name, call in calls(path):
            owner, _, method = name.rpartition(".")
            if method in ("from_pretrained", "from_config") and owner not in WITHOUT_CODE:
                found += [] if "trust_remote_code" in {k.arg for k in call.keywords} else [f"{module}:{call.lineno}"]
    assert found == []


def test_nothing_is_unpickled_or_evaluated() -> None:
    forbidden = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "input", "os.system", "os.popen"}
    found = []
    for module, path in MODULES.items():
        for name, call in calls(path):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            shell = keywords.get("shell", "False") != "False" or keywords.get("allow_pickle", "False") != "False"
            # torch's loader of plain data refuses everything that would have to be called.
            plain = name == "torch.load" and keywords.get("weights_only") == "True"
            found += [f"{module}:{call.lineno}: {name}"] if (name in forbidden and not plain) or shell else []
    assert found == []


def test_no_child_process_imports_from_the_current_folder() -> None:
    """Python looks for modules there first, and it may be a folder from somebody else: see `python_process`."""
    found = [
        str(path.relative_to(ROOT))
        for path in FILES
        if "sys.executable" in path.read_text(encoding="utf-8") and path.name not in ("python_process.py", "local.py")
    ]
    assert found == []  # `local.py` runs the agent in a new folder that holds only what we put there


def test_no_child_process_reads_our_stdin() -> None:
    found = []
    for module, path in MODULES.items():
        for name, call in calls(path):
            if name in ("subprocess.run", "subprocess.Popen"):
                given = {k.arg for k in call.keywords}
                found += [] if given & {"stdin", "input"} else [f"{module}:{call.lineno}"]
    assert found == []


def test_numbers_have_bounds_that_contain_their_defaults() -> None:
    import dataclasses
    import math

    from qat_edge import options

    classes = [cls for name, cls in vars(options).items() if name.endswith("Options")]
    fields = [field for cls in classes for field in dataclasses.fields(cls)]
    for field in fields:
        bounds, is_number = field.metadata["bounds"], str(field.type).startswith(("int", "float"))
        has_choices = bool(field.metadata["choices"])
        assert is_number == (bounds is not None or (has_choices and is_number)), field.name
        if bounds:
            assert all(map(math.isfinite, bounds)) and bounds[0] < bounds[1], field.name
            assert field.default in (None, dataclasses.MISSING) or bounds[0] <= field.default <= bounds[1], field.name

"""Check what sentence-transformers computes besides a transformer: qat-edge computes the mean of a text's tokens alone.

    modules.json                      modules in the order of their use, each with its type and folder
    FOLDER/config.json                settings of a module, such as which tokens are pooled
    sentence_bert_config.json         settings of the transformer
    config_sentence_transformers.json prompts, and the similarity that embeddings are compared by

A module that would be left out is refused. What the user can make up for, such as a prompt, is a warning.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from transformers.utils import cached_file

from qat_edge import readers
from qat_edge.errors import ModelError
from qat_edge.path_names import is_inside
from qat_edge.readers import shorten, show

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = "sentence_bert_config.json"
APPLIED = ("Transformer", "Pooling", "Normalize")  # by `tasks.SentenceEncoder`, in this order
ORDERS = (
    list(APPLIED),
    list(APPLIED[:2]),
)  # an embedding without the last module is compared by its cosine all the same
LIBRARY = "sentence_transformers."  # classes of other packages are code of the model
NUMBERED = re.compile(r"\d+_(Pooling|Dense|LayerNorm|CNN|LSTM|WeightedLayerPooling)")  # folders of modules
MEAN = ("pooling_mode_mean_tokens", "mean")


class _Module(NamedTuple):
    """A module of a sentence encoder: its class, and its folder below the model's."""

    kind: str
    folder: str


def check_modules(source: str, revision: str | None = None) -> None:
    """Refuse a sentence encoder with other modules than a transformer, the mean of its tokens and a normalization.

    Args:
        source: Model folder or Hub id.
        revision: Commit on the Hub.

    Raises:
        ModelError: Names the file and the module.
    """
    modules = _modules(source, revision)
    for module in modules:
        if module.kind not in APPLIED or (module.kind == "Transformer" and module.folder not in ("", ".")):
            where = f" in {shorten(module.folder)}" if module.folder else ""
            raise ModelError(
                f"{source}: {MODULES} has the module {shorten(module.kind)}{where}, which qat-edge does not apply; it "
                "supports embeddings that are the mean of a text's tokens, of length 1, and no others. Use a model "
                "without this module."
            )
        if module.kind == "Pooling":
            _check_pooling(source, str(PurePosixPath(module.folder, "config.json")), revision)
    kinds = [module.kind for module in modules]
    if kinds not in ORDERS and _find(source, MODULES, revision) is not None:
        raise ModelError(
            f"{source}: {MODULES} lists {', '.join(kinds) or 'no module'}; qat-edge applies "
            f"{', '.join(APPLIED)} in this order, and supports no others. Restore the file, or use a model with mean "
            "pooling."
        )


def _modules(source: str, revision: str | None) -> list[_Module]:
    """Return the modules that modules.json lists; without the file, those that numbered folders are named after.

    Raises:
        ModelError: The file is damaged, or leads out of the folder.
    """
    path = _find(source, MODULES, revision)
    if path is None:
        names = sorted(folder.name for folder in Path(source).glob("*_*/"))
        return [_Module(match[1], match[0]) for match in map(NUMBERED.fullmatch, names) if match]

    found = []
    entries = readers.read_json(path, ModelError)
    for entry in entries if isinstance(entries, list) else [None]:
        kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str):
            raise ModelError(f"{path}: expected a list of modules, each with a type and a path. Restore the file.")
        if not is_inside(folder):
            raise ModelError(f"{path}: the path {show(folder)} leads out of the model's folder. Restore the file.")
        own = kind.startswith(LIBRARY)
        found.append(_Module(kind.rpartition(".")[2] if own else kind, folder))
    return found


def _check_pooling(source: str, name: str, revision: str | None) -> None:
    """Refuse an embedding that is no mean of a text's tokens. name: Of the file with the settings of the pooling.

    Raises:
        ModelError: Names the file and the setting.
    """
    if _find(source, name, revision) is None:
        raise ModelError(
            f"{source}: has a Pooling module and no {name}, which says how embeddings are made. Restore the file."
        )
    settings = _settings(source, name, revision)
    # Older versions have a key for each mode, newer ones a name.
    modes = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    if settings.get("pooling_mode") is not None:
        modes.append(settings["pooling_mode"])
    if not modes or any(mode not in MEAN for mode in modes):
        found = ", ".join(shorten(mode) for mode in modes) or "no pooling mode that is on"
        raise ModelError(
            f"{source}: {name} has {found}; qat-edge supports embeddings that are "
            "the mean of a text's tokens, and no others. Use a model with mean pooling."
        )


def differences(source: str, max_length: int, revision: str | None = None) -> list[str]:
    """Return what sentence-transformers does with the texts and embeddings of a model and qat-edge does not.

    Args:
        source: Model folder or Hub id.
        max_length: Longest text in training, in tokens.
        revision: Commit on the Hub.

    Returns:
        Sentences for warnings.
    """
    lines = []
    settings = _settings(source, SETTINGS, revision)
    prompts = settings.get("prompts")
    texts = {name: text for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}
    default = settings.get("default_prompt_name")
    if texts:
        shown = ", ".join(f"{show(text)} ({shorten(name)})" for name, text in texts.items())
        when = f", {shorten(default)} by default" if isinstance(default, str) and default in texts else ""
        lines.append(
            f"{source}: sentence-transformers begins texts with a prompt: {shown}{when}. qat-edge adds none: write the "
            "prompt into the texts of your rows and of your app."
        )
    transformer = _settings(source, TRANSFORMER_SETTINGS, revision)
    longest = transformer.get("max_seq_length")
    if type(longest) is int and longest < max_length:
        lines.append(
            f"{source}: sentence-transformers cuts texts after {longest} tokens (max_seq_length), and --max-length is "
            f"{max_length}. Set --max-length to {longest} to train with texts as the model has read them."
        )
    if transformer.get("do_lower_case"):
        lines.append(
            f"{source}: sentence-transformers makes texts lower case first (do_lower_case). qat-edge leaves that to "
            "the tokenizer: write the texts of your rows and of your app in lower case if it does not do it."
        )
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, "cosine"):
        lines.append(
            f"{source}: its embeddings are meant to be compared by {show(similarity)}. qat-edge makes their length 1 "
            "and trains their cosine."
        )
    return lines


def _settings(source: str, name: str, revision: str | None) -> dict[str, Any]:
    """Return the settings in a file of a model; none where it has no such file."""
    path = _find(source, name, revision)
    return {} if path is None else readers.read_object(path, ModelError)


def _find(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model folder, or of a model on the Hub; None where it has none of this name."""
    if Path(source).expanduser().is_dir():
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    found = cached_file(
        source, name, revision=revision or "main",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(str(found))

"""Checks of a tokenizer that comes with a model: the one that was loaded is the one in its files, and gives fixed ids.

transformers builds a tokenizer from tokenizer.json and from the settings of tokenizer_config.json. It saves the result,
so that training, artifacts and runtimes have one tokenizer; but it may not be the one that the model was trained with.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import Model
from transformers import PreTrainedTokenizerBase

from qat_edge import progress
from qat_edge.errors import DataError, ModelError, QatEdgeError
from qat_edge.models.hub import one_line
from qat_edge.readers import BYTE_ORDER_MARK, read_object, read_text, shorten, show

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # of models that take images or sound, too
NAMED_TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several chat templates
TOKEN_USES = ("bos_token", "eos_token")

PLAIN = "the man in the house reads one book and then another"
# Texts in which tokenizers differ: white space, capitals, numbers, accents in two forms, other scripts. None begins
# with white space, where transformers changes tokenizers like Llama's on purpose.
PROBES = (PLAIN, "It's 12345 o'clock", "two  spaces\n\n\tand lines", "Ünïcode e\u0301 日本語 🙂")
SHOWN_TOKENS = 8  # in a message
PROBED_TOKENS = 8  # added tokens, which are compared inside of a text
SAMPLING = ("dropout", "alpha", "nbest_size")  # settings of a tokenizer's model that draw ids at random


@contextmanager
def native_errors(failure: str, advice: str, kind: type[QatEdgeError] = ModelError) -> Iterator[None]:
    """Turn errors of the tokenizers library into ours: it raises `Exception` itself, and panics, which are none.

    Args:
        failure: What could not be done, with the file.
        advice: What to do, a sentence.
        kind: Class of the error to raise.

    Raises:
        QatEdgeError: The library failed.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{failure} ({one_line(error)}). {advice}") from error


def encoding_errors(text: str) -> AbstractContextManager[None]:
    """Turn a failure to tokenize a text into an error that quotes its beginning: regular expressions have limits."""
    return native_errors(
        f"The tokenizer cannot read a text of {len(text)} characters, {show(text)}",
        "Shorten the text, or correct the regular expressions in the model's tokenizer.json.",
        DataError,
    )


def advice_for(folder: Path) -> str:
    """Return what to do about a tokenizer that cannot be loaded."""
    if not (folder / TOKENIZER_JSON).is_file():
        return "Put its tokenizer.json next to the weights."
    return f"Restore tokenizer.json and tokenizer_config.json{_named_class(folder)}."


def require_files(folder: Path, names: Iterable[str]) -> None:
    """Refuse a tokenizer with a file that is a pipe or a device: reading it may not end.

    Raises:
        ModelError: Names the file.
    """
    for name in names:
        path = folder / name
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: not a file. Restore the file.")


def check_templates(folder: Path) -> None:
    """Refuse files with chat templates that cannot be read as templates.

    Raises:
        ModelError: Names the file.
    """
    for path in (folder / TEMPLATE_FILE, *sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))):
        if path.is_file():
            read_text(path, ModelError)
    path = folder / TOKENIZER_CONFIG
    template = _settings(path).get("chat_template")
    named = template if isinstance(template, list) else []
    texts = [item.get(key) if isinstance(item, dict) else None for item in named for key in ("name", "template")]
    if not isinstance(template, str | list | None) or not all(isinstance(text, str) for text in texts):
        raise ModelError(
            f"{path}: chat_template is {show(template)}, expected a text, or a list of objects with 'name' and "
            "'template'. Restore the file."
        )


def require_spelled(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse special tokens without characters: transformers takes them as the unknown token, or searches for ever.

    Raises:
        ModelError: Names the token.
    """
    for use, value in tokenizer.special_tokens_map.items():
        if "" in ([value] if isinstance(value, str) else value):
            raise ModelError(
                f"{folder}: {use} is an empty text, which is no token. Set it to null in {TOKENIZER_CONFIG} and "
                f"{TOKENS_MAP}, or to the token's text."
            )


def check_settings(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse settings of a loaded tokenizer that it could not encode or pad a text with.

    Raises:
        ModelError: Names the setting.
    """
    length, sides, names = tokenizer.model_max_length, ("left", "right"), tokenizer.model_input_names
    is_length = isinstance(length, int | float) and not isinstance(length, bool) and length >= 1
    faults = {
        "model_max_length": (not is_length, length, "a number of 1 or more"),
        "padding_side": (tokenizer.padding_side not in sides, tokenizer.padding_side, "left or right"),
        "truncation_side": (tokenizer.truncation_side not in sides, tokenizer.truncation_side, "left or right"),
        # The first one is what `pad` pads.
        "model_input_names": (list(names[:1]) != ["input_ids"], names, "a list that begins with input_ids"),
    }
    for key, (is_wrong, value, expected) in faults.items():
        if is_wrong:
            raise ModelError(
                f"{folder}: {TOKENIZER_CONFIG} has {key} {show(value)}, expected {expected}. Restore the file."
            )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, is_encoder: bool = False) -> None:
    """Compare a loaded tokenizer with its files, and make its ids fixed; report what is not as in the files.

    Args:
        tokenizer: As loaded.
        folder: Its files.
        is_encoder: The model generates no text, and needs no end token.

    Raises:
        ModelError: The loaded tokenizer is another one than that of tokenizer.json, or not one that runtimes can have,
            or its end token is not in tokenizer.json.
    """
    require_spelled(tokenizer, folder)
    check_settings(tokenizer, folder)
    if tokenizer.split_special_tokens:
        raise ModelError(
            f"{folder}: tokenizer_config.json sets split_special_tokens, so that training would read special tokens as "
            "text, and every runtime as tokens. Remove the key."
        )
    template = tokenizer.chat_template
    if any(text.startswith(BYTE_ORDER_MARK) for text in ([template] if isinstance(template, str) else template or ())):
        raise ModelError(
            f"{folder}: the chat template begins with a byte-order mark, which every prompt would begin with. Save "
            f"{TEMPLATE_FILE} as UTF-8 without."
        )
    config = _settings(folder / TOKENIZER_CONFIG)
    _warn_of_two_templates(config, folder)
    _warn_of_processor_template(tokenizer, folder)
    _warn_of_other_tokens(tokenizer, config, folder)
    if not tokenizer.is_fast:
        return
    path = folder / TOKENIZER_JSON
    _without_sampling(tokenizer, path)
    if path.is_file():
        with native_errors(f"{path}: cannot be read as a tokenizer", "Restore the file."):
            stored = Tokenizer.from_file(str(path))
            _require_same(tokenizer, stored, folder)
        _check_new_tokens(tokenizer, stored, config, folder, is_encoder)


def check_copy(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse the tokenizer of a folder that qat-edge wrote if it is not that of its tokenizer.json.

    Differences that do no harm were reported before training.

    Raises:
        ModelError: The loaded tokenizer is another one than that of tokenizer.json.
    """
    path = folder / TOKENIZER_JSON
    if tokenizer.is_fast and path.is_file():
        with native_errors(f"{path}: cannot be read as a tokenizer", "Restore the file."):
            _require_same(tokenizer, Tokenizer.from_file(str(path)), folder, report=False)


def warn_of_losses(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Report a tokenizer that does not give a text back. A model cannot learn to write what its tokenizer leaves out.

    Args:
        tokenizer: Of a model that generates text.
        source: Its folder or Hub id.
    """
    for text in PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        decoded = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if _composed(decoded) != _composed(text):
            progress.warn(
                f"{source}: the tokenizer does not give back what it reads: {show(text)} comes back as "
                f"{show(decoded)}. The model can neither read nor write what is lost. If the model is not made "
                "so, restore its tokenizer.json."
            )
            return


def _composed(text: str) -> str:
    """Return a text without differences that do no harm: white space around it, and forms of one character."""
    return unicodedata.normalize("NFKC", text.strip())


def _without_sampling(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Switch off random ids, in what is saved too: a text would have other ids in every epoch and on every device."""
    for name, value in _without_random_ids(tokenizer.backend_tokenizer.model):
        progress.warn(
            f"{path}: '{name}' of its model is {shorten(value)}, which draws the tokens of a text at random. It is "
            "switched off, in the tokenizer of the artifacts too."
        )


def _without_random_ids(model: Model) -> list[tuple[str, Any]]:
    """Switch off the settings of a model that draw ids at random, and return name and value of those that were on."""
    found = [(name, value) for name in SAMPLING if (value := getattr(model, name, None))]
    for name, _ in found:
        setattr(model, name, None)
    return found


def _require_same(tokenizer: PreTrainedTokenizerBase, stored: Tokenizer, folder: Path, *, report: bool = True) -> None:
    """Refuse a tokenizer that differs from tokenizer.json in plain text; report one that differs elsewhere."""
    named = _named_class(folder)
    kept, loaded = stored.get_vocab(), tokenizer.get_vocab()
    moved = next((token for token, i in kept.items() if loaded.get(token) != i), None)
    if moved is not None:
        raise ModelError(
            f"{folder}: tokenizer.json gives the token {show(moved)} the id {kept[moved]}, and the tokenizer that "
            f"transformers builds from it {loaded.get(moved, 'none')}{named}. Correct the file that is wrong."
        )

    for text, found, expected in _differences(tokenizer, stored):
        same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
        differs = (
            f"{folder}: transformers builds another tokenizer than tokenizer.json has{named}: in {show(text)}, it "
            f"reads {_shown(tokenizer, found[same:])} where tokenizer.json has {_shown(tokenizer, expected[same:])}"
        )
        # Settings in tokenizer_config.json change white space, case and the first word of a text in some families.
        half = len(expected) // 2
        if text == PLAIN and found[-half:] != expected[-half:]:
            raise ModelError(
                f"{differs}. Correct tokenizer_class in tokenizer_config.json (PreTrainedTokenizerFast takes "
                "tokenizer.json as it is), or restore both files."
            )
        if not report:
            continue
        progress.warn(
            f"{differs}. Training and the artifacts use the tokenizer that was built. If the model was trained with "
            "tokenizer.json, set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast."
        )
        return


def _differences(tokenizer: PreTrainedTokenizerBase, stored: Tokenizer) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield texts that two tokenizers read in different ways, with the ids of each."""
    stored.no_truncation()
    stored.no_padding()
    _without_random_ids(stored.model)
    added = stored.get_added_tokens_decoder()
    # transformers changes white space next to special tokens on purpose, so that only the tokens are compared there.
    marked = "".join(f"a{token.content} b" for token in list(added.values())[:PROBED_TOKENS])
    for text in (*PROBES, marked):
        expected = list(stored.encode(text, add_special_tokens=False).ids)
        found = list(tokenizer.encode(text, add_special_tokens=False))
        if text == marked:
            expected, found = [i for i in expected if i in added], [i for i in found if i in added]
        if found != expected:
            yield text, found, expected


def _settings(path: Path) -> dict[str, Any]:
    return read_object(path, ModelError) if path.is_file() else {}


def _named_class(folder: Path) -> str:
    """Return which class tokenizer_config.json names, for a message."""
    name = _settings(folder / TOKENIZER_CONFIG).get("tokenizer_class")
    return f" (tokenizer_config.json has tokenizer_class {show(name)})" if name else ""


def _shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    shown = " ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ids[:SHOWN_TOKENS]))
    return shown or "no token"


def _warn_of_two_templates(config: dict[str, Any], folder: Path) -> None:
    """Report a chat template that another file replaces."""
    path = folder / TEMPLATE_FILE
    replaced = _default_template(config.get("chat_template")) if path.is_file() else None
    if replaced is not None and replaced.rstrip("\n") != read_text(path, ModelError).rstrip("\n"):
        progress.warn(
            f"{folder}: the chat templates of chat_template.jinja and of tokenizer_config.json differ. "
            "chat_template.jinja is used. Remove the one that is wrong."
        )


def _warn_of_processor_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Report a chat template of a processor, which tokenizers do not read, unless it is the one that is used."""
    path = folder / PROCESSOR_TEMPLATE
    found = _default_template(_settings(path).get("chat_template"))
    used = tokenizer.chat_template
    used = used.get("default") if isinstance(used, dict) else used
    if found is None or (used is not None and used.rstrip("\n") == found.rstrip("\n")):
        return
    state = "and the tokenizer has no other" if used is None else "and the tokenizer has another one, which is used"
    progress.warn(
        f"{path}: the chat template of this file is not used: only processors read it, {state}. To use it, write the "
        f"text of its 'chat_template' into {TEMPLATE_FILE} of that folder."
    )


def _warn_of_other_tokens(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], folder: Path) -> None:
    """Report tokens that a file gives another id or another use than the loaded tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    decoder = config.get("added_tokens_decoder")
    texts = {key: _content(value) for key, value in decoder.items()} if isinstance(decoder, dict) else {}
    added = [(token, str(i)) for token, i in _settings(folder / ADDED_TOKENS).items()]
    in_config = [(token, key) for key, token in texts.items() if token is not None]
    for name, stated in ((TOKENIZER_CONFIG, in_config), (ADDED_TOKENS, added)):
        wrong = next(((token, key) for token, key in stated if str(vocabulary.get(token)) != key), None)
        if wrong is not None:
            progress.warn(
                f"{folder}: {name} gives the token {show(wrong[0])} the id {shorten(wrong[1])}, and the tokenizer that "
                f"transformers builds {vocabulary.get(wrong[0], 'none')}, which is used: the model may not have "
                "learned it. Correct the file that is wrong."
            )
    for name, settings in ((TOKENIZER_CONFIG, config), (TOKENS_MAP, _settings(folder / TOKENS_MAP))):
        for use in TOKEN_USES:
            token, used = _content(settings.get(use)), getattr(tokenizer, use)
            if token is not None and token != used:
                progress.warn(
                    f"{folder}: {name} has the {use} {show(token)}, and another file of the tokenizer {show(used)}, "
                    "which is used. Correct the file that is wrong."
                )


def _check_new_tokens(
    tokenizer: PreTrainedTokenizerBase, stored: Tokenizer, config: dict[str, Any], folder: Path, is_encoder: bool
) -> None:
    """Report tokens that tokenizer.json does not have, and refuse an end token among them.

    transformers gives them the next free ids. Tables of embeddings are padded upward, so that these ids mostly have
    rows, which no training ever changed.
    """
    known = stored.get_vocab()
    new = sorted((i, token) for token, i in tokenizer.get_vocab().items() if token not in known)
    if not new:
        return
    named = [f"{show(token)} (id {i}{_origin(token, config, folder)})" for i, token in new[:SHOWN_TOKENS]]
    more = f" and {len(new) - SHOWN_TOKENS} more" if len(new) > SHOWN_TOKENS else ""
    end = tokenizer.eos_token
    if end is not None and end not in known and not is_encoder:
        raise ModelError(
            f"{folder}: tokenizer.json does not have the end token {show(end)}{_origin(end, config, folder)}: "
            f"transformers gives it the new id {tokenizer.eos_token_id}, whose embedding the model never learned, and "
            "every answer would be trained to end with it. Set eos_token to a token of tokenizer.json, or restore the "
            "tokenizer.json that has it."
        )
    progress.warn(
        f"{folder}: tokenizer.json does not have {', '.join(named)}{more}. transformers gives such tokens new ids, "
        "whose embeddings the model may never have learned, and LoRA does not train them. Leave the tokens out of the "
        "rows, or restore the tokenizer.json that has them."
    )


def _origin(token: str, config: dict[str, Any], folder: Path) -> str:
    """Return which key of which file adds a token, as a part of a sentence; empty where no file does."""
    for name, settings in ((TOKENIZER_CONFIG, config), (TOKENS_MAP, _settings(folder / TOKENS_MAP))):
        # The use of a token says more than the list of all.
        for key in sorted(settings, key="added_tokens_decoder".__eq__):
            value = settings[key]
            # One token, or several in a list or by name.
            if isinstance(value, dict) and "content" not in value:
                value = list(value.values())
            if any(_content(each) == token for each in (value if isinstance(value, list) else [value])):
                return f", {key} in {name}"
    return f", {ADDED_TOKENS}" if token in _settings(folder / ADDED_TOKENS) else ""


def _content(value: Any) -> str | None:
    """Return the text of a token, which files have as it is or in an object; None for anything else."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _default_template(value: Any) -> str | None:
    """Return the template of tokenizer_config.json that is used by default: some models have a list with names."""
    if isinstance(value, list):
        named = (item.get("template") for item in value if isinstance(item, dict) and item.get("name") == "default")
        value = next(named, None)
    return value if isinstance(value, str) else None

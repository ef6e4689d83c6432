"""Compare the tokenizer of ExecuTorch's LLM runner, and so of its apps, with the one of training.

The runner takes text, and its C++ library reads tokenizer.json its own way. Where it splits a prompt into other ids, an
app answers another prompt than the model was trained on, however exact the program is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from qat_edge import readers
from qat_edge.data.chat_template import PROBE, ChatTemplate
from qat_edge.data.rows import Chat
from qat_edge.errors import ArtifactError, DataError, ModelError
from qat_edge.models import tasks, tokenizer
from qat_edge_exporters.executorch import runtime_probe
from qat_edge_exporters.executorch.llm_runner import first_difference
from qat_edge_exporters.executorch.pte.program_info import TokenizerCheck
from qat_edge_exporters.executorch.runtime_probe import ProbedTokenizer

TOKENIZER = "tokenizer.json"
# Split by both tokenizers: a request, whitespace and digits, and characters of several bytes.
TEXTS = ("Set an alarm for seven.", "  two  spaces,\n\nline feeds and 12345 digits", "Grüße, 你好 🙂, don't")
MOST_SPECIAL_TEXTS = 8
# Settings of an added token that the C++ library has no code for (executorch 1.4).
IGNORED_SETTINGS = ("lstrip", "rstrip", "single_word")
OTHER_RUNTIME = "The runtime of `qat-edge export --target onnx` takes token ids, so that it has no such difference."


def tokenizer_faults(folder: Path) -> list[str]:
    """Return how apps would read other prompts with the .pte in a folder than training did, one sentence each.

    An encoder's app brings a tokenizer of its own, so it has none.
    """
    path = folder / TOKENIZER
    if not path.is_file() or tasks.task_of_folder(folder).is_encoder:
        return []
    texts = probe_texts(path)
    check = check_tokenizer(path, runtime_probe.probe(None, path, texts)["tokenizer"], texts)
    return [] if check is None else splitting_faults(path, check)


def probe_texts(path: Path) -> list[str]:
    """Return texts that the runner's tokenizer has to split as training did: general ones, and those of a chat.

    Args:
        path: of tokenizer.json. A missing or damaged one has no special tokens; loading it reports that.
    """
    special = [f"{token}user\nHello {token}\n" for token, added in _added_tokens(path).items() if added.get("special")]
    return [*TEXTS, *special[:MOST_SPECIAL_TEXTS], *_chat_texts(path.parent)]


def check_tokenizer(path: Path, probed: ProbedTokenizer | None, texts: Sequence[str]) -> TokenizerCheck | None:
    """Compare the tokenizer in ExecuTorch's library with the Hugging Face one; None if there is no file.

    Args:
        path: of tokenizer.json.
        probed: result of ExecuTorch's library for `texts`.
        texts: that both split.
    """
    if probed is None:
        return None
    if probed["error"]:
        return TokenizerCheck(error=probed["error"])

    # The other library was called without special tokens around the texts.
    try:
        reference = Tokenizer.from_file(str(path))
        expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
        end_tokens = tokenizer.end_tokens(path.parent)
    except (OSError, ValueError, ModelError) as error:
        one_line = " ".join(str(error).split())
        return TokenizerCheck(error=one_line, size=probed["size"], bos=probed["bos"], eos=probed["eos"])
    found = zip(texts, probed["ids"], expected, strict=True)
    differing = {text: first_difference(ids, wanted) for text, ids, wanted in found if ids != wanted}
    difference = next(iter(differing.values()), "")
    return TokenizerCheck("", probed["size"], probed["bos"], probed["eos"], end_tokens, [*differing], difference)


def splitting_faults(path: Path, check: TokenizerCheck) -> list[str]:
    """Return why the tokenizer cannot be used, or which text it splits differently; empty where nothing is wrong."""
    if check.error:
        return [
            f"{path.name} cannot be used by ExecuTorch's LLM runner: {check.error}. Restore the file if it was "
            f"changed. {OTHER_RUNTIME}"
        ]
    if not check.differing:
        return []
    others = len(check.differing) - 1
    texts = f"{check.differing[0]!r}" + (f" and {others} other texts" if others else "")
    return [describe_split(path, texts, check.difference)]


def describe_split(path: Path, text: str, difference: str) -> str:
    """Describe a text that ExecuTorch's tokenizer splits differently, and what to do.

    Args:
        path: of tokenizer.json.
        text: quoted, or a noun for it such as "this prompt".
        difference: from `first_difference`.
    """
    ignored = {
        token: names
        for token, added in _added_tokens(path).items()
        if (names := [name for name in IGNORED_SETTINGS if added.get(name)])
    }
    advice = OTHER_RUNTIME
    if ignored:
        token, names = next(iter(ignored.items()))
        more = f" and {len(ignored) - 1} others" if len(ignored) > 1 else ""
        advice = (
            f"It ignores the settings {', '.join(names)} of the token {token!r}{more}. Set them to false in the base "
            f"model's tokenizer.json and tokenizer_config.json and train again. {OTHER_RUNTIME}"
        )
    return (
        f"{path.name}: ExecuTorch's tokenizer splits {text} differently than training did ({difference}), so its LLM "
        f"runner and apps would answer another prompt. {advice}"
    )


def _added_tokens(path: Path) -> dict[str, dict[str, object]]:
    """Return the added tokens of tokenizer.json by their text; empty where it is missing or damaged."""
    try:
        return {str(token["content"]): token for token in readers.read_object(path, ArtifactError)["added_tokens"]}
    except (ArtifactError, KeyError, TypeError):
        return {}


def _chat_texts(folder: Path) -> list[str]:
    """Return a conversation as the chat template of a folder writes it; empty without a template that takes one."""
    user, assistant = ({"role": role, "content": PROBE} for role in ("user", "assistant"))
    try:
        template = ChatTemplate(tokenizer.load_tokenizer(folder))
        if not template.tokenizer.chat_template:
            return []
        return [template.render(Chat([user, assistant, user], "probe"), 3, add_generation_prompt=True)]
    except (DataError, ModelError):
        return []

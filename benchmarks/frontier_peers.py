"""Models of other tools for the page of `benchmarks.frontier`: the same FP32 fine-tune, calibration and rows.

llama.cpp's types with its importance matrix, and AutoRound. Their weights are dequantized and run in torch with float
inputs. Their own runtimes lose a little more where they round the inputs, as llama.cpp does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks import page
from benchmarks.cells import Cell
from benchmarks.peers import AUTO_ROUND_PACKAGES, LLAMA_CPP_PACKAGE, PeerBuilder
from benchmarks.runner import BenchmarkRunner, Figures, Training
from benchmarks.settings import FRONTIER_TOKENS
from qat_edge.data import calibration, tokenization
from qat_edge.data.formats import load_rows
from qat_edge.models.load import load_model
from qat_edge.models.tokenizer import end_tokens, load_tokenizer
from qat_edge.options import EvalOptions
from qat_edge.public_tasks import own_rows
from qat_edge.public_tasks.answering import TorchModel
from qat_edge.public_tasks.prompting import TaskPrompts
from qat_edge.verbs.eval import answers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD = ("model", "weights", "right answers", "less our PTQ", "nats per token", "less our PTQ", "our PTQ", "seeds")
SMALL = "4 bits, embedding and head too"
SEQUENCE = 128  # tokens of one of AutoRound's calibration texts


@dataclass(frozen=True)
class Peer:
    """Another tool's way to quantize.

    Attributes:
        kind: Type as llama-quantize has it; empty for AutoRound.
        bits: Of AutoRound's weights.
        rival: Scheme in settings.SCHEMES of about its size, whose PTQ it is compared with.
    """

    kind: str = ""
    bits: int = 0
    rival: str = "4 bits"


PEERS = {
    "llama.cpp Q4_0": Peer("Q4_0", rival=SMALL),
    "llama.cpp Q4_K_M": Peer("Q4_K_M"),
    "llama.cpp Q3_K_M": Peer("Q3_K_M", rival=SMALL),
    "llama.cpp Q2_K": Peer("Q2_K", rival=SMALL),
    "AutoRound, 4 bits": Peer(bits=4),
    "AutoRound, 2 bits": Peer(bits=2, rival="2 bits"),
}


def cell(runner: BenchmarkRunner, name: str, training: Training, questions: int) -> Cell:
    """Return the identity of a peer's figures."""
    peer = PEERS[name]
    settings = {
        "steps": training.steps,
        "questions": questions,
        "tokens": FRONTIER_TOKENS,
        "packages": LLAMA_CPP_PACKAGE if peer.kind else AUTO_ROUND_PACKAGES,
        "trained": runner.identity(training),
    }
    return Cell("peer", training.task, training.seed, name, settings)


def measure(runner: BenchmarkRunner, name: str, training: Training, questions: int) -> Figures:
    """Quantize the FP32 fine-tune with another tool, and return what `frontier.measure` returns of ours.

    Args:
        runner: Trains the fine-tune where it is missing.
        name: One of PEERS.
        training: Its run has the fine-tune as its reference.
        questions: Rows that it answers.

    Raises:
        PeerError: The tool cannot be installed or built, or failed.
    """
    run = runner.train(training)
    runner.frozen(run)  # has the tokenizer and the end tokens of the run's models
    tokenizer, eos_ids = load_tokenizer(run.quantized), end_tokens(run.quantized)
    rows = runner.data(training.task)
    weights, size = _quantized(PeerBuilder(runner.work, run), PEERS[name], _tokenized(rows.train, tokenizer), tokenizer)
    model = TorchModel(name, weights, eos_ids, eos_ids[0])
    figures: Figures = {"size_bytes": size}
    for task_name in own_rows.TASKS:
        options = EvalOptions(task=task_name, data=str(rows.eval), limit=questions)
        task = own_rows.load(run, options, tokenizer)
        prompts = TaskPrompts(run, task, options, tokenizer)
        answers = answers_of(model, task, prompts.prepare(), prompts.max_new_tokens, tokenizer)
        figures[task_name] = [[each.id, each.score, each.weight] for each in answers]
    return figures


def section(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the paragraphs of the page about other tools. rows: of its table."""
    return [
        "## Other tools",
        "The same FP32 fine-tunes, quantized by llama.cpp with its importance matrix and by AutoRound, on as many "
        "tokens of the training rows as our PTQ. They run in torch with float inputs: in its own runtime, llama.cpp "
        "rounds the inputs of each layer to int8 as well. llama.cpp gives matrices that its 2- to 4-bit types do not "
        "divide, as most of this model's, another type of more bits. AutoRound leaves the table of embedding and head "
        "in float16. Differences are from our PTQ with the same seeds and requests, in the scheme that the row names, "
        "which is the one of about its size.",
        page.table(HEAD, rows),
    ]


def _tokenized(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return as many tokens of training rows as our PTQ calibrates on."""
    rows = tokenization.tokenize(load_rows(str(path)), tokenizer, SEQUENCE).rows
    chosen = calibration.choose_rows(rows, FRONTIER_TOKENS, 0, str(path), "FRONTIER_TOKENS")
    return [token for row in chosen for token in row["input_ids"]]


def _quantized(
    builder: PeerBuilder, peer: Peer, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, int]:
    """Return a peer's model in float32, and the bytes of its weights as the tool stores them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "calibration"
        if peer.kind:
            from gguf import GGUFReader

            path.write_text(tokenizer.decode(ids), encoding="utf-8")
            made = builder.gguf(peer.kind, path)
            return load_model(str(made)).model.eval(), sum(int(t.n_bytes) for t in GGUFReader(made).tensors)

        parts = [list(ids[i : i + SEQUENCE]) for i in range(0, len(ids) - SEQUENCE + 1, SEQUENCE)]
        path.write_text("".join(json.dumps(part) + "\n" for part in parts), encoding="utf-8")
        rounded = builder.auto_round(peer.bits, path)
    size = json.loads((rounded / "size.json").read_text(encoding="utf-8"))["bytes"]
    return load_model(str(rounded / "float")).model.eval(), size

"""Run an artifact on a few prompts, and decide whether it computes the function of its frozen checkpoint.

Reading codes and scales back proves that the file holds the trained weights. That its graph does with them what the
model does (epsilon and kind of the norms, multipliers, soft caps, rotary angles, masks, cache) shows only when it runs.
So the last step of an export, and of `verify`, runs the artifact in its own runtime and in a process of its own:

    prompts   tokens of a fixed text and random ones, LENGTH each; the first half is read at once, the rest is decoded
              token by token through the cache. A model with a short attention window gets longer ones as well.
    expected  the frozen checkpoint in torch, rounding as the runtime does on this machine
    noise     the same checkpoint with its embeddings and the output of every linear layer disturbed, several draws
    test      `fault_test`: is a token's error larger than those of the disturbed checkpoint at the same position

The embeddings are disturbed because a looked-up row consists of integers times one scale: the first layers' inputs may
then lie exactly on rounding ties, which a runtime decides by the last bit (a correct .pte of a two-layer model differed
for 43% of the tokens, the checkpoint with disturbed layers alone for 6%, with disturbed embeddings too for 44%).

Errors below FLOAT_DB count as equal: runtimes approximate exp and tanh, and such an error changes nothing. What exceeds
the noise is tested again on other prompts, twice as many, and is a fault only if it exceeds the noise there, too.

No evaluation data is needed. The torch side is computed once for all artifacts of a checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qat_edge.diagnose import fault_test
from qat_edge.diagnose.fault_test import Errors
from qat_edge.diagnose.locate_fault import locate_on_prompts
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding, rounding_of
from qat_edge.errors import ArtifactError, RunError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.metrics import LogitComparison, LogitMetrics, first_not_finite
from qat_edge.evaluate.reference import Logits
from qat_edge.evaluate.results import Parity
from qat_edge.models import tasks, tokenizer_check, weights_check
from qat_edge.models.meta_model import model_without_weights
from qat_edge.models.tasks import ModelTask
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.quant import frozen_config
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.device_errors import (
    CancelledError,
    CapacityError,
    DeviceLayerError,
    MissingPackageError,
    UnsupportedDeviceError,
)
from qat_edge_devices.processor import this_processor
from qat_edge_exporters.targets import target_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PROMPTS, CONFIRMING_PROMPTS = 24, 48
LENGTH, DECODED_FROM = fault_test.LENGTH, fault_test.DECODED_FROM
WINDOW_PROMPTS = 16
LONGEST = 72  # tokens of a prompt; a window that needs longer ones is not tested
BEYOND = 8  # tokens of a prompt beyond the window: half of them read at once, half decoded
TEXT_TOKENS = (2, 24)  # shortest and longest text of an encoder
SEEDS = 3  # draws of the noise
BATCH = 8  # prompts that torch computes at once: logits of 64 tokens
# Two-layer models of twelve families: correct artifacts are at -100 dB, or where a rounding flips at -55 to -30 dB.
FLOAT_DB = -80.0
LOWEST_DB = -300.0
# Reasons that say something about this machine and nothing about the artifact.
UNAVAILABLE = (MissingPackageError, UnsupportedDeviceError, CapacityError)
# Plain prose, code, numbers and other scripts, so that the prompts are not all of one kind.
TEXT = """The committee will meet again on Thursday at half past nine, and each member may bring one guest.
def mean(values): return sum(values) / len(values)  # arithmetic mean, 0 < len(values)
{"name": "set_timer", "arguments": {"minutes": 12, "label": "tea"}} Is 3.14159 larger than 22/7? No, it is smaller.
Der Zug nach München fährt um 17:45 Uhr. Où est la gare? El tren sale mañana. 我们明天见。 Увидимся завтра."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one length.

    Attributes:
        ids: one list a prompt, with one id more than is run: the one that follows.
        decode_from: position from which on tokens are decoded one at a time.
        first: first compared position; errors there only help to locate a fault.
    """

    ids: list[list[int]]
    decode_from: int
    first: int = 0

    @property
    def inputs(self) -> list[list[int]]:
        """Return the ids that are run."""
        return [ids[:-1] for ids in self.ids]

    def targets(self, index: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the ids that follow the compared positions of one prompt."""
        return np.asarray(self.ids[index][self.first + 1 :])


@dataclass(frozen=True)
class ExpectedLogits:
    """The torch side of one set of prompts.

    Attributes:
        logits: of the checkpoint at the compared positions, one array a prompt.
        noise: errors of the disturbed checkpoint, (draws * prompts, positions), dB.
        floor: metrics of the disturbed checkpoint, one a draw; empty for an encoder.
        floor_sqnr_db: lowest SQNR of the draws; infinite where nothing changed.
    """

    logits: list[Logits]
    noise: Errors
    floor: list[LogitMetrics]
    floor_sqnr_db: float


class FrozenReference:
    """Torch side of the comparison for all artifacts of one frozen checkpoint.

    Args:
        quantized: folder of the checkpoint.
    """

    def __init__(self, quantized: Path) -> None:
        self.quantized = quantized
        self._config: PretrainedConfig = frozen_config.read(quantized)
        tokenizer_check.check_copy(load_tokenizer(quantized), quantized)
        self.task: ModelTask = tasks.task_of_folder(quantized)
        self._expected: dict[tuple[str, int, int], list[ExpectedLogits]] = {}

    def prompt_sets(self, context_length: int, seed: int, count: int) -> list[PromptSet]:
        """Return the prompts of a decoder whose artifact holds `context_length` tokens."""
        length = min(LENGTH, context_length)
        sets = [PromptSet(self._prompts(count, length, seed), min(DECODED_FROM, length))]
        window = self._window(context_length)
        if window is not None and window + BEYOND <= min(LONGEST, context_length):
            # Positions from just before the window ends: all others are as in the short prompts.
            prompts = self._prompts(max(WINDOW_PROMPTS, count // 2), window + BEYOND, seed)
            sets.append(PromptSet(prompts, window + BEYOND // 2, first=window - 1))
        return sets

    def not_reached(self, context_length: int) -> str:
        """Return what the prompts do not test, as a phrase."""
        window = self._window(context_length)
        if window is None or window + BEYOND <= min(LONGEST, context_length):
            return ""
        return f"the attention window of {window} tokens"

    def texts(self, seed: int, count: int) -> list[list[int]]:
        """Return texts of an encoder, of several lengths."""
        rng = np.random.default_rng(seed)
        model = model_without_weights(self._config, self.task.auto_class)
        longest = min(TEXT_TOKENS[1], tasks.max_text_tokens(model, load_tokenizer(self.quantized)))
        lengths = rng.integers(TEXT_TOKENS[0], longest + 1, count)
        return [ids[:length] for ids, length in zip(self._prompts(count, longest, seed), lengths, strict=True)]

    def expected(self, rounding: Rounding, context_length: int, seed: int, count: int) -> list[ExpectedLogits]:
        """Return the checkpoint's logits for each of `prompt_sets`, with the rounding of a runtime."""
        key = (f"{_rounding_key(rounding)} {context_length}", seed, count)
        if key not in self._expected:
            model, names = reference.load_dequantized(self.quantized)
            weights_check.check_vocabulary(model, load_tokenizer(self.quantized), str(self.quantized))
            with emulate_rounding(model, names, rounding):
                sets = self.prompt_sets(context_length, seed, count)
                self._expected[key] = [self._expected_of_set(model, prompts) for prompts in sets]
        return self._expected[key]

    def expected_outputs(self, rounding: Rounding, seed: int, count: int) -> ExpectedLogits:
        """Return an encoder's outputs for each of `texts`, with the rounding of a runtime."""
        key = (f"texts {_rounding_key(rounding)}", seed, count)
        if key not in self._expected:
            model, names = reference.load_dequantized(self.quantized)
            texts, draws = self.texts(seed, count), []
            with emulate_rounding(model, names, rounding):
                outputs = self._outputs(model, texts)
                self._require_finite(outputs, texts)
                for draw in range(SEEDS):
                    with fault_test.layers_disturbed(model, draw):
                        draws.append(self._outputs(model, texts))
            noise = np.concatenate([_errors(outputs, found) for found in draws])
            floor = min(_sqnr_db(outputs, found) for found in draws)
            self._expected[key] = [ExpectedLogits(outputs, noise, [], floor)]
        return self._expected[key][0]

    def _expected_of_set(self, model: PreTrainedModel, prompts: PromptSet) -> ExpectedLogits:
        logits = list(_logits(model, prompts))
        self._require_finite(logits, prompts.ids)
        noise, floor, sqnr = [], [], []
        for draw in range(SEEDS):
            with fault_test.layers_disturbed(model, draw):
                disturbed = list(_logits(model, prompts))
            noise.append(_errors(logits, disturbed))
            floor.append(_compare(logits, disturbed, prompts))
            sqnr.append(floor[-1].sqnr_db)
        return ExpectedLogits(logits, np.concatenate(noise), floor, min(sqnr))

    def _outputs(self, model: PreTrainedModel, texts: Sequence[list[int]]) -> list[Logits]:
        """Return an encoder's output for each text, (1, width)."""
        with torch.no_grad():
            ids = [torch.tensor([text]) for text in texts]
            return [self.task.predict(model, each, torch.ones_like(each)).float().numpy() for each in ids]

    def _require_finite(self, logits: Sequence[Logits], ids: Sequence[list[int]]) -> None:
        """Refuse a checkpoint whose own outputs are not finite: nothing can be compared with it.

        Raises:
            RunError: names the prompt and the position.
        """
        for rows, prompt in zip(logits, ids, strict=True):
            row = first_not_finite(rows)
            if row is not None:
                raise RunError(
                    f"{self.quantized}: the frozen checkpoint's outputs are not finite at position {row} of the token "
                    f"ids {prompt[:LENGTH]}. Its weights or scales are not usable numbers: train again, with a lower "
                    "--learning-rate if the loss was not finite."
                )

    def _prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Return `count` lists of `length` + 1 token ids: every second one from a text, the others random."""
        tokenizer = load_tokenizer(self.quantized)
        rng = np.random.default_rng(seed)
        vocabulary = min(len(tokenizer), int(getattr(self._config, "vocab_size", len(tokenizer))))
        stream = [i for i in tokenizer.encode(TEXT, add_special_tokens=False) if i < vocabulary]
        # A seed of its own starts elsewhere in the text.
        stream = stream[seed % max(len(stream), 1) :] + stream[: seed % max(len(stream), 1)]
        starts = np.linspace(0, max(len(stream) - length - 1, 0), -(-count // 2)).astype(int)
        spoken = [stream[start : start + length + 1] for start in starts]
        random = rng.integers(0, vocabulary, (count, length + 1)).tolist()
        return [
            spoken[index // 2] if index % 2 == 0 and len(spoken[index // 2]) == length + 1 else random[index]
            for index in range(count)
        ]

    def _window(self, context_length: int) -> int | None:
        """Return the attention window of some layers, or None if every token sees the whole context."""
        config = self._config.get_text_config()
        window: int | None = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if window is None or window >= context_length:
            return None
        return window if types is None or any("sliding" in str(each) for each in types) else None


def _rounding_key(rounding: Rounding) -> str:
    return f"{rounding.name} {sorted(rounding.blocks.items())}"


def not_comparable(quantized: Path) -> str:
    """Return why an artifact of this checkpoint cannot be compared with it, as a sentence; empty where it can."""
    config = frozen_config.read(quantized)
    if getattr(config, "quantization_config", None) is None:
        return "The checkpoint holds float weights, and nothing was frozen."
    return ""


def measure(
    folder: Path, target: str, frozen: FrozenReference, context_length: int, int8_cache: bool = False
) -> Parity:
    """Run an artifact on this machine and compare it with its frozen checkpoint.

    Args:
        folder: of the artifact; it needs no manifest yet.
        target: of the artifact.
        frozen: torch side of the comparison.
        context_length: tokens that the artifact holds.
        int8_cache: it keeps keys and values in int8.

    Raises:
        RunError: the checkpoint's own outputs are not finite.
        ArtifactError: the files cannot be read.
    """
    elsewhere = target_named(target).runs_elsewhere
    if elsewhere:
        return Parity(not_measured=elsewhere)

    began = time.monotonic()
    try:
        target_named(target).check(folder)
    except ArtifactError as error:
        return Parity(fault=f"It was not run: {error}")
    try:
        if frozen.task.is_encoder:
            found = _measure_encoder(folder, target, frozen)
        else:
            found = _measure_decoder(folder, target, frozen, context_length, int8_cache)
    except UNAVAILABLE as error:
        return Parity(not_measured=str(error))
    except CancelledError:
        raise
    except (DeviceLayerError, ArtifactError) as error:
        found = Parity(fault=f"Its runtime on this machine failed: {error}")
    return replace(found, seconds=round(time.monotonic() - began, 2))


def _measure_decoder(
    folder: Path, target: str, frozen: FrozenReference, context_length: int, int8_cache: bool
) -> Parity:
    rounding = rounding_of(folder, target, int8_cache)
    applied = _rounding_here(rounding)

    result, suspect = _run_prompts(folder, target, frozen, applied, context_length, seed=0, count=PROMPTS)
    if suspect is not None and not suspect.is_certain:
        # Again on other prompts: noise that exceeded the noise once does not do so twice.
        result, suspect = _run_prompts(folder, target, frozen, applied, context_length, 1, CONFIRMING_PROMPTS)
    result = replace(result, not_reached=frozen.not_reached(context_length))
    if suspect is None:
        return result

    fault = suspect.text
    if not suspect.is_certain and target_named(target).expose:
        with closing(open_transport(LOCAL)) as transport:
            where = locate_on_prompts(
                folder, target, frozen.quantized, suspect.ids, rounding or Rounding(), transport, _threads()
            )
        fault += f" {where.describe('On this machine')}."
    return replace(result, fault=fault)


def _rounding_here(rounding: Rounding | None) -> Rounding:
    """Return how a runtime rounds on this machine."""
    return Rounding() if rounding is None else rounding.on(this_processor())


@dataclass(frozen=True)
class _Suspect:
    """A difference that exceeds the noise.

    Attributes:
        text: description, as sentences.
        ids: prompts that show it.
        is_certain: it needs no confirmation, because it is no matter of size.
    """

    text: str
    ids: list[list[int]]
    is_certain: bool = False


def _run_prompts(
    folder: Path,
    target: str,
    frozen: FrozenReference,
    rounding: Rounding,
    context_length: int,
    seed: int,
    count: int,
) -> tuple[Parity, _Suspect | None]:
    """Run the artifact on all sets of prompts, and test every set; figures are those of the short prompts."""
    sets = frozen.prompt_sets(context_length, seed, count)
    expected = frozen.expected(rounding, context_length, seed, count)
    results = []
    for prompts, torch_side in zip(sets, expected, strict=True):
        found = [rows[prompts.first :] for rows in _artifact_logits(folder, target, prompts)]
        results.append(_judge(torch_side, found, prompts))

    parity = results[0][0]
    suspect = next((suspect for _, suspect in results if suspect is not None), None)
    chance = max((each.chance for each, _ in results if each.chance is not None), default=None)
    tokens = sum(each.tokens for each, _ in results)
    return replace(parity, chance=chance, tokens=tokens), suspect


def _judge(expected: ExpectedLogits, found: list[Logits], prompts: PromptSet) -> tuple[Parity, _Suspect | None]:
    """Compare an artifact's logits with those expected for one set of prompts."""
    for index, rows in enumerate(found):
        row = first_not_finite(rows)
        if row is not None:
            text = (
                f"Its logits are not finite at position {prompts.first + row} of the token ids "
                f"{prompts.ids[index][:LENGTH]}."
            )
            return Parity(tokens=_rows(found)), _Suspect(text, prompts.inputs, is_certain=True)

    errors = _errors(expected.logits, found)
    test = fault_test.compare_errors(errors, np.maximum(expected.noise, FLOAT_DB))
    metrics = _compare(expected.logits, found, prompts)
    parity = Parity(
        tokens=metrics.tokens,
        error_db=_typical_db(errors),
        noise_db=_typical_db(expected.noise),
        sqnr_db=_finite(metrics.sqnr_db),
        kl_nats=metrics.kl_nats,
        floor_sqnr_db=_finite(expected.floor_sqnr_db),
        floor_kl_nats=max(each.kl_nats for each in expected.floor),
        chance=test.chance,
    )
    if test.position is None:
        return parity, None
    return parity, _Suspect(_describe_excess(parity, test.position, errors, expected.noise, prompts), prompts.inputs)


def _describe_excess(parity: Parity, at: int, errors: Errors, noise: Errors, prompts: PromptSet) -> str:
    """Describe a difference that exceeds the noise, as sentences.

    Args:
        parity: figures over all prompts.
        at: first compared position that exceeds the noise.
        errors: of the artifact.
        noise: of the disturbed checkpoint.
        prompts: that were run.
    """
    worst, position = int(errors[:, at].argmax()), prompts.first + at
    how = "decoded one at a time" if position >= prompts.decode_from else "read at once"
    largest = float(np.maximum(noise[:, at], FLOAT_DB).max())
    return (
        f"From position {position} of a prompt on ({how}), its logits differ from the frozen checkpoint's by more than "
        f"rounding: by {errors[worst, at]:.0f} dB for the token ids {prompts.ids[worst][: position + 1]}, where "
        f"disturbing the checkpoint explains {largest:.0f} dB at most. Over all prompts, a typical token differs by "
        f"{parity.error_db:.0f} dB (noise floor {parity.noise_db:.0f} dB), the KL divergence is {parity.kl_nats:.2g} "
        f"nats per token (noise floor {parity.floor_kl_nats:.2g}), and a token's error exceeds the noise with "
        f"probability {parity.chance:.2f} (limit {fault_test.MAX_CHANCE:g})."
    )


def _measure_encoder(folder: Path, target: str, frozen: FrozenReference) -> Parity:
    applied = _rounding_here(rounding_of(folder, target, int8_cache=False))
    for seed, count in ((0, PROMPTS), (1, CONFIRMING_PROMPTS)):
        texts, expected = frozen.texts(seed, count), frozen.expected_outputs(applied, seed, count)
        found = [output[None] for output in target_named(target).run_encoder(folder, texts)]
        broken = next((text for text, output in zip(texts, found, strict=True) if not np.isfinite(output).all()), None)
        if broken is not None:
            return Parity(fault=f"Its outputs are not finite for the token ids {broken[:LENGTH]}.", tokens=count)

        # One output a text: there are no positions, and every error counts.
        errors = _errors(expected.logits, found)
        noise = np.maximum(expected.noise, FLOAT_DB)
        test = fault_test.compare_errors(errors, noise, decisive_from=0)
        sqnr_db = _sqnr_db(expected.logits, found)
        parity = Parity(
            tokens=count,
            error_db=float(np.median(errors)),
            noise_db=float(np.median(noise)),
            sqnr_db=_finite(sqnr_db),
            floor_sqnr_db=_finite(expected.floor_sqnr_db),
            chance=test.chance,
        )
        if not test.exceeds_noise:
            return parity

    worst = int(errors[:, 0].argmax())
    return replace(
        parity,
        fault=(
            f"Its outputs differ from the frozen checkpoint's by more than rounding: by {errors[worst, 0]:.0f} dB for "
            f"the token ids {texts[worst][:LENGTH]}, where disturbing the checkpoint explains {noise.max():.0f} dB at "
            f"most (SQNR {sqnr_db:.1f} dB, noise floor {expected.floor_sqnr_db:.1f} dB; a text's error exceeds the "
            f"noise with probability {test.chance:.2f}, limit {fault_test.MAX_CHANCE:g})."
        ),
    )


def _artifact_logits(folder: Path, target: str, prompts: PromptSet) -> list[Logits]:
    """Run the artifact in a process of its own; return the logits (tokens, vocabulary) of each prompt."""
    with closing(open_transport(LOCAL)) as transport:
        runtime = open_runtime(target, transport, _threads())
        runtime.prepare(folder)
        # The files are deleted one by one, so each is copied into memory.
        return [np.load(scored.logits) for scored in runtime.score(prompts.inputs, prompts.decode_from)]


def _logits(model: PreTrainedModel, prompts: PromptSet) -> Iterator[Logits]:
    """Yield the model's logits at the compared positions of each prompt, (positions, vocabulary)."""
    ids = prompts.inputs
    for begin in range(0, len(ids), BATCH):
        with torch.no_grad():
            logits = model(torch.tensor(ids[begin : begin + BATCH]), use_cache=False).logits
        yield from logits[:, prompts.first :].float().numpy()


def _typical_db(errors: Errors) -> float:
    """Return the median error of the positions that decide."""
    # A prompt of one token has its first position only.
    return float(np.median(errors[:, fault_test.DECISIVE_FROM :] if errors.shape[1] > 1 else errors))


def _errors(expected: Sequence[Logits], found: Sequence[Logits]) -> Errors:
    return np.maximum(fault_test.errors_db(expected, found), FLOAT_DB)


def _compare(expected: Sequence[Logits], found: Sequence[Logits], prompts: PromptSet) -> LogitMetrics:
    comparison = LogitComparison()
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        comparison.add(one, other, prompts.targets(index))
    return comparison.result()


def _sqnr_db(expected: Sequence[Logits], found: Sequence[Logits]) -> float:
    signal = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in expected)
    pairs = zip(expected, found, strict=True)
    noise = sum(float(np.square(one.astype(np.float64) - other).sum()) for one, other in pairs)
    return float(10 * np.log10(signal / noise)) if noise and signal else float("inf") if not noise else float("-inf")


def _rows(found: Sequence[Logits]) -> int:
    return sum(len(rows) for rows in found)


def _finite(value: float) -> float | None:
    """Return None for the infinite SQNR of equal outputs, which JSON has no number for."""
    # Outputs next to zeros have an SQNR of minus infinity; any number as low says the same.
    return None if value == np.inf else max(value, LOWEST_DB)


def _threads() -> int:
    return os.cpu_count() or 1

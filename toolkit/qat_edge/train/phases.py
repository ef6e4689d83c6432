"""The border between plain LoRA and fake quantization: what is kept, what teaches, where the second phase starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from qat_edge import progress
from qat_edge.config import FinetuneOptions, flag_name
from qat_edge.data import calibration, tokenization
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import UsageError
from qat_edge.quant import fake
from qat_edge.quant import qat_init as starts
from qat_edge.quant.ptq import methods
from qat_edge.quant.qat_init import Start
from qat_edge.quant.scheme import Scheme
from qat_edge.run import Run
from qat_edge.train.distill import Batch, CachedTeacher, LiveTeacher, Teacher, write_cache

LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
METHOD_OF = {"none": "rtn"}  # --ptq-init none keeps the weights, and what learned scales begin from


@dataclass
class Crossing:
    """Crosses the border once, or brings a resumed training to the other side.

    adapted: the peft model, or the model itself where it has no adapters; snapshot: keeps what was trained as
    RUN/reference; teach: hands the trainer its teacher; forget: drops the optimizer's averages of gradients.
    rotation_seed: None where the hidden states stay as they are. start_sha256: of RUN/start, None where phase 2
    needs none.
    """

    adapted: Any
    switch: fake.Switch
    scheme: Scheme
    rows: TokenizedRows
    tokenizer: Any
    options: FinetuneOptions
    run: Run
    device: str
    precision: str
    rotation_seed: int | None
    snapshot: Callable[[], None]
    teach: Callable[[Teacher], None]
    forget: Callable[[], None]
    start_sha256: str | None = field(default=None, init=False)

    def cross(self) -> None:
        """Snapshot, then the teacher, then the start: each needs what the next one changes."""
        self.switch.enabled = False
        self.snapshot()
        if self.options.distill_weight > 0:
            teacher = LiveTeacher(self.adapted, self.switch, self.options.distill_temperature)
            if self.options.distill_top_k:
                self._ask_beforehand(teacher)
            self.teach(self._cached() if self.options.distill_top_k else teacher)
        if needs_start(self.options):
            self.start_sha256 = self._make_start()
        if self.rotation_seed is not None:
            self.forget()  # the averages are of gradients in the coordinates before

    def finish(self) -> None:
        """End a training whose steps were all plain: what phase 2 would have started from is what ships."""
        self.snapshot()
        if needs_start(self.options):
            self.start_sha256 = self._make_start()

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest records of the adapters on the far side."""
        learned = self.options.scales == "learned" and self.start_sha256 is not None
        return {
            "learned_scales": learned,
            "start": self.start_sha256
            and {
                "method": self.options.ptq_init,
                "sha256": self.start_sha256,
                "rotation_seed": self.rotation_seed,
            },
        }

    def restore(self) -> None:
        """Teacher and start as `cross` left them in the run folder."""
        if self.options.distill_weight > 0:
            self.teach(self._cached() if self.options.distill_top_k else self._restored_teacher())
        if needs_start(self.options):
            self.start_sha256 = starts.recorded_sha256(self.run.start)
            start = Start.load(self.run.start, self.start_sha256)
            # Weights that were trained since then are in the checkpoint, and stay as they are.
            start = start if self.options.method == "lora" else replace(start, changed={})
            start.apply(fake.base_of(self.adapted))

    def _restored_teacher(self) -> LiveTeacher:
        teacher = LiveTeacher(self.adapted, self.switch, self.options.distill_temperature)
        teacher.load(self.run.reference)
        return teacher

    def _make_start(self) -> str:
        method = METHOD_OF.get(self.options.ptq_init, self.options.ptq_init)
        seen: list[dict[str, Tensor]] = []
        facts: dict[str, Any] = {"method": method}
        if method in methods.CALIBRATED:
            rows = self.rows.rows
            facts["calibration_tokens"] = tokens = calibration.tokens_to_take(self.options.calibration_tokens, rows)
            progress.info(f"Preparing the second phase: {method.upper()} on {tokens} tokens of the training rows")
            chosen = calibration.choose_rows(rows, tokens, self.options.seed, self.options.data, "--calibration-tokens")
            seen = calibration.batches(chosen, self.tokenizer)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            start = starts.make(self.adapted, self.scheme, method, seen, self.rotation_seed)
        return start.save(self.run.start, **facts)

    def _ask_beforehand(self, teacher: LiveTeacher) -> None:
        with progress.bar("asking the teacher", len(self.rows.rows)) as shown:
            write_cache(teacher, self._batches(), self.options.distill_top_k, self._cache, shown.update)

    def _batches(self) -> Iterator[Batch]:
        collate, size = tokenization.Collator(self.tokenizer), self.options.batch_size
        for begin in range(0, len(self.rows.rows), size):
            batch = collate(self.rows.rows[begin : begin + size])
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _cached(self) -> CachedTeacher:
        return CachedTeacher(self.rows.rows, self._cache, self.options.distill_temperature)

    @property
    def _cache(self) -> Any:
        return self.run.checkpoints / "teacher.safetensors"


def needs_start(options: FinetuneOptions) -> bool:
    """Whether phase 2 has scales, or weights, that have to be kept beside the adapters."""
    return options.ptq_init != "none" or options.scales != "absmax"


def check_combination(options: FinetuneOptions) -> None:
    """Refuse schemes that exclude each other, before anything is loaded.

    Raises:
        UsageError: names both.
    """
    for wrong, message in (*_refused_schemes(options), *_refused_bases(options)):
        if wrong:
            raise UsageError(message)


def _refused_schemes(options: FinetuneOptions) -> tuple[tuple[bool, str], ...]:
    """What excludes each other in start, scales and teacher: whether it is so, and what to say then."""
    changes_base = options.ptq_init in methods.CALIBRATED
    return (
        (
            options.ptq_init != "none" and options.scales == "absmax",
            f"--ptq-init {options.ptq_init} and --scales absmax: the scales it chooses would be thrown away. "
            "Take --scales learned or fixed.",
        ),
        (
            options.distill_weight > 1,
            f"--distill-weight {options.distill_weight:g}: is a share of the loss, 1 at most.",
        ),
        (
            options.distill_top_k > 0 and options.distill_weight == 0,
            f"--distill-top-k {options.distill_top_k} and --distill-weight 0: nothing would be learned from the "
            "teacher. Give it a weight.",
        ),
        (
            options.distill_weight > 0 and options.qat_start == 0,
            "--distill-weight and --qat-start 0: without plain LoRA first there is no teacher. Start later.",
        ),
        (
            options.distill_weight > 0 and options.distill_top_k == 0 and changes_base,
            f"--distill-weight and --ptq-init {options.ptq_init}: it changes the base weights that the teacher "
            "needs. Add --distill-top-k 64, which asks the teacher beforehand.",
        ),
    )


def _refused_bases(options: FinetuneOptions) -> tuple[tuple[bool, str], ...]:
    """The same for what is trained, and what it is trained on."""
    stored, full = options.base != "fp32", options.method == "full"
    defaults = {f.name: f.default for f in fields(options)}
    given = [name for name in LORA_OPTIONS if getattr(options, name) != defaults[name]]
    return (
        (
            stored and full,
            f"--base {options.base} and --method full: weights that are trained cannot be stored in few bits. "
            "Take --base fp32 or --method lora.",
        ),
        (
            stored and options.ptq_init in methods.CALIBRATED,
            f"--base {options.base} and --ptq-init {options.ptq_init}"
            f"{' (the default)' if options.ptq_init == defaults['ptq_init'] else ''}: it would write into the base "
            f"weights, which are held as {options.base}. Give --ptq-init hqq, which only looks at them, or none.",
        ),
        (
            options.rotate == "on" and (full or options.ptq_init not in methods.CALIBRATED),
            f"--rotate on and {'--method full' if full else f'--ptq-init {options.ptq_init}'}: weights are turned "
            "where a start changes them under adapters. "
            f"Take --method lora, --ptq-init {'|'.join(methods.CALIBRATED)}.",
        ),
        (
            full and bool(given),
            f"--method full and {', '.join(map(flag_name, given))}: there are no adapters. Leave it out.",
        ),
        (
            full and options.distill_weight > 0 and options.distill_top_k == 0,
            "--distill-weight and --method full: training changes the weights that the teacher needs. Add "
            "--distill-top-k 64, which asks the teacher beforehand.",
        ),
    )

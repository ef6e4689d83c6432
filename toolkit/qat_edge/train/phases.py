"""Start of the QAT phase: save the FP32 reference, prepare the teacher, initialize weights and scales.

Phase 1 trains without rounding, phase 2 with fake quantization. Between them, once (`PhaseTransition.start_qat`):

1. RUN/reference: the weights trained so far, without anything of phase 2.
2. The teacher of self-distillation, if one is requested: the same weights, live or run beforehand (`distill`).
3. RUN/start: scales, and for most methods base weights, from a PTQ method (`--ptq-init`), put into the model.
4. The optimizer starts again, if the weights were rotated: its averages are of gradients in the old basis.

A resumed run that is in phase 2 already reads 2 and 3 from the run folder (`PhaseTransition.restore`). One that was
killed between the transition and the next checkpoint makes the transition again, but takes the results of 2 and 3 that
were made of the same weights: calibration may take longer than the training. A training that has no second phase ends
with 1 and 3 (`PhaseTransition.finish_without_qat`). When the transition happens is decided in `trainer.TwoPhases`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import __version__, progress
from qat_edge.data import calibration, tokenization
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import RunError
from qat_edge.manifest import LIBRARIES, library_version, read_manifest
from qat_edge.options import FinetuneOptions
from qat_edge.quant import base_storage, fake, numerics, qat_init
from qat_edge.quant.ptq.method_names import CALIBRATED, METHOD_OF
from qat_edge.quant.qat_init import QatInit
from qat_edge.quant.scheme import Scheme
from qat_edge.run import Run
from qat_edge.train import distributed
from qat_edge.train.distill import Batch, CachedTeacher, LiveTeacher, Teacher, cache_made_of, write_cache
from qat_edge.train.divergence import require_finite

TEACHER_FILE = "teacher.safetensors"  # next to the checkpoints


def needs_initialization(options: FinetuneOptions) -> bool:
    """Return whether phase 2 has scales or weights of its own, which are kept in RUN/start."""
    return options.ptq_init != "none" or options.scales != "absmax"


def digest_of(tensors: Iterable[tuple[str, Tensor]], prefix: str = "") -> str:
    """Return the sha256 of named tensors, bit for bit."""
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in tensors:
        digest.update(name.encode())
        for part in _parts(tensor.detach()):
            flat = part.cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same_tensors(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Require that tensors are the same in all processes, bit for bit. what: Name of them, for the message.

    Raises:
        RunError: Names the processes that differ.
    """
    if distributed.count() > 1:
        distributed.require_same(
            digest_of(tensors), what, "This is a fault of qat-edge or of a machine. Please report it."
        )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a tensor consists of: itself, or codes and scales of one that is quantized."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


@dataclass
class PhaseTransition:
    """The transition from phase 1 to phase 2, made once, or restored for a resumed run.

    Attributes:
        model: The peft model, or the model itself if it has no adapters.
        switch: Turns fake quantization on and off.
        scheme: Bits and group size of each weight.
        rows: Training rows, for the cached teacher and for calibration.
        tokenizer: The model's tokenizer.
        options: All options of finetune.
        run: The run folder.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the matrix products.
        rotation_seed: Seed of the rotation; None without one.
        given_start: Weights and scales of the frozen base or of a model that is quantized already; None for those of
            the PTQ initialization.
        save_reference: Saves the trained weights as RUN/reference.
        set_teacher: Passes the teacher to the trainer.
        reset_optimizer: Drops the optimizer's averages of gradients.
        init_sha256: sha256 of the tensors in RUN/start; None until it is made, and where phase 2 needs none.
    """

    model: PreTrainedModel | PeftModel
    switch: fake.Switch
    scheme: Scheme
    rows: TokenizedRows
    tokenizer: PreTrainedTokenizerBase
    options: FinetuneOptions
    run: Run
    device: str
    precision: str
    rotation_seed: int | None
    given_start: QatInit | None
    save_reference: Callable[[], None]
    set_teacher: Callable[[Teacher], None]
    reset_optimizer: Callable[[], None]
    init_sha256: str | None = field(default=None, init=False)

    def start_qat(self) -> None:
        """Make the transition. The steps are in this order because each one needs what the next one changes."""
        # The FP32 reference: the weights as phase 1 left them.
        self.switch.enabled = False
        distributed.on_first(self.save_reference)
        made_of = self._identity()

        # The teacher is the model at this moment. It is run now, if the initialization is about to change the base.
        if self.options.distill_weight > 0:
            teacher = LiveTeacher(self.model, self.switch, self.options.distill_temperature)
            if self.options.distill_top_k:
                distributed.on_first(lambda: self._require_teacher_cache(teacher, made_of))
                self.set_teacher(self._cached_teacher())
            else:
                self.set_teacher(teacher)

        # Scales, and weights with their rounding compensated; with a rotation also the rotated basis.
        if needs_initialization(self.options):
            with self._wide_base():
                self.init_sha256 = self._initialize_in_all(made_of)
        self._fix_codes()
        require_same_tensors((*self.model.named_parameters(), *self.model.named_buffers()), "The weights")

        if self.rotation_seed is not None:
            self.reset_optimizer()  # its averages are of gradients in the basis before the rotation

    def finish_without_qat(self) -> None:
        """End a training that has no second phase: the model as phase 2 would have begun is the result."""
        distributed.on_first(self.save_reference)
        if needs_initialization(self.options):
            with self._wide_base():
                self.init_sha256 = self._initialize_in_all(self._identity())

    def restore(self) -> None:
        """Bring a resumed run to where `start_qat` left it, from the files in the run folder."""
        if self.options.distill_weight > 0:
            self.set_teacher(self._cached_teacher() if self.options.distill_top_k else self._restored_teacher())

        if needs_initialization(self.options):
            self.init_sha256, start = self._recorded_initialization()
            if self.options.method != "lora":
                # The weights have been trained since, and the checkpoint that is resumed has them.
                start = replace(start, changed={})
            with self._wide_base():
                start.apply(fake.base_of(self.model))
        self._fix_codes()

    def _recorded_initialization(self) -> tuple[str, QatInit]:
        """Return RUN/start, which a run that is resumed after the start of QAT needs, with its sha256.

        Raises:
            RunError: It is missing or damaged.
        """
        try:
            digest = qat_init.recorded_sha256(self.run.start)
            return digest, QatInit.load(self.run.start, digest)
        except RunError as error:
            raise RunError(
                f"--resume: {self.run.start} is missing or damaged: it was written at the start of QAT, and the "
                "checkpoint is after that. Restore the folder, or train again: `qat-edge finetune --force` with the "
                f"options in {self.run.config}. ({error})"
            ) from error

    @contextmanager
    def _wide_base(self) -> Iterator[None]:
        """Store base weights in float32 while a rotation or a PTQ method changes them."""
        if self.given_start is None and self.options.ptq_init not in CALIBRATED:
            yield  # nothing changes them
            return
        base_storage.widen(self.model, self.scheme)
        yield
        if self.options.narrows_base:
            base_storage.narrow(self.model, self.scheme)

    def _fix_codes(self) -> None:
        """Let phase 2 train scales alone, or adapters next to a base that stays as it is, if the options say so."""
        if self.options.frozen_base is not None:
            fake.fix_base(self.model)
        elif self.options.has_fixed_codes:
            fake.fix_codes(self.model)

    @property
    def metadata(self) -> dict[str, Any]:
        """Entries of the manifest of RUN/adapter that are known only after the transition."""
        # Merging the adapters needs the file they were trained on: its checksum, not only its method.
        start = None
        if self.init_sha256 is not None:
            start = {
                "method": self.options.ptq_init,
                "sha256": self.init_sha256,
                "rotation_seed": self.rotation_seed,
            }
        learned = self.options.scales == "learned" and start is not None
        fixed = learned and self.options.has_fixed_codes
        unmerged = self.options.frozen_base is not None
        return {"learned_scales": learned, "fixed_codes": fixed, "unmerged": unmerged, "start": start}

    def _initialize_in_all(self, made_of: str) -> str:
        """Run the PTQ initialization in process 0; the others take what it saved, as a resumed run does.

        Returns:
            sha256 of the tensors in RUN/start.
        """
        digest = distributed.on_first(lambda: self._initialize(made_of))
        if not distributed.is_first():
            with torch.no_grad():
                saved = QatInit.load(self.run.start, digest)
                qat_init.repeat(self.model, self.scheme, self._method, saved, self.rotation_seed)
        return digest

    @property
    def _method(self) -> str:
        """The PTQ method of the initialization."""
        return METHOD_OF.get(self.options.ptq_init, self.options.ptq_init)

    def _initialize(self, made_of: str) -> str:
        """Run the PTQ initialization, put its weights and scales into the model, and save them as RUN/start.

        Args:
            made_of: `_identity` at this moment. A RUN/start that was made of the same is taken as it is.

        Returns:
            sha256 of the tensors in RUN/start.
        """
        method = self._method
        moment = "Start of QAT" if self.options.has_qat else "Without QAT"
        if self.given_start is not None:
            base = self.options.frozen_base
            progress.info(
                f"{moment}: codes and scales stay as they are stored"
                if base is None
                else f"{moment}: weights and scales become those of {base}"
            )
            with torch.no_grad():
                qat_init.repeat(self.model, self.scheme, method, self.given_start, self.rotation_seed)
            write = self.given_start.save if base is None else self.given_start.copy
            return write(self.run.start, method=method, rotation_seed=self.rotation_seed)

        saved = self._saved_initialization(made_of)
        if saved is not None:
            progress.info(f"{moment}: taking the initialization in {self.run.start}, made of the same weights")
            with torch.no_grad():
                qat_init.repeat(self.model, self.scheme, method, saved, self.rotation_seed)
            return qat_init.recorded_sha256(self.run.start)

        batches: list[dict[str, Tensor]] = []
        metadata: dict[str, Any] = {"method": method, "made_of": made_of, "rotation_seed": self.rotation_seed}
        if method in CALIBRATED:
            # Methods that compensate rounding need activations, which training rows give.
            rows = self.rows.rows
            tokens = calibration.choose_token_count(self.options.calibration_tokens, rows)
            metadata["calibration_tokens"] = tokens
            progress.info(f"{moment}: initializing weights by {method} on {tokens} tokens of the training rows")
            source = f"the first block of {self.options.data}" if self.options.streaming else self.options.data
            chosen = calibration.choose_rows(rows, tokens, self.options.seed, source, "--calibration-tokens")
            batches = calibration.make_batches(chosen, self.tokenizer)

        # Calibration runs the model in the precision of the training.
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            on_grid = not self.options.has_qat
            start = qat_init.prepare(self.model, self.scheme, method, batches, self.rotation_seed, on_grid)
        require_finite((start.changed | start.scales).items(), "in the PTQ initialization")
        return start.save(self.run.start, **metadata)

    def _saved_initialization(self, made_of: str) -> QatInit | None:
        """Return RUN/start if it is whole and was made of the same weights, None otherwise."""
        try:
            if read_manifest(self.run.start).get("made_of") != made_of:
                return None
            return QatInit.load(self.run.start, qat_init.recorded_sha256(self.run.start))
        except RunError:
            return None  # missing or damaged

    def _identity(self) -> str:
        """Return a digest of all that the transition depends on and that may differ when a run is resumed.

        The options, the base model and the rows are those of the run: `finetune` compares them.
        """
        versions = {name: library_version(name) for name in LIBRARIES}
        libraries = json.dumps([__version__, numerics.QUANTIZER, versions, self.device])
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return digest_of(trained, libraries)

    # --- the teacher ---------------------------------------------------------------------------------------

    def _require_teacher_cache(self, teacher: LiveTeacher, made_of: str) -> None:
        """Run the teacher on all training rows and keep its most likely tokens, if there is no file of them.

        made_of: see `_identity`.
        """
        file = self._teacher_file
        if cache_made_of(file) == made_of:
            return
        with progress.bar("running the teacher", len(self.rows.rows)) as shown:
            write_cache(teacher, self._batches(), self.options.distill_top_k, file, shown.update, made_of)

    def _batches(self) -> Iterator[Batch]:
        """Yield all training rows in order, in batches on the device of the training."""
        # In the order of the file, which is the order of the offsets in the cache.
        collate, size = tokenization.Collator(self.tokenizer), self.options.batch_size
        for begin in range(0, len(self.rows.rows), size):
            batch = collate(self.rows.rows[begin : begin + size])
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _cached_teacher(self) -> CachedTeacher:
        return CachedTeacher(self.rows.rows, self._teacher_file, self.options.distill_temperature)

    def _restored_teacher(self) -> LiveTeacher:
        """Return the live teacher of a resumed run; RUN/reference has the adapters of the end of phase 1."""
        teacher = LiveTeacher(self.model, self.switch, self.options.distill_temperature)
        teacher.load(self.run.reference)
        return teacher

    @property
    def _teacher_file(self) -> Path:
        return self.run.checkpoints / TEACHER_FILE

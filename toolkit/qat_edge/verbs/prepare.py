"""Prepare a model for a trainer of transformers or TRL, which then trains it in two phases like `finetune`.

prepare     load, choose the scheme, insert fake quantization (off) and adapters; nothing is written yet
callback    `train.qat_callback`: the phases, and the run folder at the end
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qat_edge import option_paths, progress, run_lock
from qat_edge.data.formats import RowStream
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.models import load
from qat_edge.models.tasks import CAUSAL_LM
from qat_edge.options import BF16_BASE, MOST_STEPS, QLORA_BASES, TRAINER_ROWS, FinetuneOptions
from qat_edge.quant import bits_file, fake, scheme
from qat_edge.quant.codebook import SEQ
from qat_edge.quant.ptq.method_names import STORED
from qat_edge.run import Run
from qat_edge.train import model_options, run_inputs
from qat_edge.train.option_checks import check_combination
from qat_edge.train.qat_callback import PreparedModel, QatCallback
from qat_edge.train.setup import choose_rotation, load_base, make_trainable, report_scheme, untie_trained_head
from qat_edge.train.training_log import TRAINING_LOG, Finetuned


@dataclass(frozen=True)
class PreparedTraining:
    """A model for a trainer of transformers or TRL, and the callback that trains it in two phases.

    Attributes:
        model: Give it to the trainer as `model`.
        tokenizer: Give it to the trainer as `processing_class`.
        callback: Give it to the trainer in `callbacks`. It writes the run folder.
        run: The run folder.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    callback: QatCallback
    run: Run

    @property
    def result(self) -> Finetuned:
        """Result of the training.

        Raises:
            RunError: The training has not ended, or ended before QAT began.
        """
        if self.callback.result is None:
            raise RunError(f"{self.run.path} is not finished: {self.callback.why_unfinished}")
        return self.callback.result


def prepare(options: FinetuneOptions, out: Path, resume: bool = False, force: bool = False) -> PreparedTraining:
    """Load a model and put fake quantization, switched off, and adapters into it.

    Args:
        options: Of finetune. Those that a trainer decides are replaced by its own when training begins.
        out: Run folder that the training will write.
        resume: The folder holds a run that a checkpoint of the trainer continues.
        force: Replace a run folder that exists. The old run is kept until the new one is finished.

    Raises:
        RunError: `out` exists (without `force` or `resume`), or cannot be resumed.
        UsageError: An impossible combination of options.
        ModelError: The model cannot be loaded or trained.
    """
    # The trainer knows the steps later; every start of QAT is possible with this many.
    options = option_paths.absolute(dataclasses.replace(options, steps=MOST_STEPS))
    if options.base == FinetuneOptions.base:
        # Trainers read the weight of the head themselves, and expect the dtype of the hidden states.
        options = dataclasses.replace(options, base="fp32")
    run = Run.to_resume(out) if resume else Run(out)
    if resume and (run.path / TRAINING_LOG).is_file():
        raise RunError(f"resume=True: {run.path} is finished. Export it, or train again with force=True.")
    if not resume:
        with run_lock.writing(out, "prepare", create=True, resuming=force):
            run_inputs.check_folder(options, run, resume, force)
    _check(options)
    prepared = _load(options)
    return PreparedTraining(prepared.model, prepared.tokenizer, QatCallback(prepared, run, resume, force), run)


def _check(options: FinetuneOptions) -> None:
    """Refuse options before anything is loaded.

    Raises:
        UsageError: Names the option.
        ModelError: The model generates no text.
        DataError: Rows cannot be read.
    """
    check_combination(options)
    if options.base == BF16_BASE:
        raise UsageError(
            f"--base {BF16_BASE}: trainers of others need a base in float32. Give fp32, or {' or '.join(QLORA_BASES)}."
        )
    if options.ptq_init == STORED:
        raise UsageError(
            f"--ptq-init {STORED}: codes that a model is stored with stay as they are, so QAT would have nothing to "
            "train. Choose another method."
        )
    if load.encoder_config(options.model, options.trust_remote_code) is not None:
        raise ModelError(
            f"{options.model}: an encoder. prepare() is for models that generate text; `qat-edge finetune` trains "
            "encoders."
        )
    for source, part in ((options.data, "train"), (options.eval_data, "eval")):
        if source not in (None, TRAINER_ROWS):
            next(iter(RowStream(source, part, report=False)))


def _load(options: FinetuneOptions) -> PreparedModel:
    """Load the base model, choose bits and rotation, and add adapters."""
    model, tokenizer, identity = load_base(options, CAUSAL_LM)
    bits_file.require_model(options.bits, dataclasses.asdict(identity), None)
    bits = bits_file.load_bits(Path(options.bits)) if options.bits else {}
    levels = bits_file.requested_levels(options.bits, options.weight_levels) or SEQ
    choose_scheme = partial(
        scheme.choose_scheme, model, options.group_size, bits, (options.embedding_bits, options.head_bits),
        scheme.LinearCodes(options.weight_bits, levels),
    )  # fmt: skip
    model_options.check(model, options, choose_scheme)

    weights = untie_trained_head(choose_scheme(), options)
    report_scheme(model, weights)
    rotation_seed = choose_rotation(model, weights, options, None)
    adapted, switch = make_trainable(model, weights, CAUSAL_LM, options)
    assert isinstance(adapted, PeftModel)  # --method full is not offered

    # Scales are trained by the callback, from the start of QAT on: the trainer's optimizer shall not have them.
    for name, parameter in adapted.named_parameters():
        if fake.SCALE_FACTOR in name:
            parameter.requires_grad_(False)
    progress.info("Prepared: pass model, tokenizer (processing_class) and callback to the trainer")
    return PreparedModel(adapted, switch, tokenizer, identity, weights, bits, levels, rotation_seed, options)

"""Peak memory of training steps, from a run of the real code on tensors without memory.

The model gets fake tensors (`live_bytes`) in the place of its weights, is prepared by `train.setup`, and makes a step
of each phase with `train.trainer`, while the bytes of all tensors are counted. So what is counted is what a training
allocates: weights as they are stored, adapters, gradients, the optimizer's state, activations that autograd keeps, and
the temporaries of fake quantization, loss and distillation. Between the phases a PTQ method may initialize the weights
(`initialization_memory`).

Every row is as long as the longest one permitted, and every token has loss: a training whose rows are shorter needs
less. Attention is counted as with padding, for which transformers makes a mask.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from qat_edge import progress
from qat_edge.data.calibration import DEFAULT_CALIBRATION_TOKENS
from qat_edge.models.tasks import CAUSAL_LM
from qat_edge.options import BF16_BASE, FinetuneOptions
from qat_edge.quant import base_storage, fake
from qat_edge.quant.ptq.method_names import CALIBRATED
from qat_edge.quant.scheme import Scheme
from qat_edge.train.arguments import training_arguments
from qat_edge.train.distill import Batch, CachedTeacher, LiveTeacher
from qat_edge.train.initialization_memory import count_initialization
from qat_edge.train.live_bytes import AssumedValues, LiveBytes
from qat_edge.train.phases import needs_initialization
from qat_edge.train.rotated_outline import RotationOutcome, apply_outcome
from qat_edge.train.setup import make_trainable
from qat_edge.train.trainer import QatTrainer


@dataclass(frozen=True)
class TrainingCount:
    """Memory of all tensors of a training at its peak, in bytes, and the parameters that are trained.

    Attributes:
        adapter_parameters: Elements of all adapters.
        scale_parameters: Factors of learned scales.
        base: Weights that are not trained, as they are stored, and buffers.
        trained: Adapters or weights that are trained, with factors of learned scales.
        optimizer: State of AdamW.
        step: Everything else at the peak: gradients, activations, temporaries; in QAT scales, codes and teacher, too.
        phase_1: Peak of a step of LoRA or full fine-tuning; None without one.
        initialization: Peak of a PTQ initialization that is calibrated; None without one.
        qat: Peak of a step of QAT; None without one.
    """

    adapter_parameters: int
    scale_parameters: int
    base: int
    trained: int
    optimizer: int
    step: int
    phase_1: int | None
    initialization: int | None
    qat: int | None

    @property
    def peak(self) -> int:
        """Sum of all parts."""
        return self.base + self.trained + self.optimizer + self.step


def count_training(
    model: PreTrainedModel,
    scheme: Scheme,
    options: FinetuneOptions,
    row_tokens: int,
    precision: str,
    rotation: RotationOutcome,
    is_stored_in_16_bits: bool = False,
) -> TrainingCount:
    """Return the memory of the training steps that `finetune` would make.

    Args:
        model: On the meta device; it is changed.
        scheme: Bits and group size of each weight.
        options: Of finetune.
        row_tokens: Tokens of each row.
        precision: "bf16" or "fp32", of the matrix products.
        rotation: Effect of the rotation at the start of QAT.
        is_stored_in_16_bits: The checkpoint holds bfloat16 or float16, which decides how `--base checkpoint` stores it.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(model, mode)
    with AssumedValues(), progress.report_to(progress.SilentReporter()):
        # Values decide what is stored in 16 bits, so that is done below.
        wide = dataclasses.replace(options, base="fp32") if options.narrows_base else options
        adapted, switch = make_trainable(model, scheme, CAUSAL_LM, wide)
    _replace_tensors(adapted, mode)

    with tempfile.TemporaryDirectory() as folder, mode, LiveBytes() as live, AssumedValues():
        if options.narrows_base and (is_stored_in_16_bits or options.base == BF16_BASE):
            _store_base(adapted, scheme, torch.bfloat16)
        training = _Training(adapted, options, row_tokens, precision, Path(folder), live)
        phase_1 = training.peak_of_step() if options.qat_start_step else None
        before, qat = training.optimizer, None
        if options.ptq_init in CALIBRATED:
            _store_base(adapted, scheme, torch.float32)
        initialization = _initialization_peak(training, scheme, precision, row_tokens, rotation)
        if options.ptq_init in CALIBRATED and options.narrows_base:
            _store_base(adapted, scheme, torch.bfloat16)
        if options.has_qat:
            _start_qat(training, switch, scheme, rotation)
            qat = training.peak_of_step()

        # The parts at the largest of the peaks.
        peak = max(phase_1 or 0, initialization or 0, qat or 0)
        optimizer = training.optimizer if peak == qat else before
        rest = peak - training.base - training.trained - optimizer
        adapters, scales = _count_trained(adapted)
        return TrainingCount(
            adapters, scales, training.base, training.trained, optimizer, max(0, rest), phase_1, initialization, qat
        )


def _count_trained(model: nn.Module) -> tuple[int, int]:
    """Return the elements of all adapters, and those of all factors of learned scales."""
    named = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    scales = sum(count for name, count in named if fake.SCALE_FACTOR in name)
    return sum(count for name, count in named if "lora_A" in name or "lora_B" in name), scales


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the CPU into the place of a model's parameters and buffers; shared ones stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made.setdefault(id(tensor), _as_fake(tensor, mode))
                    tensors[name] = made[id(tensor)]


def _as_fake(tensor: Any, mode: FakeTensorMode) -> Any:
    """Return a fake tensor of the same shape and type."""
    # A quantized tensor has fake ones inside already.
    if isinstance(tensor, FakeTensor) or hasattr(tensor, "__tensor_flatten__"):
        return tensor
    with mode:
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _store_base(model: nn.Module, scheme: Scheme, dtype: torch.dtype) -> None:
    """Store the frozen weights that `base_storage` stores in 16 bits as `dtype`; shared ones stay shared."""
    stored = {
        id(weight): nn.Parameter(torch.empty(weight.shape, dtype=dtype), requires_grad=False)
        for weight in base_storage.frozen_weights(model, scheme)
        if weight.dtype != dtype
    }
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if id(tensor) in stored:
                module._parameters[name] = stored[id(tensor)]


class _StepTrainer(QatTrainer):
    """A trainer that leaves fake tensors where they are."""

    at_targets = True

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass


class _Training:
    """A training of fake tensors, prepared as the Trainer does.

    Attributes:
        model: With or without adapters.
        options: Of finetune.
        trainer: Has the optimizer and the loss.
        base: Bytes of weights that are not trained, and of buffers.
        trained: Bytes of parameters that are trained.
        optimizer: Bytes of the optimizer's state after the last step.
        live: Counts the tensors.
        batch: Token ids, mask and labels.
        in_qat: Phase 2 has begun.
    """

    in_qat = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        options: FinetuneOptions,
        row_tokens: int,
        precision: str,
        folder: Path,
        live: LiveBytes,
    ) -> None:
        self.model, self.options, self.live = model, options, live
        self.trained = live.add(p for p in model.parameters() if p.requires_grad)
        self.base = live.add([*model.parameters(), *model.buffers()])
        self.optimizer = 0

        untracked = dataclasses.replace(options, track=("none",))
        arguments = training_arguments(untracked, folder, "cpu", precision, CAUSAL_LM, evaluates=False)
        self.trainer = _StepTrainer(model=model, args=arguments)
        self.trainer.configure_optimizer(options, options.qat_start_step)
        if options.gradient_checkpointing:
            checkpointed: Any = model
            checkpointed.activation_checkpointing_enable(dict(arguments.activation_checkpointing_kwargs or {}))
        accelerator = self.trainer.accelerator
        self._prepared = accelerator.prepare_model(model, device_placement=False)
        self._optimizer = accelerator.prepare_optimizer(self.trainer.optimizer, device_placement=False)

        shape = (options.batch_size, row_tokens)
        names = ("input_ids", "attention_mask", "labels")
        self.batch = {name: torch.ones(shape, dtype=torch.int64) for name in names}

    def peak_of_step(self) -> int:
        """Make a step whose optimizer has its state from earlier ones, and return the peak of all tensors."""
        before = self.live.live_bytes - self.optimizer
        for parameter in self._with_gradient():
            parameter.grad = torch.empty_like(parameter)
        self._update()

        self.live.restart()
        # From the second batch of a step on, there are gradients of the one before.
        for _ in range(min(2, self.options.gradient_accumulation)):
            self.trainer.training_step(self._prepared, dict(self.batch), torch.ones((), dtype=torch.int64))
        self._update()
        self.optimizer = self.live.live_bytes - before
        return self.live.peak_bytes

    def reset_optimizer(self) -> None:
        """Drop the optimizer's state."""
        self.trainer.reset_optimizer()
        self.optimizer = 0

    def _update(self) -> None:
        self._optimizer.step()
        self._prepared.zero_grad()

    def _with_gradient(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that a step changes: learned scales in QAT alone."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and (self.in_qat or fake.SCALE_FACTOR not in name):
                yield parameter


def _initialization_peak(
    training: _Training, scheme: Scheme, precision: str, row_tokens: int, rotation: RotationOutcome
) -> int | None:
    """Return the peak of all tensors while a calibrated method initializes weights; None without one."""
    options = training.options
    if options.ptq_init not in CALIBRATED or options.frozen_base is not None:
        return None
    tokens = options.calibration_tokens or DEFAULT_CALIBRATION_TOKENS
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return training.live.live_bytes + count_initialization(
            fake.base_of(training.model), scheme, options.ptq_init, tokens, row_tokens, rotation, training.live
        )


def _start_qat(training: _Training, switch: fake.Switch, scheme: Scheme, rotation: RotationOutcome) -> None:
    """Add what `train.phases` adds at the start of QAT: teacher, rotation, scales, fixed codes."""
    options, model = training.options, training.model
    if options.distill_weight > 0 and options.distill_top_k:
        training.trainer.set_teacher(_CachedTeacherOutline(options, training.batch))
    elif options.distill_weight > 0:
        training.trainer.set_teacher(LiveTeacher(model, switch, options.distill_temperature))
    base = fake.base_of(model)
    apply_outcome(base, rotation)
    if needs_initialization(options):
        shapes = {name: fake.linear(base, name).scales_shape for name in scheme.linears}
        fake.set_scales(base, {name: torch.empty(shape) for name, shape in shapes.items()})
    if options.frozen_base is not None:
        fake.fix_base(model)
    elif options.has_fixed_codes:
        fake.fix_codes(model)
    if rotation.is_on:
        training.reset_optimizer()
    switch.enabled = training.in_qat = True


class _CachedTeacherOutline(CachedTeacher):
    """A teacher with predictions for the tokens of one batch."""

    def __init__(self, options: FinetuneOptions, batch: Batch) -> None:
        tokens = batch["labels"][:, 1:].numel()
        self.choices = torch.zeros((tokens, options.distill_top_k), dtype=torch.int32)
        self.log_probs = torch.zeros((tokens, options.distill_top_k), dtype=torch.float16)
        self.temperature = options.distill_temperature

    def _positions(self, batch: Batch) -> Tensor:
        return torch.arange(len(self.choices))

"""Trainers of TRL with a prepared model: the run that they end in, what they compute in QAT, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import qat_edge
from conftest import plain_rows, short_training
from qat_edge import config
from qat_edge.data.formats import load_rows
from qat_edge.data.tokenization import Collator, tokenize
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.evaluate.reference import load_exact
from qat_edge.manifest import read_manifest
from qat_edge.models.load import load_model
from qat_edge.models.merge import merged_model
from qat_edge.quant import fake
from qat_edge.run import Run
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.prepare import PreparedTraining
from tests.docs.doc_pages import code_blocks

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'qat-edge[trl]'")
datasets = pytest.importorskip("datasets")

STEPS, START = 6, 3
IDS = torch.arange(3, 40).unsqueeze(0)
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f'{{"n":{i}}}'}]}
    for i in range(24)
]
PAIRS = [{"prompt": f"say {i} ", "chosen": f"it is {i}", "rejected": "no"} for i in range(24)]
COMMON: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "use_cpu": True,
    "report_to": [], "logging_steps": 1, "save_strategy": "no", "max_length": 64, "disable_tqdm": True,
}  # fmt: skip


def prepared_in(model: Path, folder: Path, **options: Any) -> PreparedTraining:
    return qat_edge.prepare(model, folder / "run", **{"lora_rank": 4, "qat_start": 0.5, **options})


def sft(prepared: PreparedTraining, folder: Path, rows: list[dict[str, Any]] = CHATS, **options: Any) -> Any:
    """An SFTTrainer of a prepared model. Options are those of SFTConfig, and of the trainer where it has them."""
    of_trainer = {
        name: options.pop(name)
        for name in ("callbacks", "peft_config", "eval_dataset", "optimizers")
        if name in options
    }
    return trl.SFTTrainer(
        model=prepared.model, processing_class=prepared.tokenizer, train_dataset=datasets.Dataset.from_list(rows),
        args=trl.SFTConfig(str(folder / "out"), **{**COMMON, **options}),
        **{"callbacks": [prepared.callback], **of_trainer},
    )  # fmt: skip


def dpo(prepared: PreparedTraining, folder: Path, **options: Any) -> Any:
    of_trainer = {name: options.pop(name) for name in ("ref_model",) if name in options}
    return trl.DPOTrainer(
        model=prepared.model, processing_class=prepared.tokenizer, train_dataset=datasets.Dataset.from_list(PAIRS),
        args=trl.DPOConfig(str(folder / "out"), **{**COMMON, **options}), callbacks=[prepared.callback], **of_trainer,
    )  # fmt: skip


def logits(model: Any) -> Tensor:
    # Without the trainer's autocast, which stays around the model.
    with torch.no_grad():
        return torch.as_tensor(fake.base_of(model).eval()(input_ids=IDS).logits)


def frozen_logits(run: Run) -> Tensor:
    """Logits of the frozen checkpoint, computed as exported models do."""
    qat_edge.quantize(run)
    return logits(load_exact(run.quantized))


class BeforeEachStep(TrainerCallback):
    """Calls a function before every step, after the callback of the prepared model."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.record()


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedTraining:
    folder = tmp_path_factory.mktemp("sft")
    prepared = prepared_in(tiny_model_folder, folder)
    sft(prepared, folder).train()
    return prepared


# --- the function that is trained is the one that is frozen ------------------------------------------------


def test_the_frozen_checkpoint_of_sft_equals_the_trained_model(trained: PreparedTraining) -> None:
    assert torch.equal(logits(trained.model), frozen_logits(trained.run))


def test_the_run_exports_and_verifies(trained: PreparedTraining) -> None:
    (exported,) = qat_edge.export(trained.run, target=["onnx"], ptq=["none"], context_length=64)
    assert [result.faults for result in qat_edge.verify(trained.run)] == [[]]
    assert exported.folder == trained.run.exports / "onnx"


def test_the_run_has_the_parts_of_a_fine_tune(trained: PreparedTraining) -> None:
    run, result = trained.run, trained.result
    assert (result.run, result.steps, result.qat_start_step) == (run.path, STEPS, START)
    options = config.load_trained(run.config)
    assert (options.steps, options.learning_rate, options.batch_size, options.lora_rank) == (STEPS, 1e-2, 4, 4)
    log = json.loads((run.path / "training.json").read_text())
    assert [row["phase"] for row in log["curve"]] == ["lora"] * START + ["qat"] * START
    assert (log["trainer"]["arguments"], log["trainer"]["logging_steps"]) == ("SFTConfig", 1)
    # After coordinate descent, QAT has a tenth of the rate, and the trainer's schedule once more.
    rates = [row["learning_rate"] for row in log["curve"]]
    assert rates == pytest.approx([1e-2, 1e-2 * 5 / 6, 1e-2 * 4 / 6, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert read_manifest(run.adapter)["conversation"]["end_of_turn"] == [trained.tokenizer.eos_token_id]


def test_rows_of_the_trainer_calibrate_later_commands(trained: PreparedTraining) -> None:
    texts = [json.loads(line)["text"] for line in trained.run.rows.read_text().splitlines()]
    assert len(texts) == len(CHATS) and all(text.startswith("<|im_start|>user\nsay ") for text in texts)
    done = qat_edge.quantize(trained.run, method="gptq")
    assert done.folder == trained.run.ptq("gptq").quantized


def test_scales_are_learned_in_qat_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    factors = [p for name, p in prepared.model.named_parameters() if fake.SCALE_FACTOR in name]
    moved: list[bool] = []
    trainer = sft(prepared, tmp_path)
    trainer.add_callback(BeforeEachStep(lambda: moved.append(any(bool((p != 1).any()) for p in factors))))
    trainer.train()
    # Seen before each step: the first step of QAT moves them.
    assert factors and moved == [False] * (START + 1) + [True] * (STEPS - START - 1)
    in_trainer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not in_trainer & {id(p) for p in factors}


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 2},
        {"ptq_init": "hqq", "scales": "fixed"},
        {"ptq_init": "none", "scales": "absmax"},
        {"qat_start": STEPS},
        {"qat_start": 0},
        {"base": "nf4", "ptq_init": "hqq"},
        {"head_bits": 4, "rotate": "off"},
    ],
    ids=str,
)
def test_every_kind_of_qat_freezes_what_it_trained(
    options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path, **options)
    sft(prepared, tmp_path).train()
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_steps": -1, "num_train_epochs": 1},
        {"packing": True, "max_length": 48},
        {"padding_free": True, "max_length": None},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2},
        {"neftune_noise_alpha": 5.0},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.2},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": datasets.Dataset.from_list(CHATS[:4])},
        {"bf16": True},
    ],
    ids=str,
)
def test_options_of_the_trainer_work(options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    sft(prepared, tmp_path, **options).train()
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))


def test_it_trains_what_finetune_trains(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Summed in another order, the loss of finetune differs in its last bits from the model's own.
    monkeypatch.setattr("qat_edge.train.next_token_loss.is_loss_of", lambda model: False)
    options = {"lr_schedule": "constant", "warmup_steps": 0, "seed": 3, "learning_rate": 1e-2, "precision": "fp32"}
    made = short_training(tiny_model_folder, tmp_path, plain_rows(24), steps=STEPS, **options)
    finetune(dataclasses.replace(made, eval_data=None), tmp_path / "own")

    # The same rows, batches, optimizer and schedule.
    (tmp_path / "other").mkdir()
    prepared = prepared_in(tiny_model_folder, tmp_path / "other", data=made.data, seed=3)
    rows = tokenize(load_rows(made.data), prepared.tokenizer, 512).rows
    arguments = {**COMMON, "lr_scheduler_type": "constant", "optim": "adamw_torch", "seed": 3}
    del arguments["max_length"]
    Trainer(
        model=prepared.model, processing_class=prepared.tokenizer, callbacks=[prepared.callback],
        data_collator=Collator(prepared.tokenizer), train_dataset=rows,
        args=TrainingArguments(str(tmp_path / "out"), remove_unused_columns=False, **arguments),
    ).train()  # fmt: skip
    own, other = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "own", prepared.run.path)
    )
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_a_model_in_qat_is_not_merged_by_peft(trained: PreparedTraining) -> None:
    with pytest.raises(UsageError, match="another function than the trained one"):
        trained.model.merge_adapter()


def test_the_trained_model_generates_as_the_frozen_one(trained: PreparedTraining) -> None:
    frozen_logits(trained.run)
    models = (trained.model.eval(), load_exact(trained.run.quantized))
    answers = [model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False).tolist() for model in models]
    assert answers[0] == answers[1] and len(answers[0][0]) > IDS.shape[1]


def test_rows_may_be_a_stream(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    trl.SFTTrainer(
        model=prepared.model, processing_class=prepared.tokenizer, callbacks=[prepared.callback],
        train_dataset=datasets.Dataset.from_list(CHATS).to_iterable_dataset(),
        args=trl.SFTConfig(str(tmp_path / "out"), **COMMON),
    ).train()  # fmt: skip
    assert len(prepared.run.rows.read_text().splitlines()) == len(CHATS)
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))


# --- the head, which TRL does not call ---------------------------------------------------------------------


def test_losses_of_qat_are_those_of_the_rounded_head(trained: PreparedTraining) -> None:
    base, labels = fake.base_of(trained.model), IDS.clone()
    with torch.no_grad():
        found = base(input_ids=IDS, labels=labels, fused_lm_head=True).log_probs
    expected = logits(trained.model)[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected)

    # TRL's own head would not round: the difference is what this test is about.
    with torch.no_grad():
        hidden = base.base_model(input_ids=IDS).last_hidden_state[:, :-1]
        float_head = (hidden @ base.get_output_embeddings().weight.T).log_softmax(-1)
    assert float((float_head.gather(-1, IDS[:, 1:, None])[..., 0] - expected).abs().max()) > 1e-4


def test_a_head_that_is_not_rounded_is_refused(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def nothing(base: Any) -> Iterator[None]:
        yield

    prepared = prepared_in(tiny_model_folder, tmp_path)
    # Larger weights than a model begins with, so that the head's rounding shows.
    fake.base_of(prepared.model).get_output_embeddings().weight.data.mul_(10)
    monkeypatch.setattr("qat_edge.train.trainer_forward._rounded_head", nothing)
    with pytest.raises(ModelError, match="log-probabilities differ from those of the rounded head by"):
        sft(prepared, tmp_path).train()


def test_gradients_of_the_fused_head_are_those_of_the_logits(trained: PreparedTraining) -> None:
    base = fake.base_of(trained.model).eval()
    parameters = [p for name, p in trained.model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    fused = base(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs.sum()
    plain = base(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).sum()
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (fused, plain)]
    for found, expected in zip(*gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


# --- DPO ---------------------------------------------------------------------------------------------------


@contextmanager
def recorded_references(trainer: Any) -> Iterator[list[list[float]]]:
    """Log-probabilities of the reference model for the same three pairs, before each step of a training."""
    found: list[list[float]] = []
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])

    def record() -> None:
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, batch)
        found.append([*chosen.tolist(), *rejected.tolist()])

    trainer.add_callback(BeforeEachStep(record))
    yield found


@pytest.mark.parametrize(
    "options", [{}, {"ptq_init": "hqq"}, {"ptq_init": "awq", "weight_bits": 2}, {"qat_start": 0}], ids=str
)
def test_the_reference_model_of_dpo_stays_the_base_model(
    options: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path, **options)
    trainer = dpo(prepared, tmp_path)
    with recorded_references(trainer) as references:
        trainer.train()
    assert len(references) == STEPS and all(one == references[0] for one in references)
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))

    # And it is the base model: no adapter, no rounding.
    plain = trl.DPOTrainer(
        model=str(tiny_model_folder), train_dataset=datasets.Dataset.from_list(PAIRS),
        args=trl.DPOConfig(str(tmp_path / "plain"), model_init_kwargs={"dtype": "float32"}, **COMMON),
    )  # fmt: skip
    chosen, rejected = plain.compute_ref_log_probs(
        plain.ref_model, plain.data_collator([plain.train_dataset[i] for i in range(3)])
    )
    assert references[0] == [*chosen.tolist(), *rejected.tolist()]


def test_reference_log_probabilities_may_be_computed_beforehand(tiny_model_folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, beforehand in (("first", True), ("second", False)):
        (tmp_path / name).mkdir()
        prepared = prepared_in(tiny_model_folder, tmp_path / name)
        trainer = dpo(prepared, tmp_path / name, precompute_ref_log_probs=beforehand)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # beforehand, batches are padded to other lengths


def test_a_reference_model_of_its_own_gives_the_same_losses(tiny_model_folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, options in (("own", {"ref_model": load_model(str(tiny_model_folder)).model}), ("none", {})):
        (tmp_path / name).mkdir()
        prepared = prepared_in(tiny_model_folder, tmp_path / name)
        trainer = dpo(prepared, tmp_path / name, **options)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_the_loss_of_dpo_in_qat_is_that_of_the_rounded_policy(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path, qat_start=0)
    trainer = dpo(prepared, tmp_path, max_steps=1)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    reference = trainer.compute_ref_log_probs(trainer.model, batch)
    with torch.no_grad():
        log_probs = prepared.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["input_ids"][:, 1:, None]
    per_token = log_probs[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0] * batch["completion_mask"][:, 1:]
    chosen, rejected = per_token.sum(1).chunk(2)
    margin = (chosen - reference[0]) - (rejected - reference[1])
    expected = -torch.nn.functional.logsigmoid(trainer.beta * margin).mean()
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)


# --- a training that is resumed ----------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "step"), [(sft, 2), (sft, 3), (sft, 4), (dpo, 4)])
def test_a_resumed_training_ends_in_the_same_weights(
    make: Any, step: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    adapters = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        prepared = prepared_in(tiny_model_folder, folder)
        trainer = make(prepared, folder, save_strategy="steps", save_steps=1)
        if name == "whole":
            trainer.train()
        else:
            interrupted(trainer, step)
            with pytest.raises(RunError, match="its training has not ended"):
                _ = prepared.result
            prepared = prepared_in(tiny_model_folder, folder, resume=True)
            trainer = make(prepared, folder, save_strategy="steps", save_steps=1)
            assert get_last_checkpoint(str(folder / "out")).endswith(f"checkpoint-{step}")
            trainer.train(resume_from_checkpoint=True)
        adapters.append(merged_model(prepared.run.adapter).model.state_dict())
        assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())


def interrupted(trainer: Any, step: int) -> None:
    """Train, and raise KeyboardInterrupt after the checkpoint of a step."""

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_checkpoint_of_another_training_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    trainer = sft(prepared, tmp_path, save_strategy="steps", save_steps=1)
    interrupted(trainer, 5)
    path = tmp_path / "out" / "checkpoint-5" / "qat_edge.pt"
    own = torch.load(path)
    for saved, message in (
        ({**own, "start": "other"}, "is of another training than"),
        ({**own, "scales": {}}, "damaged, or not of this training"),
        ([1], "damaged, or not of this training"),
        (None, r"qat_edge\.pt: missing"),
    ):
        torch.save(saved, path)
        if saved is None:
            path.unlink()
        again = prepared_in(tiny_model_folder, tmp_path, resume=True)
        resumed = sft(again, tmp_path, save_strategy="steps", save_steps=1)
        with pytest.raises(RunError, match=message):
            resumed.train(resume_from_checkpoint=True)


def test_a_checkpoint_needs_a_run_to_resume(tiny_model_folder: Path, tmp_path: Path) -> None:
    interrupted(sft(prepared_in(tiny_model_folder, tmp_path), tmp_path, save_strategy="steps", save_steps=1), 2)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    trainer = sft(prepared_in(tiny_model_folder, tmp_path), tmp_path)
    with pytest.raises(UsageError, match=r"resume_from_checkpoint: step 2 .* resume=True"):
        trainer.train(resume_from_checkpoint=True)


def test_a_finished_run_has_nothing_to_resume(trained: PreparedTraining, tiny_model_folder: Path) -> None:
    with pytest.raises(RunError, match="is finished"):
        prepared_in(tiny_model_folder, trained.run.path.parent, resume=True)


def test_finetune_does_not_resume_it(tiny_model_folder: Path, tmp_path: Path, trained: PreparedTraining) -> None:
    own = config.load_trained(trained.run.config)
    with pytest.raises(UsageError, match=r"trained by a trainer of its own \('SFTConfig'\)"):
        qat_edge.finetune(own.model, own.data, trained.run.path, resume=True)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_trainer_without_the_callback_is_refused_at_its_first_step(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    with pytest.raises(RunError, match="the trainer has not trained"):
        _ = prepared.result
    with pytest.raises(UsageError, match=r"callbacks=\[prepared\.callback\]"):
        sft(prepared, tmp_path, callbacks=[]).train()
    assert not prepared.run.path.exists()


def test_a_model_is_trained_once(trained: PreparedTraining, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a prepared model is trained once"):
        sft(trained, tmp_path).train()


class StopAfter(TrainerCallback):
    """Stops a training in order, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_training_that_stops_in_qat_is_finished_as_it_is(
    tiny_model_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    sft(prepared, tmp_path, callbacks=[prepared.callback, StopAfter(5)]).train()
    assert prepared.result.steps == 5 and "Training was stopped at step 5 of 6, in the QAT phase" in messages
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))


def test_a_training_that_stops_before_qat_is_not_finished(
    tiny_model_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    sft(prepared, tmp_path, callbacks=[prepared.callback, StopAfter(2)]).train()
    with pytest.raises(RunError, match="stopped at step 2 of 6, before QAT began at step 3"):
        _ = prepared.result
    assert any("is not finished: training was stopped at step 2" in line for line in messages)
    assert not prepared.run.adapter.exists()


def test_adapters_of_the_trainer_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    prepared = prepared_in(tiny_model_folder, tmp_path)
    with pytest.raises(ValueError, match="You passed a `PeftModel` instance together with a `peft_config`"):
        sft(prepared, tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    prepared.model.add_adapter("second", prepared.model.peft_config["default"])
    with pytest.raises(UsageError, match="a further adapter, second"):
        sft(prepared, tmp_path).train()


def test_another_tokenizer_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    with pytest.raises(UsageError, match=r"tokenizer is not the model's \(eos_token differs\)"):
        sft(prepared, tmp_path, eos_token="<|endoftext|>").train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16": False, "fp16": True}, "fp16=True"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True: the evaluation would convert the weights"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True: Liger"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"activation_offloading": True}, "activation_offloading=True"),
        ({"push_to_hub": True}, "push_to_hub=True"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"},
            "load_best_model_at_end=True",
        ),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(
    options: dict[str, Any], message: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from qat_edge.train.trainer_arguments import check_arguments

    with pytest.raises(UsageError, match=message):
        check_arguments(trl.SFTConfig(str(tmp_path / "out"), **{**COMMON, **options}))


def test_other_trainers_of_trl_are_refused(tmp_path: Path) -> None:
    from qat_edge.train.trainer_arguments import check_arguments

    with pytest.raises(UsageError, match="GRPOConfig: prepared models are tested with SFTTrainer and DPOTrainer"):
        check_arguments(trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[]))


def test_a_schedule_by_the_loss_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = sft(
        prepared_in(tiny_model_folder, tmp_path), tmp_path, lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps", eval_steps=1, eval_dataset=datasets.Dataset.from_list(CHATS[:4]),
        metric_for_best_model="loss",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"lr_scheduler_type=.*needs a schedule by steps"):
        trainer.train()


def test_an_optimizer_of_the_user_trains_adapters_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    def own(prepared: PreparedTraining, parameters: Any) -> Any:
        optimizer = torch.optim.AdamW(list(parameters), lr=1e-2)
        return (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))

    prepared = prepared_in(tiny_model_folder, tmp_path, qat_learning_rate=1e-4)
    with pytest.raises(UsageError, match="optimizer has the learned scales"):
        sft(prepared, tmp_path, optimizers=own(prepared, prepared.model.parameters())).train()
    adapters = [p for p in prepared.model.parameters() if p.requires_grad]
    with pytest.raises(UsageError, match=r"other learning rates \(0\.01\) than its arguments \(0\.5\)"):
        sft(prepared, tmp_path, optimizers=own(prepared, adapters), learning_rate=0.5).train()
    trainer = sft(prepared, tmp_path, optimizers=own(prepared, adapters))
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[:START] == [1e-2] * START and max(rates[START:]) == pytest.approx(1e-4)


def test_a_start_of_qat_after_the_last_step_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    trainer = sft(prepared_in(tiny_model_folder, tmp_path, qat_start=50), tmp_path)
    with pytest.raises(UsageError, match="qat_start=50: the trainer does 6 steps"):
        trainer.train()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_folder_that_exists_is_replaced_by_force_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    sft(prepared, tmp_path).train()
    before = read_manifest(prepared.run.adapter)["files"]
    with pytest.raises(RunError, match="exists already"):
        prepared_in(tiny_model_folder, tmp_path)
    again = prepared_in(tiny_model_folder, tmp_path, force=True, seed=1)
    sft(again, tmp_path).train()
    assert not (again.run.path / ".previous").exists()
    assert read_manifest(again.run.adapter)["files"] != before
    assert torch.equal(logits(again.model), frozen_logits(again.run))


def test_a_loaded_model_is_saved_first(tmp_path: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(UsageError, match=r"model: a LlamaForCausalLM.*save_pretrained"):
        qat_edge.prepare(model, tmp_path / "run")


# --- the Trainer of transformers ---------------------------------------------------------------------------


def test_the_trainer_of_transformers_trains_it_too(tiny_model_folder: Path, tmp_path: Path) -> None:
    prepared = prepared_in(tiny_model_folder, tmp_path)
    ids = prepared.tokenizer("the rain in the other region")["input_ids"]
    arguments = {key: value for key, value in COMMON.items() if key != "max_length"}
    trainer = Trainer(
        model=prepared.model, processing_class=prepared.tokenizer, callbacks=[prepared.callback],
        args=TrainingArguments(str(tmp_path / "out"), **arguments),
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids, "labels": ids}] * 24),
    )  # fmt: skip
    trainer.train()
    assert torch.equal(logits(prepared.model), frozen_logits(prepared.run))


# --- the guide ---------------------------------------------------------------------------------------------

GUIDE = {block.title: block.code for block in code_blocks("python") if block.page.name == "trl.md" and block.title}
SMALLER = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "MODEL",
    "max_steps=200": "max_steps=4, bf16=False, use_cpu=True, report_to=[], max_length=64, save_strategy='no'",
    'target=["onnx"]': 'target=["onnx"], ptq=["none"], context_length=64',
}


def test_the_programs_of_the_guide_run(
    tiny_model_folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data_folder)
    for name, rows in {"train": CHATS, "eval": CHATS[:4], "pairs": PAIRS}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("sft.py", "dpo.py", "merge.py"):
        code = GUIDE[name]
        for text, smaller in SMALLER.items():
            code = code.replace(text, smaller)
        exec(compile(code.replace("MODEL", str(tiny_model_folder)), name, "exec"), {"__name__": "documentation"})
    assert Run.open(Path("runs/sft")).targets() == ["onnx"]
    assert Run.open(Path("runs/dpo")).adapter.is_dir()
    assert qat_edge.prepare("sft-model", "runs/after").run.path == Path("runs/after")

"""Training in two phases: plain LoRA (or plain fine-tuning of all weights), then the same with fake quantization.

The order of a training, which `qat_edge.verbs.finetune` follows, and the file that does each step:

1. Checks (`option_checks`): refuse combinations of options that exclude each other, before anything is loaded.
2. Setup (`setup`): choose device and precision, load model and data, remove layers (`prune`), choose bits and group
   size of every weight, insert fake quantization (switched off) and adapters.
3. Phase 1 (`trainer`): steps without rounding. `QatTrainer` is the Hugging Face `Trainer` with the learning rates of
   both phases; an encoder is trained on an objective of its own (`objectives`).
4. Start of QAT (`phases`), before the step after the last one of phase 1: save RUN/reference, the FP32 fine-tune that
   everything is compared with; prepare the teacher (`distill`); run the PTQ initialization, which writes RUN/start;
   switch fake quantization on. `TwoPhases` in `trainer` calls it once, or restores its results for a resumed run.
5. Phase 2 (`trainer`): steps with the deployed rounding in the forward pass. The result is saved as RUN/adapter.

Under a launcher, several processes do all of this at once: `distributed` has how they agree, `distributed_trainer` how
they share a batch.
"""

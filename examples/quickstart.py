"""Train a model, export it, verify and validate the files, and generate an answer: the Python API in one file.

    python examples/quickstart.py
    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl --eval-data eval.jsonl

Without arguments it trains SmolLM2-135M-Instruct on generated phone requests, in some ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from qat_edge import export, finetune, generate, load_frozen, validate, verify
from qat_edge.demo_data import assistant
from qat_edge.evaluate.results import Report


def main(arguments: list[str] | None = None) -> None:
    """Run every step."""
    given = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qat_edge").setLevel(logging.INFO)

    run = train(given)
    export_and_verify(run, given.tiny)
    measure(run, given.tiny)

    # The frozen checkpoint is an ordinary model: every artifact reproduces its logits.
    parameters = sum(parameter.numel() for parameter in load_frozen(run).parameters())
    print(f"Frozen checkpoint: {parameters / 1e6:.1f} M parameters")

    answer = generate(
        run, given.prompt, source="executorch", system=assistant.SYSTEM, max_new_tokens=8 if given.tiny else 64
    )
    print(f"{given.prompt} -> {answer}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id, folder or .gguf file")
    parser.add_argument("--data", type=Path, help="training rows; by default generated phone requests")
    parser.add_argument("--eval-data", type=Path, help="rows that are not trained on; required with --data")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="run folder to write")
    parser.add_argument("--prompt", default="Wake me at 7:15 am", help="prompt for the exported model")
    parser.add_argument("--tiny", action="store_true", help="a few steps and tokens, to see that everything works")
    given = parser.parse_args(arguments)
    if given.data is not None and given.eval_data is None:
        parser.error("--data needs --eval-data: rows that are not trained on")
    return given


def train(given: argparse.Namespace) -> Path:
    """Fine-tune on the given rows, or on generated ones, and return the run folder."""
    data, eval_data = given.data, given.eval_data
    if data is None:
        # The generated requests are the same every time; 400 of them are held out.
        data, eval_data = assistant.write(given.out.parent / f"{given.out.name}-data")

    # LoRA first, then the last tenth of the steps with the rounding of the exported model.
    trained = finetune(
        given.model,
        data,
        given.out,
        eval_data=eval_data,
        steps=4 if given.tiny else 100,
        batch_size=2 if given.tiny else 16,
        eval_rows=2 if given.tiny else 64,
        max_length=192,
        track=["none"],
        force=given.out.exists(),
    )
    print(f"Trained {trained.steps} steps in {trained.wall_s:.0f} s, last loss {trained.loss:.3f}")
    return trained.run


def export_and_verify(run: Path, tiny: bool) -> None:
    """Write one .pte for ExecuTorch and compare every code and scale in it with the trained ones."""
    # Round-to-nearest of the same fine-tune is exported too, for comparison.
    ptq = ["none"] if tiny else ["rtn"]
    for artifact in export(run, target=["executorch"], context_length=512, ptq=ptq):
        print(f"Wrote {artifact.folder}, {artifact.size_bytes / 1e6:.1f} MB")

    # Raises ArtifactError if something differs.
    for result in verify(run):
        print(result.describe())


def measure(run: Path, tiny: bool) -> None:
    """Run the artifacts in their own runtime, and print how they compare with the FP32 fine-tune."""
    tokens, prompts, max_new_tokens = (64, 2, 4) if tiny else (1024, 64, 64)
    report = validate(run, tokens=tokens, window=192, prompts=prompts, max_new_tokens=max_new_tokens)[0]
    assert isinstance(report, Report)  # an encoder has a Comparison instead
    for measured in report.measured:
        print(f"{measured.name:<24} {measured.target:<11} perplexity {measured.perplexity:.2f}")


if __name__ == "__main__":
    main()

"""Make or export one synthetic model in a process of its own: `python -m benchmarks.export_step STEP ...`.

make HEADS LAYERS FOLDER     write a Llama of random weights, rounded to nearest, as a frozen checkpoint
measure FOLDER OUT RESULT    export it to OUT, and write time and peak memory of each stage to RESULT
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_edge import progress
from qat_edge.logs import quiet_libraries
from qat_edge.manifest import write_manifest
from qat_edge.storage import write_text
from qat_edge_devices.agent.machine import forget_peak, peak_bytes, resident_bytes

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

HEAD_SIZE, VOCABULARY, GROUP_SIZE, CONTEXT = 64, 49152, 32, 1024
PARTITIONS = "lowering partitions"  # title of the exporter's progress bar


@dataclass(frozen=True)
class Shape:
    """Size of a Llama-like model with SmolLM2's proportions: KV heads 1/3, MLP width 8/3, tied embeddings.

    Attributes:
        heads: query heads of HEAD_SIZE each.
        layers: decoder layers.
    """

    heads: int
    layers: int

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.heads * HEAD_SIZE

    @property
    def parameters(self) -> int:
        """Number of parameters: tied table, projections and norms."""
        width, kv = self.width, self.width // 3
        layer = 2 * width * width + 2 * width * kv + 3 * width * (width * 8 // 3) + 2 * width
        return VOCABULARY * width + self.layers * layer + width

    @property
    def float_bytes(self) -> int:
        """Bytes of the weights in float32."""
        return 4 * self.parameters

    def config(self) -> LlamaConfig:
        """Return the configuration for transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.width, intermediate_size=self.width * 8 // 3,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads // 3,
            max_position_embeddings=2 * CONTEXT, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip


# 135M is the shape of SmolLM2 itself; the models of LAYERS have its width.
SIZES = {
    "50M": Shape(6, 20), "135M": Shape(9, 30), "360M": Shape(15, 32), "680M": Shape(21, 32), "1.0B": Shape(27, 29),
    "1.5B": Shape(33, 29),
}  # fmt: skip
LAYERS = {f"{layers} layers": Shape(9, layers) for layers in (6, 12, 18, 24)} | {"30 layers": SIZES["135M"]}
MODELS = SIZES | LAYERS


def make(shape: Shape, folder: Path) -> None:
    """Write a frozen checkpoint of random weights and a byte tokenizer into an empty folder."""
    import torch
    from transformers import LlamaForCausalLM

    from qat_edge.quant import frozen, scheme

    torch.manual_seed(0)
    model = LlamaForCausalLM(shape.config()).eval()
    rounding = scheme.choose_scheme(model, GROUP_SIZE)
    frozen.freeze(model, rounding)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(rounding))


def measure(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Export a frozen checkpoint into an empty folder.

    Returns:
        seconds and cpu_seconds: elapsed time and CPU time of this process.
        peak_bytes: largest resident memory.
        runtime_bytes: resident memory before anything is loaded.
        file_bytes: size of the .pte.
        stages: name, times and peak memory of each stage.
    """
    from qat_edge_exporters.executorch.export_pte import MODEL, export

    # Importing the exporter loads torch and ExecuTorch: their memory is there before the model is.
    stages = _Stages()
    runtime = resident_bytes()

    with progress.report_to(stages):
        export(checkpoint, out, CONTEXT)
    stages.end()

    return {
        "seconds": sum(stage.seconds for stage in stages.found),
        "cpu_seconds": sum(stage.cpu_seconds for stage in stages.found),
        "peak_bytes": max(stage.peak_bytes for stage in stages.found),
        "runtime_bytes": runtime,
        "file_bytes": (out / MODEL).stat().st_size,
        "stages": [asdict(stage) for stage in stages.found],
    }


@dataclass
class _Stage:
    """Time and peak memory of one stage."""

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


class _Stages(progress.LogReporter):
    """Reporter that measures stages: each message of the exporter starts one, which lasts until the next message."""

    def __init__(self) -> None:
        self.found: list[_Stage] = []
        self._began = time.perf_counter(), time.process_time()

    def info(self, text: str) -> None:
        """End the current stage and start one named `text`."""
        self.end()
        self.found.append(_Stage(text))

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[progress.Bar]:
        """Start one stage for all of a progress bar."""
        self.info(title)
        yield progress.LineBar(title, total, lambda line: None)

    def end(self) -> None:
        """End the current stage: add the time since its start, and its peak memory."""
        now = time.perf_counter(), time.process_time()
        if self.found:
            stage = self.found[-1]
            stage.seconds += now[0] - self._began[0]
            stage.cpu_seconds += now[1] - self._began[1]
            stage.peak_bytes = max(stage.peak_bytes, peak_bytes())
        forget_peak()  # the next stage counts from what is resident now
        self._began = now


def _tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer of 256 bytes and three special tokens: an export copies it and reads its end token."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def main(argv: list[str]) -> None:
    """Run one step; the module describes the arguments."""
    quiet_libraries(verbose=False)
    step, *rest = argv
    if step == "make":
        make(Shape(int(rest[0]), int(rest[1])), Path(rest[2]))
    else:
        write_text(Path(rest[2]), json.dumps(measure(Path(rest[0]), Path(rest[1]))))


if __name__ == "__main__":
    main(sys.argv[1:])

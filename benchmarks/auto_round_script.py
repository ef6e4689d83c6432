"""Quantize a model with AutoRound, in a process of its own: MODEL CALIBRATION BITS OUT.

CALIBRATION has one JSON list of token ids a line, all of equal length. OUT gets float/, a Hugging Face folder with the
rounded weights in float32, and size.json, the bytes of the weights in AutoRound's own format (what it leaves in float
counts as float16).
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 32


def main(source: Path, calibration: Path, bits: int, out: Path) -> None:
    """Quantize linear layers in symmetric groups; embedding and head stay as AutoRound leaves them."""
    rows = [json.loads(line) for line in calibration.read_text(encoding="utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [torch.tensor([row]) for row in rows]
    rounder = AutoRound(
        model, tokenizer, scheme=f"W{bits}A16", group_size=GROUP, sym=True, device_map="cpu", dataset=texts,
        nsamples=len(texts), seqlen=len(rows[0]), enable_torch_compile=False,
    )  # fmt: skip
    rounded, _ = rounder.quantize()
    rounded.save_pretrained(out / "float")
    tokenizer.save_pretrained(out / "float")

    packed = out / "packed"
    rounder.save_quantized(str(packed), format="auto_round")
    tensors = [tensor for path in packed.rglob("*.safetensors") for tensor in load_file(path).values()]
    size = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)
    shutil.rmtree(packed)
    (out / "size.json").write_text(json.dumps({"bytes": size}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

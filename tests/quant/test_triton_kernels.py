"""Run the tests of the Triton kernels where Triton is: in its interpreter, or on a GPU. And compile the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qat_edge.quant import fused, numerics
from qat_edge.quant.codebook import Codebook, codebook_of

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".cache" / "triton"
CODES = codebook_of(4)

needs_triton = pytest.mark.skipif(
    not (TRITON / "triton").is_dir() and not torch.cuda.is_available(),
    reason="no Triton in .cache/triton; tests/quant/install-triton installs it",
)


def run(*arguments: str, interpret: bool) -> str:
    """Run Python with Triton; return its output, and fail with it."""
    path = os.pathsep.join([*filter(None, sys.path), str(TRITON)])
    environment = os.environ | {"PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_kernels_compute_what_the_cpu_computes() -> None:
    flags = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:warnings")
    printed = run(*flags, "tests/quant/triton_cases.py", interpret=not torch.cuda.is_available())
    assert " passed" in printed and "skipped" not in printed


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_here(capability: int, tmp_path: Path) -> None:
    """ptxas takes them; divisions round to nearest, and no number is flushed to zero."""
    program = tmp_path / "compile_kernels.py"
    program.write_text(COMPILE.replace("CAPABILITY", str(capability)).replace("CACHE", str(tmp_path)))
    printed = run(str(program), interpret=False)
    assert printed.splitlines() == ["_round_merged", "_round_and_differentiate", "_round_tokens"]


COMPILE = """
import os
os.environ["TRITON_CACHE_DIR"] = "CACHE"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qat_edge.quant import triton_kernels

weights = {"w": "*bf16", "a": "*fp32", "b": "*fp32", "s": "*fp32", "out": "*bf16"}
sizes = dict.fromkeys(("row_count", "row_length", "group_count", "group_size"), "i32")
constants = {"RANK": 16, "OWN": True, "ROWS": 32, "GROUPS": 4, "WIDTH": 32, "LOW": -8.0, "HIGH": 7.0, "STEP": 1}
for name, types, given in (
    ("_round_merged", weights | {"scaling": "fp32"} | sizes, constants),
    ("_round_and_differentiate", weights | {"grad": "*bf16", "grad_s": "*fp32", "scaling": "fp32"} | sizes, constants),
    ("_round_tokens", {"x": "*bf16", "out": "*bf16", "length": "i32"}, {"WIDTH": 2048}),
):
    kernel = getattr(triton_kernels, name)
    given = given | {"BF16": True}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    values = {(kernel.arg_names.index(argument),): value for argument, value in given.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"] and "div.rn.f32" in ptx and "div.full" not in ptx and ".ftz" not in ptx
    print(name)
"""


def stand_in(weight_error: float) -> SimpleNamespace:
    """Kernels that compute with torch, and are wrong by `weight_error`."""

    def round_merged(
        weight: Tensor, a: Tensor, b: Tensor, scales: Tensor, scaling: float, codes: Codebook, group: int, dtype: object
    ) -> Tensor:
        own = numerics.representable(scales)
        merged = numerics.merge(weight, a, b, scaling)
        return numerics.fake_quantize_weight(merged, codes, group, own) + weight_error

    return SimpleNamespace(
        round_merged=round_merged,
        round_activation=lambda x, dtype: numerics.fake_quantize_activation(x).to(dtype),
    )


def test_kernels_with_other_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    cpu = torch.device("cpu")
    assert fused.fault(stand_in(0.0), cpu) is None  # type: ignore[arg-type]
    wrong = stand_in(1e-3)
    monkeypatch.setitem(sys.modules, "qat_edge.quant.triton_kernels", wrong)
    monkeypatch.setattr("qat_edge.quant.triton_kernels", wrong, raising=False)
    assert fused._checked_kernels.__wrapped__(cpu) is None
    assert "a weight in 4 bits is rounded differently from the CPU" in " ".join(messages)


def test_kernels_that_do_not_compile_are_not_used(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    def fail(x: Tensor, dtype: object) -> Tensor:
        raise RuntimeError("no ptxas here")

    broken = SimpleNamespace(round_activation=fail)
    monkeypatch.setitem(sys.modules, "qat_edge.quant.triton_kernels", broken)
    monkeypatch.setattr("qat_edge.quant.triton_kernels", broken, raising=False)
    assert fused._checked_kernels.__wrapped__(torch.device("cpu")) is None
    assert "RuntimeError: no ptxas here" in " ".join(messages)


def test_torch_computes_on_a_cpu_and_where_scales_are_searched() -> None:
    assert fused.kernels_for(torch.zeros(4, 32), None, CODES) is None
    assert fused.kernels_for(torch.zeros(4, 32), None, codebook_of(2)) is None

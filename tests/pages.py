"""Example data and checks that the tests of report pages share."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import pytest

from qat_edge import config
from qat_edge.evaluate import results
from qat_edge.evaluate.results import Agreement, Budget, FaultTest, Gate, Measurement, Part, Report, Speed, Spread, Step
from qat_edge.manifest import write_manifest
from qat_edge.options import FinetuneOptions
from qat_edge.run import Run
from qat_edge.verbs.report import report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b"
SIZES = {"linears": 53_084_160, "scales": 6_635_520, "embedding": 28_508_160, "head": 28_508_160, "graph": 512_000}

# Unfolds everything and writes the widths of the page and of its tables into the page, where --dump-dom shows them.
MEASURE_WIDTHS = """<script>
document.querySelectorAll("details").forEach(block => { block.open = true; });
const regions = [document.documentElement, ...document.querySelectorAll(".scroll")];
const widths = regions.map(r => [r.getAttribute("aria-label") || "page", r.scrollWidth, r.clientWidth]);
document.body.setAttribute("data-widths", JSON.stringify(widths));
</script>"""


def agreement(kl_nats: float) -> Agreement:
    """Return an agreement in which top-1 falls as KL rises."""
    return Agreement(tokens=2048, kl_nats=kl_nats, top1=1 - kl_nats, sqnr_db=21.7)


def spread(median: float) -> Spread:
    """Return repeats within 3% below and 2% above their median."""
    return Spread(median, median * 0.97, median * 1.02)


def quantized(name: str, target: str, exact_match: float, kl_nats: float, decode: float) -> Measurement:
    """Return a quantized model with every metric set."""
    return Measurement(
        name=name,
        target=target,
        runtime=f"{target} 1.0",
        # ONNX stores one table for embedding and head.
        size_bytes=SIZES if target == "executorch" else {**SIZES, "head": 0},
        perplexity=18 + 10 * kl_nats,
        agreement=agreement(kl_nats),
        parity=agreement(0.0221),
        exact_match=exact_match,
        prompts=64,
        same_answers=exact_match - 0.125,
        first_divergence=11.5,
        load_ms=402.5,
        speed=Speed(2, 128, 64, 5, spread(decode * 6.5), spread(decode), spread(124.25)),
        memory_bytes=344_000_000,
        runtime_bytes=104_000_000,
    )


def example() -> Report:
    """Return a report of both float models, and of RTN and QAT on two targets."""
    float_bytes = {"float": 538_060_032}
    return Report(
        created="2026-01-02 03:04",
        device="local",
        machine={"cpu": "x86", "memory_bytes": 16_400_000_000},
        options={"tokens": 2048, "max_kl": 0.1},
        tokens=2048,
        noise_floor=agreement(0.0233),
        measured=[
            Measurement("fp32 base", "torch", "torch 2.13", float_bytes, 21.9, agreement(0.9), None, 0.0156, 64),
            Measurement("fp32 fine-tuned", "torch", "torch 2.13", float_bytes, 17.3, None, None, 0.8594, 64),
            quantized("ptq (round-to-nearest)", "executorch", 0.5469, 0.412, 164.2),
            quantized("ptq (round-to-nearest)", "onnx", 0.5313, 0.409, 118.9),
            quantized("qat", "executorch", 0.8438, 0.0672, 165.0),
            replace(quantized("qat", "onnx", 0.8281, 0.0668, 120.4), notes=("int8 activations on x86",)),
        ],
        gates=[
            Gate("--max-kl", 0.1, "qat executorch", 0.0672, True),
            Gate("--min-exact-match", 0.9, "qat onnx", 0.8281, False),
        ],
    )


def budget(target: str) -> Budget:
    """Return an error budget in which the checkpoint equals the model in training, bit for bit."""
    states = [  # name, perplexity, KL to the fine-tune, KL to the step before
        ("FP32 base", 21.9, 0.9, None),
        ("FP32 fine-tuned", 17.3, None, 0.9),
        ("trained forward, fake-quantized", 18.1, 0.065, 0.065),
        ("frozen checkpoint", 18.1, 0.065, 0.0),
        ("inputs rounded per block, as ONNX Runtime does on x86", 17.9, 0.061, 0.018),
        ("artifact on this machine", 18.0, 0.063, 0.021),
        ("artifact on the device", 18.05, 0.0631, 0.0221),
    ]
    steps = []
    for name, perplexity, kl, change in states:
        # Only ONNX Runtime rounds inputs per block.
        if "block" in name and target != "onnx":
            continue
        # No SQNR, as if the logits were equal: with a KL of 0 the page shows "equal".
        change_agreement = None if change is None else replace(agreement(change), sqnr_db=None)
        steps.append(Step(name, perplexity, kl and agreement(kl), change_agreement))

    parts = [Part(name, 17.4 + kl, agreement(kl)) for name, kl in (("weights", 0.021), ("activations", 0.052))]
    # The ExecuTorch artifact has a fault, the ONNX artifact has none.
    where = "The file is not what was frozen: lm_head" if target == "executorch" else ""
    judged = FaultTest(bool(where), 0.98 if where else 0.52, 0 if where else None, where)
    return Budget(target, judged, "", steps, parts, [agreement(0.0233), agreement(0.0219)], [0.004, -0.006])


def curve(steps: int, start: int) -> list[dict[str, Any]]:
    """Return the loss curve of training.json. start: last step of the LoRA phase."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        phase = "lora" if step <= start else "qat"
        rows.append({"step": step, "loss": 3 * math.exp(-step / 10) + 0.1, "learning_rate": 1e-3, "phase": phase})
        if step in (start, steps):
            rows.append({"step": step, "eval_loss": 0.25, "phase": phase})
    return rows


def make_run(folder: Path, *reports: Report, whole: bool = True, target: str = "onnx") -> Run:
    """Write a run folder with reports.

    Args:
        folder: The run folder, which exists.
        reports: The reports.
        whole: Whether to write the training log and the manifests too.
        target: Target of the exported artifacts.
    """
    run = Run(folder)
    config.save(run.config, "finetune", FinetuneOptions(model="org/tiny-model", data="rows.jsonl"))
    for index, one in enumerate(reports):
        results.save(one, run.reports / f"{index}.json")
    if not whole:
        return run

    # The training log, the frozen checkpoint's manifest, and an artifact of QAT and of RTN.
    log = {"run": str(folder), "steps": 40, "qat_start_step": 20, "wall_s": 542.1, "truncated_rows": 3}
    log |= {"peak_memory_bytes": 2_310_000_000, "device": "CPU (2 threads)", "curve": curve(40, 20)}
    (folder / "training.json").write_text(json.dumps(log))
    run.quantized.mkdir()
    identity = {"kind": "hub", "name": "org/tiny-model"}
    write_manifest(run.quantized, "quantized", model={"source": "x", "identity": identity}, seed=0)
    for variant in (run, run.ptq("rtn")):
        artifact = variant.exports / target
        artifact.mkdir(parents=True)
        (artifact / f"model.{target}").write_bytes(b"x")
        write_manifest(artifact, "export", target=target, options={"context_length": 256}, wall_s=3.5)
    return run


def write(run: Run) -> str:
    """Write the report of a run and return its HTML."""
    return report([run]).read_text(encoding="utf-8")


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: Each tag with its attributes.
        words: All visible text.
        data: Value and text of each <data> element.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.data: list[tuple[float, str]] = []
        self._value: float | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "data" and (value := dict(attrs).get("value")) is not None:
            self._value = float(value)

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._value is not None:
            self.data.append((self._value, data))
            self._value = None


def numbers_in(document: Any) -> set[float]:
    """Return every number in a JSON value."""
    if isinstance(document, dict):
        return set().union(*map(numbers_in, document.values())) if document else set()
    if isinstance(document, list):
        return set().union(*map(numbers_in, document)) if document else set()
    return {float(document)} if isinstance(document, int | float) and not isinstance(document, bool) else set()


def svgs(html: str) -> list[ET.Element]:
    """Return every chart of a page."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def check_self_contained(page: str) -> None:
    """Check that nothing in the page is loaded from elsewhere or executed."""
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        # Images inside the page are allowed: "data:" loads nothing.
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < 300_000


def check_renders(page: Path, width: int, dark: bool = False) -> Path:
    """Check that a browser shows the page without an error; return a picture of it."""
    picture = page.with_name("page.png")
    dark_mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = run_browser(page, width, [*dark_mode, f"--screenshot={picture}"])
    assert "CONSOLE" not in done.stderr
    assert len(picture.read_bytes()) > 20_000
    return picture


class RegionWidth(NamedTuple):
    """Widths of the page or of one table, in CSS pixels. content: the width it needs; visible: the width it has."""

    name: str
    content: int
    visible: int


def region_widths(page: Path, width: int) -> list[RegionWidth]:
    """Return the widths of the page and of each table, unfolded, in a window of `width` pixels.

    A copy of the page measures itself: the page itself forbids scripts.
    """
    html = page.read_text(encoding="utf-8")
    copy = page.with_name("measured.html")
    without_policy = re.sub(r"<meta http-equiv=\"Content-Security-Policy\".*?>", "", html)
    copy.write_text(without_policy.replace("</body>", f"{MEASURE_WIDTHS}</body>"), encoding="utf-8")

    done = run_browser(copy, width, ["--dump-dom"])
    (body,) = (attributes for tag, attributes in Page(done.stdout).tags if tag == "body")
    return [RegionWidth(*region) for region in json.loads(body["data-widths"] or "")]


def check_fits(page: Path, width: int) -> None:
    """Check that neither the page nor a table on it scrolls sideways in a window of `width` pixels."""
    regions = region_widths(page, width)
    assert regions[0].visible == width
    too_wide = [region for region in regions if region.content > region.visible]
    assert not too_wide, too_wide


def run_browser(page: Path, width: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium; the test is skipped if it is not installed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={page.with_name('profile')}", f"--window-size={width},2000", *arguments, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done

"""The page of docs/guides/browser.md chats with a tiny model in headless Chromium."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import make_tokenizer
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding
from qat_edge.evaluate import reference
from qat_edge_devices import chromium
from qat_edge_devices.page_server import PageEnd, PageServer
from qat_edge_exporters.targets import target_named
from tests.devices.browser_fixtures import chromium_or_skip, npm_package
from tests.docs.doc_pages import DOCS, code_blocks
from tests.exporters.tiny import freeze, llama

GUIDE = DOCS / "guides" / "browser.md"
NEW_TOKENS = 12
CONTEXT = 256
MESSAGES = ("hello", "and again")
TRANSFORMERS = (
    "@huggingface/transformers@4.3.2",
    "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
)
ONNXRUNTIME = (  # that this version of transformers.js depends on
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0",
    "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
)
# Sends the messages as a reader would, and reports the text of the page or its first error.
READER = """
<script type="module">
const post = (body) => fetch("_exit", { method: "POST", body: JSON.stringify(body) });
const end = (code, message) => post({ code, message: String(message) });
addEventListener("error", (event) => end(1, event.message));
addEventListener("unhandledrejection", (event) => end(1, event.reason?.stack ?? event.reason));
const button = document.querySelector("button");
const ready = async () => { while (button.disabled) await new Promise((resolve) => setTimeout(resolve, 50)); };
for (const message of MESSAGES) {
  await ready();
  document.querySelector("input").value = message;
  button.click();
}
await ready();
end(0, document.querySelector("#log").textContent);
</script>
"""


def letters_only(model: Any) -> None:
    """Let the head prefer lower-case letters, so that answers are text."""
    letters = make_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz"))
    chosen = torch.zeros(model.lm_head.weight.shape[0], 1)
    chosen[letters] = 1
    with torch.no_grad():
        model.lm_head.weight.mul_(chosen)


def expected_log(frozen: Path) -> str:
    """Return the text of the page if it computes the frozen weights, with inputs that are not rounded."""
    tokenizer = AutoTokenizer.from_pretrained(frozen)
    model, names = reference.load_dequantized(frozen)
    messages: list[dict[str, str]] = []
    log = ""
    for content in MESSAGES:
        messages.append({"role": "user", "content": content})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = list(prompt)
        with torch.no_grad(), emulate_rounding(model, names, Rounding(unrounded=tuple(names))):
            for _ in range(NEW_TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answer = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        log += f"\n> {content}\n{answer}"
    return log


@pytest.mark.browser
def test_the_page_answers_as_the_frozen_weights_do(tmp_path: Path) -> None:
    program = chromium_or_skip()
    config = llama(tie_word_embeddings=False, max_position_embeddings=CONTEXT)
    freeze(config, 32, tmp_path / "frozen", adjust=letters_only)

    # The folder that the guide's commands make.
    site = tmp_path / "site"
    (site / "model").mkdir(parents=True)
    target_named("onnx").export(tmp_path / "frozen", site / "model", CONTEXT)
    shutil.copy(tmp_path / "frozen" / "config.json", site / "model")
    npm_package(*TRANSFORMERS, site / "unpacked")
    npm_package(*ONNXRUNTIME, site / "runtime")
    for name, target in (("unpacked", "@huggingface/transformers"), ("runtime", "onnxruntime-web")):
        (site / "node_modules" / target).parent.mkdir(parents=True, exist_ok=True)
        (site / name / "package").rename(site / "node_modules" / target)

    (page,) = [block.code for block in code_blocks("html") if block.page == GUIDE]
    assert page.count("max_new_tokens: 256") == 1
    shorter = page.replace("max_new_tokens: 256", f"max_new_tokens: {NEW_TOKENS}")
    (site / "index.html").write_text(shorter + READER.replace("MESSAGES", str(list(MESSAGES))), encoding="utf-8")

    server = PageServer(site, lambda forget: {})
    profiles = tempfile.TemporaryDirectory(prefix="qat-edge-")  # Chromium's socket needs a short path
    with profiles as profile, tempfile.TemporaryFile() as stderr, server.serving():
        url = f"{server.url}index.html"
        with chromium.started("browser", program, url, Path(profile), ("--disable-gpu",), stderr):
            try:
                end = server.events.get(timeout=150)
            except Empty:
                stderr.seek(0)
                pytest.fail(f"the page did not answer: {stderr.read().decode(errors='replace')}")
    assert end == PageEnd(0, expected_log(tmp_path / "frozen"))

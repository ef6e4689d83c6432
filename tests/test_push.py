"""push: the model card, and one commit to a local stand-in of the Hub with everything in it, or nothing."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import constants

from qat_edge.cli import commands
from qat_edge.errors import HubError, RunError, UsageError
from qat_edge.manifest import MANIFEST, sha256, write_manifest
from qat_edge.options import PushOptions
from qat_edge.report import model_card
from qat_edge.run import Run
from qat_edge.verbs.push import push
from tests.docs.doc_pages import code_blocks
from tests.pages import example, make_run

REPO = "someone/tiny-int4"
LARGE = 5_000_000  # bytes: the stand-in takes larger files as LFS objects


class Handler(BaseHTTPRequestHandler):
    """The parts of the Hub's HTTP interface that an upload uses."""

    server: HubStandIn

    def do_HEAD(self) -> None:
        self.answer(200, {})

    def do_GET(self) -> None:
        repo = self.server.files.get("/".join(self.path.partition("?")[0].split("/")[3:5]))
        if repo is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in repo])
        else:
            self.answer(200, {"id": REPO, "siblings": [{"rfilename": name} for name in repo]})

    def do_PUT(self) -> None:
        self.server.lfs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, {})

    def do_POST(self) -> None:
        body, url = self.body(), self.server.url
        part = next((name for name in self.server.refused if name in self.path), None)
        if part is not None:
            self.answer(self.server.refused[part], {"error": f"no right to {part}"})
        elif self.path == "/api/repos/create":
            self.server.files[REPO] = {}
            self.server.private = json.loads(body).get("visibility") == "private"
            self.answer(200, {"url": f"{url}/{REPO}"})
        elif "/preupload/" in self.path:
            self.answer(200, {"files": [upload_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            given = [{**one, "actions": {"upload": {"href": f"{url}/lfs/{one['oid']}"}}} for one in objects]
            self.answer(200, {"transfer": "basic", "objects": given})
        elif "/commit/" in self.path:
            self.server.commit(body)
            self.answer(200, {"commitUrl": f"{url}/{REPO}/commit/1", "commitOid": "1" * 40})
        else:  # checks of the card's metadata
            self.answer(200, {"errors": [], "warnings": []})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, each in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, each)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *given: object) -> None:
        pass


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["size"] > LARGE else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


class HubStandIn(ThreadingHTTPServer):
    """A Hub on this machine.

    Attributes:
        url: Its address.
        files: Files of each repository.
        private: Whether the repository that was created is private.
        lfs: Objects by sha256.
        refused: Status by a part of a path, for requests that fail.
        commits: Number of commits.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: bool | None = None
        self.lfs: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        self.commits = 0

    def commit(self, body: bytes) -> None:
        self.commits += 1
        repo = self.files[REPO]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo[value["path"]] = self.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo[value["path"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    found = HubStandIn()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Large files as LFS objects: nothing stands in for the storage behind Xet.
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose ONNX folder was exported, verified and measured."""
    made = make_run(tmp_path, example())
    folder = made.exports / "onnx"
    (folder / "model.onnx.data").write_bytes(b"w" * (LARGE + 1))
    rewrite_manifest(made)
    return made


def rewrite_manifest(run: Run) -> None:
    folder = run.exports / "onnx"
    options = {"context_length": 256}
    write_manifest(
        folder, "export", target="onnx", options=options, wall_s=3.5, quantized_sha256=sha256(run.quantized / MANIFEST)
    )
    row: dict[str, Any] = {
        "folder": "exports/onnx", "manifest_sha256": sha256(folder / MANIFEST), "faults": [], "linears": 210,
        "linears_equal": 210, "embedding_equal": True, "head_equal": True, "floats": 62, "floats_equal": 62,
        "parity_line": "parity -35 dB (noise floor -35 dB)",
    }  # fmt: skip
    run.verified.write_text(json.dumps([row]))


def test_everything_arrives_in_one_commit(hub: HubStandIn, run: Run) -> None:
    hub.files[REPO] = {"onnx/old.data": b"old", "notes.txt": b"kept", "README.md": b"old"}
    pushed = push(run, REPO, PushOptions())
    assert pushed.url == f"{hub.url}/{REPO}/commit/1" and hub.commits == 1
    there = hub.files[REPO]
    names = {path.relative_to(run.exports).as_posix() for path in (run.exports / "onnx").rglob("*") if path.is_file()}
    assert set(there) == {*names, "README.md", "notes.txt"}, "a file of the earlier artifact is gone"
    assert all(there[name] == (run.exports / name).read_bytes() for name in names)
    assert hub.lfs, "the large file went as an LFS object"
    assert there["README.md"] == (run.path / "model-card.md").read_bytes()


def test_a_new_repository_is_private_if_asked(hub: HubStandIn, run: Run) -> None:
    push(run, REPO, PushOptions(private=True))
    assert hub.private is True


def test_the_card_has_the_figures_of_verify_and_validate(run: Run) -> None:
    pushed = push(run, REPO, PushOptions(dry_run=True))
    card = pushed.card.read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["base_model"] == "org/tiny-model" and metadata["base_model_relation"] == "quantized"
    assert metadata["pipeline_tag"] == "text-generation" and "onnx" in metadata["tags"]
    assert body.startswith("\n# tiny-int4\n")
    assert "`onnx/`: 210 of 210 linear layers, 62 of 62 norms and biases equal; parity -35 dB" in body
    assert sha256(run.exports / "onnx" / "model.onnx.data") in body
    (row,) = [line for line in body.splitlines() if line.startswith("| QAT · ONNX")]
    measured = next(one for one in example().measured if one.name == "qat" and one.target == "onnx")
    assert measured.agreement is not None and f" {measured.agreement.kl_nats:.3g} " in row
    assert f"hf download {REPO} --local-dir model" in body and 'og.Model("model/onnx")' in body
    # Nothing of this machine's paths, of PTQ, or of artifacts that are not in the repository.
    assert (
        str(run.path) not in card
        and "GPTQ" not in card
        and "| QAT · .pte" not in card
        and "round-to-nearest" not in card
    )
    assert pushed.url == ""


def test_names_from_files_cannot_write_markdown(run: Run) -> None:
    manifest = json.loads((run.quantized / MANIFEST).read_text())
    manifest["model"] = {"source": "x", "identity": {"kind": "local", "name": "a](b) <i>|"}}
    (run.quantized / MANIFEST).write_text(json.dumps(manifest))
    rewrite_manifest(run)
    card = push(run, REPO, PushOptions(dry_run=True)).card.read_text()
    assert r"a\](b) \<i\>\|" in card and "base_model" not in card


@pytest.mark.parametrize("title", ["ExecuTorch", "ONNX in onnxruntime-genai", "GGUF in llama.cpp"])
def test_programs_of_the_card_are_those_of_the_guide(title: str) -> None:
    (block,) = [each for each in code_blocks("python") if each.title == title]
    programs = [program for _, program in model_card.PROGRAMS.values()]
    targets = {target: f"runs/mine/exports/{target}" for target in model_card.PROGRAMS}
    written = [p.replace("FOLDER", targets[name]) for name, p in zip(model_card.PROGRAMS, programs, strict=True)]
    assert block.code.strip() in [one.strip() for one in written]


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["tiny", "a/b/c", "some one/x", ""])
def test_a_repository_without_a_valid_name_is_refused(repo_id: str, run: Run) -> None:
    with pytest.raises(UsageError, match="--repo-id"):
        push(run, repo_id, PushOptions(dry_run=True))


def test_only_what_was_verified_is_uploaded(hub: HubStandIn, run: Run) -> None:
    with pytest.raises(RunError, match=r"executorch exported\. Run `qat-edge export \S+ --target executorch`"):
        push(run, REPO, PushOptions(target=("executorch",)))
    run.verified.unlink()
    with pytest.raises(RunError, match=r"onnx: not verified since it was exported\. Run `qat-edge verify"):
        push(run, REPO, PushOptions())
    rewrite_manifest(run)
    (run.exports / "onnx" / "model.onnx.data").write_bytes(b"x" * (LARGE + 1))
    with pytest.raises(RunError, match=r"model\.onnx\.data: changed"):
        push(run, REPO, PushOptions())
    assert hub.files == {} and hub.commits == 0


def test_a_run_that_was_not_validated_has_no_card(run: Run) -> None:
    for path in run.reports.glob("*.json"):
        path.unlink()
    with pytest.raises(RunError, match="Run `qat-edge validate"):
        push(run, REPO, PushOptions(dry_run=True))
    assert not (run.path / "model-card.md").exists()


@pytest.mark.parametrize(
    ("part", "status", "advice"),
    [
        ("create", 403, "may not write there"),
        ("create", 401, "The token is not valid"),
        ("preupload", 403, "may not write there"),
        ("commit", 500, "Try again"),
    ],
)
def test_a_refusal_uploads_nothing_and_says_what_to_do(
    part: str, status: int, advice: str, hub: HubStandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refused[part] = status
    with pytest.raises(HubError, match=f"{REPO}: nothing was uploaded") as raised:
        push(run, REPO, PushOptions())
    assert advice in str(raised.value) and hub.commits == 0
    assert (f"The repository {REPO} was created" in str(raised.value)) is (part != "create")


def test_without_a_token_or_a_network_nothing_is_tried(
    hub: HubStandIn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="the Hub cannot be reached"):
        push(run, REPO, PushOptions())
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"No token for \S+\. Run `hf auth login`, or set HF_TOKEN"):
        push(run, REPO, PushOptions())
    assert hub.files == {}


def test_the_command_prints_where_the_commit_is(hub: HubStandIn, run: Run) -> None:
    done = CliRunner().invoke(commands.main, ["push", str(run.path), "--repo-id", REPO, "--json"])
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/{REPO}/commit/1" in done.output
    with contextlib.suppress(ValueError):
        assert json.loads(done.stdout)["url"] == f"{hub.url}/{REPO}/commit/1"

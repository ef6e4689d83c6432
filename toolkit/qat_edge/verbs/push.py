"""Upload artifacts to the Hugging Face Hub with a model card of what `verify` found and `validate` measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qat_edge import progress
from qat_edge.errors import RunError
from qat_edge.export_command import export_targets
from qat_edge.manifest import MANIFEST, check_files
from qat_edge.models import hub_upload
from qat_edge.options import PushOptions
from qat_edge.report.collect import RunResults, collect
from qat_edge.report.formatting import megabytes
from qat_edge.report.model_card import CardArtifact, render_card
from qat_edge.run import Run
from qat_edge.storage import write_text

CARD = "model-card.md"  # in the run folder; README.md in the repository


@dataclass(frozen=True)
class Pushed:
    """Files of a commit.

    Attributes:
        url: of the commit; empty with --dry-run.
        card: the model card in the run folder.
        size_bytes: by path in the repository.
    """

    url: str
    card: Path
    size_bytes: dict[str, int]


def push(run: Run, repo_id: str, options: PushOptions) -> Pushed:
    """Write the model card, and upload it with the artifacts in one commit.

    Args:
        run: with verified and validated artifacts.
        repo_id: repository, as NAME/MODEL.
        options: what it gets.

    Raises:
        UsageError: the repository has no valid name.
        RunError: an artifact is missing, has changed, or was not verified since its export; or the run was not
            validated since.
        HubError: the upload failed; nothing of it is in the repository then.
    """
    hub_upload.check_repo_id(repo_id)
    targets = options.target or tuple(run.targets())
    missing = [target for target in targets if target not in run.targets()]
    if missing or not targets:
        raise RunError(
            f"{run.exports}: {', '.join(missing) or 'nothing'} exported. Run `{export_targets(run.path, missing)}`."
        )
    results = collect(run)
    if results.outdated:
        raise RunError(f"{run.path}: {next(iter(results.outdated.values())).replace('RUN', str(run.path))}")
    artifacts = [_artifact(run, target, results) for target in targets]

    # The card stays in the run folder too, to be read before it is public.
    card = run.path / CARD
    write_text(card, render_card(results, artifacts, repo_id))
    files = {
        f"{artifact.target}/{name}": run.exports / artifact.target / name
        for artifact in artifacts
        for name in (*artifact.manifest["files"], MANIFEST)
    }
    files["README.md"] = card
    sizes = {name: path.stat().st_size for name, path in files.items()}
    progress.info(f"{repo_id}: {len(files)} files, {megabytes(sum(sizes.values()))} MB; card in {card}")
    if options.dry_run:
        return Pushed("", card, sizes)
    message = f"Upload {', '.join(targets)} with qat-edge"
    return Pushed(hub_upload.upload(repo_id, files, options.private, message), card, sizes)


def _artifact(run: Run, target: str, results: RunResults) -> CardArtifact:
    """Return an artifact that is as it was exported, verified and measured.

    Raises:
        RunError: it is not.
    """
    run.require_current(target)
    folder = run.exports / target
    manifest = check_files(folder)
    name = folder.relative_to(run.path).as_posix()
    row = next((row for row in results.verified if row["folder"] == name), None)
    if row is None:
        raise RunError(f"{folder}: not verified since it was exported. Run `qat-edge verify {run.path}`.")
    if row["faults"]:
        raise RunError(f"{folder}: `qat-edge verify` found that it differs ({row['faults'][0]}). Export it again.")
    return CardArtifact(target, manifest, row)

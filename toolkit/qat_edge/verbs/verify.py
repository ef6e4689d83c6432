"""Compare every artifact with its frozen checkpoint: what its files hold, and what it computes.

read   codes and scales of every matrix, norms, biases and other float constants, and the matrices of an unmerged
       adapter, bit for bit. The target's reader unpacks the file (`Target.read`), and this module compares what it
       found with `quant.frozen`'s tensors.
files  every file with the manifest, the tokenizer with the checkpoint's, end tokens with training and chat template
run    the artifact in its own runtime on a few prompts, with the frozen checkpoint in torch (`diagnose.parity`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qat_edge import progress
from qat_edge.data import conversation
from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError, RunError
from qat_edge.evaluate.results import Parity
from qat_edge.export_command import export_targets
from qat_edge.manifest import MANIFEST, check_files, file_faults, read_manifest, sha256
from qat_edge.models import tokenizer
from qat_edge.models.artifact_options import options_of_artifact
from qat_edge.quant import frozen
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.scheme import Scheme
from qat_edge.readers import counted
from qat_edge.run import Run, Variant
from qat_edge.run_lock import writes_run
from qat_edge.storage import write_text
from qat_edge.verbs.exported_schema import schema_faults
from qat_edge_exporters.artifact import Artifact, ArtifactAdapter, ArtifactWeight, FloatConstant
from qat_edge_exporters.targets import Target, require_known, target_named, unmerged_adapter

NOT_RUN = Parity(not_measured="The artifact was only read.")
# Rotary tables of the ONNX builder for models that pair neighbouring channels: nothing here computes those.
NOT_COMPUTED = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class Verified:
    """Result of comparing one artifact with its checkpoint.

    Attributes:
        folder: the artifact's.
        target: its name.
        linears: number of quantized linear layers in the checkpoint.
        linears_equal: how many of them are equal in every code and scale.
        embedding_equal: whether all embeddings are.
        head_equal: whether the output head is; None for a model without one.
        faults: one sentence for each difference; empty where the artifact equals the checkpoint.
        floats: number of norms, biases and other float tensors in the checkpoint; None where the artifact stores
            them in a form that cannot be compared.
        floats_equal: how many of them are equal, bit for bit.
        parity: what it computes, compared with the checkpoint.
        adapter: number of matrices in the checkpoint's unmerged adapter.
        adapter_equal: how many of them are equal, bit for bit; None where the artifact stores them in a form that
            cannot be compared.
        is_readable: its files could be read; all other figures are those of nothing otherwise.
    """

    folder: Path
    target: str
    linears: int
    linears_equal: int
    embedding_equal: bool
    head_equal: bool | None
    faults: list[str]
    floats: int | None = None
    floats_equal: int = 0
    parity: Parity = NOT_RUN
    adapter: int = 0
    adapter_equal: int | None = 0
    is_readable: bool = True

    def describe(self) -> str:
        """Return the line that `qat-edge verify` prints."""
        if not self.is_readable:
            return f"{self.folder}: cannot be read, so that nothing was compared"
        rest = [f"{name} {'equal' if equal else 'DIFFERS'}" for name, equal in self._tables()]
        rest += [self._floats(), *self._adapter()]
        linears = f"{self.linears_equal} of {self.linears} linear layers equal"
        return f"{self.folder}: {', '.join([linears, *rest])}; {self.parity.describe()}"

    def _tables(self) -> list[tuple[str, bool]]:
        head = [] if self.head_equal is None else [("head", self.head_equal)]
        return [("embedding", self.embedding_equal), *head]

    def _floats(self) -> str:
        if self.floats is None:
            return "norms and biases not compared (stored in a layout of its backend)"
        return f"{self.floats_equal} of {self.floats} norms and biases equal"

    def _adapter(self) -> list[str]:
        if not self.adapter:
            return []
        if self.adapter_equal is None:
            return ["adapter not compared (stored in a layout of its backend)"]
        return [f"adapter: {self.adapter_equal} of {self.adapter} matrices equal"]


@writes_run("verify")
def verify(run: Run, targets: Sequence[str]) -> list[Verified]:
    """Compare the run's artifacts, and those of its PTQ variants, with their checkpoints.

    Writes the results to RUN/verified.json, which the report shows, in place of earlier ones.

    Args:
        run: a run with exports.
        targets: names of targets to compare; all that were exported where empty.

    Returns:
        One result for each artifact. `require_equal` raises what they found.

    Raises:
        RunError: nothing was exported, a named target was not, or a checkpoint is not as it was written.
    """
    # A target is found if any variant has it.
    found = [(v, t) for v in run.variants() for t in _artifacts(v) if not targets or t in targets]
    for variant, target in found:
        require_known(variant.exports / target)
    missing = set(targets) - {t for _, t in found}
    if missing or not found:
        what = f"{', '.join(sorted(missing))} not exported yet" if missing else "nothing exported yet"
        raise RunError(f"{run.exports}: {what}. Run `{export_targets(run.path, sorted(missing))}`.")

    # Everything is compared with the checkpoints, so they are checked first.
    references = {}
    for path in dict.fromkeys(variant.quantized for variant, _ in found):
        check_files(path)
        references[path] = FrozenReference(path)

    # What an earlier one found must not stand as the result of a command that fails.
    run.verified.unlink(missing_ok=True)
    results = []
    for variant, target in found:
        progress.info(f"Reading and running {variant.exports / target}")
        try:
            results.append(_verify_artifact(run, variant, target, references[variant.quantized]))
        except (ArtifactError, RunError) as error:  # of its files or its manifest; the others are compared all the same
            results.append(_unreadable(variant, target, error))
        if results[-1].parity.not_measured:
            progress.warn(f"{results[-1].folder} was not run: {results[-1].parity.not_measured}")
    write_text(run.verified, json.dumps([_record(run, result) for result in results], indent=1) + "\n")
    return results


def _artifacts(variant: Variant) -> list[str]:
    """Return the names of a variant's artifacts, those without a manifest among them, sorted."""
    return sorted([*variant.targets(), *(folder.name for folder in variant.damaged_exports())])


def _record(run: Run, result: Verified) -> dict[str, Any]:
    """Return one artifact's entry in verified.json; the manifest's hash identifies the export, "" where it has none."""
    entry = dataclasses.asdict(result) | {"folder": result.folder.relative_to(run.path).as_posix()}
    manifest = result.folder / MANIFEST
    return entry | {
        "parity_line": result.parity.describe(),
        "manifest_sha256": sha256(manifest) if manifest.is_file() else "",
    }


def _verify_artifact(run: Run, variant: Variant, target: str, reference: FrozenReference) -> Verified:
    """Read one artifact back and run it."""
    folder = variant.exports / target
    options = options_of_artifact(folder)
    result = verify_folder(folder, target, variant.quantized)
    schema = schema_faults(run, folder, target_named(target))
    result = dataclasses.replace(result, faults=[*result.faults, *schema])

    reason = parity.not_comparable(variant.quantized)
    if reason:
        return dataclasses.replace(result, parity=Parity(not_measured=reason))
    measured = parity.measure(folder, target, reference, options.context_length, options.int8_cache)
    faults = [f"It does not compute the frozen checkpoint. {measured.fault}"] if measured.fault else []
    return dataclasses.replace(result, parity=measured, faults=[*result.faults, *faults])


def _unreadable(variant: Variant, target: str, error: ArtifactError | RunError) -> Verified:
    """Return the result of an artifact that cannot be read: nothing in it is equal."""
    scheme = frozen.read_scheme(variant.quantized)
    return Verified(
        folder=variant.exports / target,
        target=target,
        linears=len(scheme.linears),
        linears_equal=0,
        embedding_equal=False,
        head_equal=False if scheme.heads else None,
        faults=[f"It cannot be read. {error}"],
        parity=Parity(not_measured="Its files cannot be read."),
        is_readable=False,
    )


def verify_folder(folder: Path, target: str, quantized: Path) -> Verified:
    """Compare the files of the artifact in `folder` with the frozen checkpoint in `quantized`; nothing is run."""
    scheme, expected = frozen.read_scheme(quantized), frozen.read_weights(quantized)
    record = target_named(target)
    artifact = record.read(folder)
    computed = list(record.computed_constants(quantized, artifact))

    # Every matrix of the scheme has to be in the artifact, equal in bits, codes and scales, or as floats in its place.
    differing = {name: _difference(name, expected[name], artifact.weights.get(name)) for name in scheme.weights}
    in_place = _compare_replacements(computed, artifact)
    differing |= {name: text for name, text in in_place.items() if name in differing}
    adapter = _compare_adapter(quantized, record, artifact)
    floats = _compare_floats(quantized, record, artifact, computed, in_place, adapter.matrices.values())

    # Beyond the tensors: what the reader itself found wrong, extra matrices, other files.
    faults = [*artifact.faults, *(text for text in differing.values() if text), *floats.faults, *adapter.faults]
    faults += _unexpected(scheme, artifact)
    # The end tokens mean nothing with another tokenizer.
    copied = [name for name in record.copied if (quantized / name).is_file()]
    faults += _copy_faults(folder, quantized, copied, f"not the file of {quantized}")
    faults += record.setting_faults(folder, quantized)
    faults += _tokenizer_faults(folder, quantized) or _conversation_faults(folder, quantized, artifact.end_tokens)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        faults += [f"{fault}." for fault in file_faults(folder, manifest, "exported")]
        if manifest.get("conversation") != read_manifest(quantized).get("conversation"):
            faults.append(f"{MANIFEST}: its 'conversation', which prompts are written with, is not the checkpoint's.")

    return Verified(
        folder=folder,
        target=target,
        linears=len(scheme.linears),
        linears_equal=sum(not differing[name] for name in scheme.linears),
        embedding_equal=not any(differing[name] for name in scheme.embeddings),
        head_equal=not any(differing[name] for name in scheme.heads) if scheme.heads else None,
        faults=faults,
        floats=floats.total,
        floats_equal=floats.equal,
        adapter=len(adapter.matrices),
        adapter_equal=adapter.equal,
    )


def conclusion(results: Sequence[Verified]) -> str:
    """Return what equal artifacts are known to be, as a phrase: those that were only read may compute anything."""
    unrun = sorted({result.target for result in results if result.parity.not_measured})
    if not unrun:
        return f"Verified {counted(len(results), 'artifact')}: equal to the frozen checkpoint"
    return (
        f"Verified {counted(len(results), 'artifact')}: the files hold what was frozen, but what {', '.join(unrun)} "
        "computes was NOT measured"
    )


def require_equal(results: Sequence[Verified]) -> None:
    """Raise the faults that `verify` found as one error.

    Raises:
        ArtifactError: an artifact differs from its checkpoint.
    """
    faults = [f"{result.folder}: {fault}" for result in results for fault in result.faults]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:20])
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(
            f"{counted(len(faults), 'fault')} found; export again, or restore the files:\n{shown}{more}"
        )


def _difference(name: str, expected: FrozenWeight, found: ArtifactWeight | None) -> str:
    """Return how one matrix differs, as a sentence; empty where it is equal."""
    if found is None:
        return f"{name}: not in the artifact"
    codes, scales = expected.codes.numpy(), expected.scales.float().numpy()
    if found.bits != expected.bits or found.codes.shape != codes.shape:
        return (
            f"{name}: int{found.bits} {found.codes.shape} in the artifact, int{expected.bits} {codes.shape} was frozen"
        )
    if found.levels != expected.levels:
        return f"{name}: {found.levels} levels in the artifact, {expected.levels} levels were frozen"
    positions = np.argwhere(found.codes != codes)
    if len(positions):
        row, column = positions[0]
        return (
            f"{name}: {len(positions)} of {codes.size} codes differ, first at row {row}, column {column}: "
            f"{found.codes[row, column]} in the artifact, {codes[row, column]} was frozen"
        )

    # A runtime may use smaller blocks than the groups of training: a group's scale is then repeated.
    finer = found.scales.shape[1] // scales.shape[1]
    if found.scales.shape != (scales.shape[0], scales.shape[1] * finer):
        return f"{name}: scales {found.scales.shape} in the artifact, {scales.shape} were frozen"
    positions = np.argwhere(found.scales != np.repeat(scales, finer, axis=1))
    if len(positions):
        row, column = positions[0]
        return (
            f"{name}: {counted(len(positions), 'scale differs', 'scales differ')}, first at row {row}, group {column}"
        )
    return ""


def _unexpected(scheme: Scheme, artifact: Artifact) -> list[str]:
    """Name matrices of the artifact that the checkpoint does not have."""
    extra = sorted(set(artifact.weights) - set(scheme.weights))
    return [f"{name}: in the artifact, but not in the checkpoint" for name in extra]


def _compare_replacements(computed: Sequence[FloatConstant], artifact: Artifact) -> dict[str, str]:
    """Compare float constants that stand for tensors of the checkpoint.

    Returns:
        How each of these tensors differs, as a sentence, by name; empty where it is equal.
    """
    stored = {constant.name: constant.values for constant in artifact.floats or ()}
    found: dict[str, str] = {}
    for constant in computed:
        fault = _difference_in_float(constant, stored.get(constant.name)) if constant.replaces else ""
        found |= {name: f"{name}: {fault}" if fault else "" for name in constant.replaces}
    return found


def _difference_in_float(expected: FloatConstant, values: NDArray[np.float32] | None) -> str:
    """Return how a stored constant differs from the computed one, as a phrase; empty where it is equal."""
    if values is None or values.shape != expected.values.shape:
        shape = "not there" if values is None else f"{values.shape}, expected {expected.values.shape}"
        return f"its constant {expected.name} is {shape}"
    if expected.is_product:
        differs = ~(np.abs(values - expected.values) <= np.spacing(np.abs(expected.values)))
    else:
        differs = values.view(np.int32) != expected.values.view(np.int32)
    positions = np.argwhere(differs)
    if not len(positions):
        return ""
    place = tuple(positions[0])
    return (
        f"{len(positions)} of {values.size} numbers of its constant {expected.name} differ, first at row {place[0]}, "
        f"column {place[1]}: {values[place]:g} in the artifact, {expected.values[place]:g} from the checkpoint"
    )


class _FloatComparison(NamedTuple):
    """Number of float tensors of the checkpoint, how many are equal, and a sentence for each difference."""

    total: int | None
    equal: int
    faults: list[str]


class _AdapterComparison(NamedTuple):
    """Matrices of the checkpoint's unmerged adapter by name, how many are equal, and a sentence for each difference."""

    matrices: dict[str, NDArray[np.float32]]
    equal: int | None
    faults: list[str]


def _compare_adapter(quantized: Path, target: Target, artifact: Artifact) -> _AdapterComparison:
    """Compare the matrices A and s B of every adapted layer, bit for bit.

    Args:
        quantized: the checkpoint.
        target: of the artifact.
        artifact: as it was read.
    """
    trained = _matrices(unmerged_adapter(quantized))
    in_file = _matrices(artifact.adapter or {})
    faults = [
        f"{name}: in the artifact's adapter, but not in the checkpoint's" for name in in_file.keys() - trained.keys()
    ]
    if artifact.adapter is None and artifact.floats is None:
        return _AdapterComparison(trained, None, faults)

    # A format without a place for adapters holds their values somewhere among its constants.
    stored = {constant.values.tobytes() for constant in artifact.floats or ()}
    equal = 0
    for name, values in trained.items():
        if artifact.adapter is None:
            fault = "" if values.tobytes() in stored else f"not in {target.file} as it was trained"
        else:
            fault = _difference_in_matrix(values, in_file.get(name))
        equal += not fault
        faults += [f"{name}: {fault}"] if fault else []
    return _AdapterComparison(trained, equal, faults)


def _matrices(adapter: Mapping[str, ArtifactAdapter]) -> dict[str, NDArray[np.float32]]:
    """Return the matrices of an adapter by name for messages."""
    found = {}
    for module, layer in adapter.items():
        found[f"{module}, adapter A"] = layer.down
        found[f"{module}, adapter s B"] = layer.up
    return found


def _difference_in_matrix(expected: NDArray[np.float32], values: NDArray[np.float32] | None) -> str:
    """Return how a matrix of an adapter differs, as a phrase; empty where it is equal."""
    if values is None:
        return "not in the artifact"
    if values.shape != expected.shape:
        return f"{values.shape} in the artifact, {expected.shape} was trained"
    positions = np.argwhere(values.view(np.int32) != expected.view(np.int32))
    if not len(positions):
        return ""
    place = tuple(positions[0])
    return (
        f"{len(positions)} of {values.size} numbers differ, first at row {place[0]}, column {place[1]}: "
        f"{values[place]:g} in the artifact, {expected[place]:g} was trained"
    )


def _compare_floats(
    quantized: Path,
    target: Target,
    artifact: Artifact,
    constants: Sequence[FloatConstant],
    in_place: Mapping[str, str],
    adapter: Collection[NDArray[np.float32]],
) -> _FloatComparison:
    """Compare norms, biases and every other float constant, bit for bit.

    Args:
        quantized: the checkpoint.
        target: of the artifact.
        artifact: as it was read.
        constants: that the exporter computes.
        in_place: tensors of the checkpoint that a constant stands for, as from `_compare_replacements`.
        adapter: matrices of the checkpoint's adapter, which have been compared.
    """
    if artifact.floats is None:
        return _FloatComparison(None, 0, [])
    # What stands for other tensors has been compared with them.
    replacing = {constant.name for constant in constants if constant.replaces}
    in_file = [constant for constant in artifact.floats if constant.name not in replacing]
    tensors = frozen.read_floats(quantized)
    expected = {name: _forms(tensor.numpy()) for name, tensor in tensors.items() if name not in in_place}
    by_tensor = {constant.tensor: constant.values for constant in in_file if constant.tensor}
    stored = {constant.values.tobytes() for constant in in_file}

    # A constant under the tensor's name has to equal it. Without names, the file has to hold the values somewhere.
    missing = []
    for name, forms in expected.items():
        if name in by_tensor:
            is_equal = by_tensor[name].tobytes() in forms
        else:
            # An exporter drops a product with ones or a sum with zeros.
            is_equal = not stored.isdisjoint(forms) or _is_neutral(name, forms[0])
        if not is_equal:
            missing.append(name)
    faults = [f"{name}: not in the artifact as it was frozen" for name in missing]

    # What is in the file and not in the checkpoint: computed by the exporter, or a constant that holds no information.
    known = {form for forms in expected.values() for form in forms}
    computed = {constant.name: constant.values for constant in constants}
    known |= {values.astype(np.float32).tobytes() for values in computed.values()}
    known |= {values.tobytes() for values in adapter}
    sizes = [len(expected[name][0]) for name in missing]
    sizes += [values.nbytes for values in adapter if values.tobytes() not in stored]
    for constant in in_file:
        values, data = constant.values, constant.values.tobytes()
        if constant.name in computed:
            if not np.array_equal(values, computed[constant.name]):
                faults.append(f"{target.file}: its constant {constant.name} is not what the model computes")
        elif data not in known and not _is_structural(values) and constant.name not in NOT_COMPUTED:
            # A changed tensor has been reported by its name: its new values are no further fault.
            if constant.tensor in expected or len(data) in sizes:
                continue
            faults.append(
                f"{target.file}: its constant {constant.name}, {values.size} numbers, is not in the checkpoint"
            )
    differing = len(missing) + sum(bool(in_place[name]) for name in tensors.keys() & in_place.keys())
    return _FloatComparison(len(tensors), len(tensors) - differing, faults)


def _forms(values: NDArray[np.float32]) -> tuple[bytes, bytes]:
    """Return the bytes of a tensor, and of 1 + the tensor: Gemma's norms are stored so where a norm has no offset."""
    return values.tobytes(), (values + np.float32(1)).tobytes()


def _is_neutral(name: str, data: bytes) -> bool:
    """Return True for a weight of ones or a bias of zeros, which change nothing."""
    return bool((np.frombuffer(data, np.float32) == (0 if name.endswith("bias") else 1)).all())


def _is_structural(values: NDArray[np.float32]) -> bool:
    """Return True for a constant that the graph needs and that holds no weights.

    These are single numbers (an epsilon, a factor), rows of one number (the mean as a product), and matrices of 0, 1
    and -1 (a permutation, `rotate_half`). Whether they are the right ones shows when the artifact runs.
    """
    return bool(values.size <= 1 or (values == values.flat[0]).all() or np.isin(values, (0, 1, -1)).all())


def _tokenizer_faults(folder: Path, quantized: Path) -> list[str]:
    """Compare the artifact's tokenizer, with its chat template, with the checkpoint's."""
    extra = sorted({*tokenizer.tokenizer_files(folder)} - {*tokenizer.tokenizer_files(quantized)})
    faults = [f"{name}: not in the tokenizer the model was trained with" for name in extra]
    names = tokenizer.tokenizer_files(quantized)
    return faults + _copy_faults(folder, quantized, names, "not the tokenizer the model was trained with")


def _copy_faults(folder: Path, quantized: Path, names: Iterable[str], changed: str) -> list[str]:
    """Compare copies of the checkpoint's files, which runners read, with them. changed: sentence for another file."""
    faults = []
    for name in names:
        if not (folder / name).is_file():
            faults.append(f"{name}: missing, though {quantized} has it")
        elif sha256(folder / name) != sha256(quantized / name):
            faults.append(f"{name}: {changed}")
    return faults


def _conversation_faults(folder: Path, quantized: Path, ends: Sequence[int] | None) -> list[str]:
    """Compare the tokens that end a generation with training's, and with the chat template in the folder."""
    if ends is None:
        return []
    trained = tokenizer.trained_end_tokens(read_manifest(quantized))
    return conversation.template_faults(tokenizer.load_tokenizer(folder), ends, trained)

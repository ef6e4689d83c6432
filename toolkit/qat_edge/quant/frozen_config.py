"""Check the config.json of a checkpoint that qat-edge wrote, as that of a base model is checked.

transformers builds a model from whatever the file says, and gives it matrices of other shapes where a checkpoint is
quantized already. So the values are checked before, and the shapes of the matrices with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchao.core.config import config_from_dict
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, TorchAoConfig

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError, RunError
from qat_edge.manifest import MANIFEST, how_to_restore, read_manifest
from qat_edge.models import config_check, config_keys, tasks
from qat_edge.models.hub import one_line
from qat_edge.models.load_config import WRONG_VALUES
from qat_edge.models.meta_model import model_without_weights
from qat_edge.models.tokenizer import GENERATION_CONFIG
from qat_edge.options import MOST_LAYERS

RECORD = "model_config"  # entry of the manifest: config.json as it was frozen
QUANTIZER = "quantization_config"


def read(folder: Path) -> PretrainedConfig:
    """Return the configuration of a checkpoint, frozen or float.

    Raises:
        ModelError: A JSON file has a value that no model can have; names the key.
        RunError: The manifest has the scheme of a frozen checkpoint, and config.json is not that of one.
    """
    document = config_check.read_config(folder, str(folder))
    where = f"{folder}: {config_check.CONFIG}"
    layers = document.get("num_hidden_layers")
    if type(layers) is int and layers > MOST_LAYERS:
        raise ModelError(
            f"{where} has num_hidden_layers {readers.shorten(layers)}, at most {MOST_LAYERS}. {how_to_restore(folder)}"
        )
    _check_quantizer(folder, document.get(QUANTIZER))
    remote_code.require_no_kernels(document, folder)
    with remote_code.refusals(folder):
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=remote_code.permitted()
            )
        except WRONG_VALUES as error:
            if remote_code.OPTION in str(error):
                raise
            raise ModelError(f"{where} cannot be used ({one_line(error)}). {how_to_restore(folder)}") from error
    config_keys.check_choices(config, document, where)
    _check_record(folder, document)
    if (folder / GENERATION_CONFIG).is_file():
        with building_errors(folder, GENERATION_CONFIG):
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    return config


def settings_of(folder: Path) -> dict[str, str]:
    """Return the settings in config.json that the function of a model depends on, as JSON texts, for the manifest.

    Texts, because a manifest has no infinite numbers, and transformers writes them for some models.
    """
    return _as_texts(config_check.read_config(folder, str(folder)))


@contextmanager
def building_errors(folder: Path, file: str = config_check.CONFIG) -> Iterator[None]:
    """Turn what transformers and torchao raise for wrong values in a file of a checkpoint into one error.

    Raises:
        RunError: Names the file.
        ModelError: The folder needs code of its own, which the command does not permit.
    """
    try:
        with remote_code.refusals(folder):
            yield
    except (*WRONG_VALUES, OSError) as error:
        raise RunError(
            f"{folder}: no model can be built from {file} ({one_line(error)}). {how_to_restore(folder)}"
        ) from error


def require_quantizer(folder: Path, expected: TorchAoConfig) -> None:
    """Refuse a quantization_config that is not that of the scheme: torchao builds the layers from it.

    Args:
        folder: Of the checkpoint.
        expected: The quantizer of the scheme in its manifest.

    Raises:
        RunError: Names the first entry that differs.
    """
    found = config_check.read_config(folder, str(folder)).get(QUANTIZER)
    plain = readers.parse_json(json.dumps(expected.to_dict()), QUANTIZER, RunError)
    if found == plain or not isinstance(found, dict):
        return  # one that is no object was refused before
    where = f"{folder}: {config_check.CONFIG}: {QUANTIZER}"

    # Another version of torchao may write the same settings in another form, so that they are read as it reads them.
    for key in sorted(found.keys() | plain.keys()):
        if key != "quant_type" and (found.get(key) or None) != (plain.get(key) or None):
            raise _not_of_scheme(folder, f"{where} has {config_check.written(key)} {readers.show(found.get(key))}")
    try:
        layers = config_from_dict(found["quant_type"]["default"]).fqn_to_config
    except WRONG_VALUES as error:
        raise _not_of_scheme(
            folder, f"{where} has a quant_type that torchao cannot read ({one_line(error)})"
        ) from error
    wanted: Any = expected.quant_type.fqn_to_config
    for name in [*wanted, *layers]:
        if layers.get(name) != wanted.get(name):
            state = "other settings" if name in layers and name in wanted else "no settings"
            state = "settings" if name not in wanted else state
            raise _not_of_scheme(folder, f"{where} has {state} for {config_check.written(name)}")


def _not_of_scheme(folder: Path, found: str) -> RunError:
    return RunError(f"{found}, which is not the scheme in {MANIFEST}. {how_to_restore(folder)}")


def _as_texts(document: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: json.dumps(value, sort_keys=True) for key, value in document.items() if key not in config_keys.HARMLESS
    }


def _check_record(folder: Path, document: Mapping[str, Any]) -> None:
    """Refuse a config.json whose settings are not those that the model was frozen with.

    Raises:
        RunError: Names the first one that differs.
    """
    recorded = read_manifest(folder).get(RECORD) if (folder / MANIFEST).is_file() else None
    if recorded is None:
        return  # a checkpoint of an earlier version, or a float model
    found = _as_texts(document)
    for key in sorted(found.keys() | recorded.keys()):
        if found.get(key) != recorded.get(key):
            raise RunError(
                f"{folder}: {config_check.CONFIG} has {config_check.written(key)} "
                f"{readers.shorten(found.get(key, 'missing'))}, and the model was frozen with "
                f"{readers.shorten(recorded.get(key, 'no such key'))} ({MANIFEST}). {how_to_restore(folder)}"
            )


def require_shapes(folder: Path, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint whose matrices have other shapes than in a model of its configuration.

    Args:
        folder: Of the checkpoint.
        config: Its configuration.
        shapes: Shape of each quantized matrix, (out, in), by module name.

    Raises:
        RunError: Names the first matrix that differs.
    """
    with remote_code.refusals(folder):
        try:
            model = model_without_weights(config, tasks.task_of_folder(folder).auto_class)
        except WRONG_VALUES as error:
            if remote_code.OPTION in str(error):
                raise
            raise ModelError(
                f"{folder}: no model can be built from config.json ({one_line(error)}). {how_to_restore(folder)}"
            ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, shape in sorted(shapes.items()):
        found = expected.get(f"{name}.weight")
        if found != shape:
            described = "no such matrix" if found is None else f"{list(found)}"
            raise RunError(
                f"{folder}: {name} is {list(shape)}, and a model of config.json has {described}. "
                f"{how_to_restore(folder)}"
            )


def _check_quantizer(folder: Path, settings: object) -> None:
    """Refuse a folder with the manifest of a frozen checkpoint and the config.json of another model."""
    if not (folder / MANIFEST).is_file() or "scheme" not in read_manifest(folder):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "torchao":
        found = "no quantization_config" if settings is None else f"a quantization_config of {readers.show(method)}"
        raise RunError(
            f"{folder}: {MANIFEST} has the scheme of a frozen checkpoint, and {config_check.CONFIG} has {found}. "
            f"{how_to_restore(folder)}"
        )

"""Check the config.json of a checkpoint that qat-edge wrote, as that of a base model is checked.

transformers builds a model from whatever the file says, and gives it matrices of other shapes where a checkpoint is
quantized already. So the values are checked before, and the shapes of the matrices with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from qat_edge import readers, remote_code
from qat_edge.errors import ModelError, RunError
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models import config_check, config_keys, tasks
from qat_edge.models.hub import one_line
from qat_edge.models.load_config import WRONG_VALUES
from qat_edge.models.meta_model import model_without_weights
from qat_edge.options import MOST_LAYERS

ADVICE = "Restore the folder, or make it again: `qat-edge quantize --force`."


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
        raise ModelError(f"{where} has num_hidden_layers {readers.shorten(layers)}, at most {MOST_LAYERS}. {ADVICE}")
    _check_quantizer(folder, document.get("quantization_config"))
    remote_code.require_no_kernels(document, folder)
    with remote_code.refusals(folder):
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=remote_code.permitted()
            )
        except WRONG_VALUES as error:
            if remote_code.OPTION in str(error):
                raise
            raise ModelError(f"{where} cannot be used ({one_line(error)}). {ADVICE}") from error
    config_keys.check_choices(config, document, where)
    return config


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
                f"{folder}: no model can be built from config.json ({one_line(error)}). {ADVICE}"
            ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    for name, shape in sorted(shapes.items()):
        found = expected.get(f"{name}.weight")
        if found != shape:
            described = "no such matrix" if found is None else f"{list(found)}"
            raise RunError(f"{folder}: {name} is {list(shape)}, and a model of config.json has {described}. {ADVICE}")


def _check_quantizer(folder: Path, settings: object) -> None:
    """Refuse a folder with the manifest of a frozen checkpoint and the config.json of another model."""
    if not (folder / MANIFEST).is_file() or "scheme" not in read_manifest(folder):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method != "torchao":
        found = "no quantization_config" if settings is None else f"a quantization_config of {readers.show(method)}"
        raise RunError(
            f"{folder}: {MANIFEST} has the scheme of a frozen checkpoint, and {config_check.CONFIG} has {found}. "
            f"{ADVICE}"
        )

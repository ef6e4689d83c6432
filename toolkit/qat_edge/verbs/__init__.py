"""The verbs of the command line as functions, one file each. `qat_edge.api` is their public face."""

from qat_edge.environment import require_importable

# For the Python API; the command line checks it as well. The errors of transformers come late and name no way out.
require_importable()

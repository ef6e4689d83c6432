"""The verbs of the command line as functions, one file each. `qat_edge.api` is their public face."""

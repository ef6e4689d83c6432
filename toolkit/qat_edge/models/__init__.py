"""Models: load one from its source, find its task, remove layers, save and merge what was trained."""

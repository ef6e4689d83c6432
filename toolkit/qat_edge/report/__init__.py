"""Reports: the JSON that validate, compare and sensitivity write, as self-contained HTML pages."""

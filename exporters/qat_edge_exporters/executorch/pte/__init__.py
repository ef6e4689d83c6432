"""The bytes of a .pte: read, check and rewrite."""

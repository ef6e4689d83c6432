"""The bytes of a .pte: read, checked and rewritten."""

"""Backends that a .pte can be lowered to, one file each."""

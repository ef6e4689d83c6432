"""Backends other than XNNPACK that a .pte can be lowered to, one file each."""

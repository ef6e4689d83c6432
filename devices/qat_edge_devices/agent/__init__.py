"""What travels to a device: scripts that know Python, numpy and a runtime, and nothing of this package."""

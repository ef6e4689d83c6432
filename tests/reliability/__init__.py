"""Kill, interrupt and starve the verbs that write, and check that nothing is lost: `python -m tests.reliability`."""

"""One module per kind of artifact: what to send to the device and which backend of the agent runs it."""

"""Files: volumes, their XDMF sidecar, checkpoints."""

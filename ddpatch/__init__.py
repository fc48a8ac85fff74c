"""ddpatch: multi-level patch diffusion models for fields that are too large for one device."""

__version__ = "0.1.0"

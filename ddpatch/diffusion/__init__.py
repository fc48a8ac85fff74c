"""Schedule, denoiser, solver. Nothing here knows about ranks."""

"""Fields read by hyperslab, batches of patches, and simulated turbulence."""

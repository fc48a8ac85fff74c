"""Communication: the one module that imports mpi4py, and what is built on it."""

"""What ddpatch is called and what it needs; the versions it is tested with stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ddpatch/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION is not None, "ddpatch/__init__.py: no __version__"

REPORT = ["matplotlib>=3.8"]
TENSORBOARD = ["tensorboard>=2.14"]
TEST = ["pytest>=9", "pytest-mpi>=0.6", "pytest-xdist>=3.6", "hypothesis>=6.100", "xarray>=2024.1", "h5netcdf>=1.3"]
LINT = ["ruff>=0.17", "mypy>=2", "types-PyYAML>=6"]

setup(
    name="ddpatch",
    version=VERSION[1],
    description="Multi-level patch diffusion models, run over MPI, for physical fields that are too large for one device",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="the ddpatch developers",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Physics",
    ],
    packages=find_packages(include=["ddpatch", "ddpatch.*"]),
    entry_points={"console_scripts": ["ddpatch = ddpatch.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "mpi4py>=4",
        "h5py>=3.10",
        "einops>=0.7",
        "PyYAML>=6",
        "tqdm>=4.60",
    ],
    extras_require={
        "mpich": ["mpich>=4"],
        "report": REPORT,
        "tensorboard": TENSORBOARD,
        "peers": ["monai>=1.5"],
        "test": TEST + REPORT,
        "lint": LINT,
        "dev": TEST + REPORT + LINT,
    },
)

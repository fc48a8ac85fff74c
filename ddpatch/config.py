"""The configuration: frozen dataclasses, read from YAML. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ddpatch.couplings import COUPLINGS, Pathways
from ddpatch.errors import UserError, nearest


@dataclass(frozen=True)
class DomainConfig:
    """The grid and its patches, in points, axes in the order ``[z,] y, x``.

    ``grid`` is what one training sample covers. Where it is smaller than the fields in the data file, samples are crops, and the
    cropped axes are not periodic. ``null`` takes the grid, or the periodicity, of the file.
    """

    patch: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    periodic: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        _require(len(self.patch) in (2, 3), "domain.patch", list(self.patch), "2 or 3 numbers of points")


@dataclass(frozen=True)
class DataConfig:
    """An HDF5 dataset of fields.

    ``axes`` names the axes of the dataset in the order of the file, for example ``sample z y x channel``; ``null`` means
    ``sample channel [z] y x``. Missing ``sample`` or ``channel`` axes count as length 1. ``normalise`` is ``joint`` (one standard
    deviation for all channels, right for the components of one vector) or ``channel``. ``shift`` draws a random origin for every
    sample: right for homogeneous fields on the periodic axes. ``holdout`` samples at the end of the file are never trained on.
    """

    path: str
    name: str = "fields"
    axes: str | None = None
    normalise: str = "joint"
    shift: bool = True
    holdout: int = 0

    def __post_init__(self) -> None:
        _one_of(self.normalise, ("joint", "channel"), "data.normalise")
        _require(self.holdout >= 0, "data.holdout", self.holdout, "0 or more samples")


@dataclass(frozen=True)
class ModelConfig:
    """The two-level network.

    ``coupling`` of the patches, one of :data:`ddpatch.couplings.COUPLINGS`; ``channels`` per level of the U-Net, finest first;
    ``blocks`` residual blocks per level and side; ``halo`` width in points; ``tokens`` per axis and patch; ``token_channels``
    latent features per token (what the allgather carries, besides block means); ``coarse_*`` the vision transformer, whose tokens
    attend to means of tokens, ``coarse_keys`` per axis and patch (``null``: to every token);
    ``positions`` Fourier modes of the physical coordinates fed to the encoder and to the tokens (0 for homogeneous data);
    ``whiten`` puts the first convolution on stencils whitened with the data's covariance (:mod:`ddpatch.model.stencil`);
    ``wiener`` adds the exact linear denoiser of the data's covariance (:mod:`ddpatch.model.wiener`).
    """

    coupling: str = "two-level"
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    halo: int = 2
    tokens: int = 4
    token_channels: int = 32
    coarse_width: int = 128
    coarse_layers: int = 3
    coarse_heads: int = 4
    coarse_keys: int | None = None
    positions: int = 0
    whiten: bool = True
    wiener: bool = True

    def __post_init__(self) -> None:
        _one_of(self.coupling, tuple(COUPLINGS), "model.coupling")
        _require(len(self.channels) > 0 and min(self.channels) > 0, "model.channels", list(self.channels), "positive widths")
        least_values = {"blocks": 1, "halo": 0, "tokens": 1, "token_channels": 1, "coarse_layers": 1, "positions": 0}
        for name, least in least_values.items():
            _require(getattr(self, name) >= least, f"model.{name}", getattr(self, name), f"{least} or more")
        heads, width = self.coarse_heads, self.coarse_width
        fits = heads > 0 and width % (2 * heads) == 0
        _require(fits, "model.coarse_width", width, f"a multiple of 2 × coarse_heads = {2 * heads}")
        divides = self.keys > 0 and self.tokens % self.keys == 0
        _require(divides, "model.coarse_keys", self.coarse_keys, f"a divisor of model.tokens = {self.tokens}")
        _require(not (self.paths.alone and self.positions), "model.positions", self.positions, "0 where patches have no place")

    @property
    def keys(self) -> int:
        """Means per axis and patch that tokens attend to."""
        return self.tokens if self.coarse_keys is None else self.coarse_keys

    @property
    def paths(self) -> Pathways:
        """What couples the patches."""
        return COUPLINGS[self.coupling]

    @property
    def reach(self) -> int:
        """Width of the halo that is exchanged: 0 without one."""
        return self.halo if self.paths.halo else 0


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise levels, and how they are weighed in the loss.

    ``sigma_min`` and ``sigma_max`` are in units of the normalised data's standard deviation; ``null`` derives them from the
    spectrum. ``weighting`` is ``edm``, or ``relative`` to the error of the exact linear denoiser of that spectrum.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    weighting: str = "relative"

    def __post_init__(self) -> None:
        low, high = self.sigma_min, self.sigma_max
        _one_of(self.weighting, ("edm", "relative"), "diffusion.weighting")
        _require(low is None or low > 0, "diffusion.sigma_min", low, "a positive noise level")
        _require(high is None or high > (low or 0), "diffusion.sigma_max", high, "more than sigma_min")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. ``batch`` is the global number of samples per step; ``ema`` the half-life of the averaged weights in
    samples; ``warmup``, ``log_every``, ``checkpoint_every`` and ``keep_every`` are in steps: the last ``keep_last`` checkpoints
    are kept, and those of multiples of ``keep_every``; ``optimiser`` is ``muon``
    (:mod:`ddpatch.optimiser`) or ``adam``; ``dtype`` is ``float32`` or ``float64``.
    """

    steps: int = 10000
    batch: int = 4
    optimiser: str = "muon"
    learning_rate: float = 5e-3
    warmup: int = 100
    ema: float = 2000.0
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    log_every: int = 10
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.dtype, ("float32", "float64"), "train.dtype")
        _one_of(self.optimiser, ("muon", "adam"), "train.optimiser")
        for name in ("steps", "batch", "learning_rate", "ema", "clip", "log_every", "checkpoint_every", "keep_last"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "a positive number")
        _require(
            self.keep_every is None or self.keep_every > 0, "train.keep_every", self.keep_every, "a positive number of steps"
        )
        _require(self.warmup >= 0, "train.warmup", self.warmup, "0 or more steps")


@dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn: ``solver`` is ``heun`` or ``dpm++2m``, ``steps`` the number of solver steps. ``shift`` lets the
    patches tile the grid from another origin in every evaluation, along periodic axes, where the training did so too, at the cost
    of exchanging half a patch along every axis twice. The noise level that the network is told is divided by ``noise_scale``,
    less so where there is much noise (:class:`ddpatch.diffusion.level_scale.LevelScale`); ``null`` takes what ``ddpatch
    calibrate`` found for the checkpoint, or 1.
    ``lagged`` lets the coarse level speak of the evaluation before, so that the gather of tokens goes on while patches are
    decoded and encoded; the tiling stays where it is then. ``batch`` samples are drawn at a time, ``null`` as many as
    a step of the training has. ``on_host`` keeps the fields of a solver in host memory: with ``execution.patches_at_once`` a
    group of patches at a time is on the GPU (:mod:`ddpatch.model.ferry`).
    """

    solver: str = "dpm++2m"
    steps: int = 20
    batch: int | None = None
    shift: bool = False
    lagged: bool = False
    noise_scale: float | None = None
    on_host: bool = False

    def __post_init__(self) -> None:
        scale = self.noise_scale
        _require(scale is None or scale > 0, "sample.noise_scale", scale, "a positive number")
        _one_of(self.solver, ("heun", "dpm++2m"), "sample.solver")
        _require(self.steps > 0, "sample.steps", self.steps, "a positive number")
        _require(self.batch is None or self.batch > 0, "sample.batch", self.batch, "a positive number of samples")


@dataclass(frozen=True)
class OutputConfig:
    """Files of samples: ``mode`` is ``gather``, ``virtual``, ``mpio``, or ``auto`` (see :mod:`ddpatch.io.writers`)."""

    mode: str = "auto"

    def __post_init__(self) -> None:
        _one_of(self.mode, ("auto", "gather", "virtual", "mpio"), "output.mode")


@dataclass(frozen=True)
class ParallelConfig:
    """``device`` is ``auto``, ``cpu`` or ``cuda``; ``deterministic`` sums over ranks in rank order, and on GPUs likewise: runs
    repeat bit for bit; ``replicas`` is the number of groups of ranks that train on different samples, ``null`` as few as there
    can be; ``transport`` of tensors is ``host`` (MPI from host memory), ``cuda-aware`` (MPI from the memory of GPUs, where the
    library can) or ``torch`` (NCCL, where every rank has a GPU of its own; gloo on CPUs); with ``share_device`` ranks share GPUs.
    """

    device: str = "auto"
    transport: str = "host"
    share_device: bool = False
    deterministic: bool = False
    replicas: int | None = None

    def __post_init__(self) -> None:
        _one_of(self.device, ("auto", "cpu", "cuda"), "parallel.device")
        _one_of(self.transport, ("host", "cuda-aware", "torch"), "parallel.transport")
        _require(self.replicas is None or self.replicas > 0, "parallel.replicas", self.replicas, "a positive number")


@dataclass(frozen=True)
class ExecutionConfig:
    """What decides about memory and time, and about results within rounding: ``patches_at_once`` is the number of patches, of
    every sample on a rank, whose features are in memory together; ``null`` all of them (:mod:`ddpatch.model.groups`). ``tune``
    lets a training choose it: all if they fit into memory, else the fastest of measured groups (:mod:`ddpatch.tuning`).
    ``precision`` of the features of the fine level is ``full``, that of ``train.dtype``, or ``bfloat16``; weights, fields, the
    coarse level and all sums are of ``train.dtype`` anyway, and GPUs do not round their factors (TF32). ``coarse`` is
    ``replicated``: every rank transforms the tokens of all patches; ``sharded``: those of its own, with keys and values gathered;
    ``auto`` decides by the number of tokens. ``compile`` lets torch translate encoder and decoder into code for this device when
    they first run.
    """

    patches_at_once: int | None = None
    tune: bool = False
    precision: str = "full"
    coarse: str = "auto"
    compile: bool = False

    def __post_init__(self) -> None:
        most = self.patches_at_once
        _require(most is None or most > 0, "execution.patches_at_once", most, "a positive number of patches")
        _require(most is None or not self.tune, "execution.patches_at_once", most, "null where execution.tune chooses it")
        _one_of(self.precision, ("full", "bfloat16"), "execution.precision")
        _one_of(self.coarse, ("auto", "replicated", "sharded"), "execution.coarse")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    domain: DomainConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain nested dictionaries of lists, numbers and strings."""
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }

    def as_yaml(self) -> str:
        """The configuration as the YAML text that :func:`load` reads."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``section.key=value`` overrides.

    Raises:
        UserError: naming the file or key, the value, and what was expected.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the configuration: {_reason(error)}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'domain:' and 'data:', got {type(tree).__name__}")
    return build(tree, str(path), overrides)


def build(tree: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """Make a configuration from nested dictionaries and overrides; ``origin`` names their source in messages."""
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _override(changed, override)
    return _build(Config, changed, "", origin)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise UserError(f"--set {override}: expected section.key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise UserError(f"{section}: expected keys and values, got {branch!r}")
    branch[name] = value


def _build(kind: Any, tree: Any, prefix: str, origin: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(f"{origin}: {prefix.rstrip('.') or 'top level'}: expected keys and values, got {tree!r}")
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            raise UserError(f"{origin}: unknown key '{prefix}{key}'{nearest(str(key), hints)}")
    for item in dataclasses.fields(kind):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if needed and item.name not in tree:
            raise UserError(f"{origin}: missing key '{prefix}{item.name}'")
    try:
        return kind(**{key: _convert(hints[key], value, f"{prefix}{key}", origin) for key, value in tree.items()})
    except UserError as error:
        raise UserError(str(error) if origin in str(error) else f"{origin}: {error}") from None


def _convert(kind: Any, value: Any, key: str, origin: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.", origin)
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_convert(item, v, key, origin) for v in value)
        raise UserError(f"{origin}: {key}: expected a list of {item.__name__}, got {value!r}")
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    elif kind is not float and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{origin}: {key}: expected {kind.__name__}, got {value!r}")


def _require(holds: bool, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"{key}: expected {expected}, got {value}")


def _one_of(value: str, known: Sequence[str], key: str) -> None:
    if value not in known:
        raise UserError(f"{key}: expected one of {', '.join(known)}, got '{value}'{nearest(value, known)}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

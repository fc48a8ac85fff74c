"""A run: what its configuration and data determine together, the objects made from them, and its folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpatch.config import Config, ModelConfig, build
from ddpatch.data.batches import check_grid
from ddpatch.data.fields import FieldFile
from ddpatch.data.normalisation import Normalisation, measure_normalisation, measure_stencil
from ddpatch.decomposition import Decomposition
from ddpatch.diffusion.denoiser import Denoiser
from ddpatch.diffusion.schedule import Schedule, sigma_range
from ddpatch.diffusion.weighting import RelativeError, edm
from ddpatch.errors import UserError
from ddpatch.model.coupling import Coupling, Lag, OwnPatch
from ddpatch.model.groups import Objective, group_by_group, sum_of_groups
from ddpatch.model.tokens import check_tokens
from ddpatch.model.two_level import Message, TwoLevelModel
from ddpatch.model.wiener import LinearPart
from ddpatch.optimiser import Muon
from ddpatch.parallel.comm import Communicator
from ddpatch.parallel.grid import choose_replicas
from ddpatch.random import Stream, generator
from ddpatch.statistics.covariance import Moments, measure_moments
from ddpatch.statistics.spectrum import mode_deviation

MEASURED_SAMPLES, MEASURED_POINTS = 64, 2**22  # what statistics of the data are taken from
FREE_TO_CHANGE: dict[str, set[str] | None] = {  # None: every key of the section
    "data": {"path"},
    "train": {"steps", "log_every", "checkpoint_every", "keep_last", "keep_every"},
    "sample": None,
    "output": None,
    "parallel": None,
    "execution": None,
}


@dataclass(frozen=True)
class Field:
    """What the samples of a run are fields of: everything that was measured on the training data.

    Arguments:
        channels: Names of the channels.
        spacing: Distance of neighbouring points per axis.
        normalisation: Physical to normalised fields.
        sigma_min, sigma_max: Noise levels, in units of the normalised data's deviation.
        spectrum: Standard deviation of an orthonormal Fourier mode of the normalised data, and number of modes, by shell.
        stencil: Covariance of the normalised data on 3^d points, ``[channel 3^d, channel 3^d]``.
        moments: Second moments of the normalised data, for ``model.wiener``.
        grid: Points of the grid whose wave numbers the moments have.
    """

    channels: tuple[str, ...]
    spacing: tuple[float, ...]
    normalisation: Normalisation
    sigma_min: float
    sigma_max: float
    stencil: tuple[tuple[float, ...], ...]
    spectrum: tuple[tuple[float, ...], tuple[float, ...]]
    moments: Moments | None = None
    grid: tuple[int, ...] = ()

    @property
    def schedule(self) -> Schedule:
        """The noise levels."""
        return Schedule(self.sigma_min, self.sigma_max, deviation=tuple(self.spectrum[0][1:]))

    def as_state(self) -> dict[str, Any]:
        """For checkpoints: plain lists, numbers and tensors."""
        moments = None if self.moments is None else self.moments._asdict()
        return {**dataclasses.asdict(dataclasses.replace(self, moments=None)), "moments": moments}

    @staticmethod
    def from_state(state: dict[str, Any], origin: Path) -> Field:
        """The inverse of :meth:`as_state`; ``origin`` names the checkpoint in messages.

        Raises:
            UserError: if the checkpoint was written before moments of the data were part of it.
        """
        affine = Normalisation(*(tuple(state["normalisation"][key]) for key in ("mean", "std")))
        if "moments" not in state:
            raise UserError(f"{origin}: a checkpoint of an earlier version, which holds no moments of the data; train anew")
        moments = None if state["moments"] is None else Moments(**state["moments"])
        return Field(**{**state, "normalisation": affine, "moments": moments})


def resolve(config: Config, file: FieldFile) -> Config:
    """Fill in the grid and periodicity that the configuration leaves to the data, and check that data and domain fit."""
    full, closes = file.header.grid_shape, file.header.periodic
    grid = config.domain.grid or full
    cropped = [len(grid) == len(full) and m < n for m, n in zip(grid, full, strict=False)]
    periodic = config.domain.periodic or tuple(c and not cut for c, cut in zip(closes, cropped, strict=False))
    domain = dataclasses.replace(config.domain, grid=grid, periodic=periodic)
    check_grid(file, grid, periodic)
    if config.model.paths.whole:
        config = dataclasses.replace(config, model=_model_of_whole(config, grid))
        domain = dataclasses.replace(domain, patch=grid)
    if config.data.holdout >= file.header.samples:
        raise UserError(f"data.holdout: {config.data.holdout} leaves none of the {file.header.samples} samples of {file.path}")
    return dataclasses.replace(config, domain=domain)


def _model_of_whole(config: Config, grid: Sequence[int]) -> ModelConfig:
    """The model of the whole grid as one patch, with the tokens and keys per length of the configured patches."""
    model, axes = config.model, list(zip(grid, config.domain.patch, strict=True))
    counts = {(model.tokens * n // p, model.coarse_keys and model.coarse_keys * n // p) for n, p in axes}
    if len(counts) > 1:
        found = f"{list(config.domain.patch)} in {list(grid)}"
        raise UserError(f"model.coupling: {model.coupling} needs as many patches on every axis, got {found}")
    tokens, keys = counts.pop()
    return dataclasses.replace(model, tokens=tokens, coarse_keys=keys)


def measure_field(config: Config, file: FieldFile, comm: Communicator) -> Field:
    """Measure normalisation, spectrum and moments on training samples: 64, or as many as have 2^22 points. Collective.

    Wave numbers count as resolved up to the file's attribute ``k_max`` (in multiples of its smallest one), or else up to a third
    of the points per axis, where dealiased simulations end.
    """
    samples = training_samples(config, file)
    most = max(MEASURED_SAMPLES, MEASURED_POINTS // math.prod(file.header.grid_shape))
    picked = samples[:: -(-len(samples) // most)]
    affine = measure_normalisation(file, picked, config.data.normalise, comm)
    grid, full = decompose(config, 1).grid_shape, file.header.grid_shape
    deviation, modes = mode_deviation(file, picked, comm, grid, np.asarray(affine.mean), np.asarray(affine.std))
    finest = file.header.attributes.get("k_max", min(full) / 3)
    low, high = sigma_range(deviation, max(1, int(finest * max(grid) / max(full))))
    low, high = config.diffusion.sigma_min or low, config.diffusion.sigma_max or high
    stencil = measure_stencil(file, picked, affine, comm)
    rows = tuple(tuple(row) for row in stencil.tolist())
    spectrum = tuple(deviation.tolist()), tuple(modes.tolist())
    moments = None
    if config.model.wiener:
        tokens = [n * config.model.tokens for n in decompose(config, 1).patch_grid]
        lags, waves = [2 * n for n in stencil_reach(config)], [n // 2 for n in tokens]
        moments = measure_moments(file, picked, grid, affine, lags, waves, comm)
    return Field(file.header.channels, file.header.spacing, affine, low, high, rows, spectrum, moments, grid)


def stencil_reach(config: Config) -> tuple[int, ...]:
    """How far the linear part sees around a point: the halo, but not through walls, and nothing where patches are alone."""
    reach = 0 if config.model.paths.alone else config.model.reach
    assert config.domain.periodic is not None
    return tuple(reach if wraps else 0 for wraps in config.domain.periodic)


def make_linear(config: Config, field: Field) -> LinearPart | None:
    """The exact linear denoiser of the data, with a coarse part where means of a periodic grid are gathered."""
    if not config.model.wiener or field.moments is None:
        return None
    paths, periodic = config.model.paths, config.domain.periodic
    gathered = paths.coarse and paths.means and not paths.alone and periodic and all(periodic)
    cell = [n // config.model.tokens for n in config.domain.patch] if gathered else None
    return LinearPart(stencil_reach(config), *field.moments, field.grid, cell)


def training_samples(config: Config, file: FieldFile) -> range:
    """The samples that are not held out."""
    return range(file.header.samples - config.data.holdout)


def decompose(config: Config, size: int, grid: Sequence[int] | None = None) -> Decomposition:
    """The decomposition of the configured grid, or of another one with the same patches, over ``size`` ranks."""
    domain = config.domain
    assert domain.grid is not None and domain.periodic is not None
    return Decomposition(tuple(grid or domain.grid), domain.patch, size, domain.periodic)


def build_for_sampling(tree: dict[str, Any], origin: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run with overrides ``section.key=value`` of what may differ when it is sampled.

    Raises:
        UserError: if they are mistaken, or belong to what was trained.
    """
    free = [section for section, keys in FREE_TO_CHANGE.items() if keys is None]
    for override in overrides:
        if override.partition(".")[0] not in free:
            raise UserError(f"--set {override}: expected a key of {', '.join(free)}; the rest is as it was trained")
    config = build(tree, origin, overrides)
    if config.execution.tune:
        raise UserError("execution.tune: expected false, got true: a training chooses, and sampling takes what it chose")
    return config


def replicas(config: Config, size: int) -> int:
    """The number of replicas of ``size`` ranks that train."""
    return choose_replicas(size, decompose(config, 1).num_patches, config.train.batch, config.parallel.replicas)


def make_model(config: Config, field: Field) -> TwoLevelModel:
    """The network with initial weights keyed by the seed: the same on all ranks. Leaves torch's global state as it was."""
    domain, model = config.domain, config.model
    assert domain.periodic is not None
    check_tokens(domain.patch, model.tokens, len(model.channels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(config.train.seed, Stream.INIT).integers(2**62)))
        periodic = (False,) * len(domain.patch) if model.paths.alone else domain.periodic
        network = TwoLevelModel(len(field.channels), len(domain.patch), model, periodic, make_linear(config, field))
        network = network.to(dtype(config))
    if model.whiten:
        network.encoder.stem.stencil.whiten(torch.tensor(field.stencil, dtype=torch.float64))
    return network


def dtype(config: Config) -> torch.dtype:
    """Type of weights and fields."""
    return torch.float64 if config.train.dtype == "float64" else torch.float32


def make_optimiser(config: Config, model: TwoLevelModel) -> torch.optim.Optimizer:
    """The optimiser of all weights."""
    if config.train.optimiser == "adam":
        fused = next(model.parameters()).device.type in ("cpu", "cuda")  # and not on meta
        return torch.optim.Adam(model.parameters(), lr=config.train.learning_rate, betas=(0.9, 0.99), fused=fused)
    return Muon(model.named_parameters(), config.train.learning_rate, adam=("embed.", "decoder.out.", ".centre"))


def make_denoiser(
    config: Config, field: Field, model: TwoLevelModel, coupling: Coupling, lag: Lag[Message] | None = None
) -> Denoiser:
    """The denoiser of coupled patches, with the configured weighting of its loss."""
    execution = config.execution
    all_of_group = dataclasses.replace(execution, patches_at_once=None)

    def coupled(x: Tensor, noise: Tensor, objective: Objective | None = None) -> Tensor:
        return model(x, noise, coupling, execution, lag, objective)

    def alone(x: Tensor, noise: Tensor, objective: Objective | None = None) -> Tensor:
        def evaluate(group: Tensor) -> Tensor:
            fields = group.flatten(0, 1)[:, None]
            found = model(fields, noise.repeat_interleave(group.shape[1]), own, all_of_group)
            return found.unflatten(0, group.shape[:2]).squeeze(2)

        groups = [(group,) for group in x.split(execution.patches_at_once or x.shape[1], dim=1)]
        if objective is None:
            return group_by_group(evaluate, groups, model.parameters(), home=x.device)
        return sum_of_groups(evaluate, groups, model.parameters(), objective)

    own = OwnPatch(config.domain.patch, config.model.reach)
    network = alone if config.model.paths.alone else coupled
    return Denoiser(network, edm if config.diffusion.weighting == "edm" else RelativeError(*field.spectrum), network)


def check_same_run(config: Config, state: dict[str, Any], folder: Path) -> None:
    """Raise a UserError unless the configuration continues the run of a checkpoint."""
    for section, values in build(state["config"], str(folder)).as_dict().items():
        free = FREE_TO_CHANGE.get(section, set())
        for key, value in values.items():
            wanted = config.as_dict()[section][key]
            if free is not None and key not in free and value != wanted:
                raise UserError(
                    f"{folder}: the run was started with {section}.{key} = {value}, the configuration has {wanted}; "
                    "choose another --run, or the value of the run"
                )

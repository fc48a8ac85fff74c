"""XDMF sidecars: small XML files through which ParaView and VisIt open our HDF5 files as they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np

from ddpatch.io.volume import VolumeHeader, replace_when_complete


def write_sidecar(path: str | Path, header: VolumeHeader, name: str = "fields", overwrite: bool = False) -> Path:
    """Describe a file of fields in an XDMF 3 file beside it: one point in time per sample, one scalar per channel.

    A regular grid in three dimensions with exactly three channels also gets their vector, for streamlines and glyphs. The two
    files move together.

    Arguments:
        path: The HDF5 file, which need not exist yet.
        header: Its header.
        name: Its dataset ``[sample, channel, (z,) y, x]``.
        overwrite: Whether an existing sidecar may be replaced.

    Returns:
        The path of the sidecar.

    Raises:
        UserError: if the sidecar exists and may not be replaced, or its folder cannot be written.
    """
    path = Path(path)
    root = Element("Xdmf", Version="3.0")
    series = SubElement(SubElement(root, "Domain"), "Grid", Name=name, GridType="Collection", CollectionType="Temporal")
    for sample in range(header.samples):
        _add_sample(series, header, sample, f"{path.name}:/{name}")
    indent(root)
    sidecar = path.with_suffix(".xdmf")
    with replace_when_complete(sidecar, overwrite) as temporary:
        ElementTree(root).write(temporary, encoding="utf-8", xml_declaration=True)
    return sidecar


def _add_sample(series: Element, header: VolumeHeader, sample: int, dataset: str) -> None:
    grid = SubElement(series, "Grid", Name=f"sample {sample}", GridType="Uniform")
    SubElement(grid, "Time", Value=str(sample))
    SubElement(grid, "Topology", TopologyType=f"{header.ndim}DCoRectMesh", Dimensions=_words(header.grid_shape))
    geometry = SubElement(grid, "Geometry", GeometryType="ORIGIN_DXDYDZ" if header.ndim == 3 else "ORIGIN_DXDY")
    _add_values(geometry, (0.0,) * header.ndim)
    _add_values(geometry, header.spacing)
    for channel, label in enumerate(header.channels):
        attribute = SubElement(grid, "Attribute", Name=label, AttributeType="Scalar", Center="Node")
        _add_hyperslab(attribute, header, sample, channel, dataset)
    if header.ndim == len(header.channels) == 3:
        _add_vector(grid, header, sample, dataset)


def _add_vector(grid: Element, header: VolumeHeader, sample: int, dataset: str) -> None:
    attribute = SubElement(grid, "Attribute", Name="vector", AttributeType="Vector", Center="Node")
    shape = _words((*header.grid_shape, 3))
    join = SubElement(attribute, "DataItem", ItemType="Function", Function="JOIN($0, $1, $2)", Dimensions=shape)
    for channel in range(3):
        _add_hyperslab(join, header, sample, channel, dataset)


def _add_hyperslab(parent: Element, header: VolumeHeader, sample: int, channel: int, dataset: str) -> None:
    """Add the box of one channel of one sample: start, stride and count on every axis of the dataset."""
    slab = SubElement(parent, "DataItem", ItemType="HyperSlab", Dimensions=_words(header.grid_shape))
    box = SubElement(slab, "DataItem", Dimensions=f"3 {len(header.shape)}", NumberType="Int", Format="XML")
    start = (sample, channel, *(0,) * header.ndim)
    box.text = _words((*start, *(1,) * len(header.shape), 1, 1, *header.grid_shape))
    size = str(np.dtype(header.dtype).itemsize)
    values = SubElement(slab, "DataItem", Dimensions=_words(header.shape), NumberType="Float", Precision=size, Format="HDF")
    values.text = dataset


def _add_values(parent: Element, values: Iterable[float]) -> None:
    numbers = [float(value) for value in values]
    item = SubElement(parent, "DataItem", Dimensions=str(len(numbers)), NumberType="Float", Precision="8", Format="XML")
    item.text = _words(numbers)


def _words(values: Iterable[float]) -> str:
    return " ".join(repr(value) for value in values)

"""Sections, split by a protocol and served to methods, with the choices of ``conf/`` by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stexp.api.features import frozen_encoder, machine_of
from stexp.api.sections import Source, source_of
from stexp.api.settings import run_config
from stexp.api.typed import typed
from stexp.arguments import check
from stexp.construct import build
from stexp.data import datamodule
from stexp.data.cohorts import check_protocol
from stexp.data.dataset import DataSet
from stexp.data.features import TileEncoder
from stexp.data.section import Section
from stexp.data.shown import facts_table, one_line
from stexp.data.splits import check_fold, folds
from stexp.errors import InputError
from stexp.evaluation.verdict import count
from stexp.protocol import Protocol

log = logging.getLogger(__name__)


class _Own:
    def __repr__(self) -> str:
        return "<the data set's own>"


OWN: Any = _Own()
"""Default of arguments: what ``conf/data/<name>.yaml`` has for the data set that was read."""


class SpotDataModule(datamodule.SpotDataModule):
    """Sections, joined with their tiles and split by a protocol: a LightningDataModule of one fold.

    Settings that are left out are those of the data set that the sections were read from, as ``stexp-train`` has them;
    for sections made by hand the general ones hold, with flips and right angles as augmentation.

    Parameters
    ----------
    sections
        All sections, held out and not; those without an image serve as references.
    protocol
        ``"strict"`` (patients disjoint), ``"paper"`` (one section held out; with the gene list of the paper, where the
        data set names one, and whatever sections are given), ``"blocks"``, or a :class:`~stexp.protocol.Protocol`.
    fold
        The patient (strict), section (paper) or block that is held out; None: the first.
    image_encoder
        A choice of ``conf/image_encoder``, such as ``"uni"``; None: that of the data set or of the method. Two of the
        floors are on its features: scores of methods with different ones have different floors.
    image_encoder_args
        Arguments of the encoder that differ, such as ``{"frozen": True, "checkpoint": "weights.pth"}``.
    tile_px, tile_um
        Pixels of a tile's side, and the micrometres it covers; None: as many pixels of the full-resolution image.
    scales, scales_um
        Sides of what the image encoder sees of a spot, as multiples of a tile's or in micrometres, such as
        ``[56, 112, 224]``; None: the tile alone.
    batch_size, eval_batch_size
        Spots of a training step, and of a step without gradients.
    augmentation, hed_sigma, views
        ``"none"``, ``"dihedral"``, ``"paper"`` or ``"hed"``; spread of hed; augmented views whose frozen features are
        kept.
    stain
        ``"macenko"`` brings every section to the colours of the training sections.
    panel
        Genes to predict: names, or a file with one a line; None: chosen as the protocol says.
    panel_saw_test
        Whether whoever chose the panel had looked at the test sections; an item of the audit.
    leave_out
        Flags of spots to leave out, such as ``["few_counts", "off_tissue"]``.
    n_neighbours
        Spots around a spot that a batch carries.
    cache_dir, tile_store, placement
        Where tiles and features are kept, and how; see :class:`stexp.data.datamodule.SpotDataModule`.
    name
        Of the data, in scores and tables.
    test_data
        Sections of another data set: all of them are held out, and `sections` train. Settings are those of `sections`,
        genes those of both.
    test_name
        Of that data set, which is the fold; None: that of its source.
    random_features
        Seeds of the floor that the image encoder has at random weights, as many more passes over the tiles that are
        kept in the cache; 0: without it. An encoder that has random weights already is its own control.
    seed
        Of order, augmentation and the weights that training starts from.
    plugins
        Modules or packages of one's own that bring protocols, image encoders or methods as choices.

    Raises
    ------
    InputError
        An argument that does not fit, in one line that says what would.

    Examples
    --------
    >>> data = stexp.SpotDataModule(stexp.read_visium("outs/"), fold="P2", image_encoder="uni", tile_um=112)
    >>> data.spots.groupby("role").size(), data.panel[:3]
    """

    @typed
    def __init__(
        self,
        sections: Sequence[Section],
        protocol: str | Protocol = "strict",
        fold: str | None = None,
        *,
        image_encoder: str | None = None,
        image_encoder_args: Mapping[str, Any] | None = None,
        tile_px: int = OWN,
        tile_um: float | None = OWN,
        scales: Sequence[float] | None = OWN,
        scales_um: Sequence[float] | None = OWN,
        batch_size: int = OWN,
        eval_batch_size: int = OWN,
        augmentation: str = OWN,
        hed_sigma: float = OWN,
        views: int | None = OWN,
        stain: str | None = OWN,
        panel: Sequence[str] | str | Path | None = None,
        panel_saw_test: bool = OWN,
        leave_out: Sequence[str] = OWN,
        n_neighbours: int = OWN,
        cache_dir: str | Path = OWN,
        tile_store: str = OWN,
        placement: str = OWN,
        name: str | None = None,
        test_data: Sequence[Section] | None = None,
        test_name: str | None = None,
        random_features: int = 3,
        seed: int = 0,
        plugins: Sequence[str] = (),
    ) -> None:
        check("fold", fold, str | None)
        sections, source = _in_order(sections)
        named = {"data": "default" if source is None else source.data}
        named |= {"image_encoder": image_encoder} if image_encoder is not None else {}
        changes = _of_source(source, sections)
        if isinstance(protocol, Protocol):
            if type(protocol) is not Protocol:
                raise InputError(
                    f"protocol: {type(protocol).__name__} is a class derived of stexp.Protocol, whose values are all "
                    f"that splits and scores ask; an object of stexp.Protocol itself would fit"
                )
            changes |= {f"protocol.{key}": value for key, value in asdict(protocol).items()}
        else:
            named["protocol"] = protocol
        changes |= {f"image_encoder.{key}": value for key, value in (image_encoder_args or {}).items()}
        values = {
            "tile_px": tile_px,
            "tile_um": tile_um,
            "scales": scales,
            "scales_um": scales_um,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "augmentation": augmentation,
            "hed_sigma": hed_sigma,
            "views": views,
            "stain": stain,
            ("panel_file" if isinstance(panel, str | Path) else "panel"): OWN if panel is None else panel,
            "panel_saw_test": panel_saw_test,
            "leave_out": leave_out,
            "n_neighbours": n_neighbours,
            "cache_dir": cache_dir,
            "tile_store": tile_store,
            "placement": placement,
            "name": OWN if name is None else name,
        }
        changes |= {f"data.{key}": value for key, value in values.items() if value is not OWN}
        changes |= {"seed": seed, "random_features": random_features}
        self._named, self._changes, self._plugins = named, changes, tuple(plugins)
        self._config = run_config(self._named, self._changes, self._plugins)
        if test_data is not None:
            check_protocol(self._config["protocol"])
            other, tested = _cohort(test_data, test_name)
            self._changes |= {"test_data": other, "protocol.hold_out": "cohort"}
            self._config = run_config(self._named, self._changes, self._plugins)
        self._encoder: TileEncoder | None = None

        dataset, chosen = DataSet.of(self._config), build(self._config["protocol"])
        self.every_section = dataset.prepare(sections)
        if test_data is not None:
            self.every_section = dataset.tested_on(self.every_section, DataSet(other).prepare(tested))
        held_out = folds(self.every_section, chosen)
        if not held_out:
            raise InputError("no section has an image; nothing can be trained or scored")
        if fold is None:
            fold = held_out[0]
            log.info("fold=%s: the first of %s", fold, ", ".join(held_out))
        check_fold(self.every_section, chosen, fold)
        arguments = dataset.module_arguments() | {"panel": dataset.panel(chosen)}
        super().__init__(self.every_section, chosen, fold, **arguments, seed=seed)
        self.name = str(self._config["data"]["name"])

    @property
    def encoder(self) -> TileEncoder | None:
        """The frozen image encoder of :attr:`features`, built when they are first needed."""
        if self._encoder is None:
            self._encoder = frozen_encoder(self._config, machine_of(self._config))
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: TileEncoder | None) -> None:
        self._encoder = encoder

    def run_config(
        self, choices: Mapping[str, str], changes: Mapping[str, Any], plugins: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The config of a run on these data, with further choices of ``conf/`` and values; as plain data."""
        changes = {**self._changes, "fold": self.fold, **changes}
        return run_config({**self._named, **choices}, changes, [*self._plugins, *plugins])

    def __repr__(self) -> str:
        return one_line(self._facts())

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return facts_table(f"Spots of {self.name}, fold {self.fold}", self._facts())

    def _facts(self) -> dict[str, str]:
        """What the module holds, in words."""
        counted = self.spots.groupby("role", sort=False)["section"].agg(["size", "nunique"])
        roles = {
            str(role): f"{count(row['size'], 'spot')} of {count(row['nunique'], 'section')}"
            for role, row in counted.iterrows()
        }
        tile = f"{self.tile.px} px" + ("" if self.tile.um is None else f", {self.tile.um:g} um")
        return {
            "data": str(self.name),
            "protocol": f"{self.protocol.name} (fold {self.fold})",
            **roles,
            "panel": f"{len(self.panel)} genes",
            "tile": tile,
            "image encoder": self._named.get("image_encoder", "by default"),
        }


def _in_order(sections: Sequence[Section]) -> tuple[list[Section], Source | None]:
    """Sections in the order in which the files of their source are read, and the source, where they have one."""
    if not len(sections):
        raise InputError("sections: the list is empty; those of stexp.read_visium, read_samplesheet, ... would fit")
    sections = list(sections)
    source = source_of(sections)
    if source is None:
        return sections, None
    places = {name: place for place, name in enumerate(source.names)}
    return sorted(sections, key=lambda section: places[section.name]), source


def _cohort(sections: Sequence[Section], name: str | None) -> tuple[dict[str, Any], list[Section]]:
    """What a config says of a data set that is tested, and its sections."""
    sections, source = _in_order(sections)
    changes = _of_source(source, sections) | ({} if name is None else {"data.name": name})
    return run_config({"data": "default" if source is None else source.data}, changes)["data"], sections


def _of_source(source: Source | None, sections: Sequence[Section]) -> dict[str, Any]:
    """Values of ``conf/data`` that read the same sections again; of sections made by hand, that nothing does."""
    if source is None:
        return {"data.name": "sections", "data.root": None, "data.augmentation": "dihedral"}
    of_set = run_config({"data": source.data}, {})["data"]
    changes = {f"data.{'' if key in of_set else 'reader.'}{key}": value for key, value in source.arguments.items()}
    names = [section.name for section in sections]
    # the paper's protocol would take the sections of the paper
    all_are_read = names == source.names and of_set["published_sections"] is None
    return changes if all_are_read else changes | {"data.sections": names}

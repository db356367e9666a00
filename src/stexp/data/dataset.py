"""A data set as its config describes it: which sections, read how, and how they are served to a method."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from stexp.arguments import Positive, check
from stexp.construct import build
from stexp.data.cohorts import check_scales, join_cohorts
from stexp.data.genes import read_panel
from stexp.data.readers.formats import tables_in_one_line
from stexp.data.section import Section
from stexp.data.section_index import read_once
from stexp.data.slides.scales import tile_and_scales
from stexp.errors import InputError, UnknownName
from stexp.protocol import Protocol

if TYPE_CHECKING:
    from stexp.data.datamodule import SpotDataModule
    from stexp.data.slides.tiles import TileSpec

_Genes = Annotated[list[str], Field(min_length=1, description="a list of gene symbols")]


@dataclass(frozen=True)
class DataSet:
    """Sections of one source, and the settings of the data module that serves them.

    Parameters
    ----------
    config
        ``conf/data/<name>.yaml`` with every value in place, as plain data.
    test
        The same of another data set, whose sections are tested and train nothing; the settings of the data module are
        those of `config`.
    """

    config: Mapping[str, Any]
    test: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DataSet:
        """The data set of a run's config, with the one that it tests on, if it names another."""
        return cls(config["data"], config.get("test_data"))  # which run folders of earlier versions lack

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def title(self) -> str:
        """Its name beside scores, with that of the data set that is tested."""
        return self.name if self.test is None else f"{self.name}-to-{self.test['name']}"

    @property
    def root(self) -> str:
        return str(self.config["root"])

    def section_names(self, protocol: Protocol) -> list[str] | None:
        """Sections to read: ``sections``, the paper's under its protocol, or None for all there are."""
        names = self.config["sections"]
        if isinstance(names, str | int):
            names = [names]
        if names is not None and len(names) == 0:
            raise InputError("data.sections is empty; name some, or leave it out for all")
        if names is None and protocol.published:
            names = self.config["published_sections"]
        return None if names is None else [str(name) for name in names]

    def read_sections(self, protocol: Protocol) -> list[Section]:
        """Read the sections a protocol asks for, at the stated scale, without the spots that are to be left out.

        Raises
        ------
        InputError
            A name that no section has, two sections with the same counts, or what the reader refuses.
        """
        names = self.section_names(protocol)
        if self.config["reader"] is None:
            raise InputError(f"the sections of {self.name} were given from Python: no file says where they are from")
        reader = dict(self.config["reader"])
        if "sections" in reader:
            reader["sections"] = names
        with tables_in_one_line(self.name):
            sections = read_once(reader, self.config["cache_dir"], lambda: build(reader))
        if names is not None:
            choices, wanted = {section.name: section for section in sections}, set(names)
            unknown = [name for name in names if name not in choices]
            if unknown:
                message = f"data.sections: {', '.join(unknown)} not in {self.name}; there are {', '.join(choices)}"
                raise UnknownName(message, unknown, choices, typed="data.sections=[{}]")
            sections = [section for section in sections if section.name in wanted]
        sections = self.prepare(sections)
        return sections if self.test is None else self.tested_on(sections, DataSet(self.test).read_sections(protocol))

    def tested_on(self, sections: list[Section], others: list[Section]) -> list[Section]:
        """Its own sections with those of `test`; see :func:`~stexp.data.cohorts.join_cohorts`."""
        assert self.test is not None
        joined = join_cohorts(sections, others, self.name, str(self.test["name"]))
        check_scales(joined, tile_and_scales(*self._sides)[0], self.config["tile_px"])
        return joined

    def prepare(self, sections: list[Section]) -> list[Section]:
        """Sections at the stated scale, without the spots that are to be left out; InputError for two of one count."""
        if not self.config.get("allow_duplicates"):  # run folders of earlier versions lack it
            _refuse_copies(sections)
        um_per_px = self.config["um_per_px"]
        if um_per_px is not None:
            check("data.um_per_px", um_per_px, Positive)
            sections = [replace(section, um_per_px=float(um_per_px)) for section in sections]
        return self._leave_out(sections) if self.config["leave_out"] else sections

    def _leave_out(self, sections: list[Section]) -> list[Section]:
        # these import torch, which reading sections does without
        from stexp.data.quality import leave_out
        from stexp.data.slides.tiles import TileSpec, open_tiles

        flags = self.config["leave_out"]
        flags = [flags] if isinstance(flags, str) else [str(flag) for flag in flags]
        tile = TileSpec(self.config["tile_px"], tile_and_scales(*self._sides)[0])  # not what views see around it
        cache = (self.config["cache_dir"], self.config["tile_store"])
        thresholds = build(self.config["quality"])
        return leave_out(sections, flags, thresholds, tile, lambda section: open_tiles(section, tile, *cache))

    @property
    def tile(self) -> TileSpec:
        """What is cut and stored of each spot."""
        from stexp.data.slides.tiles import TileSpec  # imports torch, which reading sections does without

        return TileSpec.of(self.config["tile_px"], *self._sides)

    @property
    def _sides(self) -> tuple[float | None, list[float] | None, list[float] | None]:
        """Of a tile in micrometres, and of what is seen of it."""
        # run folders of earlier versions lack the last two
        return self.config["tile_um"], self.config.get("scales"), self.config.get("scales_um")

    def panel(self, protocol: Protocol) -> list[str] | None:
        """The genes named by the data set, or the paper's under its protocol; None where genes are chosen."""
        genes = self.config.get("panel")  # run folders of earlier versions lack it
        if genes is not None:
            check("data.panel", genes, _Genes)
            return list(genes)
        file = self.config["panel_file"] or (self.config["published_panel_file"] if protocol.published else None)
        return None if file is None else read_panel(file)

    def serve(
        self,
        sections: list[Section],
        protocol: Protocol,
        fold: str,
        seed: int,
        panel: list[str] | None = None,
        **more: Any,
    ) -> SpotDataModule:
        """The data module of one fold.

        Parameters
        ----------
        panel
            Genes in place of those that the data set names or the protocol chooses.
        more
            Further arguments of :class:`~stexp.data.datamodule.SpotDataModule`, such as ``encoder``.
        """
        panel = panel or self.panel(protocol)
        node = {"_target_": self.config["_target_"], **self.module_arguments()}
        return build(node, sections=sections, protocol=protocol, fold=fold, seed=seed, panel=panel, **more)

    def module_arguments(self) -> dict[str, Any]:
        """Arguments of :class:`~stexp.data.datamodule.SpotDataModule` that stand in the config."""
        from stexp.data.datamodule import SpotDataModule  # imports torch, which reading sections does without

        # a reader's own options stand in the data set's config under the names that the reader gives them
        of_module = set(inspect.signature(SpotDataModule).parameters)
        of_reader = set(self.config["reader"] or ()) - of_module
        before = BEFORE_THE_MODULE | of_reader | {"_target_"}
        return {key: value for key, value in self.config.items() if key not in before}


BEFORE_THE_MODULE = {
    *("name", "root", "source", "download", "mirror", "keep_archives", "reader", "licence"),
    *("sections", "sections_of", "published_sections", "panel", "panel_file", "published_panel_file"),
    *("um_per_px", "quality", "leave_out"),
}
"""Keys of a data set that are for what comes before the data module."""


def _refuse_copies(sections: list[Section]) -> None:
    """A section listed twice could train and be tested, and no split by name would see it."""
    seen: dict[bytes, str] = {}
    for section in sections:
        key = section.made("digest", partial(_digest, section.spots.X))["digest"].tobytes()
        if key in seen and section.total_counts.any():
            raise InputError(f"sections {seen[key]} and {section.name} hold the same counts; list them once")
        seen[key] = section.name


def _digest(counts: sp.csr_matrix) -> dict[str, np.ndarray]:
    """Hash of counts, whatever their spots and genes are called: 16 bytes."""
    digest = hashlib.blake2b(f"{counts.shape} {counts.sum()}".encode(), digest_size=16)
    for values in (counts.data, counts.indices):
        digest.update(np.ascontiguousarray(values).data)
    return {"digest": np.frombuffer(digest.digest(), dtype=np.uint8)}

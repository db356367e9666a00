"""Sections from files, each with a record of the call that read it, so that a run can be opened again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec
from weakref import WeakKeyDictionary

from stexp.api.typed import typed
from stexp.data.readers import (
    alex10x,
    cscc,
    demo,
    her2st,
    hest,
    samplesheet,
    spatialdata,
    visium,
    visium_hd,
    xenium,
)
from stexp.data.section import Section

P = ParamSpec("P")


@dataclass(frozen=True)
class Source:
    """The call of a reader that a section is from.

    Attributes
    ----------
    data
        Choice of ``conf/data``.
    arguments
        What the reader was called with, by name.
    names
        All sections that it returned.
    """

    data: str
    arguments: dict[str, Any]
    names: list[str]


_SOURCES: WeakKeyDictionary[Section, Source] = WeakKeyDictionary()
"""Sections as they were read; one that was changed is another object, and has no source."""


def source_of(sections: Sequence[Section]) -> Source | None:
    """The one call that all of some sections are from; None where there is none, or several."""
    sources = [_SOURCES.get(section) for section in sections]
    return sources[0] if sources and all(source is sources[0] for source in sources) else None


def with_source(data: str, reader: Callable[P, list[Section]]) -> Callable[P, list[Section]]:
    """A reader whose sections :func:`source_of` knows.

    Parameters
    ----------
    data
        Choice of ``conf/data`` that names the same reader.
    """

    reader = typed(reader)

    @functools.wraps(reader)
    def read(*args: P.args, **kwargs: P.kwargs) -> list[Section]:
        sections = reader(*args, **kwargs)
        arguments = dict(inspect.signature(reader).bind(*args, **kwargs).arguments)
        source = Source(data, arguments, [section.name for section in sections])
        _SOURCES.update(dict.fromkeys(sections, source))
        return sections

    return read


read_alex10x = with_source("alex10x", alex10x.read_alex10x)
read_cscc = with_source("cscc", cscc.read_cscc)
read_demo = with_source("demo", demo.read_demo)
read_her2st = with_source("her2st", her2st.read_her2st)
read_hest = with_source("hest", hest.read_hest)
read_samplesheet = with_source("samplesheet", samplesheet.read_samplesheet)
read_spatialdata = with_source("spatialdata", spatialdata.read_spatialdata)
read_visium = with_source("visium", visium.read_visium)
read_visium_hd = with_source("visium_hd", visium_hd.read_visium_hd)
read_xenium = with_source("xenium", xenium.read_xenium)

"""A section divided into what is shown and what is asked for: the task, and the truth that only scoring sees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.completion.shown import Known, Pattern, shown_genes, shown_spots, square_array
from stexp.completion.tasks import GeneTask, SpotTask
from stexp.data.gene_names import harmonise
from stexp.data.genes import choose_panel, normalise
from stexp.data.readers.h5ad import counts_of, read_h5ad
from stexp.data.section import Section
from stexp.data.slides.spacing import spacing
from stexp.errors import InputError, listed
from stexp.protocol import Protocol

log = logging.getLogger(__name__)

OTHERS = ("patients", "sections", "none")
"""References of the data set: sections of other patients, all other sections, none; else a file."""


@dataclass(frozen=True)
class Truth:
    """What scoring holds predictions against; no method gets it.

    Parameters
    ----------
    rows : (H,) int
        Spots of the section that are asked for.
    genes
        That are asked for.
    observed, counts : (H, G)
    total_counts : (H,)
        Over the whole transcriptome.
    level : (G,)
        How high the genes are on what is shown, or in the reference: ranks the highest.
    """

    rows: np.ndarray
    genes: list[str]
    observed: np.ndarray
    counts: np.ndarray
    total_counts: np.ndarray
    level: np.ndarray


@dataclass(frozen=True)
class Problem:
    """A section to complete.

    Parameters
    ----------
    shown_genes
        Of ``known="genes"``; empty where spots are shown, which show all genes of the panel.
    references
        Names of what else is measured.
    """

    section: Section
    known: Known
    task: SpotTask | GeneTask
    truth: Truth
    shown_genes: list[str]
    references: list[str]

    @property
    def shown(self) -> np.ndarray:
        """Spots of which something is shown, (N,) bool: all, where genes are asked for."""
        return self.task.shown if isinstance(self.task, SpotTask) else np.ones(len(self.section), dtype=bool)

    @property
    def has_features(self) -> bool:
        """Whether methods get what tiles look like."""
        return isinstance(self.task, SpotTask) and self.task.features is not None

    def statement(self) -> str:
        """What methods were given, in words."""
        if self.known == "spots":
            return (
                f"Methods get the counts of {int(self.shown.sum())} of {len(self.shown)} spots, the places "
                f"{'and tiles ' if self.has_features else ''}of all, and {_names(self.references, 'whole section')}; "
                f"nothing of the other spots' counts, nor of their totals."
            )
        return (
            f"Methods get {len(self.shown_genes)} genes of every spot, as shares of the counts of these genes alone, "
            f"since the total over the transcriptome is not measured, and {_names(self.references, 'reference')}; the "
            f"truth is relative to that total, which only scoring knows."
        )


def _names(names: Sequence[str], what: str) -> str:
    if not names:
        return f"no {what}"
    some = ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:8])} and {len(names) - 8} more"
    return f"the {what}{'s' if len(names) > 1 else ''} {some}"


def in_pitches(section: Section) -> np.ndarray:
    """Places of the spots of a section, in distances to the nearest spot, (N, 2)."""
    return section.xy_px / spacing(section.xy_px)


def check_scale(protocol: Protocol) -> None:
    """InputError for a truth that mixes what is shown with what is hidden."""
    if protocol.truth != "spot":
        raise InputError(
            f"protocol.truth={protocol.truth}: it scales a spot by the others of its section, those that are hidden, "
            f"too; protocol.truth=spot would fit"
        )
    if protocol.library != "transcriptome":
        raise InputError(
            f"protocol.library={protocol.library}: it scales genes by the others of the panel, those that are hidden, "
            f"too; protocol.library=transcriptome would fit"
        )


def other_sections(section: Section, sections: Sequence[Section], reference: str) -> list[Section]:
    """Sections that `reference`, one of `OTHERS`, lets methods see in whole."""
    others = [other for other in sections if other.name != section.name]
    if reference == "patients":
        return [other for other in others if other.patient != section.patient]
    return others if reference == "sections" else []


def spot_problem(
    section: Section,
    others: Sequence[Section],
    protocol: Protocol,
    panel: Sequence[str] | None,
    *,
    features: dict[str, np.ndarray],
    pattern: Pattern = "random",
    share: float | None = None,
    seed: int = 0,
) -> Problem:
    """Show some spots of a section.

    Parameters
    ----------
    others
        Sections that are shown in whole; those that lack a gene of the panel or, where `features` has those of
        `section`, features, are left out.
    panel
        Genes; None: chosen on what is shown, as the protocol chooses.
    features
        Of the tiles of sections that have some, (n_spots, F) each.
    """
    check_scale(protocol)
    shown = shown_spots(section.array_xy, pattern, share, seed)
    visible = section.take(shown)
    # before anything is calculated, so that nothing of the hidden spots is in what methods get
    of_image = section.name in features
    others = [other for other in others if not of_image or other.name in features]
    if len(np.unique(section.xy_px, axis=0)) < len(section):
        raise InputError(f"section {section.name}: several spots lie at one place; one spot a place would fit")
    genes = list(panel) if panel else choose_panel([visible, *others], protocol)
    genes = _measured(genes, section, "section")
    whole = [other for other in others if set(genes) <= set(other.genes)]
    if len(whole) < len(others):
        log.warning("%d sections lack genes of the panel and are no reference", len(others) - len(whole))
    expression = normalise(visible.counts(genes), visible.total_counts, protocol)
    level = expression.mean(axis=0)
    references = [normalise(other.counts(genes), other.total_counts, protocol) for other in whole]
    references = [values - values.mean(axis=0) + level for values in references]
    task = SpotTask(
        xy=in_pitches(section),
        array_xy=square_array(section.array_xy),
        shown=shown,
        expression=expression,
        features=features.get(section.name),
        references=np.concatenate([np.empty((0, len(genes)), np.float32), *references]),
        reference_features=np.concatenate([features[other.name] for other in whole]) if of_image and whole else None,
        reference_section=np.concatenate([np.empty(0, str), *(np.full(len(other), other.name) for other in whole)]),
        reference_xy=np.concatenate([np.empty((0, 2)), *map(in_pitches, whole)]),
        compact=pattern in ("corner", "strip"),
        seed=seed,
    )
    rows = np.flatnonzero(~shown)
    counts, total = section.counts(genes)[rows], section.total_counts[rows]
    truth = Truth(rows, genes, normalise(counts, total, protocol), counts, total, level)
    return Problem(section, "spots", task, truth, [], [other.name for other in whole])


def gene_problem(
    section: Section,
    others: Sequence[Section] | Path,
    protocol: Protocol,
    panel: Sequence[str] | None,
    *,
    share: float | None = None,
    seed: int = 0,
) -> Problem:
    """Show some genes of all spots of a section.

    Parameters
    ----------
    others
        Sections that have all genes, or an h5ad of raw counts of cells or spots.
    panel
        Genes, of which some are shown; None: chosen on the reference, as the protocol chooses.

    Notes
    -----
    Genes outside the panel are neither shown nor asked for, and no total of them is used.
    """
    check_scale(protocol)
    has_places = not isinstance(others, Path)
    tables = [_of_file(others)] if isinstance(others, Path) else list(others)
    if not tables:
        raise InputError(
            f"reference: no section of another patient than {section.patient} is at hand to learn genes from; "
            f"reference=sections, or reference=FILE.h5ad would fit"
        )
    genes = list(panel) if panel else choose_panel(tables, protocol, measured_in=[section])
    genes = _measured(genes, section, "section")
    whole = [table for table in tables if set(genes) <= set(table.genes)]
    if not whole:  # of one file, or of sections of another panel: what all of them have
        genes = _measured(genes, tables[0], "reference")
        whole = [tables[0]]
    shown = shown_genes(len(genes), share, seed)
    names, asked = (
        [g for g, s in zip(genes, shown, strict=True) if s],
        [g for g, s in zip(genes, shown, strict=True) if not s],
    )

    def of_shown(table: Section) -> np.ndarray:
        counts = table.counts(names)
        return normalise(counts, counts.sum(axis=1), protocol)

    hidden = np.concatenate([normalise(table.counts(asked), table.total_counts, protocol) for table in whole])
    task = GeneTask(
        xy=in_pitches(section),
        expression=of_shown(section),
        reference_shown=np.concatenate([of_shown(table) for table in whole]),
        reference_hidden=hidden,
        reference_section=np.concatenate([np.full(len(table), table.name) for table in whole]),
        reference_xy=np.concatenate([in_pitches(table) for table in whole]) if has_places else None,
        seed=seed,
    )
    counts, total = section.counts(asked), section.total_counts
    truth = Truth(
        np.arange(len(section)), asked, normalise(counts, total, protocol), counts, total, hidden.mean(axis=0)
    )
    return Problem(section, "genes", task, truth, names, [table.name for table in whole])


def _measured(genes: list[str], section: Section, what: str) -> list[str]:
    """Genes of a panel that a section measures; what is left out is said, and none is refused."""
    kept = [gene for gene in genes if gene in section.genes]
    missing = sorted(set(genes) - set(kept))
    if not kept:
        raise InputError(f"{what} {section.name} measures none of the {len(genes)} panel genes ({genes[0]}, ...)")
    if missing:
        log.warning("%s %s lacks %d genes of the panel: %s", what, section.name, len(missing), listed(missing))
    return kept


def _of_file(path: Path) -> Section:
    """Raw counts of an h5ad as a section whose spots have no places."""
    if not path.is_file():
        raise InputError(f"reference={path} is no file; an h5ad of raw counts, {', '.join(OTHERS)} would fit")
    where = f"reference {path}"
    counts = harmonise(counts_of(read_h5ad(path, "reference"), where), where=where)
    counts.obs = pd.DataFrame({"array_x": 0, "array_y": np.arange(counts.n_obs)}, index=counts.obs_names)
    counts.obsm["spatial"] = np.column_stack([np.zeros(counts.n_obs), np.arange(counts.n_obs, dtype=float)])
    return Section(path.stem, path.stem, counts, files=(path,))

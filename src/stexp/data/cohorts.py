"""Two data sets in one: one trains, the other is tested."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stexp.data.section import Section
from stexp.errors import InputError

log = logging.getLogger(__name__)


def join_cohorts(training: list[Section], test: list[Section], name: str, test_name: str) -> list[Section]:
    """Sections of a data set that trains, and of another that is tested, under names that tell them apart.

    Parameters
    ----------
    name, test_name
        Of the data sets. Where a section or patient of both has one name, those of the second get its name before
        theirs.

    Raises
    ------
    InputError
        One name in two data sets that are called the same, so that it may be the same section or patient.
    """
    clashes = sorted({*_names(training)} & {*_names(test)})
    if clashes:
        few = ", ".join(clashes[:5])
        if name == test_name:
            raise InputError(
                f"data and test_data are both {name}, and both have {few}: this would test on what it is trained on; "
                f"data.sections= and test_data.sections= take some of each, test_data.name= names another set"
            )
        log.info("%s and %s both have %s; those of %s are called %s-...", name, test_name, few, test_name, test_name)
        test = [replace(part, name=f"{test_name}-{part.name}", patient=f"{test_name}-{part.patient}") for part in test]
        still = sorted({*_names(training)} & {*_names(test)})
        if still:
            raise InputError(
                f"{still[0]} is of {name} and of {test_name}; test_data.name= gives {test_name} another name"
            )
    return [*training, *(replace(section, cohort=test_name) for section in test)]


def check_protocol(protocol: Mapping[str, Any]) -> None:
    """InputError where a protocol, as its config has it, splits or chooses as no test on another data set does."""
    if protocol["hold_out"] == "block":
        reason = "holds out blocks of sections, test_data= another data set as a whole"
    elif protocol["panel"] == "all":
        reason = "chooses genes on what is tested, too (protocol.panel=all), test_data= on what trains alone"
    elif protocol["published"]:
        reason = "takes sections and genes of a paper (protocol.published=true), which tested on none of test_data="
    else:
        return
    raise InputError(f"protocol={protocol['name']} {reason}; protocol=strict would fit")


def _names(sections: Sequence[Section]) -> list[str]:
    return [name for section in sections for name in (section.name, section.patient)]


def check_scales(sections: Sequence[Section], tile_um: float | None, tile_px: int) -> None:
    """InputError where tiles of as many pixels would show more tissue in one cohort than in the other."""
    if tile_um is not None:
        return
    scales = [_scales([section for section in sections if bool(section.cohort) == tested]) for tested in (False, True)]
    if all(len(side) for side in scales) and max(max(side) for side in scales) > 1.05 * min(
        min(side) for side in scales
    ):
        spans = [f"{min(side):.3g} to {max(side):.3g}" for side in scales]
        raise InputError(
            f"pixels cover {spans[0]} um where is trained and {spans[1]} um where is tested; data.tile_um= (such as "
            f"{_round(np.median(scales[0]) * tile_px):g}) cuts tiles of one size in micrometres"
        )


def _scales(sections: Sequence[Section]) -> list[float]:
    return [section.um_per_px for section in sections if section.slide is not None and section.um_per_px is not None]


def _round(um: float) -> float:
    return float(np.round(um))


def batch_effects(sections: Sequence[Section], panel: Sequence[str]) -> list[str]:
    """Depth, detection and scale of each cohort, a line each; none where there is one cohort.

    They differ between laboratories, and a score cannot tell that from what differs between tissues.
    """
    lines: list[str] = []
    if not any(section.cohort for section in sections):
        return lines
    for tested in (False, True):
        part = [section for section in sections if bool(section.cohort) == tested and section.slide is not None]
        depth = np.median(np.concatenate([section.total_counts for section in part]))
        counts = [np.nan_to_num(section.counts(list(panel))) for section in part]
        seen = 100 * np.mean([(each > 0).mean() for each in counts])
        scales = _scales(part)
        scale = f", {np.median(scales):.3g} um a pixel" if scales else ""
        n_genes = int(np.median([len(section.genes) for section in part]))
        lines.append(
            f"{'tested' if tested else 'trained'} on: {len(part)} section(s), a spot has {depth:,.0f} counts (median) "
            f"over {n_genes:,} measured genes, {seen:.0f} % of the panel is seen in it{scale}"
        )
    return lines


def unmeasured(panel: Sequence[str], sections: Sequence[Section]) -> list[str]:
    """Genes of a panel that a tested section does not measure, in their order; they are said."""
    measured = set.intersection(*(set(section.genes) for section in sections))
    dropped = [gene for gene in panel if gene not in measured]
    if dropped:
        few = f"{', '.join(dropped[:5])}{', ...' if len(dropped) > 5 else ''}"
        log.warning(
            "%d of %d genes are not measured in the tested cohort and are dropped: %s", len(dropped), len(panel), few
        )
    return dropped


def harmonised(panel: Sequence[str], sections: Sequence[Section]) -> list[str]:
    """Genes of a panel that every tested section measures, in their order; what is dropped is said."""
    dropped = set(unmeasured(panel, sections))
    kept = [gene for gene in panel if gene not in dropped]
    if not kept:
        section = sections[0]
        raise InputError(
            f"the tested cohort measures none of the {len(panel)} panel genes: it has genes like {section.genes[0]}, "
            f"the panel like {panel[0]}; names of one kind would fit (gene_table= of a data set maps ids to symbols)"
        )
    return kept

"""What an experiment may see, and what it is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import yaml
from pydantic import Field

from stexp.arguments import Count, Positive, Share, checked
from stexp.errors import InputError, did_you_mean
from stexp.files import CONF

_Name = Annotated[str, Field(pattern=r"^[^/\\:]+$", description="a name without slashes and colons")]
_Blocks = Annotated[int, Field(ge=3, le=1000, description="3 to 1000 (one block tests, one validates, the rest train)")]
_Panel = Annotated[
    Literal["train", "all"], Field(description="train or all (whose counts choose the genes; data.panel names them)")
]


@checked("protocol")
@dataclass(frozen=True)
class Protocol:
    """Every choice between data and score that changes what a number means.

    ``conf/protocol/strict.yaml`` (default) and ``conf/protocol/paper.yaml`` are the two settings;
    each field is a switch of its own. ``paper`` follows the published code of mclSTExp
    (arXiv 2407.08216), because the code made the printed numbers.

    Parameters
    ----------
    name
        Stands beside every score.
    hold_out
        What a fold holds out: all sections of a ``"patient"``; one ``"section"``, with the other sections of
        its patient left in training and reference; or one of the `blocks` that every section is cut into,
        for data of one section or patient. Blocks share tissue, stain and depth with what trains, so their
        scores say how well a section is filled in, not how well another one is predicted. ``"cohort"``: all of
        another data set, which ``test_data=`` names.
    validation
        Keep part of the training side apart (a patient where three or more train, else a section, else a
        quarter of the spots), choose the checkpoint and k on it. False: last epoch, k as given.
    blocks
        Compact parts of about equal size that ``hold_out="block"`` cuts a section into.
    panel
        Sections that choose the predicted genes: ``"train"`` or ``"all"`` (the test section too).
    n_hvg, min_spots, panel_size
        See :func:`~stexp.data.genes.choose_panel`; `panel_size` None: all that qualify.
    library
        Library size of a spot: counts over the whole ``"transcriptome"`` or over the ``"panel"``.
    target_sum
        Counts per spot (or gene) after scaling.
    log
        ``"natural"``: ln(1 + x); ``"log10"``: log10(1 + x).
    truth
        Scaling of the observed and the retrieved expression: per ``"spot"``, or per ``"gene"``, where every
        gene sums to `target_sum` over the spots of its section, as in the published code, so that
        sequencing depth stays in the target. ``"residuals"``: how far the counts of a spot are from what its depth
        and the gene's share in the section let expect, see :func:`~stexp.data.genes.pearson_residuals`; of the three
        the least bound to depth, without a word on how high a gene is. What the spot encoder reads, and what ranks
        the highest genes of residuals, is always scaled per spot.
    spot_context
        What a spot attends to in the spot encoder: its ``"neighbours"`` in the section, or the ``"batch"``
        it came in (32 consecutive spots at inference, across section borders, as published).
    heg
        Spots that rank the 50 highest genes: ``"train"`` or ``"test"``.
    k
        Retrieved neighbours, or ``"auto"``: the best of a few on the validation spots.
    published
        Use the sections and the gene list of the paper where the data set names them.
    """

    name: _Name
    hold_out: Literal["patient", "section", "block", "cohort"] = "patient"
    blocks: _Blocks = 4
    validation: bool = True
    panel: _Panel = "train"
    n_hvg: Count = 1000
    min_spots: Share = 0.075
    panel_size: Count | None = 1000
    library: Literal["transcriptome", "panel"] = "transcriptome"
    target_sum: Positive = 1e4
    log: Literal["natural", "log10"] = "natural"
    truth: Literal["spot", "gene", "residuals"] = "spot"
    spot_context: Literal["neighbours", "batch"] = "neighbours"
    heg: Literal["train", "test"] = "train"
    k: Count | Literal["auto"] = "auto"
    published: bool = False

    def __post_init__(self) -> None:
        if self.truth == "residuals" and self.hold_out == "block":
            raise InputError(
                "protocol.truth=residuals: they are deviations from a whole section, of which hold_out=block trains on "
                "a part; truth=spot would fit, or hold_out=patient or section"
            )

    @property
    def scoring(self) -> tuple:
        """What a score depends on besides the split."""
        return (*self.scale, self.heg)

    @property
    def scale(self) -> tuple:
        """What the scale of the truth depends on."""
        return self.truth, self.library, self.log, self.target_sum


def named_protocols() -> dict[str, Protocol]:
    """The protocols of ``conf/protocol`` by name."""
    files = sorted((CONF / "protocol").glob("*.yaml"))
    nodes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    return {
        name: Protocol(**{key: value for key, value in node.items() if key != "_target_"})
        for name, node in nodes.items()
    }


def protocol_named(name: str) -> Protocol:
    """One of :func:`named_protocols`."""
    protocols = named_protocols()
    if name not in protocols:
        raise InputError(f"protocol={name}: choose {', '.join(protocols)}{did_you_mean(name, protocols)}")
    return protocols[name]


def other_protocols(own: Protocol) -> dict[str, Protocol]:
    """The protocols that a run is scored under besides its own: those with another truth or other highest genes."""
    others = {name: protocol for name, protocol in named_protocols().items() if name != own.name}
    return {
        name: protocol
        for name, protocol in others.items()
        if protocol.hold_out != "block" and protocol.scoring != own.scoring
    }

"""What an experiment may see, and what it is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from stexp.errors import InputError


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
        scores say how well a section is filled in, not how well another one is predicted.
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
        sequencing depth stays in the target. What the spot encoder reads is always scaled per spot.
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

    name: str
    hold_out: Literal["patient", "section", "block"] = "patient"
    blocks: int = 4
    validation: bool = True
    panel: Literal["train", "all"] = "train"
    n_hvg: int = 1000
    min_spots: float = 0.075
    panel_size: int | None = 1000
    library: Literal["transcriptome", "panel"] = "transcriptome"
    target_sum: float = 1e4
    log: Literal["natural", "log10"] = "natural"
    truth: Literal["spot", "gene"] = "spot"
    spot_context: Literal["neighbours", "batch"] = "neighbours"
    heg: Literal["train", "test"] = "train"
    k: int | Literal["auto"] = "auto"
    published: bool = False

    @property
    def scoring(self) -> tuple:
        """What a score depends on besides the split."""
        return (*self.scale, self.heg)

    @property
    def scale(self) -> tuple:
        """What the scale of the truth depends on."""
        return self.truth, self.library, self.log, self.target_sum

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(type(self)).items():
            value = getattr(self, key)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise InputError(f"protocol.{key}={value}: choose {' or '.join(get_args(kind))}")
        if self.k != "auto" and not (isinstance(self.k, int) and self.k >= 1):
            raise InputError(f"protocol.k={self.k}: give a whole number of neighbours, or auto")
        if not isinstance(self.name, str) or not self.name or set(self.name) & set("/\\:"):
            raise InputError(f"protocol.name={self.name}: a name without slashes and colons would fit")
        for key, value in (("n_hvg", self.n_hvg), ("panel_size", 1 if self.panel_size is None else self.panel_size)):
            if not (isinstance(value, int) and value >= 1):
                raise InputError(f"protocol.{key}={value}: a whole number of at least 1 would fit")
        if not (isinstance(self.min_spots, int | float) and 0 <= self.min_spots <= 1):
            raise InputError(f"protocol.min_spots={self.min_spots}: a fraction of the spots, 0 to 1, would fit")
        if not (isinstance(self.target_sum, int | float) and 0 < self.target_sum < float("inf")):
            raise InputError(f"protocol.target_sum={self.target_sum}: a number above 0 (say 10000) would fit")
        if not (isinstance(self.blocks, int) and self.blocks >= 3):
            raise InputError(f"protocol.blocks={self.blocks}: give 3 or more: one tests, one validates, the rest train")

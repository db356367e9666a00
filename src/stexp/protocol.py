"""What an experiment may see, and what it is scored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from stexp import InputError


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
        What a fold holds out: all sections of a ``"patient"``, or one ``"section"``, with the other
        sections of its patient left in training and reference.
    validation
        Keep part of the training side apart (a patient where three or more train, else a section, else a
        quarter of the spots), choose the checkpoint and k on it. False: last epoch, k as given.
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
    hold_out: Literal["patient", "section"] = "patient"
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

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(type(self)).items():
            value = getattr(self, key)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise InputError(f"protocol.{key}={value}: choose {' or '.join(get_args(kind))}")
        if self.k != "auto" and not (isinstance(self.k, int) and self.k >= 1):
            raise InputError(f"protocol.k={self.k}: give a whole number of neighbours, or auto")

"""``metrics.json``, ``audit.json``, ``provenance.json`` and ``per_gene.csv`` of a run folder, each read in one way."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # those of typing carry no annotations before Python 3.12
    TypeVar,
)

from pydantic import Field
from typing_extensions import TypedDict

from stexp.arguments import Count, NotNegative, Whole, check_fields
from stexp.data.readers.memory import check_fits
from stexp.documents import parse_json
from stexp.errors import InputError
from stexp.files import restore

AGAIN = "give the command that made the run again"
"""What makes a missing file of a run folder: the command goes on from what is there."""

Fields = TypeVar("Fields")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scores = dict[str, Finite | None]
Patients = dict[str, str]
Manifest = dict[str, dict[str, str]]
"""Section -> file -> digest."""


class SpotHashes(TypedDict):
    """See :func:`stexp.data.duplicates.record_spots`."""

    counts: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
    tiles: NotRequired[list[Annotated[str, Field(pattern="^[0-9a-f]{28}$")]]]


Spots = dict[str, SpotHashes]
"""Section -> hashes of some of its spots."""


class Chosen(TypedDict):
    """What a method chose on validation spots, and what retrieving again changed."""

    k: NotRequired[Count]
    k_validation_pearson: NotRequired[Scores]
    rescored_from: NotRequired[str]
    changed: NotRequired[dict[str, Any]]


class Scored(TypedDict):
    scores: Scores
    floors: dict[str, Scores]
    ceiling: Scores


class ScoredSection(Scored):
    n_spots: Count
    n_constant_genes: Whole
    patient: NotRequired[str]
    n_test_spots: NotRequired[Count]


class ScoredAs(Scored):
    """Under another protocol."""

    sections: NotRequired[dict[str, Scored]]


class CoverageCounts(TypedDict):
    """See :func:`stexp.evaluation.coverage.describe_coverage`."""

    n_spots: Count
    of_spots: Count
    n_genes: Count
    of_genes: Count
    missing_genes: list[str]


class ScaleFacts(TypedDict):
    """See :func:`stexp.runs.scale.put_on_scale`."""

    named: str | None
    looks_like: str | None
    errors: bool
    statement: str


class ForeignFacts(TypedDict):
    """What is on record of predictions that no run of ours made."""

    trained_on: list[str] | None
    genes_chosen_on: list[str] | None
    genes_by: Literal["protocol", "predictions"]
    scale: ScaleFacts
    left_over: dict[str, Any]
    n_renamed_genes: Whole


class ScoredForeign(ForeignFacts):
    coverage: CoverageCounts


class Interval(TypedDict):
    """95 %; see :mod:`stexp.evaluation.intervals`."""

    low: Finite
    high: Finite
    over: str
    n_units: NotRequired[Count]
    covers: NotRequired[Finite]


class BeyondChance(TypedDict):
    """How many genes correlate beyond their own moved maps; see :mod:`stexp.evaluation.chance`."""

    n_genes: Whole
    n_beyond: Whole
    false_discoveries: Finite
    pearson_moved: Finite | None


class Stratum(TypedDict):
    """See :func:`stexp.evaluation.strata.strata`."""

    by: str
    stratum: str
    n_genes: Whole
    pearson: Finite | None
    ceiling: Finite | None
    share: Finite | None
    share_low: Finite | None
    share_high: Finite | None
    share_over: NotRequired[str | None]
    share_covers: NotRequired[Finite | None]


class Measurable(TypedDict):
    n_genes: Whole
    pearson: Finite | None


class GeneSet(TypedDict):
    set: str
    n_genes: Count
    genes: list[str]
    pearson: Finite | None
    floors: Scores
    chance_z: NotRequired[Finite]
    chance_p: NotRequired[Finite]


class Evidence(TypedDict):
    """What stands behind a score; see :func:`stexp.evaluation.evidence.evidence`."""

    intervals: dict[str, Interval]
    error: Scores
    structure: Scores
    chance: BeyondChance | None
    strata: list[Stratum]
    measurable: Measurable
    gene_sets: list[GeneSet]


class Metrics(Scored):
    """``metrics.json``."""

    protocol: str
    truth: NotRequired[str]
    fold: str
    model: str
    data: str
    n_spots: Count
    n_genes: Count
    sections: Annotated[dict[str, ScoredSection], Field(min_length=1)]
    scored_as: dict[str, ScoredAs]
    oracle_floors: list[str]
    floor_spread: NotRequired[dict[str, Scores]]
    chosen: Chosen
    elsewhere: NotRequired[ScoredForeign]
    evidence: NotRequired[Evidence]
    leaks: NotRequired[list[str]]
    contrast: NotRequired[dict[str, Any]]  # see stexp.evaluation.contrast


class AuditItem(TypedDict):
    name: str
    leak: bool
    detail: str
    unknown: NotRequired[bool]


class AuditSections(TypedDict):
    patient_of: Patients
    train: list[str]
    validation: list[str]
    test: list[str]
    reference: list[str]
    panel_saw_test: list[str]


class ForeignAuditFacts(AuditSections):
    """See :func:`stexp.evaluation.audit.audit_foreign`."""

    trained_on: list[str] | None
    genes_chosen_on: list[str] | None
    genes_by: Literal["protocol", "predictions"]
    copies: NotRequired[list[str]]
    cohorts: NotRequired[list[str]]


class AuditFacts(AuditSections):
    """See :func:`stexp.evaluation.audit.audit`."""

    checkpoint: Literal["best", "last"]
    k_chosen_on: Literal["validation", "given", "after_scoring"]
    published_settings: bool
    spot_context: str | None
    copies: NotRequired[list[str]]
    cohorts: NotRequired[list[str]]


class AuditItems(TypedDict):
    leaks: Whole
    unknown: NotRequired[Whole]
    items: list[AuditItem]


class Audit(AuditItems):
    """``audit.json`` of a run."""

    facts: AuditFacts


class ForeignAudit(AuditItems):
    """``audit.json`` of predictions made elsewhere."""

    facts: ForeignAuditFacts


class Hardware(TypedDict):
    device: NotRequired[str]
    cpu: NotRequired[str]
    gpu: NotRequired[list[str] | None]


class Made(TypedDict):
    """What made a result: the part of ``provenance.json`` that runs and predicted slides share."""

    command: str
    commit: str | None
    dirty: bool | None
    date: str
    seconds: NotNegative
    hardware: Hardware
    versions: dict[str, str]
    precision: str
    peak_memory_gb: NotRequired[Finite | None]
    peak_gpu_memory_gb: NotRequired[Finite | None]


class Provenance(Made):
    """``provenance.json`` of a run."""

    stages: dict[str, NotNegative]
    data_manifest: Manifest
    spots: NotRequired[Spots]
    trained_by: NotRequired[str]
    epochs: NotRequired[Whole | None]
    parameters: NotRequired[dict[str, int] | None]


class SlideProvenance(Made):
    """``provenance.json`` of a predicted slide."""

    settings: dict[str, Any]
    model: NotRequired[dict[str, Any]]
    stages: NotRequired[dict[str, NotNegative]]


def read_metrics(run: Path) -> Metrics:
    """``metrics.json`` of a run; InputError where it is missing, damaged or of another form."""
    return read_json(run / "metrics.json", Metrics)


def read_audit(run: Path) -> Audit | ForeignAudit:
    """``audit.json`` of a run; InputError where it is missing, damaged or of another form."""
    path = run / "audit.json"
    audit = read_json(path)
    facts = audit.get("facts")
    is_foreign = isinstance(facts, dict) and "trained_on" in facts
    check_fields(str(path), audit, ForeignAudit if is_foreign else Audit, f"delete it and {AGAIN}")
    sections = {*facts["train"], *facts["validation"], *facts["test"], *facts["reference"]}
    if not sections <= set(facts["patient_of"]):
        nameless = ", ".join(sorted(sections - set(facts["patient_of"]))[:5])
        raise InputError(f"{run / 'audit.json'}: facts.patient_of lacks {nameless}; delete it and {AGAIN}")
    return audit


def read_provenance(run: Path) -> Provenance:
    """``provenance.json`` of a run; InputError where it is missing, damaged or of another form."""
    return read_json(run / "provenance.json", Provenance)


def read_json(path: Path, fields: Any = dict) -> Any:
    """Read a JSON object of a run folder; None stands for NaN.

    Parameters
    ----------
    fields
        A TypedDict that it must fit.

    Raises
    ------
    InputError
        The file is missing or damaged, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not got that far; {AGAIN}")
    try:
        check_fits(20 * path.stat().st_size, str(path))
        # NaN is not JSON, but Python writes it; both mean "no value"
        content = parse_json(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except InputError:
        raise
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object; delete it and {AGAIN}")
    check_fields(str(path), content, fields, f"delete it and {AGAIN}")
    return content


def read_genes(path: Path, *needs: str) -> list[dict[str, Any]]:
    """Read ``per_gene.csv`` of a run folder: a row a gene, its name and numbers; None where there is no value.

    Parameters
    ----------
    needs
        Columns that it must have besides ``gene``.

    Raises
    ------
    InputError
        The file is missing, cut or not a table of numbers, or lacks a column.
    """
    again = f"score the run again (stexp-score run={path.parent})"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {again}")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            rows, columns = list(table), table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a table of numbers ({error}); {again}") from None
    absent = [key for key in ("gene", *needs) if key not in columns]
    if absent and columns:
        raise InputError(f"{path} has no column {', '.join(absent)}; {again}")
    if not rows:
        raise InputError(f"{path} names no gene; {again}")
    if any(None in row or None in row.values() for row in rows):
        raise InputError(f"{path} is not a table of numbers (a row has fewer or more cells than columns); {again}")
    try:
        return [{key: restore(cell) if key == "gene" else _number(cell) for key, cell in row.items()} for row in rows]
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers ({error}); {again}") from None


def damaged(path: Path, error: Exception) -> InputError:
    """The error of a file of a run folder that cannot be read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{path} cannot be read: {reason}; delete it and {AGAIN}")


def _number(cell: str) -> float | None:
    value = {"true": 1.0, "false": 0.0, "": math.nan}.get(cell.lower())
    value = float(cell) if value is None else value
    return value if math.isfinite(value) else None

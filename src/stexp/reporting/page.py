"""The page of a report: one file with one script, which opens from disk and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stexp.errors import InputError
from stexp.evaluation.verdict import label, number
from stexp.reporting.maps import Maps

HERE = Path(__file__).parent
SCRIPTS = ("report_slide.js", "report_maps.js", "report_spot.js", "report.js")


def unit(protocol: dict[str, Any]) -> str:
    """The expression scale of a protocol, as a legend says it."""
    share = "gene's counts in the section" if protocol["truth"] == "gene" else f"spot's {protocol['library']} counts"
    return (
        f"{'ln' if protocol['log'] == 'natural' else 'log10'}(1 + {protocol['target_sum']:,.0f} x share of the {share})"
    )


def render(template: str, maps: Maps, gene_columns: list[dict], gene_rows: list[dict], **held: Any) -> str:
    """Fill a template that extends ``report.html.j2``.

    Parameters
    ----------
    gene_columns, gene_rows
        Of the gene table; a column has a key, a label and a kind: number, count, flag or text. The table is sorted
        by its first column of numbers.
    held
        What the template names besides.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "label": label}
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = {
        "steps": maps.steps,
        "genes": maps.genes,
        "sections": maps.sections,
        "references": maps.references,
        "table": {"columns": gene_columns, "rows": gene_rows},
    }
    return environment.get_template(template).render(
        page=page,
        arrays=maps.arrays,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # only this script may run, whatever the data holds
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **held,
    )


def save(folder: Path, page: str) -> Path:
    """Write ``report.html``, whole or not at all."""
    target, partial = folder / "report.html", folder / f".report.{os.getpid()}.html"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


LACKING = (KeyError, TypeError, AttributeError, IndexError, jinja2.UndefinedError)
"""What a file that lacks something makes of rendering."""


def lacking(folder: Path, error: Exception, again: str) -> InputError:
    return InputError(f"{folder}: its files lack something ({error}); {again}")

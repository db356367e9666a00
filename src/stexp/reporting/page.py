"""The page of a report: one file with one script, which opens from disk and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stexp.evaluation.verdict import by_score, label, number
from stexp.protocol import Protocol
from stexp.reporting.maps import Maps

PAGES = Path(__file__).parent / "pages"
SCRIPTS = ("slide.js", "maps.js", "spot.js", "genes.js")


def unit(protocol: Protocol) -> str:
    """The expression scale of a protocol, as a legend says it."""
    if protocol.truth == "residuals":
        return "Pearson residual of the counts, in standard deviations"
    share = "gene's counts in the section" if protocol.truth == "gene" else f"spot's {protocol.library} counts"
    return f"{'ln' if protocol.log == 'natural' else 'log10'}(1 + {protocol.target_sum:,.0f} x share of the {share})"


def render(template: str, **content: Any) -> str:
    """Fill a template of ``pages/`` with text that is escaped, and the style of all pages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "label": label, "by_score": by_score}
    return environment.get_template(template).render(style=Markup(_text("page.css")), **content)


def render_report(
    template: str, maps: Maps, gene_columns: list[dict], gene_rows: list[dict], *, parts: bool = False, **content: Any
) -> str:
    """Fill a template that extends ``page.html.j2``: a page with maps and a table of genes.

    Parameters
    ----------
    gene_columns, gene_rows
        Of the gene table; a column has a key, a label and a kind: number, count, flag or text. The table is sorted
        by its first column of numbers.
    parts
        Whether what the maps call sections are parts of one.
    content
        What the template names besides.
    """
    script = "\n".join(map(_text, SCRIPTS))
    page = {
        "steps": maps.steps,
        "genes": maps.genes,
        "first": maps.first,
        "sections": maps.sections,
        "references": maps.references,
        "parts": parts,
        "table": {"columns": gene_columns, "rows": gene_rows},
    }
    return render(
        template,
        page=page,
        arrays=maps.arrays,
        script=Markup(script),
        # only this script may run, whatever the data holds
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **content,
    )


def _text(name: str) -> str:
    return (PAGES / name).read_text(encoding="utf-8")

"""``stexp-report run=runs/x``: one HTML file that shows what was predicted and what that is worth."""

from __future__ import annotations

import sys

from stexp import __version__
from stexp.errors import InputError, in_one_line

HELP = """\
usage: stexp-report run=<folder>

Writes <folder>/report.html: one file, which opens from disk without a network.

Of a run, scores beside floors and ceiling, audit, maps, genes, provenance. It needs what stexp-train
and stexp-score leave in the folder: predictions.h5ad, metrics.json, per_gene.csv, audit.json,
provenance.json. Of a slide that stexp-predict predicted, maps, genes with the accuracy to expect,
provenance. It needs predictions.h5ad and provenance.json. From pictures.h5, where that is there, come
the slide to zoom into and the tiles of the spots retrieved from.

examples: stexp-report run=runs/x
          stexp-report run=predictions/slide
"""


def main(argv: list[str] | None = None) -> int:
    """``stexp-report run=<folder>``: 0, or 2 after one line on what would fit."""
    argv = sys.argv[1:] if argv is None else argv
    if "--version" in argv:
        print(f"stexp {__version__}")
        return 0
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    try:
        argv = _without_sources(argv)
        if len(argv) != 1 or not argv[0].removeprefix("run="):
            raise InputError("which run? give its folder and nothing else, as in: stexp-report run=runs/x")
        if not argv[0].startswith("run="):
            raise InputError(f"{argv[0]!r} is not understood; give run=<folder>, as in: stexp-report run=runs/x")
        from stexp.reporting.report import write_report  # anndata and jinja, which --help does without

        report = write_report(argv[0].removeprefix("run="))
    except (InputError, OSError, MemoryError) as error:
        print(f"stexp-report: {in_one_line(error)}", file=sys.stderr)
        return 2
    print(f"wrote {report} ({report.stat().st_size / 1e6:.1f} MB)")
    return 0


def _without_sources(argv: list[str]) -> list[str]:
    """The arguments but for plug-ins, which are read as by every command; a report needs none of their code."""
    if not any(argument.startswith("plugins=") for argument in argv):
        return argv
    from stexp.config.compose import split  # imports Hydra, which reports do without

    return split(argv)[1]


if __name__ == "__main__":
    sys.exit(main())

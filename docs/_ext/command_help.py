"""``{command-help}``: what ``stexp-<command> --help`` prints, read from the same configs."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from stexp.cli import report
from stexp.config.compose import compose, groups_of
from stexp.config.help import help_text
from stexp.config.plugins import default_sources


class CommandHelp(Directive):
    """One argument: the name behind ``stexp-``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name == "report":
            text = report.HELP
        else:
            text = help_text(compose(name, [], with_hydra=True), name, groups_of(name, []), default_sources())
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

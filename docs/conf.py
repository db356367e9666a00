"""The documentation, built without a network: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

import stexp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "stexp"
author = "stexp developers"
copyright = author
release = version = stexp.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "command_help",
    "repository_links",
]
templates_path = ["_templates"]
root_doc = "index"
highlight_language = "none"  # of blocks that name no language: commands, layouts of files
exclude_patterns = ["_ext", "_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["misc.highlighting_failure"]  # lines of a shell in notebooks

# Markdown and notebooks, which are shown with the outputs that they are committed with: see notebooks.py
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

# the reference
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_inherit_docstrings = False  # of Lightning: long, and about Lightning
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "sphinx_book_theme"
html_title = "stexp"
html_static_path = ["_static"]
html_css_files = ["own.css"]
html_copy_source = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

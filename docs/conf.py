"""Configuration of Sphinx. The build needs no network."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import NumpyDocstring

project = "spatialfm"
author = "spatialfm developers"
copyright = f"2026, {author}"
version = release = installed_version("spatialfm")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
default_role = "code"
python_maximum_signature_line_length = 88

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Run at every build: a cache would not notice that the package or its weights changed.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "spatialfm"
html_static_path = ["_static"]
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True}


def _returns_as_prose(self: NumpyDocstring, _section: str) -> list[str]:
    """Take "Returns" as text with a list of fields written, not as a list of types."""
    return [*self._format_block(":returns: ", self._dedent(self._consume_to_next_section())), ""]


NumpyDocstring._parse_returns_section = _returns_as_prose  # type: ignore[method-assign]


def _links_to_notebooks(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links between tutorials from file names into page names: the tutorials here are symlinks."""
    if docname.startswith("tutorials/"):
        source[0] = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _links_to_notebooks)

"""Sphinx settings. Nothing is fetched from the network: no intersphinx, no web fonts, no MathJax."""

from feedbackpath import __version__

project = "feedbackpath"
author = "the feedbackpath authors"
copyright = f"2026, {author}"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": False}

html_theme = "furo"
html_title = f"feedbackpath {release}"

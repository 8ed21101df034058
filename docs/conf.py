"""Sphinx settings. Nothing is fetched from the network: no intersphinx, no web fonts, no MathJax."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

from feedbackpath import __version__

project = "feedbackpath"
author = "the feedbackpath authors"
copyright = f"2026, {author}"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
exclude_patterns = ["_build"]
smartquotes = False  # else "--data" prints as an en dash and "data"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": False}

html_theme = "furo"
html_title = f"feedbackpath {release}"
html_static_path = ["style"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"


def write_math(writer, node):
    """Write LaTeX as MathML, which browsers draw by themselves: without a script, a font or LaTeX."""
    try:
        mathml = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
        # Brackets of a mean or a norm keep their size; else they grow to that of their neighbours.
        writer.body.append(
            re.sub(r"<mo( class=\"mathopen\")?>([⟨⟩‖])</mo>", r'<mo stretchy="false">\2</mo>', mathml)
        )
    except MathError as error:
        logging.getLogger(__name__).warning("%s in: %s", error, node.astext(), location=node)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))

"""Text between two marks of a page, which a script writes anew: <!-- mark:begin --> and <!-- mark:end -->."""

import re
from pathlib import Path


def write_between(page: Path, mark: str, text: str) -> None:
    """Put a text, which ends in a new line, between the marks of a page."""
    marked = re.compile(rf"(<!-- {mark}:begin -->\n).*(<!-- {mark}:end -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    page.write_text(marked.sub(lambda found: found[1] + text + found[2], old), encoding="utf-8")


def not_run(command: str, what: str = "") -> str:
    """Return the sentence for what a table does not have yet, or for a whole table."""
    return f"Not run yet: {what} (`{command}`)." if what else f"Not run yet: `{command}`."

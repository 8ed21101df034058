"""Tables of pages that scripts write anew, between two marks: <!-- mark:begin --> and <!-- mark:end -->."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def write_between(page: Path, mark: str, text: str) -> None:
    """Put a text, which ends in a new line, between the marks of a page."""
    marked = re.compile(rf"(<!-- {mark}:begin -->\n).*(<!-- {mark}:end -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    page.write_text(marked.sub(lambda found: found[1] + text + found[2], old), encoding="utf-8")


def not_run(command: str, what: str = "") -> str:
    """Return the sentence for what a table does not have yet, or for a whole table."""
    return f"Not run yet: {what} (`{command}`)." if what else f"Not run yet: `{command}`."


def as_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Example:
        >>> print(as_table(["rule", "error"], [["bp", "2%"]]))
        | rule | error |
        |---|---|
        | bp | 2% |
    """
    head, *body = [f"| {' | '.join(line)} |" for line in (heads, *rows)]
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def as_far_as_run(heads: Sequence[str], parts: Mapping[str, Sequence[Sequence[str]]], command: str) -> str:
    """Return a table of the rows of each part of a study, and a sentence on the parts that have none yet."""
    absent = [part for part, rows in parts.items() if not rows]
    if len(absent) == len(parts):
        return not_run(command)
    whole = as_table(heads, [row for rows in parts.values() for row in rows])
    return f"{whole}\n\n{not_run(command, ', '.join(absent))}" if absent else whole


def with_quartiles(ratio: Mapping[str, float], digits: int) -> str:
    """Return a median with its quartiles in parentheses.

    Example:
        >>> with_quartiles({"median": 1.0234, "q1": 1.0, "q3": 1.05}, 3)
        '1.023 (1.00–1.05)'
    """
    return f"{ratio['median']:.{digits}f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"


def parse_draw(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line of a script asks for that measures, and writes a table."""
    parser = argparse.ArgumentParser(description="measure, and write the table")
    parser.add_argument("--draw", action="store_true", help="write the table from the result file alone")
    return parser.parse_args(arguments)


def measure_into(file: Path, key: str, measure: Callable[[], Any]) -> None:
    """Measure with one thread, and write what was found into a result file, with the version of torch."""
    torch.set_num_threads(1)
    content = {"torch": torch.__version__, key: measure()}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""Write the tables and the figure of docs/cost.md anew: `python benchmarks/cost_page.py`.

They come from `step-cost/growth.json`, which `feedbackpath bench --grow` writes, and from the cost model.
"""

import json
import re
from pathlib import Path

from feedbackpath.report.cost import tables_of_cost
from feedbackpath.report.growth import render_growth

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "step-cost" / "growth.json"
PAGE = ROOT / "docs" / "cost.md"
FIGURE = ROOT / "docs" / "figures" / "step-cost-growth.png"


def put_tables(page: str, tables: dict[str, str]) -> str:
    """Return the page with each table between its marks, `<!-- NAME:begin -->` and `<!-- NAME:end -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        page, found = re.subn(f"(?s){begin}.*?{end}", lambda _, text=begin + table + end: text, page)
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places for the table {name!r}, not one")
    return page


def main() -> None:
    """Read, draw and write."""
    growth = json.loads(RESULTS.read_text(encoding="utf-8"))
    FIGURE.write_bytes(render_growth(growth))
    PAGE.write_text(put_tables(PAGE.read_text(encoding="utf-8"), tables_of_cost(growth)), encoding="utf-8")


if __name__ == "__main__":
    main()

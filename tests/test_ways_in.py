"""The ways in: the notebook and the commands of the tutorials run, and built pages print what they should."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "examples"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def test_the_notebook_runs_and_keeps_no_output(monkeypatch, capsys):
    book = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    monkeypatch.setattr(plt, "show", lambda: None)
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"first_steps.ipynb, code {number}", "exec"), namespace)
    said = capsys.readouterr().out
    found = {
        rule: tuple(map(float, numbers))
        for rule, *numbers in re.findall(r"^(\S+) +test error +([\d.]+)%, .* ([\d.]+) degrees$", said, re.M)
    }
    assert found["bp"][1] == 0
    assert found["mirror-kp"][1] < 2 < found["kp"][1] < 20 < found["fa"][1]
    assert all(found[rule][0] < 5 for rule in ("bp", "kp", "mirror-kp"))
    assert "transport-free in the 2 steps watched" in said
    assert [len(axes.lines) for axes in namespace["figure"].axes] == [4, 4]
    plt.close(namespace["figure"])


@pytest.mark.parametrize(
    ("page", "language", "example"),
    [("tutorial-own-rule.md", "python", "lossy_rule.py"), ("tutorial-chip.md", "yaml", "my_chip.yaml")],
)
def test_a_file_that_a_tutorial_shows_is_the_file(page, language, example):
    shown = next(text for kind, text in blocks(page) if kind == language)
    if language == "yaml":
        assert yaml.safe_load(shown) == yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8"))
    else:
        assert (EXAMPLES / example).read_text(encoding="utf-8").endswith(f'"""\n\n{shown}')


def commands(page):
    """Return the commands of a page, each with the output that is shown after it, if any."""
    found = []
    for kind, text in blocks(page):
        if kind == "bash":
            found.append([shlex.split(text)[1:], ""])
        elif kind == "text" and found:
            found[-1][1] = found[-1][1] or text
    return found


COMMANDS = [
    pytest.param(*command, id=f"{page}-{number}")
    for page in ("tutorial-own-rule.md", "tutorial-chip.md", "tutorial-evaluate.md")
    for number, command in enumerate(commands(page))
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "shown"), COMMANDS)
def test_the_commands_of_the_tutorials_print_what_is_shown(words, shown, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    done = subprocess.run(
        [sys.executable, "-m", "feedbackpath", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    for line in shown.splitlines():
        first = line.strip().split(" ")[0]
        assert re.search(rf"^\s*{re.escape(first)}", done.stdout, re.MULTILINE), line


def test_the_index_reaches_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.MULTILINE | re.DOTALL)
    listed = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


PAGE = r"""# Page

A flag --data prints as it is typed. The gain is $\langle B, W\rangle / \lVert W\rVert^2$.

$$
\begin{aligned}
\Delta W &= -\eta\, \delta\, x^\mathsf{T} & & (4)
\end{aligned}
$$

What cannot be read is named: $\nosuchthing{x}$.
"""


def test_pages_are_built_with_flags_and_equations_and_fetch_nothing(tmp_path):
    pytest.importorskip("furo", reason="the docs extra is not installed")
    (tmp_path / "index.md").write_text(PAGE, encoding="utf-8")
    shutil.copy(DOCS / "conf.py", tmp_path)
    shutil.copytree(DOCS / "style", tmp_path / "style")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "--keep-going",
        "-b",
        "html",
        tmp_path,
        tmp_path / "built",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.search(r"index.md:\d+: WARNING: Unknown LaTeX command \"\\nosuchthing\"", done.stderr), (
        done.stderr
    )
    assert done.stderr.count("WARNING") == 1
    page = (tmp_path / "built" / "index.html").read_text(encoding="utf-8")
    assert "A flag --data prints" in page
    assert page.count("<math") == 2
    assert '<mo stretchy="false">⟨</mo>' in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=\"(https?:)?//", page)

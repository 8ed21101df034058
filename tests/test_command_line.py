"""What a newcomer gets wrong on the command line, and what tables show in a narrow terminal."""

import io
import re
import warnings

import pytest
from rich.console import Console
from test_report import make_results, make_run

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.cli.output import make_table, show_warnings_in_one_line
from feedbackpath.errors import MirrorWarning
from feedbackpath.report import rich_error_table, rich_table
from feedbackpath.report.panels import lay_side_by_side

LONG = "feedback-alignment-with-a-very-long-name-of-its-own"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr()


HELPS = ("compare", "train", "tune", "audit", "bench", "hardware", "hardware tolerance", "mirror plan")


@pytest.mark.parametrize("command", HELPS)
def test_defaults_in_the_help_are_as_a_user_types_them(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "250")
    code, printed = run(capsys, *command.split(), "--help")
    assert code == 0
    defaults = re.findall(r"\[default: (.*?)\]", printed.out)
    assert defaults
    assert not [default for default in defaults if re.search(r"[()\[\]{}' ]|None", default)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare --rules bp kp", "'kp' belongs to no flag: separate the values of --rules by commas, as in "
         "--rules bp,kp"),
        ("compare --rules bp, fa, kp --data digits", "commas, as in --rules bp,fa"),
        ("compare --rules=bp kp", "commas, as in --rules bp,kp"),
        ("compare --milestones 3 5", "commas, as in --milestones 3,5"),
        ("bench --models mlp lenet", "commas, as in --models mlp,lenet"),
        ("compare bp kp", "'bp' belongs to no flag: write a flag before it; feedbackpath compare --help"),
        ("compare --data digits mnist", "'mnist' belongs to no flag: write a flag before it"),
        ("audit kp", "'kp' belongs to no flag: write a flag before it; feedbackpath audit --help"),
        ("mirror plan resnet8", "write a flag before it; feedbackpath mirror plan --help"),
        ("train --rules kp", "Unknown option: --rules. Did you mean --rule?"),
        ("compare --epoch 3", "Did you mean --epochs?"),
        ("compare --zzzz 3", "feedbackpath compare --help says what there is"),
        ("comapre --rules bp", 'Did you mean "compare"?'),
        ("report", "feedbackpath report needs FOLDERS: folders that hold a results.json each"),
        ("eval", "feedbackpath eval needs FOLDER: folder of a run, made by feedbackpath train"),
        ("data check", "feedbackpath data check needs FOLDER"),
        ("train --resume", "feedbackpath train needs a value after --resume: folder of a run to continue"),
        ("compare --lr", "feedbackpath compare needs a value after --lr"),
        ("compare --lr fast", "--lr is 'fast': it must be a number"),
        ("tune --trials two", 'unable to convert "two" into int; feedbackpath tune --help'),
        ("train --rule bp,kp --data digits --model mlp", "feedbackpath compare takes several"),
        ("train --device gpu --data digits --model mlp", "there is no such device; choose cpu"),
        ("compare --config missing.yaml", "No such file or directory; give a YAML file of settings"),
        ("hardware --chip rerram", "--chip is 'rerram': choose ideal"),
        ("hardware tolerance --imperfections stp", "--imperfections: there is no stp; choose from step,"),
        ("compare -rules bp,kp", "-rules: a flag begins with two dashes: write --rules"),
        ("compare --resume runs/kp", "name the folder by --out, as in --out runs/kp --resume"),
        ("compare --overrides fc1=bp", "--overrides is no flag: write overrides into a YAML file"),
        ("compare --data ./images --model resnet18", "leave it out (for images of your own, --data imagenet"),
        ("compare --rules bp,bp", "--rules is 'bp,bp': name each rule only once"),
        ("compare --rules KP --data digits --model mlp", "did you mean 'kp'?"),
        ("compare --rules feedback-alignment --data digits --model mlp", "did you mean 'fa'?"),
        ("compare --equivalence 0.5 --rules kp", "feedbackpath: --equivalence compares rules with bp"),
        ("compare --data mnist --data-dir missing", "mnist: there is no folder missing: torchvision"),
        ("compare --data text --model mlp", "reads numbers, but text is made of tokens; choose from gpt"),
        ("compare --data digits --model gpt", "give it text (--data text), or choose a network that"),
        ("compare --data digits --model mlp --out /proc/x", "/proc/x: No such file or directory; choose"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_wrong_and_the_next_step(capsys, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    code, printed = run(capsys, *line.split())
    assert code == 2
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_rule_that_was_not_registered_is_named_with_what_it_lacks(capsys, tmp_path):
    file = tmp_path / "forgotten.py"
    file.write_text("import feedbackpath as fp\nclass Forgotten(fp.Rule):\n    name = 'forgotten'\n")
    line = f"compare --import {file} --rules forgotten --data digits --model mlp --out {tmp_path / 'out'}"
    code, printed = run(capsys, *line.split())
    assert code == 2
    assert "Forgotten has that name: write @fp.register_rule above that class" in printed.err


def shown(table):
    output = io.StringIO()
    Console(file=output, width=80).print(table)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def unfolded(lines):
    """Return what stands in the first column, put together again."""
    return "".join(re.split(r"  | \d", line.strip())[0].strip() for line in lines)


@pytest.mark.parametrize("name", [LONG, "mirror-kp-mine"])
def test_a_long_name_is_folded_and_not_cut(name):
    runs = [make_run("bp", 0, [99.0, 20.0]), make_run(name, 0, [99.0, 30.0])]
    lines = shown(rich_table(make_results(*runs)))
    assert name in unfolded(lines)
    assert "30.0%" in "".join(lines)
    assert "finished" in "".join(lines)
    panels = lay_side_by_side([("a", make_results(*runs)), ("b", make_results(runs[0], model="mlp"))])
    lines = shown(rich_error_table(panels))
    assert "…" not in "".join(lines)
    assert "30.0%" in "".join(lines)
    table = make_table("rule", "trials", "validation error", "settings", names=(0, 3))
    table.add_row(name, "16", "3.12%", "lr=0.1 weight_decay=0.001 " * 3)
    lines = shown(table)
    assert "…" not in "".join(lines)
    assert "3.12%" in "".join(lines)


def test_rules_prints_no_markup(capsys, monkeypatch):
    rule = type(
        "Mine", (fp.FeedbackAlignment,), {"name": "mine", "__doc__": "Do ``this`` of :class:`Rule`, [b]x."}
    )
    monkeypatch.setitem(fp.RULES, "mine", rule)
    _, printed = run(capsys, "rules")
    assert "mine (Mine): Do this of Rule, [b]x." in printed.out
    assert not re.search(r"`|:\w+:|\*\*", printed.out)


@pytest.mark.parametrize("model", ["resnet8", "lenet"])
def test_mirror_plan_prints_numbers_that_a_person_reads(capsys, monkeypatch, model):
    monkeypatch.setenv("COLUMNS", "80")
    _, printed = run(capsys, "mirror", "plan", "--model", model)
    assert not re.search(r"\de[+-]?\d|…", printed.out)
    assert max(map(len, printed.out.splitlines())) <= 80


def test_warnings_of_the_library_are_one_line_and_others_name_their_place(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    show_warnings_in_one_line()
    ours = MirrorWarning("2 neurons of 'fc1'\ndo not answer")
    told = warnings.formatwarning(ours, MirrorWarning, "loop.py", 3)
    assert told == "feedbackpath: warning: 2 neurons of 'fc1' do not answer\n"
    others = warnings.formatwarning(DeprecationWarning("old"), DeprecationWarning, "users_model.py", 3)
    assert others.startswith("users_model.py:3: DeprecationWarning: old\n")

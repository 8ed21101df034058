"""What the documents say runs: every Python snippet, command line, config file and make target in them."""

import importlib
import inspect
import json
import re
import shlex
import signal
import typing
from functools import partial
from inspect import signature
from pathlib import Path
from unittest import mock

import doc_figures
import gpt_step
import mirror_memory
import pytest
import robustness
import rules_bench
import tuned_glyphs
import yaml
from cost_page import tables_of_cost
from old_names import read_with_names_of_now
from PIL import Image
from pydantic import BaseModel, JsonValue
from study_table import markdown_study_table, read_study
from test_every_rule import LEAVES

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.cli import (
    audit,
    bench,
    compare,
    evaluate,
    exit_codes,
    hardware,
    mirror,
    report,
    train,
    tune,
)
from feedbackpath.jobs.audit import audit_run
from feedbackpath.jobs.imports import import_files
from feedbackpath.recipes import RECIPES
from feedbackpath.report import markdown_table
from feedbackpath.report.equivalence import describe
from feedbackpath.report.parts import COLUMN_WIDTH, PAGE_WIDTH
from feedbackpath.report.table import summary_rows
from feedbackpath.train import config, results
from feedbackpath.train.config import AuditConfig, CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.rules import make_rule

ROOT = Path(__file__).parent.parent
OTHERS = ("CONTRIBUTING.md", "README.md", "benchmarks/README.md")
DOCUMENTS = sorted(
    [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/*.md"), *(ROOT / name for name in OTHERS)]
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(document, *languages):
    """Return the fenced blocks in a language, each with its first line number."""
    text = document.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start()) + 2, match[2])
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


def calls_of(program, document):
    """Return the arguments of every call of a program in a document's shell blocks."""
    script = "\n".join(code for _, code in blocks(document, "bash", "console", "sh", "shell"))
    lines = [
        shlex.split(line.removeprefix("$ "), comments=True)
        for line in script.replace("\\\n", " ").splitlines()
    ]
    return [words[1:] for words in lines if words and Path(words[0]).name == program]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda d: d.name)
def test_python_snippets_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippets"}
    with mock.patch.dict(fp.RULES):
        for line, code in blocks(document, "python"):
            # Empty lines in front, so that a failure names the line of the document.
            exec(compile("\n" * (line - 1) + code, document, "exec"), namespace)


OWN_RULES = {}
"""Rules of the pages' own files: a process imports a file once, for whichever page comes first."""


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if calls_of("feedbackpath", d)], ids=lambda d: d.name
)
def test_command_lines_are_accepted(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    with mock.patch.dict(fp.RULES, OWN_RULES):
        for arguments in calls_of("feedbackpath", document):
            command, bound, _ = cli.app.parse_args(arguments, exit_on_error=False, print_error=False)
            flags = bound.arguments.get("flags", CompareConfig())
            over = ("mirror", "data", "hardware") if "tolerance" in arguments else ("mirror", "data")
            name = next(word for word in arguments if word not in over)
            assert command.__name__ == {"eval": "evaluate"}.get(name, name)
            rules = (flags.rule,) if isinstance(flags, AuditConfig) else flags.rules
            import_files(flags.imports)
            OWN_RULES.update(fp.RULES)
            assert [make_rule(name, {}).name for name in rules] == list(rules)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if calls_of("python", d)], ids=lambda d: d.name)
def test_scripts_of_the_documents_exist_and_take_their_options(document):
    for script, *arguments in calls_of("python", document):
        assert (ROOT / script).exists()
        if Path(script).parent.name == "benchmarks":
            parse = getattr(importlib.import_module(Path(script).stem), "parse", None)
            assert not arguments if parse is None else parse(arguments)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "yaml")], ids=lambda d: d.name)
def test_config_files_are_accepted(document):
    for _, text in blocks(document, "yaml"):
        config = CompareConfig(**yaml.safe_load(text))
        for rule in {*config.rules, *config.rule_settings}:
            make_rule(rule, config.rule_settings.get(rule, {}))


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE)
    for document in DOCUMENTS:
        for arguments in calls_of("make", document):
            assert set(arguments) <= set(targets), document.name


def flag_of(name):
    if name == "imports":
        return "`--import`"
    flag = name.replace("_", "-")
    field = {**CompareConfig.model_fields, **RunConfig.model_fields, **AuditConfig.model_fields}[name]
    return f"`--{flag}`, `--no-{flag}`" if field.annotation is bool else f"`--{flag}`"


def default_of(value):
    if value is None or value == ():
        return "–"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


def meaning_of(field):
    is_choice = typing.get_origin(field.annotation) is typing.Literal
    choices = [f"`{choice}`" for choice in typing.get_args(field.annotation)] if is_choice else []
    return f"{field.description}: {', '.join(choices)}" if len(choices) > 1 else field.description


def is_flag(field):
    return not any(getattr(extra, "parse", True) is False for extra in field.metadata)


def list_flags(fields):
    return "".join(
        f"| {flag_of(name)} | {default_of(field.default)} | {meaning_of(field)} |\n"
        for name, field in fields.items()
        if is_flag(field)
    )


SECTIONS = {
    "Data": config.DataSettings,
    "Network": config.NetworkSettings,
    "Chip": config.ChipSettings,
    "Optimizer": config.OptimizerSettings,
    "Schedule": config.ScheduleSettings,
    "Rules": config.RuleSettings,
    "Machine": config.MachineSettings,
    "What is kept": config.KeptSettings,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_flags_has_its_table(section):
    table = f"### {section}\n\n| Flag | Default | Meaning |\n|---|---|---|\n"
    table += list_flags(SECTIONS[section].model_fields)
    assert table in read("docs/cli.md"), f"put this table into docs/cli.md:\n{table}"


def own_fields(kind, shared=TrainConfig.model_fields):
    """Return the settings of a command that the other lacks, or that begin otherwise."""
    return {
        name: field
        for name, field in kind.model_fields.items()
        if name not in shared or field.default != shared[name].default
    }


def make_compare_table():
    return list_flags(own_fields(CompareConfig)) + make_place_table(compare.compare)


def make_train_table():
    return list_flags(own_fields(RunConfig)) + make_place_table(train.train)


def make_eval_table():
    return make_place_table(evaluate.evaluate)


def make_recipe_table():
    return "".join(
        f"| `{name}` | {inspect.getdoc(recipe).splitlines()[0]} |\n" for name, recipe in RECIPES.items()
    )


def make_place_table(command):
    places = {
        name.replace("_", "-").replace("imports", "import"): p
        for name, p in signature(command).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name != "flags"
    }
    return "".join(
        f"| `--{name}` | {default_of(p.default or None)} | {p.annotation.__metadata__[0].help} |\n"
        for name, p in places.items()
    )


def make_report_table():
    return make_place_table(report.report)


def make_audit_table():
    return list_flags(own_fields(AuditConfig)) + make_place_table(audit.audit)


def make_tune_table():
    return make_place_table(tune.tune)


def make_hardware_table():
    return make_place_table(hardware.hardware)


def make_tolerance_table():
    return make_place_table(hardware.tolerance)


def make_plan_table():
    return make_place_table(mirror.plan)


def type_in_words(kind):
    """Return a type as the page on results.json names it."""
    words = {int: "integer", float: "number", str: "text", bool: "true or false", JsonValue: "any value"}
    words[results.Layers] = "number by layer"
    if kind in words:
        return words[kind]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in parts)
    inner = [type_in_words(part) for part in parts if part is not type(None)]
    return {list: f"list of {inner[0]}", dict: f"{inner[-1]} by name"}.get(origin, f"{inner[0]} or null")


def make_field_table(kind):
    names, rows = results.names_in_files(results.Metric()), []
    for name, field in kind.model_fields.items():
        words = type_in_words(field.annotation)
        if name in results.SPARSE:
            words = words.replace(" or null", ", or left out")
        rows.append(f"| `{field.alias or names.get(name, name)}` | {words} | {field.description} |\n")
    return f"| Field | Type | Meaning |\n|---|---|---|\n{''.join(rows)}"


KINDS = [kind for kind in vars(results).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.model_fields], ids=lambda kind: kind.__name__
)
def test_the_page_on_results_has_every_field(kind):
    table = f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n\n{make_field_table(kind)}"
    assert "| None |" not in table
    assert table in read("docs/results-file.md"), f"put this into docs/results-file.md:\n{table}"


def make_bench_table():
    return make_place_table(bench.bench)


def make_setting_table():
    return "".join(
        f"| `{name}` | {field.description} |\n"
        for name, field in TrainConfig.model_fields.items()
        if not is_flag(field)
    )


@pytest.mark.parametrize(
    "make_table",
    [
        make_compare_table,
        make_train_table,
        make_eval_table,
        make_recipe_table,
        make_report_table,
        make_audit_table,
        make_tune_table,
        make_hardware_table,
        make_tolerance_table,
        make_plan_table,
        make_bench_table,
        make_setting_table,
    ],
)
def test_tables_of_the_command_line_are_those_of_the_program(make_table):
    table = make_table()
    assert table
    assert f"|---|\n{table}\n" in read("docs/cli.md"), f"put this table into docs/cli.md:\n{table}"


def test_exit_codes_are_those_of_the_program():
    listed = re.findall(r"^\| (\d+) \|", read("docs/cli.md"), re.MULTILINE)
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
    interrupted = [128 + number for number in signals]
    assert [int(code) for code in listed] == [
        exit_codes.DONE,
        exit_codes.BAD_INPUT,
        exit_codes.DIVERGED,
        exit_codes.TRANSPORTS_WEIGHTS,
        exit_codes.NOT_SETTLED,
        *interrupted,
    ]


def test_commands_are_those_of_the_program():
    listed = re.findall(r"^feedbackpath (\w+) .*  ", read("docs/cli.md"), re.MULTILINE)
    assert list(dict.fromkeys(listed)) == [name for name in cli.app if not name.startswith("-")]


@pytest.mark.slow
def test_the_verdicts_of_the_page_are_those_of_audits():
    lines = ["| rule | verdict of its audit | the update of B takes |", "|---|---|---|"]
    for rule in fp.RULES:
        report = audit_run(AuditConfig(rule=rule))
        assert report.verdict.startswith(fp.RULES[rule].facts.verdict), rule
        taken = " / ".join(dict.fromkeys(report.locality.values())) or "–"
        lines.append(f"| `{rule}` | {report.verdict} | {taken} |")
    assert "\n".join(["<!-- audit:begin -->", *lines, "<!-- audit:end -->"]) in read("docs/rules.md")


def test_the_bench_of_rules_is_that_of_its_files():
    assert f"<!-- bench:begin -->\n{rules_bench.tables()}<!-- bench:end -->" in read("docs/rules.md")


@pytest.mark.parametrize(
    ("mark", "table"),
    [
        *((study.mark, partial(robustness.table, study)) for study in robustness.STUDIES.values()),
        ("tuned", tuned_glyphs.table),
        ("memory", mirror_memory.table),
    ],
)
def test_tables_of_studies_are_those_of_their_files(mark, table):
    assert f"<!-- {mark}:begin -->\n{table()}\n<!-- {mark}:end -->" in read("docs/results.md")


def test_the_layers_that_rules_leave_are_those_that_the_tests_know():
    rows = {}
    for rule in fp.RULES:
        kinds = ", ".join(sorted(LEAVES.get(rule, ())))
        rows.setdefault(kinds or "none", []).append(f"`{rule}`")
    rows["none"] = ["all others"]
    lines = sorted(f"| {', '.join(rules)} | {kinds} |" for kinds, rules in rows.items())
    found = re.search(
        r"<!-- layers:begin -->\n.*\n.*\n((?:.*\n)*?)<!-- layers:end -->", read("docs/rules.md")
    )
    assert sorted(found[1].splitlines()) == lines


def test_every_rule_is_in_the_table_of_rules():
    listed = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|", read("docs/rules.md"), re.MULTILINE)
    assert listed == [(name, rule.__name__) for name, rule in fp.RULES.items()]


@pytest.mark.parametrize("name", fp.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf"(auto\w+|py:data):: [\w.]+\.{name}$", read("docs/api.md"), re.MULTILINE)


RESULTS = [path.parent.name for path in sorted(ROOT.glob("benchmarks/*/results.json"))]
SHOWN = ("rule", "n", "test error", "minus bp", "angle, max", "angle, worst epoch", "δ angle, max", "gain")


@pytest.mark.parametrize("name", RESULTS)
def test_tables_of_results_are_those_of_the_result_files(name):
    table = markdown_table(read_with_names_of_now(ROOT / "benchmarks" / name), SHOWN)
    assert table in read("docs/results.md")
    if name == "one-input":
        assert table in read("docs/one-input.md")


def test_the_readmes_table_is_that_of_its_result_file():
    found = read_with_names_of_now(ROOT / "benchmarks" / "glyphs-resnet8")
    shown = ("rule", "test error", "angle, max", "angle, worst epoch")
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", read("README.md"), re.M)
    assert rows == [tuple(row[name] for name in shown) for row in summary_rows(found.runs, found.metric)]


def test_verdicts_of_the_study_are_those_of_its_result_file():
    found = describe(results.read_results(ROOT / "benchmarks" / "glyphs-resnet8-equivalence"))
    assert len(found) == 4
    assert "\n".join(["```text", *found, "```"]) in read("docs/results.md")
    told = re.findall(r"`([\w-]+)` \(([+-][\d.]+) points\)", read("README.md"))
    assert [rule for rule, _ in told] == ["kp", "wm", "mirror-kp"]
    for rule, difference in told:
        (line,) = [line for line in found if line.startswith(f"{rule} minus bp: {difference} points")]
        assert line.endswith(": equivalent within 0.5")


def test_what_a_step_of_the_small_gpt_costs_is_told_as_measured():
    assert f"<!-- gpt-step:begin -->\n{gpt_step.table()}\n<!-- gpt-step:end -->" in read("docs/language.md")


def test_the_readme_tells_the_order_of_tuned_rules_as_measured():
    runs = results.read_results(ROOT / "benchmarks" / "glyphs-resnet8-tuned" / "run")
    tuned = {row["rule"]: row["test error"] for row in summary_rows(runs.runs, runs.metric)}
    shared = read_with_names_of_now(ROOT / "benchmarks" / "glyphs-resnet8")
    before = {row["rule"]: row["test error"] for row in summary_rows(shared.runs, shared.metric)}

    def order(errors):
        return sorted(before, key=lambda rule: float(errors[rule].partition("(")[0]))

    assert order(tuned) == order(before)
    assert all(float(tuned[rule].split("(")[0]) < float(before[rule].split("(")[0]) for rule in before)
    assert f"(`fa` has {tuned['fa'].partition('(')[0]}%)" in read("README.md")


def test_tables_of_cost_are_those_of_the_result_file_and_of_the_model():
    page, growth = (
        read("benchmarks/step-cost/README.md"),
        json.loads(read("benchmarks/step-cost/growth.json")),
    )
    for name, table in tables_of_cost(growth).items():
        marked = f"<!-- {name}:begin -->\n{table}<!-- {name}:end -->"
        assert marked in page, "write them anew: python benchmarks/cost_page.py"


def test_rules_that_break_graphs_and_send_more_are_told_as_measured():
    told = re.search(r"Rules that listen to each layer \((.*)\) break", read("docs/cost.md"))
    listening = set(re.findall(r"`(\w+)`", told[1]))
    for file in (ROOT / "benchmarks" / "rules").glob("cost-*.json"):
        (network,) = json.loads(file.read_text())["networks"].values()
        assert {rule for rule, breaks in network["graph_breaks"].items() if breaks} == listening
        sent = {rule: sum(bytes_of.values()) for rule, bytes_of in network["collective_bytes"].items()}
        more = {rule: round(sent[rule] / sent["plain"]) for rule in sent if sent[rule] > sent["plain"]}
        assert more.keys() == listening | {"dkp"}
        assert {more[rule] for rule in listening} == {2}
        assert file.stem != "cost-resnet8" or more["dkp"] == 90


def test_what_an_audit_costs_is_told_as_measured():
    cost = json.loads(read("benchmarks/audit-cost/cost.json"))
    assert cost["task"].startswith("audit of two steps, resnet18")
    rows = cost["rules"]
    assert all(row["audit_over_step"] <= 20 and row["memory_over_step"] <= 3 for row in rows.values())
    assert all(row["verdict"].startswith("transport-free in the 2 steps watched") for row in rows.values())
    times = [f"{row['audit_over_step']:.1f} under `{rule}`" for rule, row in rows.items()]
    most = max(row["memory_over_step"] for row in rows.values())
    told = f"steps' time: {', '.join(times)}. They take at most {most:.1f} times a step's memory"
    assert told in read("docs/audit.md").replace("\n", " ")


def test_the_table_of_the_mirrors_study_is_that_of_its_file():
    assert markdown_study_table(read_study(ROOT / "benchmarks" / "mirror-study")) in read(
        "benchmarks/mirror-study/README.md"
    )


@pytest.mark.parametrize("figure", sorted(doc_figures.FIGURES.glob("*.png")), ids=lambda path: path.name)
def test_figures_are_drawn_from_the_result_files_as_they_are(figure):
    """The stamp of a figure has the checksums of the files that it shows."""
    sources, _ = doc_figures.DRAWN[figure.name]
    assert doc_figures.stamp_of(figure) == doc_figures.stamp_for(sources), "python benchmarks/doc_figures.py"
    with Image.open(figure) as image:
        assert image.width in {round(300 * width) for width in (COLUMN_WIDTH, PAGE_WIDTH)} | {
            doc_figures.WINDOW
        }


def test_every_figure_is_on_a_page():
    pages = "".join(path.read_text() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/*.md")))
    assert [name for name in doc_figures.DRAWN if f"figures/{name})" not in pages] == []


def test_figures_of_earlier_runs_have_the_names_that_rules_have_today():
    runs = doc_figures.read_panel("one-input").runs
    assert "wm-exact" in {run.rule for run in runs}
    assert "wm" not in {run.rule for run in runs}


@pytest.mark.parametrize("name", RESULTS)
def test_commands_of_results_are_listed(name):
    assert f"`{name}/`" in read("benchmarks/README.md")

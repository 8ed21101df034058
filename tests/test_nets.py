"""One net under each boundary: whatever comes in, the answer is one line, or what was asked for."""

import copy
import json
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from junk import BOUNDED, numbers, objects, plain, refused_in_a_line, texts
from torch import nn

import feedbackpath as fp
from feedbackpath import cli
from feedbackpath.arguments import checked, fits
from feedbackpath.errors import ConfigError, UserError
from feedbackpath.jobs.book import STATE, checkpoints_of
from feedbackpath.report import rich_table
from feedbackpath.report.page import render_page
from feedbackpath.report.panels import make_panel
from feedbackpath.rules import RULES
from feedbackpath.train.config import AuditConfig, CompareConfig, RunConfig
from feedbackpath.train.results import BY_LAYER, DataFacts, Entry, Results, Run, parse_results
from feedbackpath.train.rules import make_rule
from feedbackpath.train.settings import merge_config, read_config
from feedbackpath.train.store import load_checkpoint

SMALL = ["--data", "digits", "--model", "mlp", "--max-steps", "1", "--samples-per-epoch", "64"]


def ask(capsys, *arguments):
    """Run a command, and return its exit code and what it wrote to standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code, capsys.readouterr().err


def refused(capsys, *arguments):
    """Return the line with which a command is refused."""
    code, told = ask(capsys, *arguments)
    assert code == 2, (arguments, told)
    assert len(told.splitlines()) == 1, told
    assert told.startswith("feedbackpath: ")
    return told


# --- The command line --------------------------------------------------------------------------------------

HOPELESS = {
    "no such device": (["train", "--device", "hpu", *SMALL], "device 'hpu' cannot be used"),
    "a CPU's number": (["train", "--device", "cpu:3", *SMALL], "CPUs have no numbers"),
    "no such device, audit": (["audit", "--device", "xpu", *SMALL[:4]], "device 'xpu' cannot be used"),
    "no such device, bench": (["bench", "--models", "mlp", "--device", "hpu"], "device 'hpu' cannot be used"),
    "an unset variable": (["train", "--out", ""], "an empty value after --out: is a variable of the shell"),
    "an unset variable, joined": (["train", "--data-dir="], "an empty value after --data-dir"),
    "an unset folder": (["report", ""], "an empty value after report"),
    "a home behind =": (["train", "--out=~/run"], "--out=~/run: the shell has left ~ as it is"),
    "a home in quotes": (["report", "~/run"], "~/run: the shell has left ~ as it is"),
    "as many workers as numbers": (["train", *SMALL, "--num-workers", "9" * 20], "num.workers"),
    "more workers than a machine has": (["data", "check", ".", "--num-workers", "513"], "num-workers"),
    "a file without an end": (["bench", "--out", "/dev/zero"], "/dev/zero: it is not a regular file"),
    "a file under a file": (["bench", "--models", "mlp", "--out", f"{__file__}/x.json"], "File exists"),
    "no number of devices": (["train", "--devices", "cpu:0", *SMALL], "must be a whole number"),
    "nobody on the other machines": (["train", "--num-nodes", "2", *SMALL], "srun or torchrun"),
    "a batch that no integer holds": (
        ["audit", "--batch-size", "99999999999999999999", *SMALL[:4]], "batch-size is '?99999999999999999999"
    ),
    "a batch below nothing": (["bench", "--batch-size", "-4"], "batch_size is -4"),
    "threads": (["bench", "--num-threads", "99999999999"], "give 1 to 4096"),
    "an audit's rate": (["audit", "--lr", "inf", *SMALL[:4]], "lr is '?inf'?: it must be a number"),
    "more samples than memory": (
        ["train", "--data", "digits", "--model", "mlp", "--samples-per-epoch", "1000000000000000"],
        "not enough memory",
    ),
    "a wider network than memory": (["train", "--model", "mlpx99999999999", *SMALL[:2]], "not enough memory"),
    "a network without an end": (["train", "--model", "resnet99999998", *SMALL[:2]], "too deep"),
    "an angle of nothing": (["mirror", "plan", "--target-angle-deg", "1e-300"], "must be between 1e-12"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOPELESS)
def test_a_hopeless_command_is_refused_in_a_line(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = HOPELESS[case]
    told = refused(capsys, *arguments)
    assert re.search(message, told), told


COMMANDS = [
    "train",
    "compare",
    "tune",
    "audit",
    "eval",
    "report",
    "bench",
    "rules",
    "mirror plan",
    "data check",
]
FLAGS = [
    "--lr", "--rule", "--rules", "--seed", "--epochs", "--out", "--config", "--model", "--data", "--devices",
    "--milestones", "--batch-size", "--print-config", "--no-compile", "--which", "--steps", "--trials",
    "--nope", "--resume", "--rounds", "--noise", "--import", "--device", "--help",
]  # fmt: skip
words = st.one_of(numbers.map(str), texts, st.sampled_from(FLAGS))


@pytest.fixture
def nothing_runs(monkeypatch):
    """Let jobs be refused when they would begin; return the list of what is told."""
    told = []
    monkeypatch.setattr(cli, "complain", told.append)
    for job in ("jobs.run_job", "jobs.tune.tune", "jobs.audit.audit_run", "bench.run_bench"):
        monkeypatch.setattr(f"feedbackpath.{job}", _never_run)
    return told


@BOUNDED
@given(command=st.sampled_from(COMMANDS), rest=st.lists(words, max_size=5))
def test_any_command_line_gets_one_line(nothing_runs, command, rest):
    nothing_runs.clear()
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), *rest])
    assert stop.value.code in (0, 2)
    assert len(nothing_runs) == (stop.value.code == 2)
    assert not any(cli.TRACEBACK in line for line in nothing_runs), nothing_runs


def _never_run(*_, **__):
    raise ConfigError("this job would have been run")


def test_what_nobody_foresaw_is_one_line_and_whole_where_asked_for(monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("feedbackpath.train.config.RunConfig.to_yaml", fail)
    told = refused(capsys, "train", "--print-config")
    assert "ZeroDivisionError in test_nets.py, line" in told
    assert "FEEDBACKPATH_TRACEBACK=1" in told
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--print-config"])


def test_ctrl_c_before_a_job_has_begun_is_one_line(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("feedbackpath.train.config.RunConfig.to_yaml", interrupt)
    assert ask(capsys, "train", "--print-config") == (128 + signal.SIGINT, "feedbackpath: interrupted\n")


def test_names_are_text_and_no_command_to_the_terminal(capsys):
    told = refused(capsys, "eval", "\x1b[2J\udce9[/x]")
    assert (
        told == "feedbackpath: \\x1b[2J\\udce9[/x] has no run: give the --out folder of feedbackpath train\n"
    )
    from feedbackpath.cli.output import make_console

    make_console().print("[/x] :smile: \x1b[31m\nnext")
    assert capsys.readouterr().out == "[/x] :smile: \\x1b[31m\nnext\n"


# --- Files of settings -------------------------------------------------------------------------------------

BROKEN_YAML = [
    "epochs: 2023-99-99", "epochs: !!int foo", "lr: !!timestamp foo", "lr: !!float foo", "a: &a [*a]",
    "epochs: !!python/object:os.system x", "? {a: 1}\n: 1", "data: &a [*a]", "\x00", "[" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_a_broken_file_is_refused_in_a_line(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert refused_in_a_line(lambda: merge_config(RunConfig(), tmp_path / "c.yaml"))


@BOUNDED
@given(values=st.dictionaries(st.sampled_from([*CompareConfig.model_fields, "x"]), plain, max_size=4))
def test_any_settings_make_a_config_or_a_line(tmp_path_factory, values):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    for flags in (CompareConfig(), AuditConfig()):
        refused_in_a_line(lambda flags=flags: merge_config(flags, file))


@BOUNDED
@given(
    content=st.one_of(
        st.text(alphabet="ab:-[]{}&*!#|>'\"%@`\n 0123.~<?", max_size=40), st.binary(max_size=20)
    )
)
def test_any_text_is_settings_or_a_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused_in_a_line(lambda: read_config(file))


@BOUNDED
@given(
    rule=st.sampled_from(["kp", "wm", "mirror-kp", "fa-lowrank", "fa-sparse", "ss", "sa", "ia"]),
    data=st.data(),
)
def test_any_settings_of_a_rule_make_a_rule_or_a_line(rule, data):
    names = st.sampled_from(
        ["every", "rank", "share", "rate", "decay", "mirror", "magnitude", "feedback_rate", "order", "x"]
    )
    inner = st.dictionaries(st.sampled_from([*fp.Mirror.__dataclass_fields__]), plain, max_size=3)
    settings = data.draw(st.dictionaries(names, st.one_of(plain, inner), max_size=2))
    refused_in_a_line(lambda: make_rule(rule, settings))


def test_numbers_that_yaml_reads_as_text_are_named_with_what_to_write():
    with pytest.raises(
        ConfigError, match=r"wm.mirror: sigma is '1e-2', which YAML reads as text; write 1.0e-2"
    ):
        make_rule("wm", {"mirror": {"sigma": "1e-2"}})
    with pytest.raises(ConfigError, match=r"every is '1e3', which YAML reads as text; write 1.0e\+3"):
        make_rule("mirror-kp", {"every": "1e3"})
    with pytest.raises(fp.RuleError, match=r"every must be a whole number, not 1.5"):
        make_rule("mirror-kp", {"every": 1.5})


def test_a_config_from_a_pipe_is_read_once_and_honoured(tmp_path):
    command = f"{sys.executable} -m feedbackpath train --recipe glyphs-resnet8 --config <(echo 'epochs: 3')"
    command += " --print-config"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "epochs: 3\n" in done.stdout, done.stderr
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        read_config(type(tmp_path)("/dev/zero"))


# --- Result files ------------------------------------------------------------------------------------------


def results():
    """Return the content of a result file with something in every field."""
    layers = {"fc1": 20.0, "fc2": 40.0}
    entries = [
        Entry(epoch=n, train_loss=1.0, test=9.0, gain=layers, matrix_angle_deg=layers) for n in range(3)
    ]
    runs = [Run(rule=rule, seed=seed, status="finished", test=9.0, start=entries[0], history=entries[1:])
            for rule in ("bp", "kp") for seed in (0, 1)]  # fmt: skip
    return Results(model="mlp", data=DataFacts(name="digits"), config={"lr": 0.1}, runs=runs).to_json()


def places(value, path=()):
    """Yield the way to every place within a content."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


PLACES = [path for path in places(results()) if path]


@BOUNDED
@given(path=st.sampled_from(PLACES), value=plain, is_removed=st.booleans())
def test_any_damage_to_a_result_file_is_drawn_or_a_line(path, value, is_removed):
    content = copy.deepcopy(results())
    node = content
    for key in path[:-1]:
        node = node[key]
    if is_removed:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    content = json.loads(json.dumps(content))

    def read_and_draw():
        found = parse_results(content, "results.json")
        rich_table(found)
        json.dumps(found.to_json())
        if len(path) % 3 == 0:  # takes a tenth of a second
            render_page([make_panel([("runs/x", found)])]).encode("utf-8", "backslashreplace")

    refused_in_a_line(read_and_draw)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema": 1, "runs": ' + "[" * 100_000, "\udce9", "NaN", ""]
)
def test_a_result_file_of_another_form_is_one_line(tmp_path, capsys, text):
    (tmp_path / "results.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(capsys, "report", str(tmp_path))


# --- Checkpoints -------------------------------------------------------------------------------------------


def whole_content():
    """Return what a checkpoint of kp, seed 0 holds."""
    state = {name: kind() for name, kind in STATE.items()}
    return {"run": Run(rule="kp", seed=0).model_dump(mode="json"), "state": state}


@BOUNDED
@given(path=st.sampled_from([path for path in places(whole_content()) if path]), value=plain)
def test_any_content_of_a_checkpoint_is_taken_or_passed_over(tmp_path_factory, path, value):
    kept = checkpoints_of(tmp_path_factory.mktemp("c"), RunConfig(), "kp", 0, DataFacts())
    kept.save(whole_content(), (1, 0))
    content = whole_content()
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    kept.save(content, (2, 0))
    found, damaged = kept.load_newest()
    assert found["run"]["rule"] == "kp"
    assert len(damaged) <= 1


def test_a_checkpoint_does_not_say_where_files_go(tmp_path):
    kept = checkpoints_of(tmp_path, RunConfig(), "kp", 0, DataFacts())
    evil = whole_content()
    evil["run"]["rule"] = "../../../evil"
    kept.save(evil, (1, 0))
    found, damaged = kept.load_newest()
    assert found is None
    assert len(damaged) == 1
    with pytest.raises(fp.UserError, match="is damaged"):
        kept._load(damaged[0])
    assert load_checkpoint(damaged[0])["run"]["rule"] == "../../../evil"


# --- Public functions --------------------------------------------------------------------------------------


def make_model():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


PATH = fp.untie(make_model(), "wm")
CALLS = {
    "untie": (
        fp.untie,
        ["model", "rule", "overrides", "strict", "activations", "batchnorm_feedback", "seed", "x"],
    ),
    "audit": (fp.audit, ["step", "path", "build", "steps", "stateful"]),
    "mirror": (PATH.mirror, ["steps", "settings", "until_angle_deg", "most_steps", "x"]),
    "plan": (PATH.plan, ["compute_loss", "settings", "scale"]),
    "delta_angles": (PATH.delta_angles, ["compute_loss"]),
    "update_angles": (PATH.update_angles, ["compute_loss"]),
    "clip_grad_norm_": (PATH.clip_grad_norm_, ["max_norm", "norm_type"]),
    "check_optimizer": (PATH.check_optimizer, ["optimizer"]),
    "load_state_dict": (copy.deepcopy(PATH).load_state_dict, ["state"]),
    "register_layer": (fp.register_layer, ["weights", "fan_in", "as_matrix"]),
    "register_rule": (fp.register_rule, ["rule"]),
    "forward_passage": (lambda w: fp.forward_passage(w), ["w"]),
    "draw_feedback": (fp.draw_feedback, ["weights", "context"]),
    "of_tensors": (
        fp.Task.of_tensors,
        ["name", "train", "validation", "test", "num_outputs", "samples_per_epoch"],
    ),
    "Mirror": (fp.Mirror, [*fp.Mirror.__dataclass_fields__, "x"]),
    "When": (fp.When, [*fp.When.__dataclass_fields__, "x"]),
    "Broadcast": (fp.Broadcast, ["signal"]),
    "Target": (fp.Target, ["inverse"]),
    **{
        kind.__name__: (
            kind,
            ["mirror", "every", "start", "rank", "share", "rate", "decay", "scale", "magnitude"],
        )
        for kind in map(
            RULES.__getitem__, ("kp", "wm", "mirror-kp", "fa-lowrank", "fa-sparse", "ss", "sa", "ia")
        )
    },
}
DEFAULTS = {"untie": {"model": make_model, "rule": lambda: "fa"}}


@pytest.mark.parametrize("name", CALLS)
@BOUNDED
@given(data=st.data())
def test_any_call_is_done_or_refused_in_a_line(name, data):
    call, parameters = CALLS[name]
    given = data.draw(st.dictionaries(st.sampled_from(parameters), objects, min_size=1, max_size=2))
    whole = {key: make() for key, make in DEFAULTS.get(name, {}).items()} | given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused_in_a_line(lambda: call(**whole))


WRONG = {
    "sigma": lambda: fp.Mirror(sigma=float("inf")),
    "sigma squared": lambda: fp.Mirror(sigma=1e300),
    "batchnorm_feedback": lambda: fp.untie(make_model(), "fa", batchnorm_feedback="Sigma"),
    "activation that is not a number": lambda: fp.untie(
        make_model(), "wm", activations={"0": lambda x: x * float("nan")}
    ),
    "activation that returns nothing": lambda: fp.untie(
        make_model(), "wm", activations={"0": lambda x: None}
    ),
    "activation that sums": lambda: fp.untie(make_model(), "wm", activations={"0": torch.sum}),
    "loss": lambda: PATH.delta_angles(lambda: None),
    "losses": lambda: PATH.delta_angles(lambda: PATH.model(torch.zeros(3, 6))),
    "state": lambda: copy.deepcopy(PATH).load_state_dict({}),
    "a folder that is a file": lambda: fp.Recorder("/dev/null", rule="kp"),
    "a name for files": lambda: fp.register_model("a/b", make_model),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_was_taken_for_something_else_is_refused(case):
    assert refused_in_a_line(WRONG[case])


@pytest.mark.parametrize("name", ["a/b", "../x", "", "a,b", "\x1b[31m"])
def test_a_rule_whose_name_files_cannot_have_is_refused_when_it_is_registered(name):
    kind = type("Own", (fp.Rule,), {"name": name})
    with pytest.raises(fp.RuleError, match="files get this name"):
        fp.register_rule(kind)
    assert name not in RULES


def test_a_checked_call_still_takes_what_it_took():
    """Numbers of NumPy's and tensors of one number, defaults, subclasses, None where it may be."""

    @checked(UserError)
    def call(count: int, share: float | None = None, *names: str, kind: type[nn.Module] = nn.Linear) -> tuple:
        return count, share, names, kind

    import numpy as np

    assert call(np.int64(3), torch.tensor(0.5), "a", "b", kind=nn.ReLU)[2:] == (("a", "b"), nn.ReLU)
    assert call(1) == (1, None, (), nn.Linear)
    for wrong in ((1.5,), (True,), (1, "a"), (1, 0.5, 3)):
        with pytest.raises(UserError, match=r"call: (count|share|names) must be "):
            call(*wrong)
    assert fits({"a": [1]}, dict[str, list[int]])
    assert not fits({"a": [None]}, dict[str, list[int]])
    assert BY_LAYER  # a layer may have any name

"""Run a job: every rule and seed of a config through the one training loop."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from feedbackpath.data import minibatches
from feedbackpath.errors import ConfigError, UserError
from feedbackpath.jobs.book import ResultsBook
from feedbackpath.jobs.imports import import_files, naming_faults
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.report.live import LiveView
from feedbackpath.report.table import describe_divergence
from feedbackpath.rules import resolve_rule
from feedbackpath.tasks import Task, load_task
from feedbackpath.train.build import make_network, make_path
from feedbackpath.train.config import CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Diverged, Measured, Paused, Step, train
from feedbackpath.train.processes import LostProcessError
from feedbackpath.train.results import Results
from feedbackpath.train.rules import make_rule
from feedbackpath.train.schedule import Schedule
from feedbackpath.train.store import locked


def run_job(
    config: CompareConfig | RunConfig, out: Path, *, resume: bool, command: str, view: LiveView
) -> Results:
    """Train by every rule and seed of a config and keep results, figures and a page in a folder.

    Where the config asks for several devices, every process runs this; the main one writes and shows.

    Args:
        config: The settings.
        out: The folder; on several machines, one that all of them see.
        resume: Go on with what the folder holds, if it holds anything.
        command: The command line, for the results file.
        view: Where progress is shown.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: The folder holds another job's results, another process works in it, or a setting names
            what does not exist.
        DataError: The data is missing or damaged.
        CheckpointError: A checkpoint could not be written.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint of the last step is kept.
    """
    import_files(config.imports)
    engine = Engine(config)
    first_task, mirrors = prepare(config, engine)
    if config.mirror_epochs and not mirrors:
        raise ConfigError("--mirror-epochs has no effect here: no rule of this job mirrors; leave it out")
    with ExitStack() as stack:
        stack.enter_context(_ending_as_one(engine))
        _take_folder(stack, out, engine)
        book = ResultsBook(out, config, first_task, command, resume=resume)
        engine.gather(None)  # every process has looked at the folder before the main one writes into it
        book.open(is_writer=engine.is_main)
        stop = stack.enter_context(StopRequest(is_told=engine.is_main))
        stack.enter_context(view)
        for seed in range(config.seed, config.seed + config.seeds):
            task = first_task if seed == config.seed else make_task(config, seed)
            for rule in config.rules:
                if not book.results.run_of(rule, seed).is_ended:
                    _train_and_record(book, rule, seed, task, engine, stop, view)
        book.close()
    return book.results


def prepare(config: CompareConfig | RunConfig, engine: Engine) -> tuple[Task, bool]:
    """Load the first task and build every rule's path; refuse what does not fit before anything is written.

    Returns:
        The task, and whether any rule mirrors. Each network is let go before the next one is built.

    Raises:
        UserError: A setting names what does not exist, or the user's task and network do not fit.
    """
    for rule in config.by_rule:
        resolve_rule(rule)
    for rule, settings in config.rule_settings.items():
        make_rule(rule, settings)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with naming_faults(f"--data {config.data}, --model {config.model}", config.imports):
        task = make_task(config, config.seed)
        mirrors = [_prepare_rule(config, rule, task) for rule in config.rules]
        if config.imports:
            _rehearse(config, task, engine)
    return task, any(mirrors)


def _prepare_rule(config: TrainConfig, rule: str, task: Task) -> bool:
    """Build a rule's path and schedule, and let them go; return whether the rule mirrors."""
    path = make_path(config, rule, config.seed, make_network(config, config.seed, task))
    Schedule.over(config.for_rule(rule), len(task.train), config.mirror_epochs if path.mirrors else 0)
    return path.mirrors


@torch.no_grad()
def _rehearse(config: TrainConfig, task: Task, engine: Engine) -> None:
    """Try the user's network, loss and score on two samples."""
    x, y = next(minibatches(task.train, batch_size=2, seed=0, epoch=0, shuffle=True))
    x, y = engine.place(task.train.prepare(x.to(engine.device))), engine.place(y)
    with engine.autocast():
        output = engine.place_model(make_network(config, config.seed, task)).eval()(x)
        loss, score = task.loss(output, y), task.score(output, y)
    if loss.dim() or score.shape != (len(y),):
        raise ConfigError(
            f"--data {config.data}: of {len(y)} samples, the loss has the shape {list(loss.shape)} and the "
            f"score {list(score.shape)}; the loss must be one number, the score one for each sample"
        )


@contextmanager
def _ending_as_one(engine: Engine) -> Iterator[None]:
    """Let a job of several processes of which one was ended by a signal end as a job of one does."""
    try:
        with engine.naming_lost():
            yield
    except LostProcessError as lost:
        if lost.exit_code <= 128:
            raise
        raise Interrupted(lost.exit_code, reason=str(lost)) from None


def _take_folder(stack: ExitStack, out: Path, engine: Engine) -> None:
    """Keep other jobs out of the folder until this one ends; every process is told where that fails."""
    refusal: UserError | None = None
    if engine.is_main:
        try:
            stack.enter_context(locked(out))
        except UserError as error:
            refusal = error
    for found in engine.gather(refusal):
        if found is not None:
            raise found


def make_task(config: TrainConfig, seed: int) -> Task:
    """Load the task of a config for a seed."""
    return load_task(
        config.data,
        data_dir=config.data_dir,
        seed=seed,
        num_classes=config.classes,
        samples_per_epoch=config.samples_per_epoch,
        image_size=config.image_size,
        on_bad_image=config.on_bad_image,
    )


def _train_and_record(
    book: ResultsBook,
    rule: str,
    seed: int,
    task: Task,
    engine: Engine,
    stop: StopRequest,
    view: LiveView,
) -> None:
    run = book.results.run_of(rule, seed)
    state, notes = book.take_up(run)
    for note in notes:
        view.show_note(note)
    view.start_run(book.results, run)
    status = "finished"
    events = train(
        book.config.for_rule(rule), rule, seed, task, engine, state=state, must_stop=lambda: bool(stop)
    )
    try:
        with _ending_as_one(engine):
            for event in events:
                if isinstance(event, Step):
                    view.show_step(event)
                elif isinstance(event, Measured):
                    book.record(run, event)
                    view.show_measured(event)
                elif isinstance(event, Paused):
                    book.save_state(run, event.state)
                    if event.is_last:
                        raise Interrupted(128 + max(engine.gather(stop.number)))
                elif isinstance(event, Diverged):
                    status = "diverged"
                    book.record_divergence(run, event)
                    view.show_note(f"{run.rule} seed {run.seed} {describe_divergence(run)}")
    except Interrupted as asked:
        run.status = "interrupted"
        book.save()
        if not asked.is_at_once:
            book.close()
        raise
    book.end(run, status)
    view.end_run()

"""Run a job: every rule and seed of a config through the one training loop."""

from pathlib import Path
from typing import Any

import torch

from feedbackpath.data import Dataset, load_dataset
from feedbackpath.jobs.book import ENDED, ResultsBook
from feedbackpath.jobs.signals import Interrupted, StopRequest
from feedbackpath.report.live import LiveView
from feedbackpath.train.build import make_network, make_path
from feedbackpath.train.config import CompareConfig, RunConfig, TrainConfig
from feedbackpath.train.engine import Engine
from feedbackpath.train.loop import Diverged, Measured, Paused, Step, train
from feedbackpath.train.rules import make_rule


def run_job(
    config: CompareConfig | RunConfig, out: Path, *, resume: bool, command: str, view: LiveView
) -> dict[str, Any]:
    """Train by every rule and seed of a config and keep results, figures and a page in a folder.

    Where the config asks for several devices, every process runs this; the main one writes and shows.

    Args:
        config: The settings.
        out: The folder; on several machines, one that all of them see.
        resume: Go on with what the folder holds, if it holds anything.
        command: The command line, for the results file.
        view: Where progress is shown.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: The folder holds another job's results, or a setting names what does not exist.
        DataError: The data is missing or damaged.
        CheckpointError: A checkpoint could not be written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last step is kept.
    """
    for rule, settings in config.rule_settings.items():
        make_rule(rule, settings)
    engine = Engine(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    first_data = load_data(config, config.seed)
    for rule in config.rules:  # refuses what cannot be built before anything is written
        make_path(config, rule, config.seed, make_network(config, config.seed, first_data))
    book = ResultsBook(out, config, first_data.facts, command, resume=resume)
    engine.gather(None)  # every process has looked at the folder before the main one writes into it
    book.open(is_writer=engine.is_main)
    with StopRequest() as stop, view:
        for seed in range(config.seed, config.seed + config.seeds):
            dataset = first_data if seed == config.seed else load_data(config, seed)
            for rule in config.rules:
                if book.run_of(rule, seed)["status"] not in ENDED:
                    _train_and_record(book, rule, seed, dataset, engine, stop, view)
    book.close()
    return book.results


def load_data(config: TrainConfig, seed: int) -> Dataset:
    """Load the data of a config for a seed."""
    return load_dataset(
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
    dataset: Dataset,
    engine: Engine,
    stop: StopRequest,
    view: LiveView,
) -> None:
    run = book.run_of(rule, seed)
    state, notes = book.take_up(run)
    for note in notes:
        view.show_note(note)
    view.start_run(book.results, run)
    status = "finished"
    events = train(book.config, rule, seed, dataset, engine, state=state, must_stop=lambda: bool(stop))
    try:
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
                view.show_note(book.record_divergence(run, event))
    except Interrupted:
        book.end(run, "interrupted")
        book.close()
        raise
    book.end(run, status)
    view.end_run()

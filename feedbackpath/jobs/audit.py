"""Audit a rule in the training step of a run."""

import torch

from feedbackpath.auditing import Report, audit
from feedbackpath.data import minibatches
from feedbackpath.jobs.imports import import_files
from feedbackpath.jobs.run import make_task
from feedbackpath.train.build import make_network, make_optimizer, make_path, run_once
from feedbackpath.train.config import AuditConfig
from feedbackpath.train.devices import usable_device


def audit_run(config: AuditConfig) -> Report:
    """Audit training steps by a rule, all on one minibatch of the run's data.

    Args:
        config: The settings.

    Raises:
        UserError: There is no such rule, network or data, or the step cannot be audited.
    """
    import_files(config.imports)
    device = usable_device(config.device)
    run = config.as_run()
    task = make_task(run, run.seed)
    model = make_network(run, run.seed, task).to(device)
    path = make_path(run, config.rule, run.seed, model)
    run_once(path, task)
    optimizer = make_optimizer(path, run)
    x, y = next(minibatches(task.train, batch_size=run.batch_size, seed=run.seed, epoch=1, shuffle=True))
    x, y = task.train.prepare(x.to(device)), y.to(device)

    def step() -> None:
        optimizer.zero_grad()
        task.loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        if run.clip_norm is not None:
            path.clip_grad_norm_(run.clip_norm)
        optimizer.step()
        path.step()

    torch.manual_seed(run.seed)
    return audit(step, path, steps=config.steps)

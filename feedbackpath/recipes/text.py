"""Networks that read text; none is in the paper, which asks for tests in other architectures."""

from feedbackpath.train.config import RunConfig

SMALL = {
    "data": "text",
    "epochs": 4,
    "samples_per_epoch": 4000,
    "batch_size": 16,
    "optimizer": "adamw",
}


def text_gpt_small(rule: str = "bp", norm: str = "after") -> RunConfig:
    """A GPT of 0.47 million parameters on the bytes of Python's standard library.

    Expected bits per byte: ``benchmarks/language/gpt/run`` (docs/language-results.md), where other rules have
    settings of their own. It has no BatchNorm, so that ``norm`` makes no difference.

    Left open by the paper, which has no such task: everything. Learning rate and decay are the best of eight
    trials for backprop. Kolen-Pollack has 0.04 e-folds of its clock in so few steps: see ``mirror-kp``.

    Hardware and time: one CPU core, one to two minutes.

    Command: ``feedbackpath train --recipe text-gpt-small --rule mirror-kp``
    """
    own = {"rule": rule, "norm": norm, "model": "gpt", "lr": 0.00218, "weight_decay": 0.0383}
    return RunConfig.model_validate(SMALL | own)


def text_lstm_small(rule: str = "bp", norm: str = "after") -> RunConfig:
    """An LSTM of 256 units on the bytes of Python's standard library.

    Expected bits per byte: ``benchmarks/language/lstm/run`` (docs/language-results.md). It has no
    BatchNorm, so that ``norm`` makes no difference.

    Left open by the paper, which has no such task: everything. Learning rate and decay are the best of eight
    trials for every rule.

    Hardware and time: one CPU core, one to two minutes.

    Command: ``feedbackpath train --recipe text-lstm-small --rule mirror-kp``
    """
    own = {"rule": rule, "norm": norm, "model": "lstm", "lr": 0.0062, "weight_decay": 0.0189}
    return RunConfig.model_validate(SMALL | own)


def text_gpt_124m(rule: str = "bp", norm: str = "after") -> RunConfig:
    """A GPT of 126 million parameters that reads 1,024 bytes at once, on a corpus of one's own.

    Settings are nanoGPT's for GPT-2 (github.com/karpathy/nanoGPT, ``config/train_gpt2.py``): about half a
    million symbols a step, learning rate 6e-4, decay 0.1, gradient norm 1, 2,000 of 600,000 steps of
    warm-up. Kolen-Pollack has 18 e-folds of its clock in them.

    Differs from it: bytes in place of tokens, and depth and width to match; beta_2 is 0.999, not 0.95; the
    learning rate falls to 0, not to a tenth; biases and norms are decayed as all else.

    Expected: not measured. Two steps were run, of windows of 64 bytes, to see that it runs.

    Hardware: eight GPUs of 40 GB, with ``--devices 8``; fewer take a smaller ``--micro-batch-size``.
    Time: not measured.

    Command: ``feedbackpath train --recipe text-gpt-124m --rule kp --data-dir DIR --device cuda --devices 8``
    """
    return RunConfig.model_validate(
        {
            "rule": rule,
            "norm": norm,
            "data": "text-1024",
            "model": "gpt-124m",
            "epochs": 600,
            "samples_per_epoch": 480_000,
            "batch_size": 480,
            "micro_batch_size": 12,
            "optimizer": "adamw",
            "lr": 6e-4,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "warmup_epochs": 2,
            "precision": "bf16-mixed",
            "compile": True,
            "checkpoint_steps": 250,
        }
    )

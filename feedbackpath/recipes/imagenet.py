"""The paper's own experiment: ResNet-18 and ResNet-50 on ImageNet, by five rules, BatchNorm after or before.

Akrout et al. 2019, Section 6 and Appendix D. Ten cells a network: rules ``bp``, ``fa``, ``ss``, ``wm`` and
``kp`` with ``norm`` ``after`` or ``before`` the ReLU. What the paper says:

- 2048 images per minibatch, over 32 devices; Nesterov momentum 0.9; L2 penalty 1e-4 (D.1);
- the learning rate grows linearly over the first 6 epochs (3 to 8 for ``wm``) and shrinks tenfold after
  epochs 32, 62 and 82; 0.5 for sign-symmetry, from a search over [0.01, 2] (D.1);
- ``wm``: two epochs in mirror mode alone, then a little mirroring after every minibatch, layer by layer: 2048
  Gaussian samples of unit variance, learning rate 0.1 and decay 0.5 (D.2);
- sigma alone goes back through BatchNorm (D.3): ``--batchnorm-feedback sigma``.

What it leaves open, and what is assumed here:

- base learning rate: 0.1 for each 256 images, 0.8 at 2048 (Goyal et al. 2017, whom its schedule is from);
- sign-symmetry's 0.5 is taken as the peak at 2048 images;
- epochs: 90, the two of mirror mode among them;
- augmentation: random resized crops and flips in training, the centre of the image scaled to 256 in tests;
- decay of biases and BatchNorm parameters: decayed as all others;
- how Algorithm 1's decay is read: inside the learning rate, so that gains settle near 1 (its printed form
  gives a tenth of W's size a layer); ``rule_settings`` takes the printed one.

Differs from the paper: autograd's BatchNorm gradient is the default.
"""

from feedbackpath.train.config import RunConfig

EPOCHS, WARMUP_EPOCHS, MILESTONES = 90, 6, (32, 62, 82)
# As Mirror.paper(), written out: a recipe is listed without importing torch.
PAPER_MIRROR = {
    "noise": "gaussian", "samples": 2048, "sigma": 1.0, "reading": "inside", "rate": 0.1, "decay": 0.5,
    "block_bias": False, "when": {"layers": "all"},
}  # fmt: skip


def imagenet_resnet18(rule: str = "bp", norm: str = "after") -> RunConfig:
    """ResNet-18 on ImageNet: Figure 3a.

    Expected top-1 test error, norm after (before): bp 30.1(4)%, fa 97.4(2)%, ss 39.2(4)% (37.8(4)%), wm
    30.2(7)%, kp 29.2(4)% (Section 6). Nobody has run this here yet.

    Hardware: the paper's 32 TPU v2 workers; here any number of GPUs, with ``--micro-batch-size`` at what
    one can hold.

    Time: 90 epochs of 1.28 million images: 32 hours at 1,000 images per second, which ``train`` shows.

    Command: ``feedbackpath train --recipe imagenet-resnet18 --rule kp --data DIR --device cuda --devices 8
    --precision bf16-mixed --num-workers 8``
    """
    return _imagenet("resnet18", rule, norm)


def imagenet_resnet50(rule: str = "bp", norm: str = "after") -> RunConfig:
    """ResNet-50 on ImageNet: Figure 3b; sign-symmetry with norm before is Figure 5.

    Expected top-1 test error, norm after (before): bp 22.9(4)%, fa 98.9(1)%, ss 33.8(3)% (32.6(6)%), wm
    23.4(5)%, kp 23.9(7)% (Section 6). Nobody has run this here yet.

    Hardware: the paper's 32 TPU v2 workers; here any number of GPUs, with ``--micro-batch-size`` at what
    one can hold.

    Time: 90 epochs of 1.28 million images: 32 hours at 1,000 images per second, which ``train`` shows.

    Command: ``feedbackpath train --recipe imagenet-resnet50 --rule wm --norm after --data DIR --device cuda
    --devices 8 --precision bf16-mixed --num-workers 8``
    """
    return _imagenet("resnet50", rule, norm)


def _imagenet(model: str, rule: str, norm: str) -> RunConfig:
    lr, lr_batch_size = (0.5, 2048) if rule == "ss" else (0.1, 256)
    return RunConfig.model_validate(
        {
            "rule": rule,
            "data": "imagenet",
            "image_size": 224,
            "model": model,
            "norm": norm,
            "epochs": EPOCHS,
            "mirror_epochs": 2 if rule == "wm" else 0,
            "batch_size": 2048,
            "lr": lr,
            "lr_batch_size": lr_batch_size,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 1e-4,
            "schedule": "steps",
            "milestones": MILESTONES,
            "warmup_epochs": WARMUP_EPOCHS,
            "checkpoint_steps": 250,
            "rule_settings": {"wm": {"mirror": PAPER_MIRROR}} if rule == "wm" else {},
        }
    )

"""Speed of ImageNet's training data path, against Pillow's own decode, crop and resize, on one core.

Run it alone on a machine: `python benchmarks/data_path.py`. The variants take turns over the same files
with the same crops, a few at a time: ratios are between times that lie a tenth of a second apart. Images
are 500 x 375 pixels and some 100 kB, as many of ImageNet's are, cut from scikit-learn's two photographs.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from feedbackpath.data import decode, load_dataset
from feedbackpath.data.counter import uniform
from feedbackpath.data.imagenet import NUM_DRAWS, ImageSplit, random_box

NUM_IMAGES, BATCH_SIZE, REPETITIONS, IMAGE_SIZE = 64, 8, 20, 224
WIDTH, HEIGHT, QUALITY = 500, 375, 97
OUT = Path(__file__).parent / "data-path" / "speed.json"


def write_images(root: Path) -> None:
    """Write class folders of one class: parts of the photographs, at their own resolution."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(2 * NUM_IMAGES):
        image = photographs[number % 2]
        left, top = rng.integers(image.width - WIDTH + 1), rng.integers(image.height - HEIGHT + 1)
        part = image.crop((left, top, left + WIDTH, top + HEIGHT))
        path = root / ("train" if number < 3 * NUM_IMAGES // 2 else "val") / "n0" / f"{number:04}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=QUALITY)


def load_with_pillow(split: ImageSplit, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Make the same batch as the plainest code would: Pillow decodes, converts, crops, resizes and flips."""
    views = []
    for draws, number in zip(
        uniform(indices, NUM_DRAWS, split.seed, epoch).tolist(), split.numbers[indices].tolist(), strict=True
    ):
        with Image.open(split.images.locate(number)) as image:
            whole = image.convert("RGB")
        part = whole.crop(random_box(*whole.size, draws))
        view = part.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        if draws[-1] < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
    return torch.stack(views)


def without_simplejpeg(split: ImageSplit, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Make a batch as where simplejpeg is not installed."""
    with mock.patch.object(decode, "find_simplejpeg", _find_nothing):
        return split.batch(indices, epoch)[0]


def _find_nothing() -> None:
    """Stand in for `find_simplejpeg`: a mock takes long to call."""


def with_simplejpeg(split: ImageSplit, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    """Make a batch as where simplejpeg is installed."""
    return split.batch(indices, epoch)[0]


VARIANTS: dict[str, Callable[[ImageSplit, torch.Tensor, int], torch.Tensor]] = {
    "plain Pillow": load_with_pillow,
    "data path, Pillow": without_simplejpeg,
    "data path, simplejpeg": with_simplejpeg,
}


def measure(split: ImageSplit) -> dict[str, list[float]]:
    """Return the images per second of CPU time of every batch, by variant."""
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for epoch in range(REPETITIONS + 1):
        for indices in torch.arange(NUM_IMAGES).split(BATCH_SIZE):
            for name, make_batch in VARIANTS.items():
                start = time.process_time()
                make_batch(split, indices, epoch)
                rates[name].append(BATCH_SIZE / (time.process_time() - start))
    warm_up = NUM_IMAGES // BATCH_SIZE
    return {name: values[warm_up:] for name, values in rates.items()}


def summarise(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median and quartiles of rates, and of their ratios to plain Pillow's over the same batch."""
    summary = {}
    for name, values in rates.items():
        ratios = [mine / plain for mine, plain in zip(values, rates["plain Pillow"], strict=True)]
        row = {}
        for label, numbers in (("images_per_second", values), ("ratio", ratios)):
            low, middle, high = statistics.quantiles(numbers, n=4)
            row |= {label: round(middle, 3), f"{label}_q1": round(low, 3), f"{label}_q3": round(high, 3)}
        summary[name] = row
    return summary


def main() -> None:
    """Measure, print and write the result file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        split = load_dataset("imagenet", data_dir=folder, image_size=IMAGE_SIZE).train
        assert isinstance(split, ImageSplit)
        mean_bytes = statistics.mean(len(split.images.read(number)) for number in range(NUM_IMAGES))
        difference = load_with_pillow(split, torch.arange(NUM_IMAGES), 0).float()
        difference -= split.batch(torch.arange(NUM_IMAGES), 0)[0].float()
        summary = summarise(measure(split))
    results = {
        "task": f"decode, random resized crop to {IMAGE_SIZE} px, flip; CPU time of one thread",
        "images": {"count": NUM_IMAGES, "width": WIDTH, "height": HEIGHT, "mean_bytes": round(mean_bytes)},
        "batch_size": BATCH_SIZE,
        "repetitions": REPETITIONS,
        "processor": {"name": platform.processor(), "torch": torch.backends.cpu.get_cpu_capability()},
        "versions": {name: version(name) for name in ("torch", "Pillow", "simplejpeg", "numpy")},
        "mean_difference_grey_levels": round(float(difference.abs().mean()), 4),
        "variants": summary,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=2) + "\n")
    for name, row in summary.items():
        print(f"{name:24} {row['images_per_second']:6.0f} images/s  ratio {row['ratio']:.2f}")


if __name__ == "__main__":
    main()

"""What a rule costs beside plain PyTorch: time, memory, traffic, and the measurements themselves."""

from feedbackpath.bench.bench import BenchSettings, run_bench
from feedbackpath.bench.growth import GrowthSettings, run_growth

__all__ = ["BenchSettings", "GrowthSettings", "run_bench", "run_growth"]

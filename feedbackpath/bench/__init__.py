"""What a rule costs beside plain PyTorch: time, memory, traffic, and the measurements themselves."""

from feedbackpath.bench.bench import BenchSettings, run_bench

__all__ = ["BenchSettings", "run_bench"]

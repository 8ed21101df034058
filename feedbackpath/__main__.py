"""``python -m feedbackpath``, which torchrun and SLURM start more easily than a script."""

from feedbackpath.cli import main

if __name__ == "__main__":
    main()

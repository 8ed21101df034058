"""What every rule stands on: see docs/design.md. It imports torch and nothing else of this package."""

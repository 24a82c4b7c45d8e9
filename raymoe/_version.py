"""The version alone, so that it is known without importing anything else."""

__version__ = "0.1.0"

"""pause_ray: find out whether, where and at what price pause-tuning helps a long-context model."""

__version__ = "0.1.0"

"""What steps of the environments cost, and serving: ``python -m eval.bench env``, ``masks``, ``scale`` and ``serving``."""

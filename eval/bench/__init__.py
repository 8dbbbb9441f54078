"""What a step of the environments costs: ``python -m eval.bench env``, ``masks`` and ``scale``."""

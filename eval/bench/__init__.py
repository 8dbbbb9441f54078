"""What steps, serving and privacy cost: ``python -m eval.bench env``, ``masks``, ``scale``, ``serving`` and ``private``."""

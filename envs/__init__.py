"""Pathway selection as Gymnasium environments. Importing this package registers the ids and does not import torch."""

from dynamic_sparse_adapters import check_names

check_names()

from envs.registration import MINIATURES, known_spec, register, register_all  # noqa: E402

register_all()

__all__ = ["MINIATURES", "known_spec", "register", "register_all"]

"""Batched adaptation of many users (the inner loop) and the meta-learning of where it starts (the outer loop)."""

from dynamic_sparse_adapters import check_names

check_names()

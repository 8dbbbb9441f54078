"""The harness: results over several runs."""

from dynamic_sparse_adapters import check_names

check_names()

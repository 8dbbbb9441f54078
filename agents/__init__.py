"""Policies that choose the mask: PPO on the gating environments, and the rivals it is measured against."""

from dynamic_sparse_adapters import check_names

check_names()

"""Who is personalised: populations of users, simulated and real, and what is known of a user from the support set."""

from dynamic_sparse_adapters import check_names

check_names()

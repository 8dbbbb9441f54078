"""A vision transformer for Dynamic Sparse Adapters, and an environment with it. Importing this does not import torch."""


def register_envs() -> None:
    """Register our id; the entry point of the group ``dsa.envs``, called while ``envs`` is being imported."""
    from envs import register

    register(
        "vit/Digits-v0",
        users="digits",
        backbone="vit-tiny",
        miniature={"train_users": 12, "val_users": 4, "test_users": 6, "meta_steps": 2, "meta_users": 4},
    )

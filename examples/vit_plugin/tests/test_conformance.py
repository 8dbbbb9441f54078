"""The suite that every environment of Dynamic Sparse Adapters passes, on ours."""

from envs.conformance import EnvConformance

FEW = {"train_users": 6, "val_users": 3, "test_users": 3, "meta_steps": 1, "meta_users": 2, "inner_steps": 1}


class TestDigits(EnvConformance):
    """Found through the entry points of the installed package: nothing here imports ``dsa_vit``."""

    env_id = "vit/Digits-v0"


class TestDigitsThroughAllLayers(EnvConformance):
    """Adapters between the layers and second-order MAML, which differentiates the attention twice."""

    env_id = "vit/Digits-v0"
    kwargs = FEW | {"placement": "inline", "algorithm": "maml"}

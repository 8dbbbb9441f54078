"""The population model of the digits: a small ResNet, pre-trained on images that no user has."""

from pathlib import Path

import torch

from backbones import make_backbone
from backbones.artefacts import cache_key, load_or_make
from backbones.base import PopulationModel, hash_tensors
from backbones.pretrain import pretrain
from backbones.resnet import SmallResNet
from users.digits import digits_pools


def digits_model(seed: int, folder: Path, epochs: int = 60) -> PopulationModel:
    """The small ResNet, pre-trained on the pre-training pool or loaded from ``folder``.

    The file's name carries a hash of the images and of the random start, so that other pools make another backbone.
    """
    images, labels = digits_pools(seed).pretraining()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallResNet(num_classes=10)
    start = hash_tensors({"images": images, "labels": labels, **network.state_dict()})

    def train() -> tuple[dict, dict]:
        return pretrain(network, images, labels, epochs=epochs, seed=seed).state_dict(), {
            "epochs": epochs,
            "seed": seed,
        }

    path = folder / f"backbone-{cache_key(start=start, epochs=epochs)}"
    return make_backbone("resnet-small", num_classes=10, state=load_or_make(path, "backbone", train)[0])

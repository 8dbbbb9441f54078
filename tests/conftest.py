"""What all tests share: no network, one thread, no file outside pytest's own folders, small models, and small data."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium as gym
import harness
import miniatures
import pytest
import torch
import worlds
from populations import write_all

import envs
from backbones.pathways import make_pathways
from backbones.pretrain import Labelled, pretrain
from backbones.resnet import SmallResNet, small_resnet
from envs.scenario import load_scenario
from users.batch import stack
from users.digits import digits_pools, digits_population

torch.set_num_threads(1)

SHAPE = {"widths": (8, 16), "depth": 2}


@pytest.fixture(autouse=True, scope="session")
def _cache_in_tmp(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _little_shrinkage():
    """Val users are asked less: the choice is tested in test_shrinkage, elsewhere it only takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meta.shrinkage.REPEATS", (1,))
        patch.setattr("meta.shrinkage.SIZES", (1, 5))
        yield


@pytest.fixture(autouse=True)
def _as_every_test_begins():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a command line that a test called may have taken more


@pytest.fixture(scope="session")
def trained_network():
    """A small ResNet after enough steps that its batch-norm statistics are far from 0 and 1."""
    torch.manual_seed(0)
    return pretrain(SmallResNet(10, **SHAPE), Labelled(*digits_pools(0).pretraining()), epochs=15, seed=0)


@pytest.fixture(scope="session")
def model(trained_network):
    """The population model of the digits, in small."""
    return small_resnet(10, trained_network.state_dict(), **SHAPE)


@pytest.fixture(scope="session")
def pathways(model):
    """Four adapters and a head along ``model``."""
    return make_pathways("inline", model, rank=4)


@pytest.fixture
def side(model):
    return make_pathways("side", model, rank=4)


@pytest.fixture(scope="session")
def population():
    """A dozen train users with every kind of shift, few others."""
    return digits_population(0, train_users=12, val_users=3, test_users=4)


@pytest.fixture(scope="module")
def batches(pathways, population):
    """Support and query of the twelve train users."""
    return [stack(pathways, population.train, role) for role in ("support", "query")]


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """Miniatures of the real data sets and of the text encoder, for the ids that need them."""
    root = tmp_path_factory.mktemp("data")
    for write in (miniatures.unipen, miniatures.omniglot, miniatures.popquorn, miniatures.jester):
        write(root)
    text = {"backbone": "bert", "source": str(miniatures.text_encoder(root / "encoder"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_DATA_ROOT", str(root))
        for env_id in ("dsa/PopquornBert-v0", "dsa/JesterBert-v0"):
            patch.setitem(envs.MINIATURES, env_id, envs.MINIATURES[env_id] | text)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with every miniature; not to be changed."""
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def raw_root(tmp_path_factory):
    """The same judgements as the authors' one table."""
    return miniatures.popquorn_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def copy(root, tmp_path):
    """A copy of ``root`` to be changed."""
    return shutil.copytree(root, tmp_path / "copy")


@pytest.fixture(scope="module")
def digits():
    kwargs = {**gym.spec("dsa/DigitsResNet-v0").kwargs, **envs.MINIATURES["dsa/DigitsResNet-v0"]}
    return load_scenario(kwargs.pop("scenario"), **kwargs)


@pytest.fixture(scope="module")
def live(digits):
    """The live oracle of the miniature; remembers nothing but weights between rounds."""
    return digits.oracle.live


@pytest.fixture(scope="session")
def digits_world():
    """A tiny population of images, adapters inline."""
    return worlds.digits("inline")


@pytest.fixture(scope="session")
def side_world():
    """The same with adapters beside the model."""
    return worlds.digits("side")


@pytest.fixture(scope="session")
def text_world(real_data):
    """A tiny population of annotators of comments, a tiny BERT, cross-fitted."""
    return worlds.world("dsa/PopquornBert-v0")


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A finished run with a curve."""
    out = tmp_path_factory.mktemp("runs") / "done"
    harness.run(out, "base,all_on", "--shown", "0", "1", "30")
    return out

"""Every id that we register passes the suite that plug-ins run. Registering an id is enough for it to be tested here."""

import gymnasium as gym
import pytest

pytest.register_assert_rewrite("envs.conformance")

import envs  # noqa: E402
from envs.conformance import EnvConformance  # noqa: E402

IDS = [env_id for env_id in gym.registry if env_id.startswith("dsa/")]


class TestEveryId(EnvConformance):
    @pytest.fixture(autouse=True, params=IDS)
    def _id(self, request, real_data):
        self.env_id = request.param


# The ids' own rates are those of their own placement.
SLOW = {"algorithm": "fomaml", "inner_steps": 1, "inner_rate": 0.1, "head_rate": 0.1}


class TestTheOtherPlacement(EnvConformance):
    @pytest.fixture(autouse=True, params=["dsa/DigitsResNet-v0", "dsa/UnipenResNet-v0", "dsa/PopquornBert-v0"])
    def _id(self, request, real_data):
        self.env_id = request.param
        usual = gym.spec(self.env_id).kwargs.get("placement", "side")
        other = {"side": "inline", "inline": "side"}[usual]
        self.kwargs = {**envs.MINIATURES[self.env_id], "placement": other, "meta_steps": 1, **SLOW}


class TestBlocksThatMayBeLeftOut(EnvConformance):
    @pytest.fixture(autouse=True, params=[("dsa/DigitsResNet-v0", "skip"), ("dsa/PopquornBertExit-v0", "exit+skip")])
    def _id(self, request, real_data):
        self.env_id, gates = request.param
        self.kwargs = {**envs.MINIATURES[self.env_id], "gates": gates, "cost": "flops", "meta_steps": 1}

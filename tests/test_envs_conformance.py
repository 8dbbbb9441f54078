"""Every id that we register passes the suite that plug-ins run. Registering an id is enough for it to be tested here."""

import gymnasium as gym
import pytest

pytest.register_assert_rewrite("envs.conformance")

from envs.conformance import EnvConformance  # noqa: E402

IDS = [env_id for env_id in gym.registry if env_id.startswith("dsa/")]


class TestEveryId(EnvConformance):
    @pytest.fixture(autouse=True, params=IDS)
    def _id(self, request, real_data):
        self.env_id = request.param

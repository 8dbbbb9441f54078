"""Every id that we register passes the suite that plug-ins run. Registering an id is enough for it to be tested here."""

import gymnasium as gym
import miniatures
import pytest

pytest.register_assert_rewrite("envs.conformance")

import envs  # noqa: E402
from envs.conformance import EnvConformance  # noqa: E402

IDS = [env_id for env_id in gym.registry if env_id.startswith("dsa/")]


@pytest.fixture(scope="session")
def _real_data(tmp_path_factory):
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


class TestEveryId(EnvConformance):
    @pytest.fixture(autouse=True, params=IDS)
    def _id(self, request, _real_data):
        self.env_id = request.param

"""A policy of the planted problem on others with fewer pathways: it fits, it is of use, and what does not fit is refused."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from agents.bootstrap import paired_difference
from agents.checkpoint import choose_masks, choose_plans, load_policy
from agents.rivals import best_static
from agents.run import RunConfig
from agents.train_ppo import main as train_ppo
from agents.transfer import trained_rules, transferred_policy
from backbones.artefacts import ArtefactError, load_artefact, save_artefact
from envs.oracles import FormulaOracle
from envs.planted import planted
from envs.rules import Rules
from envs.scenario import Scenario
from envs.statistics import NAMES
from eval import transfer
from eval.headline import text_of
from eval.transfer import trained

QUIET = ["--no-progress", "--num-threads", "1", "-P", "search:false"]
WEIGHT = 0.1
FIVE = 5


class Overheard(FormulaOracle):
    """Remembers which users were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def measure(self, users, plans, roles):
        """See the base class."""
        self.asked.update(np.asarray(users).tolist())
        return super().measure(users, plans, roles)


def five(seed=0, users=200):
    """Like the planted problem, but with five pathways, an embedding that says nothing, and opposite users in pairs."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(users // 2, FIVE))
    need = np.stack([half, -half], 1).reshape(users, FIVE)
    statistics = rng.normal(size=(users, FIVE, len(NAMES))).astype(np.float32).clip(-5, 5)
    statistics[..., NAMES.index("gradient_norm")] = 2 * need + 0.1 * statistics[..., NAMES.index("gradient_norm")]
    statistics[..., NAMES.index("depth")] = np.linspace(0, 1, FIVE)
    statistics[..., NAMES.index("cost")] = 1 / FIVE
    statistics[..., NAMES.index("gate")] = 1
    cuts = np.split(np.arange(users), [users // 2, 3 * users // 4])
    return Scenario(
        name="five",
        pathways=tuple("abcde"),
        splits=dict(zip(("train", "val", "test"), cuts, strict=True)),
        user_ids=tuple(map(str, range(users))),
        user_info=({},) * users,
        embeddings=rng.normal(size=(users, 32)).astype(np.float32),
        statistics=statistics,
        oracle=Overheard(np.full(FIVE, 1 / FIVE), lambda who, masks: (masks == (need[who] > 0)).mean(1)),
        observe=lambda who, plans: statistics[who],
        groups=("all",) * users,
        label_counts={role: np.zeros(users, dtype=np.int64) for role in ("support", "validation")},
        scores={name: np.abs(need) for name in ("gradient_norm", "relative_gradient")},
        fingerprint=f"five-{seed}",
    )


def reward(scenario, masks, users):
    return scenario.oracle.evaluate(users, masks).reward(WEIGHT).mean()


def static_reward(scenario, users):
    mask = best_static(scenario, WEIGHT)
    return reward(scenario, np.repeat(mask[None], len(users), 0), users)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run on eight pathways."""
    folder = tmp_path_factory.mktemp("transfer") / "source"
    train_ppo(["--env", "dsa/Planted-v0", "-n", "4096", "-f", str(folder), *QUIET])
    return folder


@pytest.fixture(scope="module")
def quick():
    """How to train on five pathways in about a second."""
    ppo = {"n_steps": 4, "batch_size": 64, "n_epochs": 4, "learning_rate": 0.003, "ent_coef": 0.01}
    return RunConfig("dsa/Planted-v0", 0, WEIGHT, 512, 256, 64, 0.0, "GatingPolicy", ppo=ppo)


@pytest.fixture
def altered(source, tmp_path):
    """The source's policy with other tensors or another meta."""

    def get(tensors=None, **facts):
        known, meta = load_artefact(source / "policy", "gating policy")
        save_artefact(tmp_path / "policy", "gating policy", known if tensors is None else tensors, {**meta, **facts})
        return tmp_path / "policy"

    return get


def test_a_policy_of_eight_pathways_beats_the_best_static_mask_on_five_without_retraining(source):
    scenario = five()
    users = scenario.users("test")
    policy = transferred_policy(source / "policy", scenario)
    masks = choose_masks(policy, scenario, users)
    assert masks.shape == (len(users), FIVE)
    assert len(np.unique(masks, axis=0)) > 10
    assert reward(scenario, masks, users) > static_reward(scenario, users) + 0.2


def test_where_it_came_from_it_chooses_as_it_did(source):
    scenario = planted()
    users = scenario.users("test")
    arrived, at_home = transferred_policy(source / "policy", scenario), load_policy(source / "policy", scenario)[0]
    np.testing.assert_array_equal(choose_masks(arrived, scenario, users), choose_masks(at_home, scenario, users))


def test_policies_tied_to_their_pathways_are_refused(altered):
    with pytest.raises(ArtefactError, match="is a MultiInputPolicy, whose weights are tied to the number of pathways"):
        transferred_policy(altered(policy="MultiInputPolicy"), five())
    with pytest.raises(ArtefactError, match=r"departs from a mask of its own 8 pathways.*warm_start:false"):
        transferred_policy(altered(policy_kwargs={"start": [1.5] * 8}), five())


def test_other_widths_are_refused_by_name(source):
    scenario = five()
    narrow = dataclasses.replace(scenario, embeddings=scenario.embeddings[:, :16])
    with pytest.raises(ArtefactError, match=r"embedding 32 wide, here 16\. Train"):
        transferred_policy(source / "policy", narrow)
    few = dataclasses.replace(scenario, statistics=scenario.statistics[..., :7])
    with pytest.raises(ArtefactError, match=r"statistics per pathway 8 wide, here 7\. Train"):
        transferred_policy(source / "policy", few)


def test_a_policy_for_a_range_of_cost_weights_and_one_by_turns_fit_too(tmp_path):
    for name, more in (("range", ["--cost-weight", "uniform:0:0.3"]), ("turns", ["--env-kwargs", "layerwise:true"])):
        train_ppo(["--env", "dsa/Planted-v0", "-n", "64", "-f", str(tmp_path / name), *more, *QUIET])
        path, scenario = tmp_path / name / "policy", five()
        policy, rules = transferred_policy(path, scenario), trained_rules(path)
        plans = choose_plans(policy, scenario, scenario.users("test"), rules, 0.1)
        assert plans.shape == (50, 1, FIVE)
        with pytest.raises(ArtefactError, match="embedding 32 wide, here 31"):
            transferred_policy(path, dataclasses.replace(scenario, embeddings=scenario.embeddings[:, 1:]))


def test_fine_tuning_starts_from_the_policy_and_asks_for_no_test_user(source, quick, tmp_path):
    scenario = five()
    arrived = transferred_policy(source / "policy", scenario)
    tuned = trained(quick, scenario, Rules(WEIGHT), tmp_path / "tuned", arrived)
    val = scenario.users("val")
    assert scenario.oracle.asked > {*val.tolist()}
    assert scenario.oracle.asked.isdisjoint(scenario.users("test").tolist())
    rewards = [reward(scenario, choose_masks(policy, scenario, val), val) for policy in (arrived, tuned)]
    assert rewards[1] >= rewards[0]
    scratch = trained(quick, scenario, Rules(WEIGHT), tmp_path / "scratch")
    assert reward(scenario, choose_masks(scratch, scenario, val), val) < rewards[0]


def test_fine_tuning_moves_the_weights_but_not_those_it_was_given(source, quick, tmp_path):
    scenario = five()
    arrived = transferred_policy(source / "policy", scenario)
    before = {name: tensor.clone() for name, tensor in arrived.state_dict().items()}
    trained(quick, scenario, Rules(WEIGHT), tmp_path, arrived)
    latest = load_artefact(tmp_path / "checkpoint", "training checkpoint")[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in arrived.state_dict().items())
    moved = [name for name in before if not torch.equal(before[name], latest[f"policy/{name}"])]
    assert "mlp_extractor.score.0.weight" in moved


def test_a_finished_fine_tuning_is_not_repeated(source, quick, tmp_path):
    scenario = five()
    first = trained(quick, scenario, Rules(WEIGHT), tmp_path, transferred_policy(source / "policy", scenario))
    scenario.oracle.asked.clear()
    again = trained(quick, scenario, Rules(WEIGHT), tmp_path, transferred_policy(source / "policy", scenario))
    assert scenario.oracle.asked == set()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_zeroed_embeddings_leave_the_statistics(source):
    scenario = five()
    blind = transfer.blind(scenario)
    assert not blind.embeddings.any() and scenario.embeddings.any()
    assert blind.statistics is scenario.statistics and blind.oracle is scenario.oracle


def test_the_embedding_is_zeroed_in_fine_tuning_as_in_use(source, quick, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(transfer, "trained", lambda config, seen, rules, folder, start=None: asked.append((seen, start)))
    found = transfer.policies(source / "policy", quick, five(), Rules(WEIGHT), tmp_path, full_steps=None)
    zeroed = {title for title, (_, seen) in found.items() if not seen.embeddings.any()}
    assert zeroed == {"as it is, embedding zeroed", "fine-tuned, embedding zeroed"}
    assert [(seen.embeddings.any(), start is not None) for seen, start in asked] == [(True, True), (False, True), (True, False)]


# The command.


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A page written by the command, for two seeds."""
    folder = tmp_path_factory.mktemp("pages")
    page = folder / "page.md"
    page.write_text(f"before\n{transfer.BEGIN}\nold\n{transfer.END}\nafter\n")
    flags = ["--from", str(source), "--env", "dsa/Planted-v0", "--env-kwargs", "users:80", "--seeds", "1", "2"]
    flags += ["--fine-tune-steps", "256", "--full-steps", "300", "--runs", str(folder / "runs"), "--num-threads", "1"]
    transfer.main([*flags, "--write", str(page)])
    return page, flags


def test_the_page_has_a_row_per_method_and_names_the_command_without_folders(written, source):
    text = written[0].read_text()
    assert text.startswith(f"before\n{transfer.BEGIN}\n") and text.endswith(f"{transfer.END}\nafter\n")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "as it is", "as it is, embedding zeroed", "fine-tuned", "fine-tuned, embedding zeroed", "from scratch",
        "from scratch, 300 steps", "best_static", "all_on", "all_off",
    ]  # fmt: skip
    assert "eval.transfer --from source --env dsa/Planted-v0 --env-kwargs users:80 --seeds 1 2" in text
    assert str(source.parent) not in text
    assert "2 seeds" in text and "8 pathways, 20 test users" in text


def test_rewards_on_the_page_are_means_over_seeds_of_test_users(written, source):
    found = []
    for seed in (1, 2):
        scenario = planted(seed, 80)
        users = scenario.users("test")
        found.append(reward(scenario, choose_masks(transferred_policy(source / "policy", scenario), scenario, users), users))
    row = next(line for line in written[0].read_text().splitlines() if line.startswith("| as it is |"))
    assert f"{np.mean(found):.3f}" == row.split("|")[2].strip()
    assert "better" in row


def test_intervals_over_people_are_wider_than_over_users_redrawn_in_every_seed():
    rng = np.random.default_rng(0)
    values, still = rng.normal(size=30), np.zeros(30)
    figures = [transfer.Figures(each, each, still, 1) for each in (values, still)]
    found = {WEIGHT: {title: figures[0] for pair in transfer.PAIRS for title in pair} | {"best_static": figures[1]}}
    names = tuple(map(str, range(30)))
    simulated, real = ([transfer.Seed("from a to b", found, who)] * 3 for who in (None, names))
    redrawn, people = transfer.report(simulated, "c"), transfer.report(real, "c")
    assert "users within seeds" in redrawn and "real people, averaged over seeds" in people

    def row(text):
        return next(line for line in text.splitlines() if line.startswith("| as it is |"))

    assert text_of(paired_difference([values] * 3, [still] * 3)) in row(redrawn)
    assert text_of(paired_difference([values], [still], people=[names])) in row(people)


def test_called_again_it_trains_nothing(written, monkeypatch):
    before = written[0].read_text()
    monkeypatch.setattr("stable_baselines3.PPO.learn", lambda *_, **__: pytest.fail("trained again"))
    transfer.main([*written[1], "--write", str(written[0])])
    assert written[0].read_text() == before


def test_errors_say_what_to_do(source, tmp_path):
    def said(*arguments):
        with pytest.raises(SystemExit) as exit_:
            transfer.main([*map(str, arguments), "--runs", str(tmp_path / "runs"), "--num-threads", "1"])
        return str(exit_.value.code)

    assert "is not a run" in said("--from", tmp_path, "--env", "dsa/Planted-v0")
    assert "Did you mean 'dsa/Planted-v0'?" in said("--from", source, "--env", "dsa/Plantd-v0")
    with pytest.raises(SystemExit):
        transfer.parse(["--from", "a", "b", "--env", "dsa/Planted-v0", "--seeds", "1", "2", "3"])
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "policy.json").unlink()
    assert "no gating policy" in said("--from", copy, "--env", "dsa/Planted-v0")

"""Val users in meta-training: the state that is best for them is kept, or they teach beforehand."""

from dataclasses import replace

import pytest
import torch
from meta_runs import Killed

from meta.inner import MetaInit, adapted
from meta.learned import begun, learned_init, meta_initialisation, trainer_for
from meta.masks import sample_masks
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Prepared, stack
from users.digits import digits_population


@pytest.fixture(scope="module")
def val(pathways, population):
    return tuple(stack(pathways, population.val, role) for role in ("support", "query"))


def looks(trainer, every=1, stop_at=None):
    """Val users' losses by step, and the state at each."""
    losses, states = {}, {}

    def log(tag, value, step):
        if tag == "meta/val_query_loss":
            losses[step], states[step] = value, trainer.present().tensors()
        if step == stop_at and tag == "meta/train_query_loss":
            raise Killed

    trainer.resume_if_possible()
    return losses, states, trainer.run(log, every).tensors()


WORSE = MetaConfig(steps=6, users=4, outer_rate=1.0, keep="best")
"""Steps so large that nothing but harm is done."""


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_where_training_does_harm_the_start_is_kept(pathways, batches, val):
    trainer = MetaTrainer(pathways, *batches, WORSE, val=val)
    start = trainer.present().tensors()
    losses, _, found = looks(trainer)
    assert [*losses] == [0, 1, 2, 3, 4, 5, 6]
    assert min(losses, key=losses.get) == 0 and losses[6] > losses[0] + 0.1
    assert equal(found, start)
    assert not equal(trainer.present().tensors(), start)


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.1])
def test_the_state_with_the_least_val_loss_among_the_looks_is_kept(pathways, batches, val, rate):
    config = MetaConfig(steps=9, users=4, outer_rate=rate, keep="best")
    losses, states, found = looks(MetaTrainer(pathways, *batches, config, val=val), every=2)
    assert [*losses] == [0, 2, 4, 6, 8, 9]
    assert equal(found, states[min(losses, key=losses.get)])


def test_the_val_loss_is_that_of_adapted_val_users_under_a_fixed_mixture(pathways, batches, val):
    losses, states, _ = looks(MetaTrainer(pathways, *batches, MetaConfig(steps=2, users=4, keep="best"), val=val))
    gates = sample_masks(3, pathways.num_pathways, torch.Generator().manual_seed(0), all_on=0.5)
    for step, loss in losses.items():
        init = MetaInit.from_tensors(states[step])
        assert adapted(pathways, init, *val, gates)[1].mean().item() == pytest.approx(loss, rel=1e-6)


def test_looking_at_val_users_changes_nothing_in_training(pathways, batches, val):
    trainers = [
        MetaTrainer(pathways, *batches, MetaConfig(steps=4, users=4, keep=keep), val=val if keep == "best" else None)
        for keep in ("last", "best")
    ]
    for trainer in trainers:
        trainer.run(every=1)
    assert equal(trainers[0].result().tensors(), trainers[1].present().tensors())


@pytest.mark.parametrize("config", [WORSE, MetaConfig(steps=6, users=4, outer_rate=0.01, keep="best")], ids=["worse", "better"])
def test_a_killed_run_keeps_the_same_best_state_to_the_bit(pathways, batches, val, tmp_path, config):
    expected = looks(MetaTrainer(pathways, *batches, config, val=val), every=2)
    with pytest.raises(Killed):
        looks(MetaTrainer(pathways, *batches, config, tmp_path, val), every=2, stop_at=6)
    again = MetaTrainer(pathways, *batches, config, tmp_path, val)
    losses, _, found = looks(again, every=2)
    assert [*losses] == [6]  # what was looked at before the kill is not looked at again
    assert equal(found, expected[2])
    assert again.best[0] == min(expected[0].values())


def test_the_best_state_needs_val_users_and_nothing_else_does(pathways, batches, val):
    for keep, given in (("best", None), ("last", val)):
        with pytest.raises(ValueError, match="val users are needed to keep the best state, and for nothing else"):
            MetaTrainer(pathways, *batches, MetaConfig(keep=keep), val=given)
    with pytest.raises(ValueError, match="keep must be last or best, got 'first'"):
        MetaConfig(keep="first")


def test_val_users_make_another_initialisation_only_where_they_are_looked_at(pathways, tmp_path):
    populations = [digits_population(2, 4, 1, 1)]
    populations.append(replace(populations[0], val=digits_population(3, 1, 1, 1).val))
    for keep, files in (("last", 1), ("best", 2)):
        for population in populations:
            meta_initialisation(Prepared(pathways, population), MetaConfig(steps=1, users=2, keep=keep), tmp_path / keep)
        assert len([*(tmp_path / keep).glob("meta-*.json")]) == files


def test_what_val_users_teach_beforehand_owes_nothing_to_train_users(pathways, population, tmp_path):
    """It is where training begins, for the weights and for the rates."""
    config = MetaConfig(steps=3, users=4, public_steps=5)
    init, weights = begun(Prepared(pathways, population), config, tmp_path / "here")
    assert weights is None and init is not None
    strangers = replace(population, train=digits_population(7, train_users=12, val_users=3, test_users=4).train)
    again = begun(Prepared(pathways, strangers), config, tmp_path / "there")[0]
    assert [one.name for one in (tmp_path / "here").iterdir()] == [one.name for one in (tmp_path / "there").iterdir()]
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in init.tensors().items())
    trainer = trainer_for(Prepared(pathways, population), config, tmp_path / "taught")
    untaught = trainer_for(Prepared(pathways, population), replace(config, public_steps=0), tmp_path / "untaught")
    assert all(torch.equal(trainer.weights[key], weight) for key, weight in init.weights.items())
    assert (trainer.log_rates != untaught.log_rates).any() and any(
        (trainer.weights[key] != untaught.weights[key]).any() for key in trainer.weights
    )
    named = [
        learned_init(Prepared(pathways, population), each, tmp_path).name for each in (config, replace(config, public_steps=0))
    ]
    assert len({*named}) == 2


@pytest.mark.parametrize(
    "wrong",
    [{"public_steps": -1}, *({"public_steps": 5, **more} for more in (
        {"keep": "best"}, {"shrink": True}, {"start_steps": 3}, {"neutral": True}, {"random_start": True}
    ))],
)  # fmt: skip
def test_val_users_who_teach_do_nothing_else(wrong):
    with pytest.raises(ValueError, match="public_steps"):
        MetaConfig(**wrong)

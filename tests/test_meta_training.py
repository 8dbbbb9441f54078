"""Meta-training: what it learns, from which start and at which rates, and going on after a kill."""

import pytest
import torch
from meta_runs import FOUR, Killed, everything_on

from backbones.artefacts import ArtefactError
from backbones.pathways import Frozen, make_pathways, population_logits
from meta.inner import adapt, adapted, measure, stacked
from meta.learned import meta_initialisation
from meta.masks import sample_masks
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Batch, Prepared, stack
from users.digits import digits_population


@pytest.fixture(scope="module")
def inverted(pathways):
    """Support and query of users who all see black on white: easy to become better at."""
    users = digits_population(0, 12, 1, 1, shifts=("inverted",)).train
    return [stack(pathways, users, role) for role in ("support", "query")]


@pytest.mark.parametrize("algorithm", FOUR)
def test_fifteen_outer_steps_lower_the_query_loss_after_adaptation(pathways, inverted, algorithm):
    on = everything_on(12, pathways)
    trainer = MetaTrainer(pathways, *inverted, MetaConfig(algorithm, steps=15, users=12, inner_steps=2))
    inits = (trainer.result(), trainer.run())
    losses = [measure(pathways, adapt(pathways, init, inverted[0], on), on, inverted[1])[1].mean() for init in inits]
    assert losses[1] < losses[0] - 0.05
    assert trainer.step == 15


def test_a_random_start_learns_the_rates_alone(pathways, inverted):
    trainer = MetaTrainer(pathways, *inverted, MetaConfig(steps=3, users=4, random_start=True))
    before, after = trainer.result(), trainer.run()
    assert all(torch.equal(before.weights[key], after.weights[key]) for key in before.weights)
    assert not torch.equal(before.rates, after.rates)


def test_inner_rates_start_as_asked_and_stay_positive(pathways, inverted):
    trainer = MetaTrainer(pathways, *inverted, MetaConfig(steps=3, users=4, inner_rate=0.05, outer_rate=0.1))
    torch.testing.assert_close(trainer.result().rates, torch.full((3, pathways.num_pathways), 0.05))
    assert (trainer.run().rates > 0).all()


def test_meta_training_follows_its_seed(pathways, batches):
    results = []
    for seed in (0, 0, 1):
        results.append(MetaTrainer(pathways, *batches, MetaConfig(steps=3, users=4, seed=seed)).run().tensors())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert not torch.equal(results[0]["weights/head.weight"], results[2]["weights/head.weight"])


def test_meta_training_leaves_the_model_alone(pathways, batches):
    before = pathways.model.fingerprint()
    MetaTrainer(pathways, *batches, MetaConfig("maml", steps=2, users=4)).run()
    assert pathways.model.fingerprint() == before


def test_the_logged_loss_is_the_mean_since_the_last_log(pathways, batches):
    config = MetaConfig(steps=5, users=4)
    each, some = logged(pathways, batches, config, 1), logged(pathways, batches, config, 3)
    assert [step for step, _ in each] == [1, 2, 3, 4, 5]
    assert [step for step, _ in some] == [3, 5]
    losses = [loss for _, loss in each]
    assert [loss for _, loss in some] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 2], rel=1e-5)


def logged(pathways, batches, config, every, folder=None):
    curve = []
    trainer = MetaTrainer(pathways, *batches, config, folder)
    trainer.resume_if_possible()
    trainer.run(lambda tag, value, step: tag == "meta/train_query_loss" and curve.append((step, value)), every)
    return curve


def test_an_unknown_algorithm_is_answered_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown algorithm 'fomalm'\. Did you mean 'fomaml'"):
        MetaConfig("fomalm")


@pytest.mark.parametrize("name", ["steps", "users", "inner_steps"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        MetaConfig(**{name: 0})


@pytest.mark.parametrize("algorithm", FOUR)
def test_a_loss_that_is_not_a_number_stops_meta_training(pathways, batches, algorithm):
    support, query = batches
    sites = tuple(torch.full_like(site, torch.nan) for site in query.frozen.sites)
    trainer = MetaTrainer(pathways, support, Batch.of(Frozen(sites), query.labels, query.weights), MetaConfig(algorithm))
    with pytest.raises(FloatingPointError, match="became nan at step 0; lower inner_rate or outer_rate"):
        trainer.run()
    assert all(weight.isfinite().all() for weight in trainer.weights.values())


def kill_at(last):
    def log(tag, value, step):
        if step == last:
            raise Killed

    return log


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_a_killed_run_goes_on_to_the_same_result_to_the_bit(pathways, batches, tmp_path, algorithm):
    config = MetaConfig(algorithm, steps=7, users=4, all_on=0.3)
    expected = MetaTrainer(pathways, *batches, config).run().tensors()
    with pytest.raises(Killed):
        MetaTrainer(pathways, *batches, config, tmp_path).run(kill_at(6), every=2)
    again = MetaTrainer(pathways, *batches, config, tmp_path)
    again.resume_if_possible()
    assert again.step == 4  # steps 5 and 6 were lost with the kill and are taken again
    found = again.run(every=2).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_finished_run_is_loaded_and_not_trained_on(pathways, batches, tmp_path):
    config = MetaConfig(steps=2, users=4)
    expected = MetaTrainer(pathways, *batches, config, tmp_path).run().tensors()
    again = MetaTrainer(pathways, *batches, config, tmp_path)
    again.resume_if_possible()
    found = again.run(kill_at(2)).tensors()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_logged_loss_is_right_after_going_on_with_another_interval(pathways, batches, tmp_path):
    config = MetaConfig(steps=4, users=4)
    losses = [loss for _, loss in logged(pathways, batches, config, 1)]
    with pytest.raises(Killed):
        MetaTrainer(pathways, *batches, config, tmp_path).run(kill_at(3), every=1)
    assert logged(pathways, batches, config, 4, tmp_path) == [(4, pytest.approx(sum(losses[2:]) / 2, rel=1e-5))]


def test_without_a_checkpoint_a_run_starts_afresh(pathways, batches, tmp_path):
    trainer = MetaTrainer(pathways, *batches, MetaConfig(steps=2, users=4), tmp_path / "empty")
    trainer.resume_if_possible()
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("name", "value"), [("algorithm", "maml"), ("steps", 3), ("inner_rate", 0.2), ("seed", 1), ("random_start", True)]
)
def test_going_on_with_other_settings_is_refused(pathways, batches, tmp_path, name, value):
    MetaTrainer(pathways, *batches, MetaConfig(steps=2, users=4), tmp_path).run()
    other = MetaTrainer(pathways, *batches, MetaConfig(**{"steps": 2, "users": 4, name: value}), tmp_path)
    with pytest.raises(ArtefactError, match=rf"other settings of \['{name}'\]"):
        other.resume_if_possible()
    assert other.step == 0


@pytest.mark.parametrize("ranks", [(1, 8), (4, 8), (8, 1)])
def test_going_on_with_pathways_of_another_rank_is_refused(model, batches, tmp_path, ranks):
    config = MetaConfig(steps=1, users=2)
    trainers = [MetaTrainer(make_pathways("inline", model, rank), *batches, config, tmp_path) for rank in ranks]
    trainers[0].run()
    with pytest.raises(ArtefactError, match="checkpoint"):
        trainers[1].resume_if_possible()


def test_a_damaged_checkpoint_is_refused(pathways, batches, tmp_path):
    config = MetaConfig(steps=1, users=2)
    MetaTrainer(pathways, *batches, config, tmp_path).run()
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match=file.name):
        MetaTrainer(pathways, *batches, config, tmp_path).resume_if_possible()


@pytest.fixture
def small_population():
    return digits_population(2, 4, 1, 1)


def test_a_meta_initialisation_is_learned_once_and_then_loaded(pathways, small_population, tmp_path):
    config, steps = MetaConfig(steps=2, users=2), []

    def log(tag, value, step):
        steps.append(step)

    first = meta_initialisation(Prepared(pathways, small_population), config, tmp_path, log).tensors()
    assert steps
    steps.clear()
    again = meta_initialisation(Prepared(pathways, small_population), config, tmp_path, log).tensors()
    assert steps == []
    assert all(torch.equal(again[key], first[key]) for key in first)
    meta_initialisation(Prepared(pathways, digits_population(3, 4, 1, 1)), config, tmp_path, log)
    assert steps


def test_learning_a_meta_initialisation_goes_on_after_a_kill(pathways, small_population, tmp_path):
    config = MetaConfig(steps=102, users=2, inner_steps=1)
    expected = meta_initialisation(Prepared(pathways, small_population), config, tmp_path / "whole").tensors()
    with pytest.raises(Killed):
        meta_initialisation(Prepared(pathways, small_population), config, tmp_path / "killed", kill_at(102))
    steps = []
    found = meta_initialisation(
        Prepared(pathways, small_population), config, tmp_path / "killed", lambda tag, value, step: steps.append(step)
    ).tensors()
    assert set(steps) == {102}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# A neutral start.


@pytest.mark.parametrize("placement", ["inline", "lora", "side"])
def test_outputs_are_what_pathways_speak_through_and_no_more(model, batches, placement):
    pathways = make_pathways(placement, model, rank=4)
    blocks = {f"{name}.{part}" for name in pathways.names[:-1] for part in ("up", "up_bias")}
    if placement == "lora":
        layers = zip(pathways.names[:-1], pathways.targets, strict=True)
        blocks = {f"{name}.{layer}.up" for name, inside in layers for layer in inside}
    assert pathways.outputs == blocks | {"head.weight", "head.bias"}
    images = torch.rand(6, 1, 8, 8)
    frozen = pathways.frozen(images).map(lambda t: t[None])
    every_mask = [[bool(m >> p & 1) for p in range(pathways.num_pathways)] for m in range(2**pathways.num_pathways)]
    weights = {key: (0 if key in pathways.outputs else 1) * torch.randn_like(w)[None] for key, w in pathways.start(0).items()}
    for mask in every_mask:
        torch.testing.assert_close(pathways.logits(frozen, weights, torch.tensor([mask]))[0], model(images))
    on = torch.ones(1, pathways.num_pathways, dtype=torch.bool)
    for key in pathways.outputs:  # each of them is heard
        loud = weights | {key: torch.randn_like(weights[key])}
        assert (pathways.logits(frozen, loud, on)[0] - model(images)).abs().max() > 1e-3, key


@pytest.mark.parametrize("placement", ["inline", "lora", "side"])
@pytest.mark.parametrize("algorithm", FOUR)
def test_a_neutral_start_says_nothing_before_and_after_training(model, population, placement, algorithm):
    pathways = make_pathways(placement, model, rank=4)
    batches = [stack(pathways, population.train, role) for role in ("support", "query")]
    config = MetaConfig(algorithm, steps=3, users=6, outer_rate=0.05, neutral=True)
    trainer = MetaTrainer(pathways, *batches, config)
    first, last = trainer.present(), trainer.run()
    gates = sample_masks(12, pathways.num_pathways, torch.Generator().manual_seed(0))
    for init in (first, last):
        assert all((init.weights[key] == 0).all() for key in pathways.outputs)
        for batch in batches:
            logits = pathways.logits(batch.frozen, stacked(init, 12), gates)
            torch.testing.assert_close(logits, population_logits(model, batch.frozen))
    moved = {key for key, w in last.weights.items() if not torch.equal(w, first.weights[key])}
    others = {*pathways.start(0)} - pathways.outputs
    assert moved == (set() if algorithm == "anil" else others)
    assert (algorithm == "reptile") == torch.equal(first.rates, last.rates)


def test_a_neutral_start_still_learns_from_a_users_support(pathways, inverted):
    trainer = MetaTrainer(pathways, *inverted, MetaConfig(steps=10, users=12, inner_steps=3, neutral=True))
    on = everything_on(12, pathways)
    before = measure(pathways, stacked(trainer.present(), 12), on, inverted[1])[1].mean()
    assert adapted(pathways, trainer.run(), *inverted, on)[1].mean() < before - 0.05


# Rates.


def test_the_heads_rate_starts_where_it_is_told(pathways, batches):
    config = MetaConfig(steps=2, users=4, inner_steps=2, inner_rate=0.05, head_rate=3.0)
    rates = MetaTrainer(pathways, *batches, config).present().rates
    torch.testing.assert_close(rates[:, :-1], torch.full((2, pathways.num_pathways - 1), 0.05))
    torch.testing.assert_close(rates[:, -1], torch.full((2,), 3.0))
    with pytest.raises(ValueError, match="head_rate must be above 0, got 0"):
        MetaConfig(head_rate=0)


def test_rates_and_weights_are_learned_at_rates_of_their_own(pathways, batches):
    def learned(outer_rate, rate_of_rates):
        trainer = MetaTrainer(
            pathways, *batches, MetaConfig(steps=1, users=4, outer_rate=outer_rate, rate_of_rates=rate_of_rates)
        )
        before, after = trainer.present(), trainer.run()
        weights = max((after.weights[k] - w).abs().max().item() for k, w in before.weights.items())
        return weights, (after.rates.log() - before.rates.log()).abs().max().item()

    # Adam's first step is as long as its learning rate
    assert learned(0.01, 0.2) == pytest.approx((0.01, 0.2), rel=1e-2)
    assert learned(0.03, 0.002) == pytest.approx((0.03, 0.002), rel=1e-2)
    with pytest.raises(ValueError, match=r"rates must be above 0 .* rate_of_rates=0"):
        MetaConfig(rate_of_rates=0)


def test_both_rates_decay_to_nothing(pathways, batches):
    trainer, seen = MetaTrainer(pathways, *batches, MetaConfig(steps=4, users=4, outer_rate=0.01, rate_of_rates=0.2)), []
    trainer.run(lambda tag, value, step: seen.append([g["lr"] for g in trainer.optimiser.param_groups]), every=1)
    rates = sorted({tuple(pair) for pair in seen}, reverse=True)
    assert rates[0] == pytest.approx((0.01, 0.2))
    assert len(rates) == 4 and rates[-1][0] < 0.2 * 0.01
    assert all(pair[1] == pytest.approx(20 * pair[0]) for pair in rates)

from dataclasses import replace

import pytest
import torch

from backbones.artefacts import ArtefactError
from backbones.pathways import Frozen, make_pathways, population_logits
from backbones.resnet import small_resnet
from meta.inner import MetaInit, adapt, adapted, measure, stacked, user_loss
from meta.learned import begun, learned_init, meta_initialisation, trainer_for
from meta.masks import sample_masks
from meta.outer import ALGORITHMS, adapted_pathways
from meta.trainer import MetaConfig, MetaTrainer, redealt
from users.base import Examples, Population, User
from users.batch import Batch, Prepared, stack
from users.digits import digits_population
from users.items import TensorItems

FOUR = ("maml", "fomaml", "anil", "reptile")


def lively_init(pathways, steps=2, rate=0.1):
    """A start at which every weight has a gradient."""
    torch.manual_seed(5)
    weights = {k: w + 0.2 * torch.randn_like(w) for k, w in pathways.start(0).items()}
    count = pathways.num_pathways
    return MetaInit(weights, torch.full((steps, count), rate), torch.ones(count, dtype=torch.bool))


def everything_on(users, pathways):
    return torch.ones(users, pathways.num_pathways, dtype=torch.bool)


@pytest.fixture(scope="module")
def batches(pathways, population):
    """Support and query of the twelve train users."""
    return [stack(pathways, population.train, role) for role in ("support", "query")]


@pytest.fixture(scope="module")
def masks(pathways):
    """A mask per train user, among them all on, all off, one adapter and the head alone."""
    some = torch.rand(12, pathways.num_pathways, generator=torch.Generator().manual_seed(1)) < 0.5
    some[0], some[1], some[2], some[3] = True, False, False, False
    some[2, 1] = some[3, -1] = True
    return some


def test_adaptation_is_deterministic_to_the_bit(pathways, batches, masks):
    first, second = (adapt(pathways, lively_init(pathways), batches[0], masks) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_adaptation_lowers_every_users_support_loss(pathways, batches):
    init, on = lively_init(pathways, rate=0.002), everything_on(12, pathways)
    before = measure(pathways, stacked(init, 12), on, batches[0])[1]
    after = measure(pathways, adapt(pathways, init, batches[0], on), on, batches[0])[1]
    assert (after < before).all()


def test_a_user_does_not_feel_the_data_of_another(pathways, batches, masks):
    init, support = lively_init(pathways), batches[0]
    sites = tuple(site.clone() for site in support.frozen.sites)
    for site in sites:
        site[5] = torch.rand_like(site[5])
    labels = support.labels.clone()
    labels[5] = (labels[5] + 1) % 10
    before = adapt(pathways, init, support, masks)
    after = adapt(pathways, init, Batch.of(Frozen(sites), labels, support.weights), masks)
    others = torch.arange(12) != 5
    for key in before:
        torch.testing.assert_close(after[key][others], before[key][others], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(after[key][5], before[key][5]) for key in before)


def test_a_user_adapts_in_a_batch_as_alone(pathways, batches, masks):
    init, support = lively_init(pathways), batches[0]
    together = adapt(pathways, init, support, masks)
    for row in range(12):
        alone = adapt(pathways, init, support.rows(torch.tensor([row])), masks[row : row + 1])
        for key in together:
            torch.testing.assert_close(together[key][row], alone[key][0], rtol=1e-4, atol=1e-5)


def test_pathways_that_are_off_stay_as_they_were_to_the_bit_and_the_others_move(pathways, batches, masks):
    init = lively_init(pathways)
    weights = adapt(pathways, init, batches[0], masks)
    for p, keys in pathways.keys.items():
        for key in keys:
            moved = (weights[key] != init.weights[key]).flatten(1).any(1)
            assert torch.equal(moved, masks[:, p]), key


def test_one_step_is_one_gradient_step(pathways, population):
    init = lively_init(pathways, steps=1)
    init.rates[0] = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05])
    support = stack(pathways, population.train[:1], "support")
    gates = torch.tensor([[True, False, True, True, True]])
    weights = {k: w.clone().requires_grad_() for k, w in init.weights.items()}
    logits = pathways.logits(support.frozen, {k: w[None] for k, w in weights.items()}, gates)
    torch.nn.functional.cross_entropy(logits[0], support.labels[0]).backward()
    adapted = adapt(pathways, init, support, gates)
    for p, keys in pathways.keys.items():
        for key in keys:
            step = init.rates[0, p] * weights[key].grad if gates[0, p] else 0
            torch.testing.assert_close(adapted[key][0], init.weights[key] - step, rtol=1e-5, atol=1e-6)


def test_every_step_and_pathway_has_a_rate_of_its_own(pathways, batches):
    init, on = lively_init(pathways, steps=2), everything_on(12, pathways)
    init.rates[:, 1] = 0
    weights = adapt(pathways, init, batches[0], on)
    for p, keys in pathways.keys.items():
        moved = {bool((weights[key] != init.weights[key]).any()) for key in keys}
        assert moved == {p != 1}
    one, init.rates[1] = MetaInit(init.weights, init.rates[:1], init.adapted), 0
    first, both = adapt(pathways, one, batches[0], on), adapt(pathways, init, batches[0], on)
    assert all(torch.equal(first[key], both[key]) for key in first)


def test_two_rounds_of_one_step_are_one_round_of_two(pathways, batches, masks):
    two = lively_init(pathways, steps=2)
    one = MetaInit(two.weights, two.rates[:1], two.adapted)
    halfway = adapt(pathways, one, batches[0], masks)
    untouched = {k: w.clone() for k, w in halfway.items()}
    rounds = adapt(pathways, one, batches[0], masks, halfway)
    whole = adapt(pathways, two, batches[0], masks)
    for key in whole:
        torch.testing.assert_close(rounds[key], whole[key])
        assert torch.equal(halfway[key], untouched[key])


def test_adaptation_leaves_the_start_and_no_graph_behind(pathways, batches, masks):
    init = lively_init(pathways)
    before = {k: w.clone() for k, w in init.weights.items()}
    weights = adapt(pathways, init, batches[0], masks)
    assert all(torch.equal(init.weights[key], before[key]) for key in before)
    assert not any(w.requires_grad for w in weights.values())


def test_with_every_mask_off_nothing_is_adapted(pathways, batches):
    init = lively_init(pathways)
    weights = adapt(pathways, init, batches[0], ~everything_on(12, pathways))
    assert all(torch.equal(w, init.weights[key].expand_as(w)) for key, w in weights.items())


def test_measure_is_accuracy_and_cross_entropy(pathways, population, batches):
    accuracy, loss = measure(pathways, stacked(lively_init(pathways), 12), ~everything_on(12, pathways), batches[1])
    for row, one in enumerate(population.train):
        logits = pathways.model(one.query.inputs)
        right = (logits.argmax(-1) == one.query.labels).float().mean()
        torch.testing.assert_close(accuracy[row], right)
        torch.testing.assert_close(loss[row], torch.nn.functional.cross_entropy(logits, one.query.labels))


def test_adapted_accuracy_is_the_same_in_chunks(pathways, batches, masks):
    init = lively_init(pathways)
    expected, _ = measure(pathways, adapt(pathways, init, batches[0], masks), masks, batches[1])
    for chunk in (5, 64):
        torch.testing.assert_close(adapted(pathways, init, *batches, masks, chunk=chunk)[0], expected)


def test_a_meta_initialisation_survives_being_a_flat_dict(pathways):
    init = lively_init(pathways)
    again = MetaInit.from_tensors(init.tensors())
    assert again.weights.keys() == init.weights.keys()
    assert all(torch.equal(again.weights[key], init.weights[key]) for key in init.weights)
    assert torch.equal(again.rates, init.rates) and torch.equal(again.adapted, init.adapted)


@pytest.fixture
def tiny():
    """Two users, two adapters and a head in double precision, with weights at which curvature matters."""
    model = small_resnet(3, image_size=4, widths=(4,), depth=2)
    pathways = make_pathways("inline", model, rank=2)
    model.double()

    def part(count):
        return Examples(torch.rand(count, 1, 4, 4, dtype=torch.double), torch.randint(3, (count,)))

    users = [User(str(n), part(4), part(2), part(5)) for n in range(2)]
    support, query = (stack(pathways, users, role) for role in ("support", "query"))
    weights = {k: w.double() + 0.5 * torch.randn(w.shape, dtype=torch.double) for k, w in pathways.start(0).items()}
    rates = torch.rand(2, 3, dtype=torch.double) * 0.5 + 0.1
    gates = torch.tensor([[True, True, True], [False, True, True]])
    return pathways, MetaInit(weights, rates, torch.ones(3, dtype=torch.bool)), support, query, gates


def moved(init, direction, distance):
    """The start and the inner rates, moved by so much along a direction."""
    weights = {k: (w + distance * direction[k]).requires_grad_() for k, w in init.weights.items()}
    return MetaInit(weights, init.rates + distance * direction["rates"], init.adapted)


def slopes(tiny, algorithm, adapted=None):
    """An algorithm's meta-gradient along random directions, and the query loss's finite differences there."""
    pathways, init, support, query, gates = tiny
    if adapted is not None:
        init = MetaInit(init.weights, init.rates, adapted)
    outer = ALGORITHMS.get(algorithm)
    leaves = {k: w.clone().requires_grad_() for k, w in [*init.weights.items(), ("rates", init.rates)]}
    start = MetaInit({k: leaves[k] for k in init.weights}, leaves["rates"], init.adapted)
    gradients = torch.autograd.grad(outer(pathways, start, support, query, gates)[0], list(leaves.values()))
    found, expected = [], []
    for _ in range(4):
        direction = {k: torch.randn_like(leaf) for k, leaf in leaves.items()}
        found.append(sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True)))
        ends = [outer(pathways, moved(init, direction, d), support, query, gates)[1] for d in (1e-6, -1e-6)]
        expected.append((ends[0] - ends[1]) / 2e-6)
    return torch.stack(found), torch.stack(expected)


def test_mamls_gradient_is_that_of_the_query_loss_after_adaptation(tiny):
    found, expected = slopes(tiny, "maml")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_anils_gradient_is_that_of_the_query_loss_after_adapting_the_head(tiny):
    found, expected = slopes(tiny, "anil", torch.tensor([False, False, True]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fomamls_gradient_leaves_the_curvature_out(tiny):
    found, expected = slopes(tiny, "fomaml")
    assert found.isfinite().all()
    assert ((found - expected).abs() > 0.1 * expected.abs()).any()


def test_fomamls_gradient_is_the_mean_gradient_at_the_adapted_weights(tiny):
    pathways, init, support, query, gates = tiny
    start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
    objective, loss = ALGORITHMS.get("fomaml")(pathways, start, support, query, gates)
    objective.backward()
    ends = {k: w.requires_grad_() for k, w in adapt(pathways, init, support, gates).items()}
    at_ends = user_loss(pathways.logits(query.frozen, ends, gates), query).mean()
    at_ends.backward()
    torch.testing.assert_close(loss, at_ends.detach())
    for key, end in ends.items():
        torch.testing.assert_close(start.weights[key].grad, end.grad.sum(0))


def test_reptiles_gradient_is_the_start_minus_the_mean_end(tiny):
    pathways, init, support, query, gates = tiny
    start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
    ALGORITHMS.get("reptile")(pathways, start, support, query, gates)[0].backward()
    ends = adapt(pathways, init, Batch.joined(support, query), gates)
    for p, keys in pathways.keys.items():
        for key in keys:
            expected = init.weights[key] - ends[key][gates[:, p]].mean(0)
            torch.testing.assert_close(start.weights[key].grad, expected)
            assert expected.abs().max() > 1e-4


def test_a_pathway_that_nobody_had_on_is_not_meta_trained(tiny):
    pathways, init, support, query, _ = tiny
    gates = torch.tensor([[False, True, False], [False, True, True]])
    for algorithm in FOUR:
        start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
        ALGORITHMS.get(algorithm)(pathways, start, support, query, gates)[0].backward()
        reached = {p for p, keys in pathways.keys.items() for key in keys if start.weights[key].grad is not None}
        assert reached == {1, 2}, algorithm


@pytest.mark.parametrize("algorithm", FOUR)
def test_only_anil_restricts_the_inner_loop_and_to_the_head(pathways, batches, algorithm):
    init = lively_init(pathways)
    init = MetaInit(init.weights, init.rates, adapted_pathways(algorithm, pathways))
    weights = adapt(pathways, init, batches[0], everything_on(12, pathways))
    moved = {key.rsplit(".", 1)[0] for key, w in weights.items() if not torch.equal(w, init.weights[key].expand_as(w))}
    assert moved == ({"head"} if algorithm == "anil" else set(pathways.names))


def test_anils_shared_adapters_are_used_as_they_are(pathways, batches):
    init, on = lively_init(pathways), everything_on(12, pathways)
    head_only = MetaInit(init.weights, init.rates, adapted_pathways("anil", pathways))
    off = on.clone()
    off[:, :-1] = False
    with_adapters = measure(pathways, adapt(pathways, head_only, batches[0], on), on, batches[1])[1]
    without = measure(pathways, adapt(pathways, head_only, batches[0], off), off, batches[1])[1]
    assert ((with_adapters - without).abs() > 1e-4).all()


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


def test_every_outer_step_draws_users_and_masks_anew(pathways, batches):
    seen = []

    def spy(pathways, init, support, query, gates):
        seen.append((tuple(support.labels.flatten().tolist()), tuple(gates.flatten().tolist())))
        return ALGORITHMS.get("fomaml")(pathways, init, support, query, gates)

    ALGORITHMS.register("spy", spy)
    try:
        MetaTrainer(pathways, *batches, MetaConfig("spy", steps=6, users=3, all_on=0.0)).run()
    finally:
        ALGORITHMS.unregister("spy")
    labels, gates = zip(*seen, strict=True)
    assert len(set(labels)) == len(set(gates)) == 6


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


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


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


def test_sampled_masks_are_never_empty():
    draw = torch.Generator().manual_seed(0)
    for pathways in (1, 2, 7):
        assert sample_masks(3000, pathways, draw, all_on=0.0).any(1).all()


def test_sampled_masks_are_all_on_as_often_as_asked():
    draw = torch.Generator().manual_seed(0)
    shares = [sample_masks(4000, 7, draw, all_on).all(1).float().mean().item() for all_on in (0.0, 0.5, 1.0)]
    assert shares[0] < 0.25  # a high density turns everything on by chance
    assert 0.48 < shares[1] < 0.5 + shares[0] / 2 + 0.04
    assert shares[2] == 1


def test_densities_of_sampled_masks_spread_over_the_whole_range():
    counts = sample_masks(8000, 7, torch.Generator().manual_seed(0), all_on=0.0).sum(1).bincount(minlength=8) / 8000
    assert counts[0] == 0
    assert (counts[1:] > 0.05).all()


def test_no_pathway_is_favoured_by_sampled_masks():
    rates = sample_masks(8000, 7, torch.Generator().manual_seed(0), all_on=0.0).float().mean(0)
    assert (rates - rates.mean()).abs().max() < 0.03


def test_sampled_masks_follow_their_generator():
    first, again, other = (sample_masks(50, 7, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Dealing examples to support and query anew.


def dealt_users(items):
    """Users of different sizes, of classes with one example and with many; who shares items has positions for inputs."""
    draw = torch.Generator().manual_seed(6)

    def user(name, *sizes):
        places = torch.randperm(40, generator=draw)[: sum(sizes)]
        labels = torch.randint(3, places.shape, generator=draw)
        labels[0] = 7  # an only one
        inputs = places if items is not None else torch.rand(len(places), 1, 8, 8, generator=draw)
        return User(name, *map(Examples, inputs.split(sizes), labels.split(sizes)))

    sizes = ((9, 3, 12), (4, 3, 7), (12, 3, 2), (1, 3, 1))
    return tuple(user(str(n), *size) for n, size in enumerate(sizes))


@pytest.fixture(params=["items", "inputs"])
def uneven(request, pathways):
    """Support and query of users of different sizes, from one table or from two."""
    items = TensorItems(torch.rand(40, 1, 8, 8)) if request.param == "items" else None
    users = dealt_users(items)
    one = dealt_users(items)[:1]
    population = Population("uneven", 10, users, (replace(one[0], user_id="v"),), (replace(one[0], user_id="t"),), items=items)
    prepared = Prepared(pathways, population)
    return prepared.batch("train", "support"), prepared.batch("train", "query"), prepared.batch("train", "validation")


def belongings(*batches):
    """Per user what they have of every label, as sorted tuples of features."""
    found = []
    for row in range(len(batches[0])):
        own = []
        for batch in batches:
            present = batch.weights[row] > 0
            read = batch.frozen.sites[-1][row][present]
            own += [(int(label), *feature.tolist()) for label, feature in zip(batch.labels[row][present], read, strict=True)]
        found.append(sorted(own))
    return found


def deal(batches, seed):
    return redealt(*batches[:2], torch.Generator().manual_seed(seed))


def test_examples_dealt_anew_keep_labels_weights_and_padding(uneven):
    for before, after in zip(uneven, deal(uneven, 0), strict=False):
        assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.weights, before.weights)
        assert after.index.shape == before.index.shape


def test_examples_are_dealt_among_the_users_own_support_and_query_alone_with_their_labels(uneven):
    for seed in range(10):
        support, query = deal(uneven, seed)
        assert belongings(support, query) == belongings(*uneven[:2])
        validation = belongings(uneven[2])
        assert not any({*dealt} & {*kept} for dealt, kept in zip(belongings(support, query), validation, strict=True))


def test_examples_are_dealt_anew_by_the_generator_and_in_every_step(uneven):
    first, again, other = ([batch.index for batch in deal(uneven, seed)] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    moved = [belongings(deal(uneven, seed)[0])[0] != belongings(uneven[0])[0] for seed in range(5)]
    assert all(moved)


def test_every_example_of_a_class_comes_to_the_support_sometimes(uneven):
    seen = {}
    for seed in range(60):
        for label, *feature in belongings(deal(uneven, seed)[0])[0]:
            seen.setdefault(label, set()).add(tuple(feature))
    everything = {}
    for label, *feature in belongings(*uneven[:2])[0]:
        everything.setdefault(label, set()).add(tuple(feature))
    kept = {label: everything[label] for label in seen}
    assert seen == kept and max(map(len, kept.values())) > 3


def test_meta_training_deals_anew_only_if_asked(pathways, batches):
    seen = []

    def spy(pathways, init, support, query, gates):
        seen.append((support.labels.clone(), support.frozen.sites[-1].clone()))
        return ALGORITHMS.get("fomaml")(pathways, init, support, query, gates)

    ALGORITHMS.register("spy", spy)
    try:
        for resample in (False, True):
            MetaTrainer(pathways, *batches, MetaConfig("spy", steps=1, users=12, resample=resample)).run()
    finally:
        ALGORITHMS.unregister("spy")
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])


# Keeping the best state by val users.


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


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
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

"""Attacks that bite where there is something to find, and audits whose alarm rings."""

import numpy as np
import pytest
from scipy.stats import norm

from eval.attacks import audited_epsilon, best_guesses, confidence, exact, lira, rmia, success
from eval.audit import audit
from meta.private import Privacy, PrivateRounds
from tests.broken_rounds import Quiet, Unclipped


def test_success_is_that_of_two_normal_distributions():
    rng = np.random.default_rng(0)
    found = success(rng.normal(1, 1, 5000), rng.normal(0, 1, 5000))
    assert found.auc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.01)
    assert found.auc_ci95[0] < norm.cdf(1 / np.sqrt(2)) < found.auc_ci95[1]
    assert found.tpr == pytest.approx(norm.sf(norm.isf(0.01) - 1), abs=0.02)
    assert found.tpr_ci95[0] < found.tpr < found.tpr_ci95[1]
    chance = success(rng.normal(0, 1, 5000), rng.normal(0, 1, 5000))
    assert chance.auc_ci95[0] < 0.5 < chance.auc_ci95[1] and chance.tpr < 0.02


def test_ties_are_no_discoveries_and_few_others_are_refused():
    same = success(np.zeros(100), np.zeros(200))
    assert (same.auc, same.tpr) == (0.5, 0.0)
    with pytest.raises(ValueError, match="takes at least 100 non-members"):
        success(np.zeros(5), np.zeros(99))


def test_exact_intervals():
    """Values from the tables of Clopper & Pearson."""
    assert exact(0, 10) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert exact(10, 10) == (pytest.approx(0.6915, abs=1e-4), 1.0)
    assert exact(5, 50) == (pytest.approx(0.0333, abs=1e-4), pytest.approx(0.2181, abs=1e-4))


def test_rmia_finds_who_fits_the_target_better_than_the_references():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, 2000)  # some are harder than others: the plain loss says little
    members = rng.permutation(2000)[:1000]
    target = hard + rng.normal(0, 0.3, 2000)
    target[members] += 0.8
    references = hard + rng.normal(0, 0.3, (4, 2000))
    outside = np.setdiff1d(np.arange(2000), members)
    half, rest = outside[:500], outside[500:]
    scores = rmia(target, references, target[half], references[:, half])
    assert success(scores[members], scores[rest]).auc > 0.9
    assert success(target[members], target[rest]).auc < 0.65
    assert ((scores >= 0) & (scores <= 1)).all()
    stricter = rmia(target, references, target[half], references[:, half], gamma=2.0)
    assert (stricter <= scores).all() and stricter.mean() < scores.mean()


def test_lira_finds_examples_and_needs_no_two_of_equal_hardness():
    rng = np.random.default_rng(0)
    hard, shadows, count = rng.normal(0, 3, 1500), 64, 1500
    inside = rng.random((shadows, count)) < 0.5
    seen = hard + 1.0 * inside + rng.normal(0, 0.5, (shadows, count))
    mine = rng.random(count) < 0.5
    target = hard + 1.0 * mine + rng.normal(0, 0.5, count)
    found = lira(target, seen, inside)
    assert success(found[mine], found[~mine]).auc > 0.9
    assert success(target[mine], target[~mine]).auc < 0.65
    blind = lira(hard + rng.normal(0, 0.5, count), hard + rng.normal(0, 0.5, (shadows, count)), inside)
    assert 0.45 < success(blind[mine], blind[~mine]).auc < 0.55


def test_confidence_is_the_log_of_the_odds():
    p = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(confidence(np.log(p)), np.log(p / (1 - p)))
    assert np.isfinite(confidence(np.array([0.0, -1e-12]))).all()


def test_an_audited_epsilon_is_what_guesses_disprove():
    assert audited_epsilon(100, 50, 1000, 0.0) == 0.0
    all_right = audited_epsilon(100, 100, 1000, 0.0)
    assert 1 / (1 + np.exp(-all_right)) == pytest.approx(0.05 ** (1 / 100), abs=1e-4)  # pure: q ** 100 = .05
    assert audited_epsilon(100, 90, 1000, 0.0) < all_right
    assert audited_epsilon(100, 100, 1000, 1e-5) < all_right
    rng = np.random.default_rng(0)
    truth, bounds = 1.0, []
    for _ in range(40):  # randomised response keeps epsilon 1 exactly
        inside = rng.random(1000) < 0.5
        said = np.where(rng.random(1000) < 1 / (1 + np.exp(-truth)), inside, ~inside)
        bounds.append(best_guesses(said + 1e-6 * rng.random(1000), inside, 1e-5)[0])
    assert 0.5 < np.mean(bounds) < truth
    assert np.mean(np.array(bounds) > truth) <= 0.1


# Audits of private rounds


def audited(kind, epsilon=3.0, canaries=2500, rounds=40, noise_seed=1):
    return audit(kind(Privacy(epsilon, 1e-4, 0.5, noise_seed=noise_seed), canaries, 125, rounds))


def test_the_claim_of_private_rounds_is_never_below_what_an_audit_finds():
    found = [audited(PrivateRounds, noise_seed=seed) for seed in range(3)]
    assert all(one.passed and one.canaries == 2500 and 3.0 < one.claimed < 5.0 for one in found)


@pytest.mark.parametrize("broken", [Quiet, Unclipped])
def test_with_noise_or_clipping_off_the_alarm_rings(broken):
    found = audited(broken)
    assert not found.passed
    assert found.right == found.guesses > 500


def test_an_audit_comes_near_the_truth_where_every_user_is_in_every_round():
    rounds = PrivateRounds(Privacy(4.0, 1e-4, 1.0, noise_seed=2), 1500, 1500, 1)
    found = audit(rounds)
    assert found.passed and found.epsilon > 0.8  # one run tells less than many would

from dataclasses import replace

import pytest
import torch

from backbones.pathways import make_pathways, population_logits
from backbones.resnet import small_resnet
from envs.modelled import modelled_scenario
from envs.oracles import LiveOracle
from meta.inner import MetaInit
from users.base import Examples, User
from users.batch import Prepared, stack
from users.embedding import CLIP, DEFAULT, PARTS, WIDTH, UserEmbedder, support_features


def toy_user(name, classes, seed, support=6):
    draw = torch.Generator().manual_seed(seed)

    def part(count):
        return Examples(torch.rand(count, 1, 8, 8, generator=draw), torch.randint(classes, (count,), generator=draw))

    return User(name, part(support), part(2), part(3))


@pytest.fixture(scope="module")
def supports(pathways, population):
    """The support sets of the train users and of the test users."""
    return [stack(pathways, users, "support") for users in (population.train, population.test)]


@pytest.fixture(scope="module")
def embedder(pathways, supports):
    return UserEmbedder.fit(pathways.model, supports[0])


@pytest.mark.parametrize("classes", [2, 10, 40])
@pytest.mark.parametrize("widths", [(4,), (4, 24)])
@pytest.mark.parametrize("users", [3, 50])
def test_the_width_is_the_same_for_every_population_and_backbone(classes, widths, users):
    pathways = make_pathways("inline", small_resnet(classes, widths=widths, depth=1))
    support = stack(pathways, [toy_user(str(n), classes, n) for n in range(users)], "support")
    embedded = UserEmbedder.fit(pathways.model, support).embed(support)
    assert embedded.shape == (users, WIDTH)
    assert embedded.isfinite().all()


def test_only_the_support_set_counts(pathways, population, embedder):
    one = population.test[0]
    other = User(one.user_id, one.support, *(Examples(torch.rand(5, 1, 8, 8), torch.zeros(5).long()) for _ in range(2)))
    first, second = (embedder.embed(stack(pathways, [who], "support")) for who in (one, other))
    assert torch.equal(first, second)


def test_support_images_and_support_labels_both_count(pathways, population, embedder):
    one = population.test[0]
    images = Examples(1 - one.support.inputs, one.support.labels)
    labels = Examples(one.support.inputs, (one.support.labels + 1) % 10)
    whole = embedder.embed(stack(pathways, [one], "support"))
    for support in (images, labels):
        changed = User(one.user_id, support, one.validation, one.query)
        assert (embedder.embed(stack(pathways, [changed], "support")) - whole).abs().max() > 0.1


def test_the_order_of_the_support_does_not_count(pathways, population, embedder, supports):
    turned = supports[1].columns(torch.randperm(20))
    torch.testing.assert_close(embedder.embed(turned), embedder.embed(supports[1]), rtol=1e-3, atol=1e-3)


def test_a_user_is_embedded_alike_in_any_company(pathways, population, embedder, supports):
    together = embedder.embed(supports[1])
    for row, one in enumerate(population.test):
        alone = embedder.embed(stack(pathways, [one], "support"))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_padding_does_not_count(pathways, embedder):
    users = [toy_user("few", 10, 0, support=3), toy_user("many", 10, 1, support=9)]
    together = embedder.embed(stack(pathways, users, "support"))
    for row, one in enumerate(users):
        alone = embedder.embed(stack(pathways, [one], "support"))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_train_users_are_standardised(supports, embedder):
    embedded = embedder.embed(supports[0])
    filled = embedded.abs().amax(0) > 0
    assert filled.sum() == 11 + 4  # twelve users span eleven components; the four scores come last
    assert filled[:11].all() and filled[-4:].all()
    torch.testing.assert_close(embedded[:, filled].mean(0), torch.zeros(15), rtol=0, atol=1e-3)
    spread = embedded[:, filled].std(0, correction=0)
    torch.testing.assert_close(spread[[0, -4, -3, -2, -1]], torch.ones(5), rtol=0, atol=1e-2)
    assert (spread[:11].diff() <= 1e-4).all()  # the largest first, none blown up to the size of the first


def test_components_of_train_users_are_uncorrelated(supports, embedder):
    components = embedder.embed(supports[0])[:, :11]
    covariance = components.T @ components / 12
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=1e-2)


def test_the_scores_are_the_models_loss_accuracy_confidence_and_entropy(model, pathways, population, embedder, supports):
    scores = []
    for users in (population.train, population.test):
        for one in users:
            probabilities = model(one.support.inputs).softmax(-1)
            loss = torch.nn.functional.nll_loss(probabilities.log(), one.support.labels)
            accuracy = (probabilities.argmax(-1) == one.support.labels).float().mean()
            entropy = -(probabilities * probabilities.log()).sum(-1).mean()
            scores.append(torch.stack([loss, accuracy, probabilities.amax(-1).mean(), entropy]))
    train, test = torch.stack(scores).split([12, 4])
    expected = ((test - train.mean(0)) / train.std(0, correction=0)).clamp(-CLIP, CLIP)
    torch.testing.assert_close(embedder.embed(supports[1])[:, -4:], expected, rtol=1e-3, atol=1e-3)


def test_strangers_stay_within_the_clip(pathways, embedder):
    stranger = toy_user("stranger", 10, 0)
    stranger.support.inputs.mul_(1000)
    embedded = embedder.embed(stack(pathways, [stranger], "support"))
    assert embedded.isfinite().all()
    assert embedded.abs().max() == CLIP


def test_one_class_in_the_support_is_enough(pathways, embedder):
    one = toy_user("one", 10, 0)
    one.support.labels.fill_(7)
    assert embedder.embed(stack(pathways, [one], "support")).isfinite().all()
    lonely = toy_user("lonely", 10, 1, support=1)
    assert embedder.embed(stack(pathways, [lonely], "support")).isfinite().all()


def test_one_train_user_is_enough(pathways, population, supports):
    embedder = UserEmbedder.fit(pathways.model, stack(pathways, population.train[:1], "support"))
    for support in supports:
        embedded = embedder.embed(support)
        assert embedded.shape[1] == WIDTH
        assert embedded.isfinite().all()
        assert embedded.abs().max() <= CLIP


# What it is made of.


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_is_an_embedding(pathways, supports, part):
    embedder = UserEmbedder.fit(pathways.model, supports[0], (part,))
    for support in supports:
        embedded = embedder.embed(support)
        assert embedded.shape == (len(support), WIDTH)
        assert embedded.isfinite().all() and embedded.abs().max() <= CLIP
        assert len(embedded.unique(dim=0)) > 1  # it tells users apart
        silent = embedded[:, :-4] if part == "scores" else embedded[:, -4:]
        assert (silent == 0).all()


def test_all_parts_together_are_an_embedding(pathways, supports):
    embedded = UserEmbedder.fit(pathways.model, supports[0], PARTS).embed(supports[1])
    assert embedded.shape == (4, WIDTH) and embedded.isfinite().all()


@pytest.mark.parametrize("parts", [("label",), ("features", "prototype")])
def test_an_unknown_part_is_answered_with_a_suggestion(pathways, supports, parts):
    with pytest.raises(ValueError, match=rf"unknown part of the embedding '{parts[-1]}'\. Did you mean '{parts[-1]}s'"):
        UserEmbedder.fit(pathways.model, supports[0], parts)


def test_no_part_at_all_is_refused(pathways, supports):
    with pytest.raises(ValueError, match="an embedding needs at least one part of features, labels"):
        UserEmbedder.fit(pathways.model, supports[0], ())


def described_by_hand(model, support):
    """Mean and spread of features, shares of labels, mean predictions: the raw facts that always were described."""
    weights, features = support.weights[..., None], support.frozen.sites[-1]
    mean = (features * weights).sum(1)
    spread = ((features - mean[:, None]) ** 2 * weights).sum(1).sqrt()
    truth = torch.nn.functional.one_hot(support.labels, 10)
    predicted = population_logits(model, support.frozen).softmax(-1)
    return torch.cat([mean, spread, (truth * weights).sum(1), (predicted * weights).sum(1)], 1)


def test_the_default_is_the_embedding_that_always_was(model, supports, embedder):
    assert DEFAULT == ("features", "labels", "predictions", "scores") and embedder.parts == DEFAULT
    for support in supports:
        torch.testing.assert_close(support_features(model, support)[0], described_by_hand(model, support))
    train, test = (described_by_hand(model, support) for support in supports)
    mean, scale = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
    _, singular, right = torch.linalg.svd((train - mean) / scale, full_matrices=False)
    axes = right[:11].T * 12**0.5 / singular[0]  # twelve users span eleven components
    expected = (((test - mean) / scale) @ axes).clamp(-CLIP, CLIP)
    torch.testing.assert_close(embedder.embed(supports[1])[:, :11], expected, rtol=1e-3, atol=1e-3)


def test_the_order_in_which_parts_are_named_counts_nothing(pathways, supports, embedder):
    turned = UserEmbedder.fit(pathways.model, supports[0], DEFAULT[::-1])
    assert torch.equal(turned.embed(supports[1]), embedder.embed(supports[1]))


def test_prototypes_know_which_class_is_where_and_the_labels_shares_do_not(model, supports):
    support = supports[1]
    turned = replace(support, labels=support.labels.flip(1))  # every user keeps every image and how often each label is there
    moved = {}
    for part in PARTS[:-1]:
        first, second = (support_features(model, batch, (part,))[0] for batch in (support, turned))
        moved[part] = (first - second).abs().max().item()
    assert moved["features"] == moved["predictions"] == 0 and moved["labels"] < 1e-6
    assert moved["prototypes"] > 0.01


def test_prototypes_are_relative_to_the_mean_of_all_and_zero_for_one_class(model, supports):
    alike = replace(supports[1], labels=torch.full_like(supports[1].labels, 3))
    found = support_features(model, alike, ("prototypes",))[0]
    assert found.shape == (4, 64)
    torch.testing.assert_close(found, torch.zeros(4, 64), rtol=0, atol=1e-5)


def test_other_parts_are_other_observations(pathways, population):
    init = MetaInit(pathways.start(0), torch.full((1, 5), 0.1), torch.ones(5, dtype=torch.bool))
    prints = {}
    for parts in (DEFAULT, PARTS, ("labels",), ("scores",)):
        scenario = modelled_scenario("toy", LiveOracle(Prepared(pathways, population), init), "key", None, {}, parts)
        prints[parts] = scenario.fingerprint
        assert scenario.embeddings.shape == (19, WIDTH)
    assert prints[DEFAULT] == "key"  # policies trained before parts could be chosen are still theirs
    assert len(set(prints.values())) == 4

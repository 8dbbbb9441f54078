import pytest
import torch

from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from users.base import Examples, User
from users.batch import stack
from users.embedding import CLIP, WIDTH, UserEmbedder


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

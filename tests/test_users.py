import numpy as np
import pytest
import torch

from backbones.pathways import Frozen
from meta.inner import MetaInit, adapt, measure
from users.base import ROLES, SPLITS, Examples, Population, User
from users.batch import Batch, stack
from users.digits import KINDS, POOLS, digits_pools, digits_population
from users.items import TensorItems, TextItems
from users.shifts import SHIFTS, register_shift

POOL_OF_ROLE = {
    ("train", "support"): "train-fit",
    ("train", "validation"): "train-reward",
    ("train", "query"): "train-fit",
} | {(split, role): split for split in ("val", "test") for role in ROLES}


def examples(count, seed=0, label=None):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draw) if label is None else torch.full((count,), label)
    return Examples(torch.rand(count, 1, 8, 8, generator=draw), labels)


def user(name="u", support=4, validation=3, query=5, seed=0):
    return User(name, examples(support, seed), examples(validation, seed + 1), examples(query, seed + 2))


def same(first, second):
    return all(
        torch.equal(getattr(first, role).inputs, getattr(second, role).inputs)
        and torch.equal(getattr(first, role).labels, getattr(second, role).labels)
        for role in ROLES
    )


def lively_init(pathways, steps=2, rate=0.1):
    torch.manual_seed(5)
    weights = {k: w + 0.2 * torch.randn_like(w) for k, w in pathways.start(0).items()}
    count = pathways.num_pathways
    return MetaInit(weights, torch.full((steps, count), rate), torch.ones(count, dtype=torch.bool))


@pytest.fixture(scope="module")
def plain():
    """Users whose images are as they were, so that they can be traced to their pools."""
    return digits_population(3, train_users=6, val_users=4, test_users=5, shifts=("none",))


@pytest.fixture(scope="module")
def place():
    """From the bytes of an image to the names of the pools it is in, for the plain population's seed."""
    pools = digits_pools(3)
    found = {}
    for name, rows in pools.rows.items():
        for row in rows:
            found.setdefault(pools.images[row].tobytes(), []).append(name)
    return found


def test_the_same_seed_gives_the_same_population(population):
    again = digits_population(0, train_users=12, val_users=3, test_users=4)
    assert again.fingerprint() == population.fingerprint()
    assert [u.info for u in again.users] == [u.info for u in population.users]


def test_another_seed_gives_another_population(population):
    assert digits_population(1, 12, 3, 4).fingerprint() != population.fingerprint()


def test_a_fingerprint_knows_every_role_of_every_user(plain):
    seen = {plain.fingerprint()}
    for role in ROLES:
        other = user("train-0").__dict__ | {r: getattr(plain.train[0], r) for r in ROLES}
        changed = getattr(plain.train[0], role)
        other[role] = Examples(changed.inputs, (changed.labels + 1) % 10)
        seen.add(Population("digits", 10, (User(**other), *plain.train[1:]), plain.val, plain.test).fingerprint())
    assert len(seen) == 4


def test_contents_of_a_split_owe_nothing_to_other_users():
    def readers(mine, *texts):
        """A train user and a val user, each with a text of their own; texts stand in the order of the alphabet."""
        items = tuple(sorted(("b", *texts)))

        def one(name, text):
            return User(name, *(Examples(torch.tensor([items.index(text)]), torch.tensor([mine])) for _ in ROLES))

        people = one("train", texts[0]), one("val", "b"), one("test", texts[0])
        return Population("t", 2, *((person,) for person in people), items=TextItems(items))

    first = readers(1, "c")
    for other in (readers(1, "a"), readers(1, "d")):
        assert other.contents("val") == first.contents("val") and other.fingerprint("val") != first.fingerprint("val")
    assert readers(0, "c").contents("val") != first.contents("val") != first.contents("train")


def test_counts_and_sizes_are_as_asked(population):
    assert [len(getattr(population, split)) for split in SPLITS] == [12, 3, 4]
    assert len(population.users) == 19
    for one in population.users:
        assert [len(getattr(one, role)) for role in ROLES] == [20, 40, 60]
        for role in ROLES:
            assert getattr(one, role).inputs.shape[1:] == (1, 8, 8)
            assert getattr(one, role).inputs.dtype == torch.float32
            assert getattr(one, role).labels.dtype == torch.int64


def test_indices_point_at_the_users_of_a_split(population):
    for split in SPLITS:
        assert tuple(population.users[i] for i in population.indices(split)) == getattr(population, split)


def test_the_pools_are_disjoint_and_cover_all_images():
    pools = digits_pools(0)
    rows = np.concatenate(list(pools.rows.values()))
    assert sorted(rows) == list(range(1797))
    shares = [len(rows) / 1797 for rows in pools.rows.values()]
    assert shares == pytest.approx(list(POOLS.values()), abs=2e-3)
    assert len(np.unique(pools.images.reshape(1797, -1), axis=0)) == 1797  # no image is in two pools under two numbers
    assert (pools.images.min(), pools.images.max()) == (0, 1)


def test_pretraining_images_are_the_pretraining_pool():
    pools = digits_pools(0)
    images, labels = pools.pretraining()
    assert torch.equal(images, torch.from_numpy(pools.images[pools.rows["pretrain"]]))
    assert torch.equal(labels, torch.from_numpy(pools.labels[pools.rows["pretrain"]]))


def test_another_seed_deals_the_pools_anew():
    first, second = (set(digits_pools(seed).rows["test"]) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("role", ROLES)
def test_images_come_from_the_pool_of_their_split_and_role(plain, place, split, role):
    pools = {
        name for one in getattr(plain, split) for image in getattr(one, role).inputs for name in place[image.numpy().tobytes()]
    }
    assert pools == {POOL_OF_ROLE[split, role]}


def test_within_a_user_no_image_is_in_two_roles_or_twice_in_one(plain):
    for one in plain.users:
        images = [image.numpy().tobytes() for role in ROLES for image in getattr(one, role).inputs]
        assert len(set(images)) == len(images) == 120


def test_images_keep_their_labels(plain):
    pools = digits_pools(3)
    label = {image.tobytes(): int(digit) for image, digit in zip(pools.images, pools.labels, strict=True)}
    for one in plain.users:
        for role in ROLES:
            mine = getattr(one, role)
            assert [label[image.numpy().tobytes()] for image in mine.inputs] == mine.labels.tolist()


def test_users_of_a_split_are_different(population):
    assert not any(same(population.test[0], other) for other in population.test[1:])
    assert not same(population.val[0], population.test[0])


def test_about_a_third_of_users_have_two_different_shifts():
    users = digits_population(0, train_users=300, val_users=1, test_users=1).train
    two = [u for u in users if u.info["group"] == "two shifts"]
    assert 0.25 < len(two) / 300 < 0.42
    for one in users:
        names = one.info["shifts"].split("+")
        assert set(names) <= set(KINDS)
        assert len(names) == len(set(names)) == (2 if one in two else 1)
        assert "none" not in names or names == ["none"]
    assert {u.info["shifts"] for u in users} >= set(KINDS)


@pytest.mark.parametrize(("share", "group"), [(0.0, "at most one shift"), (1.0, "two shifts")])
def test_the_share_of_users_with_two_shifts_can_be_chosen(share, group):
    users = digits_population(0, 20, 1, 1, two_shifts=share).users
    assert {u.info["group"] for u in users} == {group}


def test_the_nth_user_does_not_depend_on_the_number_of_users(population):
    more = digits_population(0, train_users=15, val_users=5, test_users=6)
    for split in SPLITS:
        for few, many in zip(getattr(population, split), getattr(more, split), strict=False):
            assert few.user_id == many.user_id
            assert few.info == many.info
            assert same(few, many)


def test_splits_draw_their_shifts_independently():
    population = digits_population(0, 20, 20, 20)
    drawn = [tuple(one.info["shifts"] for one in getattr(population, split)) for split in SPLITS]
    assert len(set(drawn)) == 3


def test_a_shift_applies_to_all_roles_of_a_user():
    one = digits_population(3, 6, 4, 5, shifts=("inverted",)).train[2]
    clean = digits_population(3, 6, 4, 5, shifts=("none",)).train[2]
    for role in ROLES:
        torch.testing.assert_close(getattr(one, role).inputs, 1 - getattr(clean, role).inputs)


def test_no_users_are_refused():
    with pytest.raises(ValueError, match="val_users must be at least 1, got 0"):
        digits_population(0, 1, 0, 1)


def test_an_unknown_shift_is_answered_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown shift 'invertd'\. Did you mean 'inverted'"):
        digits_population(0, 1, 1, 1, shifts=("none", "invertd"))


def test_one_shift_may_be_given_by_its_name_alone():
    assert same_people(*(digits_population(0, 2, 1, 1, shifts=shifts) for shifts in ("noisy", ["noisy"])))


def same_people(first, second):
    return first.fingerprint() == second.fingerprint()


def test_a_registered_shift_is_used_where_it_is_named():
    register_shift("all-white", lambda images, labels, rng: (np.ones_like(images), labels))
    try:
        users = digits_population(0, 2, 1, 1, shifts=("all-white",)).users
    finally:
        SHIFTS.unregister("all-white")
    for one in users:
        assert one.info["shifts"] == "all-white"
        assert all((getattr(one, role).inputs == 1).all() for role in ROLES)
    with pytest.raises(ValueError, match="unknown shift 'all-white'"):
        digits_population(0, 1, 1, 1, shifts=("all-white",))


@pytest.fixture
def digits():
    """30 images and labels, every class among them."""
    pools = digits_pools(0)
    return pools.images[:30].copy(), np.arange(30) % 10


def shifted(name, digits, seed=0):
    images, labels = (array.copy() for array in digits)
    out = SHIFTS.get(name)(images, labels, np.random.default_rng(seed))
    assert np.array_equal(images, digits[0]) and np.array_equal(labels, digits[1]), "the arguments were changed"
    return out


@pytest.mark.parametrize("name", KINDS)
def test_a_shift_keeps_shapes_and_types_and_follows_its_generator(digits, name):
    images, labels = shifted(name, digits)
    assert (images.shape, images.dtype) == (digits[0].shape, np.float32)
    assert (labels.shape, labels.dtype) == (digits[1].shape, digits[1].dtype)
    again = shifted(name, digits)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    assert name == "swapped_labels" or np.array_equal(labels, digits[1])


def test_none_leaves_everything_as_it_is(digits):
    assert np.array_equal(shifted("none", digits)[0], digits[0])


def test_inverted_exchanges_black_and_white(digits):
    np.testing.assert_allclose(shifted("inverted", digits)[0] + digits[0], 1)


def test_rotated_turns_all_images_of_a_user_by_the_same_quarter_turns(digits):
    turns = set()
    for seed in range(20):
        out = shifted("rotated", digits, seed)[0]
        (turn,) = (k for k in range(4) if np.array_equal(out, np.rot90(digits[0], k, axes=(2, 3))))
        turns.add(turn)
    assert turns == {1, 2, 3}


def test_noise_is_strong_and_fresh_for_every_image(digits):
    strengths = []
    for seed in range(20):
        noise = shifted("noisy", digits, seed)[0] - digits[0]
        strengths.append(noise.std())
        assert abs(noise.mean()) < 0.05
        assert not np.allclose(noise[0], noise[1])
    assert 0.28 < min(strengths) < 0.36
    assert 0.44 < max(strengths) < 0.52


def test_faint_images_keep_35_to_55_percent_of_their_contrast(digits):
    factors = []
    for seed in range(20):
        out = shifted("faint", digits, seed)[0]
        factors.append(out.max() / digits[0].max())
        np.testing.assert_allclose(out, digits[0] * factors[-1], rtol=1e-5)
    assert 0.35 <= min(factors) < 0.4
    assert 0.5 < max(factors) <= 0.55


def test_moved_and_blurred_moves_a_dot_diagonally_and_spreads_it_by_the_kernel():
    dot = np.zeros((1, 1, 8, 8), np.float32)
    dot[..., 3, 4] = 1
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    moves = set()
    for seed in range(30):
        out = SHIFTS.get("moved_and_blurred")(dot, np.zeros(1, np.int64), np.random.default_rng(seed))[0][0, 0]
        y, x = np.unravel_index(out.argmax(), out.shape)
        np.testing.assert_allclose(out[y - 1 : y + 2, x - 1 : x + 2], kernel)
        assert out.sum() == pytest.approx(1)
        moves.add((int(y) - 3, int(x) - 4))
    assert moves == {(-1, -1), (-1, 1), (1, -1), (1, 1)}


def test_moved_and_blurred_loses_what_leaves_the_picture():
    bright = np.ones((1, 1, 8, 8), np.float32)
    for seed in range(10):
        out = SHIFTS.get("moved_and_blurred")(bright, np.zeros(1, np.int64), np.random.default_rng(seed))[0][0, 0]
        edges = sorted([out[0].max(), out[-1].max(), out[:, 0].max(), out[:, -1].max()])
        assert edges[0] < 0.5 and edges[1] < 0.5  # dark comes in on the two sides that the picture moved away from
        assert out.max() == pytest.approx(1)


def test_swapped_labels_trade_three_pairs_for_all_images_of_a_user(digits):
    permutations = set()
    for seed in range(10):
        images, labels = shifted("swapped_labels", digits, seed)
        assert np.array_equal(images, digits[0])
        meaning = {int(old): int(new) for old, new in zip(digits[1], labels, strict=True)}
        assert [meaning[int(old)] for old in digits[1]] == labels.tolist()  # one meaning per class
        assert all(meaning[new] == old for old, new in meaning.items())  # an involution
        assert sum(old != new for old, new in meaning.items()) == 6
        permutations.add(tuple(sorted(meaning.items())))
    assert len(permutations) > 5


def test_swapped_labels_are_swapped_alike_in_all_roles():
    swapped = digits_population(3, 6, 4, 5, shifts=("swapped_labels",)).train
    pools = digits_pools(3)
    label = {image.tobytes(): int(digit) for image, digit in zip(pools.images, pools.labels, strict=True)}
    for one in swapped:
        pairs = set()
        for role in ROLES:
            mine = getattr(one, role)
            pairs |= {(label[i.numpy().tobytes()], int(y)) for i, y in zip(mine.inputs, mine.labels, strict=True)}
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
        assert sum(old != new for old, new in pairs) == 6


@pytest.mark.parametrize("role", ROLES)
def test_an_empty_role_is_refused(role):
    parts = {r: examples(2) for r in ROLES} | {role: examples(0)}
    with pytest.raises(ValueError, match=f"user 'ann' has no {role} examples"):
        User("ann", **parts)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused(role, poison):
    parts = {r: examples(2) for r in ROLES}
    parts[role].inputs[1, 0, 3, 3] = poison
    with pytest.raises(ValueError, match=f"user 'ann' has NaN or infinite {role} inputs"):
        User("ann", **parts)


@pytest.mark.parametrize("role", ROLES)
def test_inputs_without_labels_are_refused(role):
    parts = {r: examples(2) for r in ROLES}
    parts[role] = Examples(parts[role].inputs, parts[role].labels[:1])
    with pytest.raises(ValueError, match=f"user 'ann' has 2 {role} inputs but 1 labels"):
        User("ann", **parts)


@pytest.mark.parametrize("role", ROLES)
def test_inputs_and_labels_of_another_type_are_refused_with_a_cure(role):
    parts = {r: examples(2) for r in ROLES}
    inputs, labels = parts[role].inputs, parts[role].labels

    def among_others(wrong):
        return Population("toy", 10, (user("bob"),), (user("cy"),), (User("ann", **parts | {role: wrong}),))

    with pytest.raises(ValueError, match=rf"user 'ann' has {role} inputs of torch\.float64, .*\.float\(\)"):
        among_others(Examples(inputs.double(), labels))
    with pytest.raises(ValueError, match=rf"user 'ann' has {role} labels of torch\.int32; .*\.long\(\)"):
        among_others(Examples(inputs, labels.int()))


def test_fitting_examples_and_items_of_another_type_or_not_finite_are_refused():
    people = {"train": (user("ann"),), "val": (user("bob"),), "test": (user("cy"),)}
    some, poisoned = examples(3), torch.full((3, 1, 8, 8), torch.nan)
    for wrong, message in (
        ({"fitting": Examples(some.inputs.double(), some.labels)}, "has fitting inputs of torch.float64"),
        ({"fitting": Examples(some.inputs, some.labels.int())}, "has fitting labels of torch.int32"),
        ({"fitting": Examples(poisoned, some.labels)}, "has NaN or infinite fitting inputs"),
        ({"items": TensorItems(poisoned)}, "has NaN or infinite items"),
        ({"items": TensorItems(some.inputs.double())}, "has items of torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"population 'toy' {message}"):
            Population("toy", 10, **people, **wrong)


def test_positions_of_items_of_another_type_are_refused():
    places = Examples(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.long))
    people = {split: (User(split, places, places, places),) for split in SPLITS}
    with pytest.raises(ValueError, match=r"user 'train' has support inputs of torch\.int32, positions of items are int64"):
        Population("toy", 10, **people, items=TensorItems(torch.zeros(1, 1, 8, 8)))


def test_integer_inputs_are_legal():
    tokens = Examples(torch.ones(2, 5, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert len(User("ann", tokens, tokens, tokens).support) == 2


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(role, label):
    parts = {r: examples(2) for r in ROLES}
    parts[role].labels[1] = label
    with pytest.raises(ValueError, match=rf"user 'ann' has {role} labels outside 0\.\.9"):
        Population("toy", 10, (user("bob"),), (user("cy"),), (User("ann", **parts),))


def test_user_ids_that_occur_twice_are_refused():
    with pytest.raises(ValueError, match=r"unique across splits.*\['ann'\]"):
        Population("toy", 10, (user("ann"), user("bob")), (user("cy"),), (user("ann"),))


def test_a_class_may_be_missing_from_the_support(pathways):
    one = User("ann", examples(4, label=3), examples(3), examples(6, seed=2))
    Population("toy", 10, (one,), (user("bob"),), (user("cy"),))
    init, on = lively_init(pathways), torch.ones(1, pathways.num_pathways, dtype=torch.bool)
    support, query = (stack(pathways, [one], role) for role in ("support", "query"))
    before = measure(pathways, {k: w[None] for k, w in init.weights.items()}, on, support)[1]
    weights = adapt(pathways, init, support, on)
    assert measure(pathways, weights, on, support)[1] < before
    assert measure(pathways, weights, on, query)[1].isfinite()


def test_stacked_users_are_padded_with_weight_zero(pathways):
    users = [user("a", support=4), user("b", support=1, seed=3), user("c", support=6, seed=6)]
    batch = stack(pathways, users, "support")
    assert len(batch) == 3
    assert (batch.weights > 0).tolist() == [[i < count for i in range(6)] for count in (4, 1, 6)]
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(3))
    torch.testing.assert_close(batch.weights[0, :4], torch.full((4,), 0.25))
    for row, one in enumerate(users):
        count = len(one.support)
        assert torch.equal(batch.labels[row, :count], one.support.labels)
        for stacked_site, site in zip(batch.frozen.sites, pathways.frozen(one.support.inputs).sites, strict=True):
            torch.testing.assert_close(stacked_site[row, :count], site)


def test_the_chunk_size_changes_nothing(pathways):
    users = [user("a", support=4), user("b", support=1, seed=3), user("c", support=6, seed=6)]
    whole, parts = (stack(pathways, users, "support", chunk) for chunk in (2048, 2))
    assert torch.equal(whole.labels, parts.labels)
    for first, second in zip(whole.frozen.sites, parts.frozen.sites, strict=True):
        torch.testing.assert_close(first, second)


def test_a_padded_user_adapts_and_scores_as_when_alone(pathways):
    users = [
        user("a", support=4, query=2),
        user("b", support=2, query=7, seed=3),
        user("c", support=6, query=1, seed=6),
    ]
    init = lively_init(pathways)
    gates = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    support, query = (stack(pathways, users, role) for role in ("support", "query"))
    accuracy, loss = measure(pathways, adapt(pathways, init, support, gates), gates, query)
    for row, one in enumerate(users):
        gate = gates[row : row + 1]
        weights = adapt(pathways, init, stack(pathways, [one], "support"), gate)
        alone = measure(pathways, weights, gate, stack(pathways, [one], "query"))
        torch.testing.assert_close(accuracy[row : row + 1], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss[row : row + 1], alone[1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def ragged():
    """Two batches of the same two users, one site and a context, padding marked by -1."""
    first = Batch.of(
        Frozen(
            (torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [-1.0], [-1.0]]]),),
            {"m": torch.tensor([[1, 2, 3], [4, -1, -1]])},
        ),
        torch.tensor([[1, 2, 3], [4, -1, -1]]),
        torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1, 0, 0]]),
    )
    second = Batch.of(
        Frozen((torch.tensor([[[5.0], [-1.0]], [[6.0], [7.0]]]),), {"m": torch.tensor([[5, -1], [6, 7]])}),
        torch.tensor([[5, -1], [6, 7]]),
        torch.tensor([[1.0, 0.0], [0.5, 0.5]]),
    )
    return first, second


def aligned(batch):
    """Whether site, context and labels, which were made equal, stayed together."""
    parts = (batch.frozen.sites[0][..., 0].long(), batch.frozen.context["m"])
    return all(torch.equal(part, batch.labels) for part in parts)


def test_joined_batches_weigh_every_example_alike(ragged):
    joined = Batch.joined(*ragged)
    assert aligned(joined)
    assert joined.labels.tolist() == [[1, 2, 3, 5, -1], [4, -1, -1, 6, 7]]
    torch.testing.assert_close(joined.weights, torch.tensor([[1, 1, 1, 1, 0], [4 / 3, 0, 0, 4 / 3, 4 / 3]]) / 4)


def test_rows_pick_users_in_any_order_and_with_repetitions(ragged):
    picked = ragged[0].rows(torch.tensor([1, 0, 1]))
    assert aligned(picked)
    assert picked.labels.tolist() == [[4, -1, -1], [1, 2, 3], [4, -1, -1]]
    torch.testing.assert_close(picked.weights, ragged[0].weights[[1, 0, 1]])


def test_columns_pick_examples_and_weigh_them_anew(ragged):
    picked = ragged[0].columns(torch.tensor([2, 0]))
    assert aligned(picked)
    assert picked.labels.tolist() == [[3, 1], [-1, 4]]
    torch.testing.assert_close(picked.weights, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_columns_without_any_example_of_a_user_weigh_zero(ragged):
    assert ragged[0].columns(torch.tensor([1])).weights.tolist() == [[1], [0]]

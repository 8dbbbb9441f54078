"""Serving: everybody gets answers by their own adapter, whoever else is in the batch, in memory or on disk."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import worlds

from backbones.pathways import population_logits
from envs.rules import Rules
from meta.inner import adapt
from serving import Personaliser, UnknownUserError
from serving.examples import Shelf, batch_of, labelled, ready
from serving.records import PRECISIONS, Adapter, Codec
from serving.slots import Slots
from serving.store import DamagedRecordError, ForeignStoreError, StoreFullError
from users.base import Examples


class BySign:
    """A policy that switches on what has a steeper gradient than usual; at a high price nothing."""

    def predict(self, observation, deterministic):
        assert deterministic
        masks = observation["pathways"][..., 0] > 0
        if "cost_weight" in observation:
            masks &= observation["cost_weight"] < 0.25
        return masks, None


RULES = Rules("uniform:0:0.3")


@pytest.fixture(scope="module", params=["exit", "inline", "lora", "side"])
def scenario(request):
    return worlds.digits(request.param).scenario


@pytest.fixture(scope="module")
def texts(text_world):
    return text_world.scenario


def serve(scenario, path, rules=RULES, policy=None, **settings):
    return Personaliser(scenario, policy or BySign(), rules, path / "users.db", **settings)


def people(scenario, role="support"):
    """Everybody's examples, by id."""
    everybody = (*scenario.data.population.train, *scenario.data.population.val)
    return {user.user_id: (getattr(user, role).inputs, getattr(user, role).labels) for user in everybody}


@pytest.fixture
def served(scenario, tmp_path):
    with serve(scenario, tmp_path) as personaliser:
        personaliser.enroll_many(people(scenario), 0.1)
        yield personaliser


def alone(scenario, user, inputs):
    """A user's logits by the parts that the personaliser is made of, in full precision."""
    world = replace(worlds.digits(), scenario=scenario)
    position = [each.user_id for each in scenario.data.population.train].index(user)
    support = world.group("train", "support", torch.tensor([position])).batch
    gates = torch.from_numpy(world.observe(support)[1].numpy()[..., 0] > 0)
    weights = adapt(world.pathways, world.init, support, gates)
    return world.pathways.forward(inputs[None], weights, gates)[0], gates[0]


def test_everybody_gets_their_own_answers_in_a_mixed_batch(scenario, served):
    asked = people(scenario, "query")
    users = [user for user in asked for _ in range(3)]
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = torch.stack([asked[user][0][i % 3] for i, user in enumerate(users)])
    logits = served.predict([users[i] for i in order], inputs[order])
    by_user = {}
    for row, i in enumerate(order):
        by_user.setdefault(users[i], []).append((inputs[i], logits[row]))
    masks = set()
    for user in [user.user_id for user in scenario.data.population.train]:
        mine, answers = zip(*by_user[user], strict=True)
        expected, gates = alone(scenario, user, torch.stack(mine))
        torch.testing.assert_close(torch.stack(answers), expected, atol=3e-3, rtol=3e-3)  # half precision on disk
        masks.add(tuple(gates.tolist()))
        assert served.describe(user).pathways == tuple(np.array(scenario.pathways)[gates.numpy()])
    assert len(masks) >= 3


def test_predictions_do_not_depend_on_who_else_is_asked_for_or_who_is_resident(scenario, tmp_path):
    asked = people(scenario, "query")
    answers = []
    for slots in (1, 3, 100):
        with serve(scenario, tmp_path, slots=slots) as personaliser:
            if not answers:
                personaliser.enroll_many(people(scenario), 0.1)
            users = [*reversed(asked), *asked]
            inputs = torch.stack([asked[user][0][0] for user in users])
            answers.append(personaliser.predict(users, inputs))
            one_by_one = [personaliser.predict([user], each[None])[0] for user, each in zip(users, inputs, strict=True)]
            answers.append(torch.stack(one_by_one))
            assert personaliser.stats()["resident"] == min(slots, len(asked))
            assert (personaliser.stats()["evictions"] > 0) == (slots < len(asked))
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=1e-4, rtol=1e-4)


def test_strangers_get_an_error_or_the_bare_model_never_an_adapter(scenario, served):
    inputs, _ = next(iter(people(scenario, "query").values()))
    with pytest.raises(UnknownUserError, match=r"not enrolled: 'eve', 'mallory'\. Enrol them first"):
        served.predict(["eve", "mallory"], inputs[:2])
    friend = next(iter(people(scenario)))
    mixed = served.predict(["eve", friend, "eve"], inputs[:3], unknown="bare")
    bare = population_logits(served.pathways.model, served.pathways.frozen(inputs[:3]))
    torch.testing.assert_close(mixed[[0, 2]], bare[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:2], served.predict([friend], inputs[1:2]), atol=1e-5, rtol=1e-5)
    assert served.stats()["bare_predictions"] == 2 and served.stats()["predictions"] == 4
    torch.testing.assert_close(served.predict(["eve"] * 3, inputs[:3], unknown="bare"), bare, atol=1e-5, rtol=1e-5)


def test_the_forgotten_are_strangers(scenario, served):
    user = next(iter(people(scenario)))
    inputs = people(scenario, "query")[user][0][:1]
    served.predict([user], inputs)
    assert served.forget(user, "nobody") == 1
    with pytest.raises(UnknownUserError):
        served.predict([user], inputs)
    assert served.stats()["enrolled"] == len(people(scenario)) - 1 and user not in served._slots
    assert served.forget(user) == 0


def test_a_price_that_buys_nothing_is_the_bare_model(scenario, served):
    user = max(people(scenario), key=lambda each: served.describe(each).cost)
    inputs, labels = people(scenario)[user]
    assert served.describe(user).cost > 0
    given = served.enroll(user, inputs, labels, cost_weight=0.3)
    nothing = ("readout",) if served.pathways.exits else ()
    assert (given.pathways, given.cost, given.cost_weight) == (nothing, 0.0, 0.3) and given == served.describe(user)
    bare = population_logits(served.pathways.model, served.pathways.frozen(inputs))
    torch.testing.assert_close(served.predict([user] * len(inputs), inputs), bare, atol=1e-5, rtol=1e-5)


def test_what_another_process_changes_counts_at_once(scenario, served):
    user, other = [*people(scenario)][:2]
    inputs = people(scenario, "query")[user][0][:1]
    before = served.predict([user, other], inputs.repeat(2, 1, 1, 1))
    with serve(scenario, served._store.path.parent) as elsewhere:
        elsewhere.enroll(user, *people(scenario)[other], 0.1)
        elsewhere.forget(other)
    torch.testing.assert_close(served.predict([user], inputs)[0], before[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(UnknownUserError, match=repr(other)):
        served.predict([other], inputs)


def test_updates_join_old_and_new_examples_as_long_as_they_are_of_one_kind(scenario, tmp_path, monkeypatch):
    with serve(scenario, tmp_path, keep=40) as personaliser:
        given = personaliser.enroll_many(people(scenario), 0.1)
        user = max(given, key=lambda each: given[each].cost)
        inputs, labels = people(scenario)[user]
        count = len(labels)
        with monkeypatch.context() as alike:  # hardly trained adapters do not tell
            alike.setattr("serving.personaliser.has_changed", lambda *args: False)
            assert personaliser.update(user, inputs[:5], labels[:5]).labels == count + 5
        joined = personaliser.predict([user] * count, inputs)
        personaliser.enroll(user, torch.cat([inputs, inputs[:5]]), torch.cat([labels, labels[:5]]), 0.1)
        close = 0.05 if scenario.data.pathways.rate_scale < 1 else 5e-3  # half precision goes through every layer
        torch.testing.assert_close(joined, personaliser.predict([user] * count, inputs), atol=close, rtol=close)
        ordinary = personaliser.predict(["eve"] * count, inputs, unknown="bare").argmax(1)
        assert personaliser.update(user, inputs, ordinary).labels == count  # they no longer are what they were
        assert personaliser.update(user, inputs[:2], labels[:2], cost_weight=0.3).cost_weight == 0.3
        with pytest.raises(UnknownUserError):
            personaliser.update("eve", inputs, labels)


def test_who_is_forgotten_while_they_are_updated_stays_forgotten(scenario, served, monkeypatch):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    made = served._made
    monkeypatch.setattr(served, "_made", lambda *args: (served.forget(user), made(*args))[1])
    with pytest.raises(UnknownUserError):
        served.update(user, inputs, labels)
    assert user not in served._store


def test_of_two_updates_at_once_none_is_lost(scenario, tmp_path, monkeypatch):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    monkeypatch.setattr("serving.personaliser.has_changed", lambda *args: False)
    with serve(scenario, tmp_path, keep=40) as personaliser:
        personaliser.enroll(user, inputs[:2], labels[:2], 0.1)
        made, calls = personaliser._made, []

        def disturbed(*args):
            calls.append(args)
            if len(calls) == 1:
                personaliser.update(user, inputs[2:5], labels[2:5])
            return made(*args)

        monkeypatch.setattr(personaliser, "_made", disturbed)
        assert personaliser.update(user, inputs[5:9], labels[5:9]).labels == 9 and len(calls) == 3


def test_many_users_and_many_inputs_are_computed_in_parts_that_do_not_show(scenario, served, tmp_path, monkeypatch):
    asked, everybody = people(scenario, "query"), [*people(scenario)]
    users = [everybody[0]] * 11 + everybody
    inputs = torch.stack([asked[user][0][i % 3] for i, user in enumerate(users)])
    whole = served.predict(users, inputs)
    masks = [served.describe(user).pathways for user in everybody]
    sizes, forward = [], served.pathways.forward
    monkeypatch.setattr("serving.personaliser.CHUNK", 4)
    monkeypatch.setattr("serving.personaliser.TOGETHER", 3)
    monkeypatch.setattr(
        served.pathways, "forward", lambda i, w, g: (sizes.append(i.shape[0] * i.shape[1]), forward(i, w, g))[1]
    )
    torch.testing.assert_close(served.predict(users, inputs), whole, atol=1e-5, rtol=1e-4)
    assert max(sizes) <= 4
    served.enroll_many(people(scenario), 0.1)
    assert [served.describe(user).pathways for user in everybody] == masks


def test_shared_weights_are_not_stored_and_not_forgotten(scenario, tmp_path):
    """ANIL: the head alone is each user's own."""
    look = scenario.look
    own = torch.zeros_like(look.of.init.adapted)
    own[-1] = True
    anil = replace(look.of, init=replace(look.of.init, adapted=own))
    other = replace(scenario, look=type("Look", (), {"of": anil, "embedder": look.embedder})())
    with serve(other, tmp_path) as personaliser:
        given = personaliser.enroll_many(people(scenario), 0.1)
        user = max(given, key=lambda each: len(given[each].pathways) * ("head" in given[each].pathways))
        head = personaliser.pathways.sizes[-1]
        assert len(given[user].pathways) > 2 and given[user].bytes < 2 * head + 40
        support = people(scenario)[user]
        gates = torch.tensor([name in given[user].pathways for name in scenario.pathways])[None]
        batch = personaliser_batch(personaliser, support)
        weights = adapt(personaliser.pathways, anil.init, batch, gates)
        expected = personaliser.pathways.forward(support[0][None], weights, gates)[0]
        torch.testing.assert_close(personaliser.predict([user] * 20, support[0]), expected, atol=3e-3, rtol=3e-3)


def personaliser_batch(personaliser, support):
    return batch_of(personaliser.pathways, [Examples(*support)])


def test_images_of_two_sizes_or_too_large_for_half_precision_are_kept_or_refused(scenario, tmp_path):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    with serve(scenario, tmp_path, keep=4) as personaliser:
        personaliser.enroll(user, inputs, labels, 0.1)
        larger = torch.nn.functional.pad(inputs[:2], (0, 1, 0, 1))
        with pytest.raises(ValueError, match="images of different sizes"):
            personaliser.update(user, larger, labels[:2])
    shelf = Shelf(4)
    loud = Examples(inputs * 1e5, labels)
    assert torch.equal(shelf.unpack(shelf.pack(loud)).inputs, loud.inputs[-4:])
    assert shelf.unpack(shelf.pack(Examples(inputs, labels))).inputs.sub(inputs[-4:]).abs().max() < 0.01


def test_users_whose_images_are_of_different_sizes_are_enrolled_together(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.personaliser.TOGETHER", 2)
    shown = dict([*people(scenario).items()][:6])
    for user in [*shown][::2]:
        inputs, labels = shown[user]
        shown[user] = torch.nn.functional.pad(inputs, (0, 2, 0, 1)), labels
    with serve(scenario, tmp_path) as personaliser:
        together = personaliser.enroll_many(shown, 0.1)
        assert [*together] == [*shown]
        answers = [personaliser.predict([user], inputs[:1]) for user, (inputs, _) in shown.items()]
        assert together == {user: personaliser.enroll(user, *each, 0.1) for user, each in shown.items()}
        for (user, (inputs, _)), answer in zip(shown.items(), answers, strict=True):
            torch.testing.assert_close(personaliser.predict([user], inputs[:1]), answer, atol=3e-3, rtol=3e-3)


def test_no_more_examples_are_kept_than_was_said(scenario, tmp_path):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    sizes = {}
    for keep in (0, 4):
        (tmp_path / str(keep)).mkdir()
        with serve(scenario, tmp_path / str(keep), keep=keep) as personaliser:
            sizes[keep] = personaliser.enroll(user, inputs, labels, 0.1).bytes
            again = personaliser.update(user, inputs[:2], labels[:2])
            assert again.labels in (2, min(keep, 4) or 2)
    assert sizes[0] + 4 * inputs[0].numel() * 2 < sizes[4] < sizes[0] + 4 * inputs[0].numel() * 2 + 300


def test_texts_are_cut_alike_whoever_else_is_asking(texts):
    backbone = texts.data.pathways.model.backbone
    long, short = " ".join(["word"] * 300), "word"
    expected = ready(backbone, [long, short])
    wrong = []

    def ask():
        for _ in range(40):
            wrong.extend([1] if not torch.equal(ready(backbone, [long, short]), expected) else [])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected.shape[1] <= backbone.max_length and not wrong


def test_texts_are_served_as_they_are(texts, tmp_path):
    population = texts.data.population
    user = population.train[0]
    words = [population.items.take([place]) for place in user.support.inputs.tolist()]
    lines = [line for each in words for line in each]
    with serve(texts, tmp_path, keep=3) as personaliser:
        given = personaliser.enroll("ann", lines, user.support.labels.tolist(), 0.1)
        assert given.labels == len(lines)
        logits = personaliser.predict(["ann", "eve"] * 2, [lines[0], lines[0], lines[1], "word"], unknown="bare")
        assert logits.shape == (4, 2) and logits.isfinite().all()
        personaliser.update("ann", ["a much longer text than those " * 2], [1])
        with pytest.raises(ValueError, match="user 'bob': "):
            personaliser.enroll("bob", [3, 4], [0, 1], 0.1)


@pytest.mark.parametrize(
    ("inputs", "labels", "said"),
    [
        (torch.zeros(2, 1, 28, 28), [0], "2 inputs but 1 labels"),
        (torch.zeros(0, 1, 28, 28), [], "no input"),
        (torch.zeros(1, 28, 28), [0], r"look like float32 \[1, 28, 28\]"),
        (torch.zeros(1, 3, 28, 28), [0], r"reads images \[N, 1, H, W\] .* not \[1, 3, 28, 28\]"),
        (torch.zeros(1, 1, 28, 28, dtype=torch.int64), [0], "uint8 or float in 0..1, not .* of torch.int64"),
        (torch.full((1, 1, 28, 28), float("nan")), [0], "NaN or infinite"),
        (torch.zeros(1, 1, 28, 28), [10], "0 to 9, got 10 to 10"),
        (torch.zeros(1, 1, 28, 28), [0.5], "integers"),
        (torch.zeros(1, 1, 28, 28), [None], "integers"),
        (torch.zeros(1, 1, 0, 28), [0], "nothing in them"),
    ],
)
def test_examples_that_make_no_sense_are_refused_and_nobody_is_enrolled(scenario, tmp_path, inputs, labels, said):
    fine = next(iter(people(scenario).values()))
    with serve(scenario, tmp_path) as personaliser:
        with pytest.raises(ValueError, match=f"user 'bob': .*{said}"):
            personaliser.enroll_many({"ann": fine, "bob": (inputs, labels)}, 0.1)
        assert personaliser.stats()["enrolled"] == 0


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_images_that_the_model_makes_nothing_finite_of_are_refused(scenario, tmp_path, size):
    inputs, labels = next(iter(people(scenario).values()))
    with serve(scenario, tmp_path) as personaliser:
        with pytest.raises((ValueError, FloatingPointError), match="user 'bob'"):
            personaliser.enroll("bob", inputs.sign() * size, labels, 0.1)
        assert personaliser.stats()["enrolled"] == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16])
def test_whole_numbers_of_every_kind_are_labels(scenario, kind):
    found = labelled(scenario.data.pathways.model.backbone, torch.zeros(2, 1, 28, 28), np.array([1, 9], kind), 10)
    assert found.labels.tolist() == [1, 9] and found.labels.dtype == torch.int64
    with pytest.raises(ValueError, match="labels must be 0 to 9, got"):
        labelled(scenario.data.pathways.model.backbone, torch.zeros(1, 1, 28, 28), np.array([np.iinfo(kind).max], kind), 10)


def test_arrays_of_images_are_as_good_as_tensors(scenario, tmp_path):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    with serve(scenario, tmp_path) as personaliser:
        first = personaliser.enroll(user, inputs, labels, 0.1), personaliser.predict([user] * 3, inputs[:3])
        again = (
            personaliser.enroll(user, inputs.numpy(), labels.numpy(), 0.1),
            personaliser.predict([user] * 3, inputs[:3].numpy()),
        )
        assert first[0] == again[0] and torch.equal(first[1], again[1])
        shades = (inputs * 255).round().to(torch.uint8)
        backwards = shades.numpy()[::-1]  # of negative strides, which torch does not know
        assert torch.equal(ready(personaliser.pathways.model.backbone, backwards), shades.flip(0).float() / 255)
        with pytest.raises(ValueError, match=r"give them as one tensor \[N, channels, H, W\]"):
            personaliser.enroll(user, [*inputs.numpy()], labels, 0.1)


def test_users_are_enrolled_and_updated_in_inference_mode_too(scenario, tmp_path):
    user, (inputs, labels) = next(iter(people(scenario).items()))
    with serve(scenario, tmp_path, keep=4) as personaliser:
        expected = personaliser.enroll(user, inputs, labels, 0.1), personaliser.predict([user] * 3, inputs[:3])
        with torch.inference_mode():
            assert personaliser.enroll(user, inputs * 1, labels * 1, 0.1) == expected[0]
            assert torch.equal(personaliser.predict([user] * 3, inputs[:3]), expected[1])
            personaliser.update(user, inputs[:5] * 1, labels[:5] * 1)
        with torch.no_grad():
            assert personaliser.enroll(user, inputs, labels, 0.1) == expected[0]


def test_questions_that_make_no_sense_are_refused(scenario, served):
    inputs, labels = next(iter(people(scenario).values()))
    for wrong, said in (
        (lambda: served.predict(["a", "b"], inputs[:1]), "2 users but 1 inputs"),
        (lambda: served.predict("ann", inputs[:3]), r"give \['ann'\]"),
        (lambda: served.predict(["ann"], inputs[:1], unknown="guess"), "choose from error, bare"),
        (lambda: served.enroll("ann", inputs, labels), "say which one"),
        (lambda: served.enroll("ann", inputs, labels, "0.1"), "the price: cost_weight must be of type"),
        (lambda: served.enroll("ann", inputs, labels, 0.5), "trained for cost weights of uniform:0:0.3, not 0.5"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


def test_settings_that_make_no_sense_are_refused(scenario, tmp_path):
    sizes = [({"megabytes": size}, "megabytes of a store must be above 0") for size in (0, -1, float("inf"), float("nan"))]
    for settings, said in (
        ({"slots": 0}, "got 0 slots"),
        ({"slots": 1.5}, "slots must be of type int, got 1.5"),
        ({"keep": -1}, "keep"),
        ({"keep": 1.5}, "keep must be of type int"),
        ({"megabytes": "5"}, "megabytes must be of type"),
        ({"precision": "int2"}, "choose from"),
        *sizes,
    ):
        with pytest.raises(ValueError, match=said):
            serve(scenario, tmp_path, **settings)
    with pytest.raises(ValueError, match="2 rounds is not served"):
        serve(scenario, tmp_path, Rules(0.1, rounds=2))
    with pytest.raises(ValueError, match="no model to serve"):
        serve(replace(scenario, look=None), tmp_path)


def test_another_initialisation_or_precision_is_another_store(scenario, tmp_path):
    with serve(scenario, tmp_path):
        pass
    with pytest.raises(ForeignStoreError, match="precision is float16 there and int8 here"):
        serve(scenario, tmp_path, precision="int8")
    look = scenario.look
    moved = replace(look.of, init=replace(look.of.init, rates=look.of.init.rates * 2))
    other = replace(scenario, look=type("Look", (), {"of": moved, "embedder": look.embedder})())
    with pytest.raises(ForeignStoreError, match="meta-initialisation is"):
        serve(other, tmp_path)


def test_a_damaged_record_is_nobodys(scenario, served):
    user = max(people(scenario), key=lambda each: served.describe(each).cost)
    inputs, _ = people(scenario)[user]
    path = served._store.path
    record = served._store.get(user)
    served.close()
    whole = path.read_bytes()
    place = whole.index(record[:64]) + 40
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    with serve(scenario, path.parent) as again, pytest.raises(DamagedRecordError, match=repr(user)):
        again.predict([user], inputs[:1])


def test_without_room_nobody_is_half_enrolled(scenario, tmp_path):
    roomy = type(scenario.data.pathways).__name__ == "LoraPathways"  # several times as many weights
    with serve(scenario, tmp_path, megabytes=4 if roomy else 1) as personaliser:
        given = personaliser.enroll_many(people(scenario), 0.1)
        user = max(given, key=lambda each: given[each].cost)
        examples, enrolled = people(scenario)[user], 0
        personaliser.forget(*given)
        with pytest.raises(StoreFullError, match="Nothing was changed"):
            for enrolled in range(500):
                personaliser.enroll(f"user {enrolled}", *examples, 0.1)
        assert personaliser.stats()["enrolled"] == enrolled > 3
        personaliser.predict([f"user {enrolled - 1}"], examples[0][:1])


# The parts.


@pytest.fixture(scope="module")
def codec(scenario):
    return lambda precision: Codec(scenario.data.pathways, scenario.look.of.init, precision)


def adapter(codec, seed):
    draw = torch.Generator().manual_seed(seed)
    gates = torch.rand(codec.pathways.num_pathways, generator=draw) < 0.5
    weights = {key: torch.randn(value.shape, generator=draw) for key, value in codec.init.weights.items()}
    return Adapter(gates, weights, 0.125, 7)


@pytest.mark.parametrize(("precision", "error"), [("float16", 3e-3), ("int8", 0.02), ("int4", 0.4), ("float32", 0.0)])
def test_records_hold_what_is_on_and_nothing_else(codec, precision, error):
    own = codec(precision)
    for seed in range(5):
        before = adapter(own, seed)
        record = own.pack(before)
        after = own.unpack(record)
        assert torch.equal(after.gates, before.gates) and (after.cost_weight, after.labels) == (0.125, 7)
        kept = {key for p in before.gates.nonzero()[:, 0].tolist() for key in own.pathways.keys[p]}
        assert after.weights.keys() == kept
        for key in kept:
            assert float((after.weights[key] - before.weights[key]).abs().max()) <= error
        each = {"float16": 2.0, "int8": 1.0625, "int4": 0.5625, "float32": 4.0}[precision]
        assert len(record) <= 16 + each * sum(before.weights[key].numel() for key in kept) + 40 * len(kept)


@pytest.mark.parametrize(("precision", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_changes_of_any_size_survive_few_bits(codec, precision, levels, size):
    own = codec(precision)
    start = own.init.weights
    if size < 1:  # smaller ones vanish beside the start itself, whatever they are written in
        start = {key: torch.zeros_like(w) for key, w in start.items()}
        own = Codec(own.pathways, replace(own.init, weights=start), precision)
    before = adapter(own, 0)
    changes = {key: w * size for key, w in before.weights.items()}
    before = replace(before, gates=torch.ones_like(before.gates), weights={key: start[key] + w for key, w in changes.items()})
    after = own.unpack(own.pack(before))
    for key, change in changes.items():
        error = float((after.weights[key] - before.weights[key]).abs().max())
        assert error <= 1.02 * float(change.abs().max()) / levels / 2 + 1e-7 * float(before.weights[key].abs().max())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_who_has_not_moved_is_kept_exactly(codec, precision):
    own = codec(precision)
    still = replace(adapter(own, 0), weights=own.init.weights)
    assert all(torch.equal(w, own.init.weights[key]) for key, w in own.unpack(own.pack(still)).weights.items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_weights_that_do_not_fit_are_refused(codec, precision, value):
    own = codec(precision)
    wrong = adapter(own, 0)
    wrong = replace(wrong, gates=torch.ones_like(wrong.gates))
    next(iter(wrong.weights.values())).view(-1)[0] = value
    if precision != "float16" and value == 1e9:
        own.pack(wrong)
        return
    with pytest.raises(FloatingPointError, match="not finite or too large"):
        own.pack(wrong)


def test_records_of_another_length_are_refused(codec):
    own = codec("float16")
    record = own.pack(adapter(own, 0))
    for wrong in (b"", record[:5], record[:-1], record + b"\0"):
        with pytest.raises(ValueError, match="a record of"):
            own.unpack(wrong)


def test_slots_give_way_in_order(codec):
    own = codec("float32")
    slots = Slots(own.pathways, own.init, 2)
    adapters = {name: adapter(own, seed) for seed, name in enumerate("abc")}
    a, b = slots.load("a", adapters["a"]), slots.load("b", adapters["b"])
    slots.touch("a")
    assert slots.load("c", adapters["c"]) == b and "b" not in slots and slots.evictions == 1
    weights, gates = slots.take(["c", "a"])
    assert torch.equal(gates, torch.stack([adapters["c"].gates, adapters["a"].gates]))
    for row, name in enumerate("ca"):
        for p in gates[row].nonzero()[:, 0].tolist():
            assert all(torch.equal(weights[key][row], adapters[name].weights[key]) for key in own.pathways.keys[p])
    slots.drop("a")
    assert not any(value[a].any() for value in slots.weights.values()) and len(slots) == 1
    assert all(value is not weights[key] for key, value in slots.weights.items() if key in weights)


@pytest.mark.parametrize("steps", [400, pytest.param(100_000, marks=pytest.mark.stress)])
def test_threads_that_enrol_predict_and_forget_never_mix_users_up(scenario, tmp_path, steps):
    """Six people share two slots. Everybody's record says who they are, so that a wrong answer shows."""
    inputs = next(iter(people(scenario).values()))[0][:1]
    head = scenario.data.pathways.num_pathways - 1
    names = [f"user {i}" for i in range(6)]
    wrong, done = [], []
    with serve(scenario, tmp_path, slots=2) as personaliser:
        gates = torch.zeros(head + 1, dtype=torch.bool)
        gates[head] = True
        zeros = {key: torch.zeros_like(value) for key, value in personaliser.init.weights.items()}
        bare = personaliser.predict(["eve"], inputs, unknown="bare")[0]

        def signed(number):
            bias = torch.zeros_like(zeros["head.bias"])
            bias[number] = 1000.0
            return personaliser._record(names[number], Adapter(gates, zeros | {"head.bias": bias}, 0.1, 1), None)

        records = {number: signed(number) for number in range(6)}

        def act(seed):
            draw = np.random.default_rng(seed)
            for _ in range(steps // 4):
                some = draw.choice(6, size=3, replace=False)
                kind = draw.random()
                if kind < 0.2:
                    personaliser._store.put({names[i]: records[i] for i in some})
                    personaliser._drop([names[i] for i in some])
                elif kind < 0.25:
                    personaliser.forget(names[some[0]])
                else:
                    answers = personaliser.predict([names[i] for i in some], inputs.repeat(3, 1, 1, 1), unknown="bare")
                    for i, answer in zip(some, answers - bare, strict=True):
                        if float(answer.abs().max()) > 1 and int(answer.argmax()) != i:
                            wrong.append((seed, i))
            done.append(seed)

        threads = [threading.Thread(target=act, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and len(done) == 4 and personaliser.stats()["evictions"] > 10

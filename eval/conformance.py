"""What every method must satisfy: ``check_method(name, world)``, for the tests of whoever registers one.

::

    def test_mine(world):  # an eval.world.World of few users, see tests/worlds.py
        reason = check_method("mine", world)

Every check raises ``AssertionError`` that names the method, what is wrong and the cure. Shapes: U users, N examples per user.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from backbones.pathways import population_logits
from eval.conformance_case import TRAIN_AND_VAL, Case, shared_state, with_other_test_users
from eval.declared import check_declared
from eval.group import Group
from eval.methods import make_method
from eval.methods.base import CannotServe, Fitted
from eval.world import World
from users.base import Examples

SHARE = 0.1
"""Of the length of its training, for which a method under test trains."""
SAME, SERVED = 1e-5, 1e-4
"""How far logits may be apart for other users in the group, and between looking up and serving."""
OTHER_WEIGHT = 0.9
"""A cost weight that makes no difference to methods without a trade-off."""
REPEATABLE = "draw all random numbers from world.generator(...); no order of sets, no clock, nothing kept between calls."
NO_TRADE = "declare trades = True, or leave cost_weight alone."
JSON_ABLE = "facts hold what JSON knows (lists, no tuples; keys are texts); everything else goes into tensors."
APART = "draw by world.generator(user id, ...), normalise within users, give padding weight 0."


def check_method(name: str, world: World, **settings: Any) -> str | None:
    """Check everything.

    Args:
        name: registered in :data:`eval.methods.METHODS`.
        world: with few users; val users stand for new ones.
        settings: hyperparameters that make the method quick.

    Returns:
        Why the method refuses the world; None: it does not, and passes.

    Raises:
        AssertionError: names the method, what is wrong and the cure.
    """
    check_declared(name)
    case = Case(name, make_method(name, **settings).shortened(SHARE), world)
    reason = case.method.refuses(world)
    if reason is not None:
        sentence = reason.endswith(".") and len(reason.split()) > 3
        case.require(sentence, f"it refuses with {reason!r}.", "say why in a sentence that ends with a full stop.")
        return reason
    before = shared_state(world)
    for check in CHECKS:
        check(case)
    after = shared_state(world)
    changed = [what for what in before if before[what] != after[what]]
    case.require(not changed, f"it changes {', '.join(changed)}.", "work on a copy (copy.deepcopy(world.model)).")
    return None


def check_learning(case: Case) -> None:
    """What is learned follows from train and val users, and from the cost weight if the method trades.

    Whatever should make no difference is changed at once; only if there is one is it asked what made it.
    """
    if not case.learns:
        return
    learned, weight = case.fitted.fingerprint(), case.weight if case.method.trades else OTHER_WEIGHT
    strangers = case.world if case.world.data.population.lazy else with_other_test_users(case.world)
    if case.fit(strangers, weight).fingerprint() == learned:
        return
    case.require(case.fit(case.world).fingerprint() == learned, "a second fit learns something else.", REPEATABLE)
    case.require(case.fit(strangers).fingerprint() == learned, "with other test users fit learns another thing.", TRAIN_AND_VAL)
    case.fail("another cost weight changes what fit learns.", NO_TRADE)


def check_fitted(case: Case) -> None:
    """What is learned is all that personalising needs, survives being written to disk, and gives the same to the bit."""
    try:
        facts = json.loads(json.dumps(case.fitted.facts))
    except TypeError as error:
        case.fail(f"the facts of Fitted are no JSON: {error}.", JSON_ABLE)
    case.require(facts == case.fitted.facts, "the facts of Fitted come back from JSON as something else.", JSON_ABLE)
    tensors = load(save({name: tensor.contiguous() for name, tensor in case.fitted.tensors.items()}))
    read, weight = Fitted(tensors, facts), case.weight if case.method.trades else OTHER_WEIGHT
    fresh = replace(case, method=replace(case.method))  # type: ignore[type-var]

    def same(how: Case, fitted: Fitted, weight: float) -> bool:
        return torch.equal(how.logits(how.predictor(case.shown, fitted, weight), case.asked), case.predicted)

    if same(fresh, read, weight):
        return
    case.require(same(case, case.fitted, case.weight), "a second personalise predicts something else.", REPEATABLE)
    cure = "put all that personalising needs into Fitted; keep nothing in the method."
    case.require(same(fresh, read, case.weight), "what was learned, written and read again, predicts another thing.", cure)
    case.fail("another cost weight changes what it predicts.", NO_TRADE)


def check_alone(case: Case) -> None:
    """A user's model does not depend on who else is in the group, on what those show, or on the order."""
    users = list(range(len(case.shown)))
    for user in users:
        _same(case, _of(case, case.shown, [user])[0], case.predicted[user], "alone than in a group", APART)
    others = _relabelled(case, case.shown, users[1:])
    if _apart(_of(case, others, users[::-1])[-1], case.predicted[0]) > SAME:
        _same(case, _of(case, case.shown, users[::-1])[-1], case.predicted[0], "in another order of users", APART)
        case.fail("a user's logits change with the labels of other users in the group.", APART)


def check_unequal(case: Case) -> None:
    """Users with one example, and users with different numbers of examples, are personalised as if alone."""
    cure = "examples of weight 0 in group.batch.weights are padding; leave them out of sums, counts, draws and statistics."
    case.logits(case.predictor(case.few(lambda user, n: torch.arange(1))), case.asked)
    unequal = case.few(lambda user, n: torch.arange(min(n, 1 + 3 * user)))
    together = _of(case, unequal, range(len(unequal)))
    for user in range(len(unequal)):
        _same(case, _of(case, unequal, [user])[0], together[user], "alone than among users with more examples", cure)


def check_nothing_shown(case: Case) -> None:
    """Who shows nothing gets the population model, or what everybody gets if nothing is personal."""
    logits = case.logits(case.predictor(case.few(lambda user, n: torch.arange(0))), case.asked)
    if case.method.scope == "nobody":
        others = _relabelled(case, case.shown, range(len(case.shown)))
        same = torch.equal(logits, case.predicted) and torch.equal(_of(case, others, range(len(others))), case.predicted)
        cure = "either take nothing from what is shown, or declare another scope."
        case.require(same, "the scope is 'nobody', but what is shown makes a difference.", cure)
        return
    present = (case.asked.batch.weights > 0)[..., None]
    expected = torch.where(present, population_logits(case.world.model, case.asked.batch.frozen), 0.0)
    case.require(
        torch.equal(logits, expected),
        "without any example it predicts something else than the population model.",
        "leave personalise() of the base class as it is, it sees to that.",
    )


def check_serving(case: Case) -> None:
    """``serve`` gives the logits that looking features up gives, less what cross-fitting adds."""
    asked = case.asked.first(min(case.asked.counts))
    try:
        with case.watched("serve"):
            served = case.together.serve(_inputs(asked))
    except CannotServe as error:
        case.require(len(str(error).split()) > 3, "serve refuses without a reason.", "say why in the CannotServe.")
        return
    offsets = [asked.offset(user) for user in range(len(asked))]
    logits = case.logits(case.together, asked)
    if offsets[0] is not None:
        logits = logits - torch.stack([offset for offset in offsets if offset is not None])
    case.require(served.shape == logits.shape, f"serve gives shape {tuple(served.shape)}.", f"return {tuple(logits.shape)}.")
    case.require(not served.requires_grad, "what serve gives carries a graph.", "serve under torch.no_grad().")
    case.require(
        _apart(served, logits) <= SERVED,
        f"serve and logits are {_apart(served, logits):.2g} apart.",
        "serve runs the whole personalised model on raw inputs and never adds group.offset; logits add it exactly once.",
    )


def check_sizes(case: Case) -> None:
    """Sizes and masks make sense."""
    users, sizes, masks = len(case.shown), case.together.sizes, case.together.masks
    case.require(len(sizes) == users, f"there are {len(sizes)} sizes for {users} users.", "give one per user.")
    for size in sizes:
        whole = all(isinstance(value, int) and value >= 0 for value in (size.trainable, size.active, size.stored))
        case.require(whole, f"{size} has something else than counts.", "give integers of at least 0.")
        case.require(
            0 <= size.shared <= size.active, f"{size} shares more than is active.", "shared counts some of the active ones."
        )
        cure = "stored counts the bytes that a server must keep for the user: at least what personalising changed."
        case.require(size.trainable <= 8 * size.stored, f"{size} stores less than a bit per trained parameter.", cure)
    if masks is not None:
        shape = (users, case.world.pathways.num_pathways)
        fine = masks.dtype == torch.bool and masks.shape == shape
        case.require(fine, f"masks are {tuple(masks.shape)} {masks.dtype}.", f"give {shape} torch.bool, or None.")
    count = case.together.adaptations
    case.require(isinstance(count, int) and count >= 0, f"adaptations is {count!r}.", "give a count.")


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_learning,
    check_fitted,
    check_alone,
    check_unequal,
    check_nothing_shown,
    check_serving,
    check_sizes,
)


def _of(case: Case, shown: Group, users: Sequence[int]) -> Tensor:
    """Logits of some users, personalised together, as wide as those of all."""
    asked = case.asked.rows(users)
    found = case.logits(case.predictor(shown.rows(users)), asked)
    return torch.nn.functional.pad(found, (0, 0, 0, case.predicted.shape[1] - found.shape[1]))


def _same(case: Case, first: Tensor, second: Tensor, when: str, cure: str) -> None:
    apart = _apart(first, second)
    case.require(apart <= SAME, f"a user's logits are {apart:.2g} apart {when}.", cure)


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def _relabelled(case: Case, shown: Group, users: Iterable[int]) -> Group:
    """A group in which some users, by position, call everything by the next class."""
    classes = case.world.model.num_classes
    if shown.parts is not None:
        return Group.joined(*(_relabelled(case, part, users) for part in shown.parts))
    examples, labels = list(shown.examples), shown.batch.labels.clone()
    for user in users:
        examples[user] = Examples(examples[user].inputs, (examples[user].labels + 1) % classes)
        labels[user] = (labels[user] + 1) % classes * (shown.batch.weights[user] > 0)
    return replace(shown, examples=tuple(examples), batch=replace(shown.batch, labels=labels))


def _inputs(asked: Group) -> Tensor:
    """What the backbone reads of users with equally many examples, ``[U, N, ...]``."""
    items, raw = asked.data.population.items, torch.cat([examples.inputs for examples in asked.examples])
    inputs = asked.data.pathways.model.backbone.prepare(raw if items is None else items.take(raw.tolist()))
    return inputs.unflatten(0, (len(asked), -1))

"""Unlearning: a sparse patch learned on those who stay hides those who leave, and comes off again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from coins import CONFIG, coins, learned, part_of

from backbones.artefacts import ArtefactError, load_artefact
from meta import train, unlearn
from meta.inner import MetaInit, adapt, adapted
from meta.learned import TAUGHT
from meta.store import KIND, load_init
from meta.unlearning import Patch, Unlearning, patchable, sensitivity, unlearned
from users.batch import Prepared
from users.digits import digits_population

HOW = Unlearning(share=0.5, density=0.25, fresh=0.0, steps=5, users=4, rate=0.1)


@pytest.fixture(scope="module")
def world():
    return coins()


@pytest.fixture(scope="module")
def knowing(world):
    """Of the first sixteen users."""
    return learned(world, range(16), 0)


def same(first: MetaInit, second: MetaInit) -> bool:
    return all(torch.equal(first.tensors()[name], value) for name, value in second.tensors().items())


def test_a_patch_changes_a_share_of_the_most_sensitive_pathways_and_nothing_else(world, knowing):
    before = {name: value.clone() for name, value in knowing.tensors().items()}
    patch = unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, HOW)
    after = patch.added_to(knowing)
    ranked = sensitivity(world.pathways, knowing, part_of(world, range(4, 16))[0]).argsort(descending=True)
    chosen = {key for p in ranked[:2].tolist() for key in world.pathways.keys[p]}  # half of three pathways, rounded up
    for key, old in knowing.weights.items():
        changed = (after.weights[key] != old).flatten()
        allowed = torch.zeros(len(changed), dtype=torch.bool)
        if key in chosen:
            allowed[patch.places[key]] = True
            assert allowed.sum() == -(-len(allowed) // 4)
        assert changed[allowed].float().mean() > 0.9 if allowed.any() else True
        assert not changed[~allowed].any()
    assert torch.equal(after.rates, knowing.rates)
    assert all(torch.equal(knowing.tensors()[name], value) for name, value in before.items()), "the start is left as it was"


def test_sensitivity_is_the_mean_change_of_a_weight_when_users_adapt(world, knowing):
    support = part_of(world, [3, 5])[0]
    on = torch.ones(1, world.pathways.num_pathways, dtype=torch.bool)
    expected = torch.zeros(world.pathways.num_pathways)
    for user in (0, 1):
        weights = adapt(world.pathways, knowing, support.rows(torch.tensor([user])), on)
        for p in range(world.pathways.num_pathways):
            moved = torch.cat([(weights[key][0] - knowing.weights[key]).flatten() for key in world.pathways.keys[p]])
            expected[p] += moved.abs().mean() / 2
    torch.testing.assert_close(sensitivity(world.pathways, knowing, support), expected)
    still = replace(knowing, rates=knowing.rates * torch.tensor([0.0, 1.0, 0.0]))
    where = patchable(world.pathways, still, support, replace(HOW, share=0.1, density=1.0))
    assert {*where} == {*world.pathways.keys[1]}


@pytest.mark.parametrize("taught", [False, True])
def test_what_is_patched_first_goes_to_a_fresh_start(world, knowing, taught):
    how = replace(HOW, density=1.0, fresh=1.0, steps=1, rate=1e-9, public_steps=int(taught))
    towards = world.pathways.start(7) if taught else None
    after = unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, how, towards).added_to(knowing)
    new = towards or world.pathways.start(how.seed + 1)
    patched = {*patchable(world.pathways, knowing, part_of(world, range(4, 16))[0], how)}
    for key, weight in after.weights.items():
        torch.testing.assert_close(weight, new[key] if key in patched else knowing.weights[key], atol=1e-6, rtol=0)


def test_a_patch_survives_being_saved(world, knowing):
    patch = unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, HOW)
    assert same(Patch.from_tensors(patch.tensors()).added_to(knowing), patch.added_to(knowing))


def test_those_who_leave_are_hidden_and_those_who_stay_are_served(world, knowing):
    """A patch that was learned on everybody does not hide them."""
    leave, stay = range(4), range(4, 16)
    how = Unlearning(fresh=0.0, steps=100, users=8, rate=0.05)

    def loss(init, users):
        support, query = part_of(world, users)
        on = torch.ones(len(support), world.pathways.num_pathways, dtype=torch.bool)
        return float(adapted(world.pathways, init, support, query, on)[1].mean())

    after, useless = (
        unlearned(world.pathways, knowing, *part_of(world, users), CONFIG, how).added_to(knowing) for users in (stay, range(16))
    )
    assert loss(knowing, leave) < loss(knowing, range(100, 200)) - 0.2, "it does know them"
    assert loss(after, leave) > loss(knowing, leave) + 0.1 and loss(after, leave) > loss(useless, leave) + 0.1
    assert loss(after, stay) < loss(knowing, stay) + 0.05


def test_nobody_who_leaves_is_looked_at(world, knowing, monkeypatch):
    asked, seen = set(), type(world)._seen
    monkeypatch.setattr(type(world), "_seen", lambda self, split, role, n: (asked.add(n), seen(self, split, role, n))[1])
    unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, HOW)
    assert asked and asked <= {*range(4, 16)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0},
        {"share": 1.1},
        {"density": 0},
        {"steps": 0},
        {"users": 0},
        {"rate": 0},
        {"fresh": -0.1},
        {"fresh": 1.1},
        {"public_steps": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Unlearning(**wrong)


# The command

SMALL = [part for pair in ("train_users:12", "val_users:3", "test_users:3", "pretrain_epochs:1") for part in ("-K", pair)]
SMALL += ["--placement", "side", "--rank", "2", "--num-threads", "1"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    train.main([*SMALL, "--steps", "3", "--out", str(folder)])
    return next(folder.glob("meta-*.json"))


def test_the_command_writes_a_start_for_the_population_without_those_who_left(start, tmp_path, capsys):
    before = [path.read_bytes() for path in sorted(start.parent.glob("meta-*"))]
    capsys.readouterr()
    flags = ["--steps", "4", "--public-steps", "2", "--out", str(tmp_path), "--forget"]
    unlearn.main(["--init", str(start), *SMALL, *flags, "train-3", "train-7"])
    printed = capsys.readouterr().out
    assert "before: accuracy of 3 val users" in printed and "after: accuracy of 3 val users" in printed
    assert "without 2 users" in printed
    new = next(tmp_path.glob("unlearned-*.json")).with_suffix("")
    said = load_artefact(new, KIND)[1]
    assert said["forgotten"] == 2 and not any("train-3" in path.read_text() for path in tmp_path.glob("*.json"))
    assert [path.read_bytes() for path in sorted(start.parent.glob("meta-*"))] == before, "to undo, go back to it"
    old = load_artefact(start.with_suffix(""), KIND)[1]
    assert old["train_users"] not in new.with_suffix(".json").read_text()
    load_init(new, {"train_users": "of those who stay", "model": old["model"]})  # as they are read without the others
    with pytest.raises(ArtefactError, match="another population model"):
        load_init(new, {"model": "other"})
    patch = Patch.from_tensors(load_artefact(next(tmp_path.glob("patch-*.json")).with_suffix(""), unlearn.KIND)[0])
    again = patch.added_to(load_init(start.with_suffix(""), {}))
    assert same(again, load_init(new, {}))


def test_val_users_teach_once_where_patches_begin(start, tmp_path, capsys):
    flags = ["--init", str(start), *SMALL, "--steps", "1", "--rate", "1e-9", "--public-steps", "5", "--out", str(tmp_path)]
    unlearn.main([*flags, "--forget", "train-3"])
    (path,) = (one for one in start.parent.glob("public-*.json") if load_artefact(one.with_suffix(""), TAUGHT)[1]["steps"] == 5)
    assert load_artefact(start.with_suffix(""), KIND)[1]["train_users"] not in path.read_text()
    assert "3 val users, who are public, taught" in capsys.readouterr().out
    public = MetaInit.from_tensors(load_artefact(path.with_suffix(""), TAUGHT)[0])
    (new,) = tmp_path.glob("unlearned-*.json")
    assert len(load_artefact(new.with_suffix(""), KIND)[1][unlearn.TAUGHT_BY]) >= 16
    for key, weight in load_init(new.with_suffix(""), {}).weights.items():
        torch.testing.assert_close(weight, public.weights[key], atol=1e-6, rtol=0)
    made = path.stat().st_mtime_ns
    unlearn.main([*flags, "--forget", "train-7"])
    assert path.stat().st_mtime_ns == made and len([*tmp_path.glob("unlearned-*.json")]) == 2
    known = len([*start.parent.glob("public-*.json")])
    capsys.readouterr()
    unlearn.main([*flags, "--public-steps", "0", "--forget", "train-7"])
    assert len([*start.parent.glob("public-*.json")]) == known and len([*tmp_path.glob("unlearned-*.json")]) == 3
    assert "taught" not in capsys.readouterr().out and not [*tmp_path.glob("public-*")]


def test_nobody_who_leaves_teaches_as_a_val_user(world, knowing, tmp_path):
    leaver = world.population.train[0]
    twin = replace(world.population, val=(*world.population.val, replace(leaver, user_id="twin")))
    with pytest.raises(ValueError, match=f"val user 'twin' has exactly the examples of '{leaver.user_id}', who leaves"):
        unlearn.forgotten(Prepared(world.pathways, twin), knowing, {}, [leaver.user_id], replace(HOW, fresh=1.0), tmp_path)


def test_a_patch_that_begins_where_val_users_lead_needs_their_weights(world, knowing):
    with pytest.raises(ValueError, match="give their weights"):
        unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, replace(HOW, fresh=1.0))


@pytest.mark.parametrize(
    ("who", "message"),
    [
        (["trian-3"], "'trian-3' is no train user of 'digits'; did you mean 'train-3'"),
        (["val-0"], "'val-0' is no train user"),
        (["?"], "train users alone"),
        ([f"train-{n}" for n in range(11)], "1 of 12 train users would stay"),
    ],
)
def test_who_cannot_leave_is_named(start, who, message):
    with pytest.raises(SystemExit, match=message):
        unlearn.main(["--init", str(start), *SMALL, "--forget", *who])


def test_a_private_start_needs_no_patch(world, knowing, tmp_path):
    with pytest.raises(ArtefactError, match="would end that guarantee"):
        unlearn.forgotten(world, knowing, {"accountant": {}}, ["train0"], HOW, tmp_path)


def test_nobody_leaves_a_simulation(world):
    people = Prepared(world.pathways, digits_population(0, train_users=6000, val_users=3, test_users=3))
    with pytest.raises(ValueError, match="simulated when they are asked for"):
        unlearn.staying(people, ["train-3"])


@pytest.mark.parametrize("how", ["neutral", "random_start"])
def test_what_was_never_learned_is_not_patched(world, knowing, tmp_path, how):
    with pytest.raises(ArtefactError, match="never learned"):
        unlearn.forgotten(world, knowing, {how: True}, ["train0"], HOW, tmp_path)


def test_patches_are_the_same_for_the_same_seed(world, knowing):
    first, again = (unlearned(world.pathways, knowing, *part_of(world, range(4, 16)), CONFIG, HOW) for _ in range(2))
    assert all(np.array_equal(first.values[key], again.values[key]) for key in first.values)

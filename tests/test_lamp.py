import json
import random

import pytest
import torch

from users import population_factory
from users.base import ROLES, SPLITS
from users.lamp import lamp
from users.lamp_files import RELATED

TAGS = ("comedy", "drama", "horror")
FILE_OF = {"train": "train", "val": "dev", "test": "test"}
SIZES = {"train": 12, "val": 6, "test": 4}


def movies(name, draw):
    profile = [{"id": f"{name}-{k}", "description": f"film {name} {k}", "tag": TAGS[k % 3]} for k in range(9)]
    asked = f"Which tag does this movie relate to? tags: [comedy, drama, horror] description: query of {name}, description: odd"
    return asked, profile, draw.choice(TAGS)


def news(name, draw):
    profile = [{"id": f"{name}-{k}", "title": "T", "text": f"film {name} {k}", "category": TAGS[k % 3]} for k in range(9)]
    return f"Which category does this relate to? article: query of {name}", profile, draw.choice(TAGS)


def reviews(name, draw):
    profile = [{"id": f"{name}-{k}", "text": f"film {name} {k}", "score": str(1 + k % 5)} for k in range(9)]
    return f"What is the score of the following review? review: query of {name} review: 5", profile, draw.choice("12345")


def papers(name, draw):
    profile = [{"id": f"{name}-{k}", "title": f"film {name} {k}", "abstract": "A"} for k in range(9)]
    gold = draw.choice("12")
    first, second = (f'query of {name} {"cited" if gold == k else "not"} "quoted"' for k in "12")
    asked = f'For the paper with the title "T", which reference is related? Just [1] or [2]. [1]: "{first}" [2]: "{second}"'
    return asked, profile, f"[{gold}]"


MAKERS = {"LaMP-1": papers, "LaMP-2": movies, "LaMP-3": reviews}


def dataset(folder, task="LaMP-2", sizes=SIZES, maker=None, change=None):
    """Files in the benchmark's layout. ``change(split, questions, golds)`` may spoil them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, count in sizes.items():
        questions, golds = [], []
        for number in range(count):
            name = f"{split}{number}"
            asked, profile, gold = (maker or MAKERS[task])(name, draw)
            questions.append({"id": name, "input": asked, "profile": profile})
            golds.append({"id": name, "output": gold})
        if change:
            change(split, questions, golds)
        (folder / f"{FILE_OF[split]}_questions.json").write_text(json.dumps(questions))
        (folder / f"{FILE_OF[split]}_outputs.json").write_text(json.dumps({"task": task.replace("-", "_"), "golds": golds}))
    return folder


def rows(population, examples):
    texts = population.items.take(examples.inputs.tolist())
    return [(text, population.class_names[label]) for text, label in zip(texts, examples.labels.tolist(), strict=True)]


@pytest.fixture
def root(tmp_path):
    dataset(tmp_path / "LaMP_2")
    return tmp_path


def test_it_is_registered(root):
    assert population_factory("lamp") is lamp
    assert lamp(str(root)).name == "lamp-2"


@pytest.mark.parametrize("folder", ["LaMP_2", "LaMP-2", "."])
def test_folders_it_is_found_in(tmp_path, folder):
    dataset(tmp_path / folder)
    assert lamp(tmp_path).fingerprint() == lamp(tmp_path, "LaMP_2").fingerprint()


@pytest.mark.parametrize(("task", "maker"), [("LaMP-2", movies), ("LaMP-2", news), ("LaMP-3", reviews)])
def test_profiles_are_support_and_validation_and_the_question_is_the_query(tmp_path, task, maker):
    golds = {}
    dataset(tmp_path, task, maker=maker, change=lambda s, q, g: golds.update((e["id"], e["output"]) for e in g))
    population = lamp(tmp_path, task)
    assert population.class_names == (("1", "2", "3", "4", "5") if task == "LaMP-3" else TAGS)
    for user in population.users:
        name = user.user_id
        ((text, label),) = rows(population, user.query)
        assert text.startswith(f"query of {name}") and label == golds[name]
        assert [len(user.support), len(user.validation)] == [4, 5]
        found = rows(population, user.support) + rows(population, user.validation)
        draw = random.Random(0)
        entries = maker(name, draw)[1]
        text_key, label_key = (
            ("text", "score") if task == "LaMP-3" else ("text", "category") if maker is news else ("description", "tag")
        )
        assert sorted(found) == sorted((e[text_key], e[label_key]) for e in entries)


def test_the_query_is_everything_after_the_first_marker(root):
    texts = [rows(lamp(root), user.query)[0][0] for user in lamp(root).test]
    assert all(text.endswith(", description: odd") for text in texts)


@pytest.mark.parametrize("task", MAKERS)
def test_splits_are_those_of_the_files_and_nobody_in_them_fits(tmp_path, task):
    population = lamp(dataset(tmp_path, task), task, fit_share=0.4)
    assert [len(population.val), len(population.test)] == [6, 4] and 0 < len(population.train) < 12
    for split in SPLITS:
        assert all(user.user_id.startswith(split) for user in getattr(population, split))
    fitted = {
        text.removeprefix("query of ").removeprefix("film ").split()[0].strip(",")
        for text, _ in rows(population, population.fitting)
    }
    assert fitted == {f"train{n}" for n in range(12)} - {user.user_id for user in population.train}
    assert population.fitting.inputs.dtype == population.fitting.labels.dtype == torch.int64


def test_pairs_of_the_citation_task(tmp_path):
    population = lamp(dataset(tmp_path, "LaMP-1"), "LaMP-1", fit_share=0.4)
    assert population.class_names == RELATED
    others = {}
    for split in SPLITS:
        for user in getattr(population, split):
            known = rows(population, user.support) + rows(population, user.validation)
            own = [text.split()[1] for text, label in known if label == RELATED[1]]
            others[user.user_id] = [text.split()[1] for text, label in known if label == RELATED[0]]
            assert own == [user.user_id] * 9 and len(set(known)) == 18
            assert user.user_id not in others[user.user_id] and len(others[user.user_id]) == 9
            assert all(name.startswith(split) for name in others[user.user_id])
            assert len(user.query) == 2
            for text, label in rows(population, user.query):
                assert text == f'query of {user.user_id} {"cited" if label == RELATED[1] else "not"} "quoted"'
    assert len(set(map(str, others.values()))) > 5


def test_nobody_to_be_told_apart_from(tmp_path):
    with pytest.raises(ValueError, match="no papers of other test authors to tell those of user 'test0' from; give more users"):
        lamp(dataset(tmp_path, "LaMP-1", SIZES | {"test": 1}), "LaMP-1", fit_share=0.4)


def test_without_test_answers_dev_is_halved(root):
    (root / "LaMP_2" / "test_outputs.json").unlink()
    population = lamp(root)
    assert {u.user_id for u in population.val + population.test} == {f"val{n}" for n in range(6)}
    assert any("no test_outputs.json" in note for note in population.notes)
    assert not any("test_outputs" in note for note in lamp(dataset(root / "other")).notes)


def test_the_halves_of_dev_are_of_about_the_same_size(tmp_path):
    population = lamp(dataset(tmp_path, sizes={"train": 8, "val": 60}))
    assert len(population.val) + len(population.test) == 60 and 18 <= len(population.val) <= 42


@pytest.mark.parametrize("seed", range(6))
def test_halves_and_fitting_have_somebody_and_keep_twins_together(tmp_path, seed):
    def twins(split, questions, golds):
        for first, second in zip(questions[::2], questions[1::2], strict=True):
            second["profile"] = first["profile"][::-1]

    dataset(tmp_path, sizes={"train": 4, "val": 4}, change=twins)
    population = lamp(tmp_path, seed=seed)
    where = {user.user_id: split for split in SPLITS for user in getattr(population, split)}
    for name in ("train", "val"):
        for number in (0, 2):
            assert where.get(f"{name}{number}") == where.get(f"{name}{number + 1}")
    assert [len(getattr(population, split)) for split in SPLITS] == [2, 2, 2] and len(population.fitting) == 20


def test_people_whose_profiles_number_their_entries_alike_are_not_one(tmp_path):
    def counted(split, questions, golds):
        for question in questions:
            for number, entry in enumerate(question["profile"]):
                entry["id"] = number

    population = lamp(dataset(tmp_path, change=counted))
    assert [len(getattr(population, split)) for split in ("val", "test")] == [6, 4] and len(population.train) > 2


def test_a_text_with_two_labels_is_in_no_role(tmp_path):
    def twice(split, questions, golds):
        for question in questions:
            first = question["profile"][0]
            other = next(tag for tag in TAGS if tag != first["tag"])
            question["profile"] += [{**first, "id": "again", "tag": other}, {"id": "empty", "description": " ", "tag": other}]
            question["profile"].append({"id": "blank", "description": "", "tag": first["tag"]})

    population = lamp(dataset(tmp_path, change=twice))
    for user in population.users:
        known, rest = ({text for text, _ in rows(population, part)} for part in (user.support, user.validation))
        assert not known & rest and len(known) + len(rest) == 8
    assert "22 texts left out (their profile gives them two labels)" in population.notes


def test_one_dev_user_cannot_be_halved(tmp_path):
    with pytest.raises(ValueError, match="1 users with enough examples are too few: val, test"):
        lamp(dataset(tmp_path, sizes={"train": 6, "val": 1}))


def test_the_order_of_files_and_profiles_counts_nothing(root, tmp_path):
    def shuffled(split, questions, golds):
        for each in (questions, golds, *(q["profile"] for q in questions)):
            random.Random(3).shuffle(each)

    for task in MAKERS:
        first = lamp(dataset(tmp_path / "a" / task, task), task, max_users=15, fit_share=0.4)
        second = lamp(dataset(tmp_path / "b" / task, task, change=shuffled), task, max_users=15, fit_share=0.4)
        assert first.fingerprint() == second.fingerprint() and len(first.users) < 15
        assert sorted(rows(first, first.fitting)) == sorted(rows(second, second.fitting))
        seeds = [lamp(tmp_path / "a" / task, task, seed, fit_share=0.5).fingerprint() for seed in (0, 1)]
        assert seeds[0] != seeds[1]


def test_max_users_and_support(root):
    assert len(lamp(root, max_users=None).users) == len(lamp(root).users) == len(lamp(root, max_users=22).users)
    population = lamp(root, max_users=6, support=2)
    assert len(population.users) <= 5 and all(len(getattr(population, split)) for split in SPLITS)
    assert "6 of 22 users were chosen by hash (max_users)" in population.notes
    assert {(len(user.support), len(user.validation)) for user in population.users} == {(2, 7)}


def test_small_profiles_are_left_out_and_repetitions_and_the_query_do_not_count(tmp_path):
    def change(split, questions, golds):
        if split == "train":
            questions[0]["profile"] = questions[0]["profile"][:1] * 3
            questions[1]["profile"] = [{"id": 1, "description": d, "tag": "drama"} for d in (" ", "", "a film")]
            questions[2]["profile"][:8] = [{"id": 1, "description": "query of train2, description: odd", "tag": "drama"}] * 8
            questions[3]["input"] = "tags: [] description: "

    population = lamp(dataset(tmp_path, change=change))
    note = "4 users left out (fewer than 2 profile entries, or an empty question): train0, train1, train2, train3"
    assert note in population.notes


def spoil(key, value=None):
    def change(split, questions, golds):
        if split == "train":
            if value is None:
                del questions[1][key]
            else:
                questions[1][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("input"), r"question 'train1': an entry has no 'input' \(it has id, profile\)"),
        (spoil("profile"), "question 'train1': an entry has no 'profile'"),
        (spoil("id"), "number 2 of the questions: an entry has no 'id'"),
        (spoil("profile", {}), "question 'train1': 'input' should be a string and 'profile' a list"),
        (spoil("profile", [{"id": 1, "tag": "drama"}]), "'train1', profile: an entry has no 'description'"),
        (spoil("profile", ["drama"]), r"'train1', profile: an entry has no 'description' \(it is str\)"),
        (spoil("profile", [{"id": 1, "description": "a", "tag": ""}]), "'train1', profile: a label is empty"),
        (
            spoil("input", "What?"),
            "'train1': the input should contain ' description: ' or ' article: '; is this a file of LaMP-2",
        ),
        (lambda s, q, g: q.clear(), "should hold a list of questions, and at least one"),
        (lambda s, q, g: g.pop(), "question 'train11' has no answer in"),
        (lambda s, q, g: q.pop(), "answers a question 'train11' that"),
        (lambda s, q, g: q.append(q[0]), "question 'train0' is there twice"),
        (lambda s, q, g: g[0].pop("output"), "golds: an entry has no 'output'"),
        (lambda s, q, g: [e.update(id=e["id"][-1]) for e in (*q[:10], *g[:10])], "has a question '0' that another split has"),
        (lambda s, q, g: s == "val" and g[0].update(output="drema"), r"'val0' of val has the label 'drema'.*mean 'drama'\?"),
        (
            lambda s, q, g: [e.update(output="drama") for e in g] and [p.update(tag="drama") for e in q for p in e["profile"]],
            "every",
        ),
    ],
)
def test_broken_files(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        lamp(dataset(tmp_path, change=change))


def test_a_label_that_only_personalised_train_users_have(root):
    def change(split, questions, golds):
        if split == "train":
            next(g for g in golds if g["id"] == someone)["output"] = "western"

    someone = lamp(root).train[0].user_id
    with pytest.raises(ValueError, match=rf"no user who fits .* 'western'; it occurs for 1 user \({someone}\)"):
        lamp(dataset(root / "LaMP_2", change=change).parent)


def test_files_that_are_no_json(root):
    path = root / "LaMP_2" / "dev_outputs.json"
    path.write_text('{"task": "LaMP_2",\n "golds": [}')
    with pytest.raises(ValueError, match=r"dev_outputs.json is no JSON: .* in line 2, column \d+; restore it"):
        lamp(root)
    path.write_bytes(b'{"task": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"dev_outputs.json is not UTF-8 \(.* at byte 14\)"):
        lamp(root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"does not hold LaMP_2; missing: .*dev_outputs.json"):
        lamp(root)


def test_answers_without_questions_and_files_of_another_task(root):
    with pytest.raises(ValueError, match="is of task 'LaMP_2', not LaMP-3; give the folder of LaMP-3"):
        lamp(root / "LaMP_2", "LaMP-3")
    (root / "LaMP_2" / "test_questions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*test_questions.json"):
        lamp(root)


def test_scores_and_references_that_are_none(tmp_path):
    def score(value):
        return lambda s, q, g: q[0]["profile"][0].update(score=value)

    for fine in (5, "5", 5.0):
        lamp(dataset(tmp_path / "a", "LaMP-3", change=score(fine)), "LaMP-3")
    with pytest.raises(ValueError, match="question 'train0', profile: a score should be 1 to 5, not 6"):
        lamp(dataset(tmp_path / "b", "LaMP-3", change=score(6)), "LaMP-3")
    with pytest.raises(ValueError, match=r"'train0': the input should end in .* and the answer be \[1\] or \[2\], not '3'"):
        lamp(dataset(tmp_path / "c", "LaMP-1", change=lambda s, q, g: g[0].update(output="3")), "LaMP-1")


@pytest.mark.parametrize("wrong", [{"support": 0}, {"fit_share": 0}, {"fit_share": 1.0}, {"max_users": 3}])
def test_impossible_arguments(root, wrong):
    with pytest.raises(ValueError, match="support must be at least 1"):
        lamp(root, **wrong)


def test_unknown_tasks(root):
    with pytest.raises(ValueError, match=r"unknown task 'LaMP-4' of LaMP. Did you mean 'LaMP-\d'\?"):
        lamp(root, "LaMP-4")


def test_every_role_is_there(root):
    assert all(len(getattr(user, role)) for user in lamp(root).users for role in ROLES)

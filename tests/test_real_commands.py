"""The command lines on miniatures of the real populations and on a table of one's own, with a tiny text encoder."""

import csv
import json
import random
import re
import subprocess
import sys

import miniatures
import numpy as np
import pytest

from agents import train_ppo
from agents.run import RunConfig
from eval import ablation
from meta import train as meta_train

QUIET = ["--no-progress", "--num-threads", "1"]
TINY = ["-P", "total_timesteps:16", "-P", "n_envs:4", "-P", "n_steps:2", "-P", "batch_size:8", "-P", "n_epochs:1"]
LITTLE = ["--env-kwargs", "meta_steps:2", "--env-kwargs", "meta_users:4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Miniatures of what is needed here, and the encoder."""
    root = tmp_path_factory.mktemp("data")
    for write in (miniatures.unipen, miniatures.omniglot, miniatures.popquorn, miniatures.jester):
        write(root)
    miniatures.text_encoder(root / "encoder")
    return root


@pytest.fixture(scope="module")
def encoder(root):
    return ["--backbone", "bert", "--source", str(root / "encoder")]


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    """A table of 24 users who like what is of a colour, or do not."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("table") / "ratings.csv"
    rows = []
    for user in range(24):
        for number in range(10):
            kind, thing, deed = (draw.choice(words) for words in (miniatures.KINDS, miniatures.THINGS, miniatures.DEEDS))
            liked = (kind in miniatures.KINDS[:5]) == (user % 2 == 0)
            text = f"the {kind} {thing} {deed} and {miniatures.WORDS[number]}"
            rows.append({"user_id": f"u{user}", "text": text, "label": "good" if liked else "bad"})
    write(path, rows)
    return path


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def trained(folder, *arguments):
    train_ppo.main([*map(str, arguments), *LITTLE, *TINY, *QUIET, "-f", str(folder)])
    return json.loads((folder / "summary.json").read_text())


def refused(folder, *arguments, main=None):
    """The one line with which a command line exits; what it raises otherwise is a defect."""
    flags = ["-f", str(folder), *QUIET] if main is None else ["--out", str(folder), "--num-threads", "1"]
    with pytest.raises(SystemExit) as exit_:
        (main or train_ppo.main)([*map(str, arguments), *flags])
    message = str(exit_.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert not (folder / "summary.json").exists()
    return message


# A table of one's own.


@pytest.fixture(scope="module")
def run(tmp_path_factory, ratings, encoder):
    """A run on the table."""
    folder = tmp_path_factory.mktemp("runs") / "table"
    trained(folder, "--users", "table", "--data", ratings, *encoder)
    return folder


def test_a_table_and_a_text_encoder_train_to_a_summary(run, ratings):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["env"] == "dsa/Personal-v0"
    methods = summary["test"]["methods"]
    assert {"ppo", "all_on", "all_off", "best_static", "shuffled"} <= {*methods}
    assert all(0 <= row["accuracy"] <= 1 for row in methods.values())
    assert [*summary["test"]["simple"]] == ["intercept"]
    assert summary["seconds_per_user"] > 0
    with (run / "users.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["test"]["n_users"] > 1
    assert all(re.fullmatch("[01]{5}", row["ppo_mask"]) for row in rows)  # attention and MLP of two layers, and the head
    config = RunConfig.load(run)
    assert config.env_kwargs["data"] == str(ratings) and config.env_kwargs["users"] == "table"
    assert config.warm_start  # what dsa/Personal-v0 says in the YAML file


def test_the_populations_name_comes_with_an_environment_that_is_named(tmp_path, root, encoder):
    flags = ["--data-root", root, *encoder, *LITTLE, *TINY, *QUIET]
    given = train_ppo.parse([*map(str, ["--env", "dsa/JesterBert-v0", "--max-users", "7", *flags])])
    config = train_ppo.read_settings(given)
    assert config.env_kwargs == {
        "backbone": "bert",
        "source": str(root / "encoder"),
        "data_root": str(root),
        "max_users": 7,
        "meta_steps": 2,
        "meta_users": 4,
    }
    assert config.total_timesteps == 16 and config.ppo["n_steps"] == 2
    assert len(config.scenario().users("train")) == 7


# Mistakes.


def test_a_table_needs_data(tmp_path, encoder):
    assert "population 'table' needs `data`; pass --data" in refused(tmp_path / "run", "--users", "table", *encoder)


def test_a_table_that_is_not_there_is_named(tmp_path, encoder):
    path = tmp_path / "nowhere.csv"
    message = refused(tmp_path / "run", "--users", "table", "--data", path, *encoder)
    assert str(path) in message and "--data" in message


@pytest.mark.parametrize("column", ["user_id", "label", "text"])
def test_a_column_that_is_missing_is_named(tmp_path, ratings, encoder, column):
    path = tmp_path / "renamed.csv"
    path.write_text(ratings.read_text().replace(column, f"{column}s_", 1))
    message = refused(tmp_path / "run", "--users", "table", "--data", path, *encoder)
    assert str(path) in message and f"'{column}'" in message and f"Did you mean '{column}s_'" in message


def test_an_unknown_population_is_answered_with_a_suggestion(tmp_path):
    assert "unknown population 'tabel'. Did you mean 'table'" in refused(tmp_path / "run", "--users", "tabel")


def test_an_unknown_backbone_is_answered_with_a_suggestion(tmp_path):
    message = refused(tmp_path / "run", "--users", "digits", "--backbone", "resnet-smal")
    assert "unknown backbone 'resnet-smal'. Did you mean 'resnet-small'" in message


def test_texts_are_nothing_for_the_small_resnet(tmp_path, root):
    message = refused(tmp_path / "run", "--users", "jester", "--backbone", "resnet-small", "--data-root", root)
    assert "resnet-small learns from images" in message and "'jester'" in message


@pytest.mark.parametrize("main", [None, meta_train.main], ids=["train_ppo", "meta"])
@pytest.mark.parametrize("kind", ["texts for images", "images for texts"])
def test_what_a_backbone_cannot_read_is_told_on_one_line(tmp_path, root, encoder, kind, main):
    more = "-K" if main else "--env-kwargs"
    image = ["--users", "jester", "--backbone", "resnet18", more, "weights:null", "--data-root", root]
    text = ["--users", "digits", *encoder]
    assert "reads" in refused(tmp_path / "run", *(image if kind == "texts for images" else text), main=main)


@pytest.mark.parametrize("users", ["jester", "popquorn", "unipen"])
def test_files_need_a_data_root(tmp_path, monkeypatch, encoder, users):
    monkeypatch.delenv("DSA_DATA_ROOT", raising=False)
    assert "pass --data-root (data_root=...), or set DSA_DATA_ROOT" in refused(tmp_path / "run", "--users", users, *encoder)
    missing = refused(tmp_path / "run2", "--users", users, *encoder, "--data-root", tmp_path / "empty")
    assert str(tmp_path / "empty") in missing and "missing" in missing


def test_an_encoder_that_is_nowhere_is_named(tmp_path, root):
    flags = ["--users", "jester", "--data-root", root, "--backbone", "bert", "--source", tmp_path / "none"]
    assert str(tmp_path / "none") in refused(tmp_path / "run", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--users", "digits", "--shots", "3"], "has no argument 'shots'"),
        (["--users", "digits", "--env-kwargs", "two_shift:1"], "Did you mean 'two_shifts'"),
        (["--env", "dsa/Planted-v0", "--data-root", "x"], "has no argument 'data_root'"),
    ],
)
def test_an_argument_that_neither_takes_is_refused(tmp_path, flags, words):
    assert words in refused(tmp_path / "run", *flags)


def test_a_mistake_ends_the_process_with_one_line_and_code_1(tmp_path):
    command = [sys.executable, "-m", "agents.train_ppo", "--users", "table", "-f", str(tmp_path / "run"), *QUIET]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: population 'table' needs `data`")
    assert "Traceback" not in done.stderr


# Meta-training.


def test_readers_are_meta_trained_once(tmp_path, root, encoder, capsys):
    flags = ["--users", "jester", "--data-root", root, *encoder, "--steps", "2", "--users-per-step", "4", "--rank", "2"]
    flags += ["-K", "max_users:6", "--placement", "side", "--resample", "--neutral", "--keep", "best"]
    for _ in range(2):
        meta_train.main([*map(str, flags), "--out", str(tmp_path), "--num-threads", "1"])
        told = capsys.readouterr().out
        assert "accuracy of 5 val users" in told
        assert all(name in told for name in ("all_off", "all_on", "random masks"))
    assert len([*tmp_path.glob("meta-*.json")]) == len([*tmp_path.glob("classifier-*.json")]) == 1
    assert not [*tmp_path.glob("*-unfinished")]
    assert [*(tmp_path / "tensorboard").rglob("events.out.tfevents.*")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--users", "jestr"], "unknown population 'jestr'. Did you mean 'jester'"),
        (["--users", "table"], "population 'table' needs `data`"),
        (["--users", "jester", "-K", "max_user:6"], "Did you mean 'max_users'"),
        (["-K", "max_users=6"], "name:value"),
        (["--algorithm", "mamll"], "Did you mean 'maml'"),
    ],
)
def test_mistakes_before_meta_training_are_told_on_one_line(tmp_path, flags, words):
    assert words in refused(tmp_path, *flags, main=meta_train.main)


# What each part of the embedding adds.


def test_every_part_is_left_out_once_and_alone_once():
    variants = ablation.variants()
    assert len(set(variants.values())) == len(variants) == 2 + len(ablation.DEFAULT) + len(ablation.PARTS)
    assert all(set(ablation.DEFAULT) - set(variants[f"default without {part}"]) == {part} for part in ablation.DEFAULT)
    assert all(variants[f"{part} alone"] == (part,) for part in ablation.PARTS)


def test_the_ablation_writes_a_row_per_variant_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "variants", lambda: {"usual": ablation.DEFAULT, "labels alone": ("labels",)})
    page = tmp_path / "page.md"
    page.write_text(f"{ablation.BEGIN}\n{ablation.END}\n")
    digits = ("train_users:8", "val_users:3", "test_users:3", "pretrain_epochs:1", "widths:[4]")
    more = [word for pair in digits for word in ("--env-kwargs", pair)]
    flags = ["--env", "dsa/Personal-v0", "--seeds", "2", "--runs", str(tmp_path / "runs"), "--write", str(page)]
    ablation.main([*flags, *more, *LITTLE, *TINY, *QUIET])
    text = page.read_text()
    for title, parts in ablation.variants().items():
        folders = [tmp_path / "runs" / f"{'-'.join(parts)}-seed{seed}" for seed in range(2)]
        assert all(RunConfig.load(folder).env_kwargs["embedding"] == [*parts] for folder in folders)
        rewards = [ablation.kept_reward(folder) for folder in folders]
        each = ", ".join(f"{reward:.4f}" for reward in rewards)
        assert f"| {title} | {np.mean(rewards):.4f} | {each} |" in text
    assert "`python -m eval.ablation --env dsa/Personal-v0 --seeds 2" in text
    monkeypatch.setattr("eval.headline.train_ppo", lambda arguments: pytest.fail("trained again"))
    ablation.main([*flags, *more, *LITTLE, *TINY, *QUIET])
    assert page.read_text() == text

"""Miniatures of the real data sets, in the real formats, and of a text encoder that knows their words.

Everything is made up here and follows from the seed. Each function writes below a data root and returns that root.
"""

import csv
import gzip
import io
import json
import string
from pathlib import Path

import numpy as np

CLASSES = (*string.digits, *string.ascii_uppercase, *string.ascii_lowercase)
COLLECTIONS = ("aaa", "bbb", "ccc")
FEW, ONCE = 900, 901
"""Writers whom no loader can keep: one with too few images, one with one image of every class."""
SCARCE = "77"
"""The annotator, and the reader, with too few judgements to be kept."""

THINGS = ("apple", "bread", "chair", "door", "egg", "fork", "garden", "hat", "ink", "jar", "kettle", "lamp")
KINDS = ("red", "blue", "green", "round", "square", "old", "new", "cold", "warm", "loud")
DEEDS = ("sings", "waits", "jumps", "sleeps", "breaks", "shines", "turns", "falls")
WORDS = (*THINGS, *KINDS, *DEEDS, "the", "and", "so", "my", "is", ",", '"', "!")


def unipen(root: Path, seed: int = 0) -> Path:
    """12 train, 4 val and 5 test writers with 48 to 75 images, and :data:`FEW` (val) and :data:`ONCE` (test).

    Every writer has 8 classes five or six times. Train writers have half of all classes at least once, in turns, so that
    any few of them know all 62. Rows are sorted by writer, then label, and ids have gaps, as in the real file.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.random((len(CLASSES), 7, 7)) < 0.4
    rows, users = [], []
    splits = ["train"] * 12 + ["val"] * 4 + ["test"] * 5
    for number, split in enumerate(splits):
        counts = np.zeros(len(CLASSES), int)
        counts[number % 2 :: 2] = split == "train"
        counts[rng.choice(len(CLASSES), 8, replace=False)] = rng.integers(5, 7, 8) + (split != "train")
        rows.append(_writer(3 + 2 * number, counts, patterns, rng))
        users.append((3 + 2 * number, split))
    few = np.zeros(len(CLASSES), int)
    few[:4] = 5
    rows += [_writer(FEW, few, patterns, rng), _writer(ONCE, np.ones(len(CLASSES), int), patterns, rng)]
    users += [(FEW, "val"), (ONCE, "test")]
    images, labels, ids = (np.concatenate(part) for part in zip(*rows, strict=True))
    folder = _folder(root, "unipen_chars")
    np.savez_compressed(
        folder / "unipen_chars.npz", images=images, label=labels, user_id=ids, collection=(ids % 3).astype(np.uint8)
    )
    table = [(user, (ids == user).sum(), len(set(labels[ids == user])), COLLECTIONS[user % 3], split) for user, split in users]
    _csv(folder / "users.csv", ("user_id", "n", "n_classes", "collection", "split"), table)
    meta = {"classes": CLASSES, "collections": COLLECTIONS}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return root


def _writer(user: int, counts: np.ndarray, patterns: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """One writer's images, labels and ids: the class's pattern, moved and dimmed as this writer always does it."""
    labels = np.repeat(np.arange(len(counts)), counts)
    move, ink = rng.integers(-3, 4, 2), rng.uniform(0.5, 1)
    clean = patterns[labels].repeat(3, 1).repeat(3, 2) * ink * 200
    images = np.zeros((len(labels), 28, 28))
    images[:, 3:24, 3:24] = clean
    images = np.roll(images, move, (1, 2)) + rng.random(images.shape) * 40
    return images.astype(np.uint8), labels.astype(np.uint8), np.full(len(labels), user, np.uint16)


def omniglot(root: Path, seed: int = 0) -> Path:
    """12 characters of 4 alphabets (2 of them background), by 10 drawers each."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((12, 7, 7)) < 0.4
    rows = [_writer(0, np.ones(12, int), patterns, rng) for _ in range(10)]
    images = np.stack([images for images, *_ in rows], 1).reshape(120, 28, 28)
    character = np.arange(12).repeat(10)
    folder = _folder(root, "omniglot28")
    np.savez_compressed(
        folder / "omniglot28.npz",
        images=images,
        character=character.astype(np.int16),
        alphabet=(character // 3).astype(np.int8),
        drawer=np.tile(np.arange(1, 11), 12).astype(np.uint8),
        background=character < 6,
    )
    sets = ["background" if a < 2 else "evaluation" for a in range(4)]
    _csv(folder / "alphabets.csv", ("alphabet", "set", "name"), [(a, sets[a], f"Made_up_{a}") for a in range(4)])
    names = [(c, c // 3, f"character{c % 3 + 1:02}") for c in range(12)]
    _csv(folder / "characters.csv", ("character", "alphabet", "name"), names)
    return root


def popquorn(root: Path, seed: int = 0) -> Path:
    """21 annotators (13 train, 4 val, 4 test), 47 to 50 of 120 comments each, :data:`SCARCE` (val) but 25."""
    texts, ratings, splits = _annotated(seed)
    folder = _folder(root, "popquorn_offensiveness")
    _csv(folder / "items.csv.gz", ("item_id", "text"), list(texts.items()))
    rows = [(user, item, rating, int(rating >= 2)) for user, item, rating in ratings]
    _csv(folder / "labels.csv.gz", ("user_id", "item_id", "rating", "label"), rows)
    _users_csv(folder / "users.csv", [(user, label) for user, _, _, label in rows], splits)
    return root


def popquorn_raw(root: Path, seed: int = 0, folder: str = "offensiveness") -> Path:
    """The judgements that :func:`popquorn` writes for the seed, as the authors' one table. It goes first: use another root."""
    texts, ratings, _ = _annotated(seed)
    header = ("instance_id", "user_id", "text", "offensiveness", "gender", "race", "age", "occupation", "education")
    rest = ("Made-up", "Made-up", "30-34", "Employed", "None, as yet")
    _csv(_folder(root, folder) / "raw_data.csv", header, [(i, u, texts[i], float(rating), *rest) for u, i, rating in ratings])
    return root


def _annotated(seed: int) -> tuple[dict[str, str], list[tuple[str, str, int]], dict[str, str]]:
    """Texts by id, ``(user, item, rating 1..5)`` sorted by user, and splits: words and annotators differ in harshness."""
    rng = np.random.default_rng(seed)
    texts = _texts(120, rng)
    harsh = np.array([sum(word in text for word in KINDS[:5]) for text in texts.values()]) - 1.0
    names = [str(2 * number + 1) for number in range(20)]
    splits = dict(zip([*names, SCARCE], ["train"] * 13 + ["val"] * 3 + ["test"] * 4 + ["val"], strict=True))
    ratings = []
    for name in splits:
        bias, size = rng.normal(0, 1.2), 25 if name == SCARCE else rng.integers(47, 51)
        for item in sorted(rng.choice(120, size, replace=False).tolist()):
            ratings.append((name, str(item), int(np.clip(1.6 + bias + harsh[item] + rng.normal(0, 0.7), 1, 5))))
    return texts, ratings, splits


def jester(root: Path, seed: int = 0) -> Path:
    """31 readers (20 train, 5 val, 6 test), 30 to 40 of 40 jokes each, :data:`SCARCE` (test) but 21."""
    rng = np.random.default_rng(seed)
    texts = _texts(40, rng)
    taste = rng.normal(0, 3, (2, 40))
    names = [str(number) for number in range(0, 60, 2)]
    splits = dict(zip([*names, SCARCE], ["train"] * 20 + ["val"] * 5 + ["test"] * 6, strict=True))
    rows = []
    for name in splits:
        size = 21 if name == SCARCE else rng.integers(30, 41)
        liking = rng.normal(1, 2) + rng.normal(0, 1, 2) @ taste + rng.normal(0, 1, 40)
        for item in sorted(rng.choice(40, size, replace=False).tolist()):
            rating = round(float(np.clip(liking[item], -9.95, 9.9)), 2)
            rows.append((name, item, rating, int(rating > 0)))
    folder = _folder(root, "jester5k")
    _csv(folder / "items.csv.gz", ("item_id", "text"), list(texts.items()))
    _csv(folder / "labels.csv.gz", ("user_id", "item_id", "rating", "label"), rows)
    _users_csv(folder / "users.csv", [(user, label) for user, _, _, label in rows], splits)
    return root


def text_encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT (width 32, 2 layers, 2 heads) that knows :data:`WORDS`, as ``save_pretrained`` writes it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: index for index, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        with torch.no_grad():  # the initial weights are so small that all texts look alike
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=64).save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    return folder


def _texts(count: int, rng: np.random.Generator) -> dict[str, str]:
    """Different texts of 4 to 22 words by id; some with commas, quotes and line breaks, which a CSV file must survive."""
    texts: dict[str, str] = {}
    while len(texts) < count:
        parts = [f"the {rng.choice(KINDS)} {rng.choice(THINGS)} {rng.choice(DEEDS)}" for _ in range(rng.integers(1, 5))]
        text = str(rng.choice([" and ", ", so ", ' "is" ', " !\n"])).join(parts)
        if text not in texts.values():
            texts[str(len(texts))] = text
    return texts


def _folder(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True, exist_ok=True)
    return root / name


def _users_csv(path: Path, judged: list[tuple[str, int]], splits: dict[str, str]) -> None:
    labels = {name: [label for user, label in judged if user == name] for name in splits}
    rows = [(name, len(own), round(float(np.mean(own)), 4), splits[name]) for name, own in labels.items()]
    _csv(path, ("user_id", "n", "positive_rate", "split"), rows)


def _csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """UTF-8 with a header; gzipped (without a time, so that equal content is equal bytes) if the name says so."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

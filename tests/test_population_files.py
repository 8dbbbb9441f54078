"""Files of real people that are missing, damaged or wrong: the message names the file, and the line where there is one."""

import gzip
import io
import json
import re

import miniatures
import numpy as np
import pytest
from populations import (
    FOLDER,
    LOADERS,
    NEW_COMMENTS,
    edit_csv,
    edit_npz,
    read_csv,
    split_by_file,
    splits_of,
    write_all,
    write_csv,
)

from users.assignment import with_fitting
from users.base import ROLES
from users.files import arrays_of
from users.jester import jester
from users.omniglot import omniglot
from users.popquorn import popquorn
from users.unipen import unipen

EVERY = LOADERS | {"omniglot": omniglot}
FILES = {
    "unipen": ("unipen_chars.npz", "users.csv", "meta.json"),
    "jester": ("items.csv.gz", "labels.csv.gz", "users.csv"),
    "annotators": ("items.csv.gz", "labels.csv.gz", "users.csv"),
    "omniglot": ("omniglot28.npz",),
}
ONE_FILE = [(name, file) for name, files in FILES.items() for file in files]
TABLES = [(name, file) for name, file in ONE_FILE if "csv" in file]
ARCHIVES = [("unipen", "unipen_chars.npz"), ("omniglot", "omniglot28.npz")]


def file_of(root, name, file):
    return root / (FOLDER | {"omniglot": "omniglot28"})[name] / file


@pytest.mark.parametrize(("name", "file"), ONE_FILE)
def test_a_missing_file_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"missing: {re.escape(str(path))} .*--data-root"):
        EVERY[name](copy)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_nothing_lists_all_that_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        EVERY[name](tmp_path)
    for file in FILES[name]:
        assert file in str(caught.value)


def test_a_folder_with_nothing_lists_the_authors_table_too(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        popquorn(tmp_path)
    for folder in ("popquorn_offensiveness", "offensiveness", "."):
        assert str(tmp_path / folder / "raw_data.csv") in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_without_a_data_root_the_error_says_how_to_name_one(name, monkeypatch):
    monkeypatch.delenv("DSA_DATA_ROOT", raising=False)
    with pytest.raises(ValueError, match=r"--data-root .*DSA_DATA_ROOT"):
        EVERY[name]()


@pytest.mark.parametrize("name", FILES)
def test_the_data_root_may_come_from_the_environment_or_be_the_folder_itself(name, root, monkeypatch):
    monkeypatch.setenv("DSA_DATA_ROOT", str(root))
    assert EVERY[name]() is not None
    monkeypatch.setenv("DSA_DATA_ROOT", str(root / "nowhere"))
    assert EVERY[name](file_of(root, name, "")) is not None  # what is given goes first


@pytest.mark.parametrize(("name", "file"), ARCHIVES)
@pytest.mark.parametrize("damage", ["truncated", "half of it", "empty", "overwritten", "one bit", "no archive", "one array"])
def test_a_damaged_archive_is_named(name, file, damage, copy):
    path = file_of(copy, name, file)
    whole, array = path.read_bytes(), io.BytesIO()
    np.save(array, np.arange(3))
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "half of it": whole[: len(whole) // 2],
            "empty": b"",
            "overwritten": whole[:2000] + b"\xff" * 500 + whole[2500:],
            "one bit": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
            "no archive": b"<html>404</html>" * 20,
            "one array": array.getvalue(),
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged \(.*\); restore it\."):
        EVERY[name](copy)


def test_of_a_damaged_archive_nothing_wrong_is_read(tmp_path):
    """Wherever a byte is wrong: the arrays as they were, or one error that names the file; and the file is closed."""
    path, expected = tmp_path / "a.npz", {"images": np.arange(40), "label": np.ones(3, np.uint8)}
    np.savez_compressed(path, **expected)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = arrays_of(path, tuple(expected))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_pickle_is_never_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is damaged .*allow_pickle"):
        arrays_of(tmp_path / "a.npz", ("images",))


@pytest.mark.parametrize(("name", "file"), ARCHIVES)
def test_a_missing_array_is_named(name, file, copy):
    path = file_of(copy, name, file)
    edit_npz(path, lambda arrays: arrays.pop("images"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has no array 'images'; it has "):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), [table for table in TABLES if table[1].endswith(".gz")])
def test_a_truncated_table_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_missing_column_is_named(name, file, copy):
    path = file_of(copy, name, file)
    column = {"users.csv": "split", "items.csv.gz": "text", "labels.csv.gz": "label"}[file]
    edit_csv(path, lambda header, rows: header.__setitem__(header.index(column), "other"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has no column '{column}'\. .*Known: .*other"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_an_empty_table_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.write_bytes(gzip.compress(b"") if path.suffix == ".gz" else b"")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is empty"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_table_that_is_not_utf8_is_named(name, file, copy):
    path = file_of(copy, name, file)
    header, *rows = read_csv(path)
    rows[-1][-1] = "caf\xe9"
    write_csv(path, [header, *rows], encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not UTF-8"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_row_that_is_too_short_is_named_with_its_line(name, file, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[1].__delitem__(slice(1, None)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: 1 fields where the header has \d; mend"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_row_that_is_too_long_is_named_with_its_line(name, file, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[0].append("more"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: \d fields where the header has \d; put texts"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_quote_that_is_not_closed_is_named(name, file, copy):
    path = file_of(copy, name, file)
    data = path.read_bytes()
    zipped = path.suffix == ".gz"
    broken = (gzip.decompress(data) if zipped else data) + b'"1,2'
    path.write_bytes(gzip.compress(broken) if zipped else broken)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: .*double quote that is not closed"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), [table for table in TABLES if table[1].endswith(".gz")])
@pytest.mark.parametrize("damage", ["not zipped", "overwritten", "checksum"])
def test_a_damaged_table_is_named(name, file, damage, copy):
    path = file_of(copy, name, file)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "not zipped": gzip.decompress(whole),
            "overwritten": whole[:300] + b"\xff" * 50 + whole[350:],
            "checksum": whole[:-8] + bytes(4) + whole[-4:],
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is (damaged after line \d+ .*; restore it|not UTF-8)"):
        EVERY[name](copy)


@pytest.mark.parametrize("name", ["jester", "annotators"])
def test_a_byte_order_mark_in_a_zipped_table_is_no_part_of_a_column(name, root, copy):
    for file in ("items.csv.gz", "labels.csv.gz"):
        path = file_of(copy, name, file)
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(path.read_bytes())))
    assert LOADERS[name](copy).fingerprint() == LOADERS[name](root).fingerprint()


def test_a_byte_order_mark_is_no_part_of_a_column(raw_root, tmp_path):
    (path,) = raw_root.glob("*/raw_data.csv")
    (tmp_path / "raw_data.csv").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert popquorn(tmp_path).fingerprint() == popquorn(raw_root).fingerprint()


@pytest.mark.parametrize("name", ["jester", "annotators", "comments"])
def test_a_judgement_of_an_unknown_text_is_named(name, copy):
    path = copy / FOLDER[name] / "labels.csv.gz"
    edit_csv(path, lambda header, rows: rows[7].__setitem__(1, "999"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 9: text '999' is judged, which .*items\.csv\.gz"):
        LOADERS[name](copy)


@split_by_file
def test_an_unknown_split_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: rows[-5].__setitem__(-1, "holdout"))
    message = rf"{re.escape(str(path))}: user '\d+' has split 'holdout', not one of train, val, test\."
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@split_by_file
def test_a_user_without_a_split_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    first = min(int(user) for user in splits_of(copy, name))
    edit_csv(path, lambda header, rows: rows.__setitem__(slice(None), [row for row in rows if int(row[0]) not in (first, 77)]))
    count = 1 if name == "unipen" else 2
    message = rf"{re.escape(str(path))} gives no split for user '{first}', who has examples \({count} such users\); add a row"
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@split_by_file
def test_a_user_with_two_splits_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: rows.append([*rows[0][:-1], "test"]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: user '\d+' is there twice"):
        LOADERS[name](copy)


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [("jester", "labels.csv.gz", "label"), ("annotators", "labels.csv.gz", "label"), ("unipen", "users.csv", "user_id")],
)
@pytest.mark.parametrize("wrong", ["", "nan", "good", "1.5"])
def test_what_is_no_whole_number_is_named_with_its_line(name, file, column, wrong, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[3].__setitem__(header.index(column), wrong))
    message = rf"{re.escape(str(path))}, line 5: {column} '{wrong}' is no whole number; mend"
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@pytest.mark.parametrize("wrong", ["", "nan", "inf", "very"])
def test_what_is_no_rating_is_named_with_its_line(wrong, tmp_path):
    path = miniatures.popquorn_raw(tmp_path) / "offensiveness" / "raw_data.csv"
    edit_csv(path, lambda header, rows: rows[0].__setitem__(header.index("offensiveness"), wrong))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: offensiveness '{wrong}' is no number"):
        popquorn(tmp_path)


@pytest.mark.parametrize("name", ["jester", "annotators"])
def test_a_label_that_is_no_class_is_named(name, copy):
    edit_csv(copy / FOLDER[name] / "labels.csv.gz", lambda header, rows: [row.__setitem__(-1, "7") for row in rows])
    with pytest.raises(ValueError, match=r"labels outside 0\.\.1"):
        LOADERS[name](copy)


def test_classes_that_cannot_be_read_are_named(copy):
    path = copy / "unipen_chars" / "meta.json"
    broken = ["{", "[]", json.dumps({"names": []}), json.dumps({"classes": []}), json.dumps({"classes": [1, 2]})]
    for content in (*(text.encode() for text in broken), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            unipen(copy)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unipen", {"shots": 0}, "shots must be at least 1.*got 0"),
        ("unipen", {"fit_share": 0.0}, "fit_share between 0 and 1"),
        ("unipen", {"fit_share": 1.0}, "fit_share between 0 and 1"),
        ("comments", {"fold": 7}, "fold 0 to 4, got .* 7"),
        ("comments", {"fold": -1}, "fold 0 to 4, got .* -1"),
        ("comments", {"protocol": "new_planets"}, f"protocol must be one of new_annotators, {NEW_COMMENTS}.*'new_planets'"),
        ("comments", {"fit_share": 0.0}, "fit_share must be between 0 and 1, got 0"),
        ("annotators", {"fit_share": 1.5}, "fit_share must be between 0 and 1, got 1.5"),
        ("jester", {"support": 0}, "support must be at least 1"),
        ("jester", {"fit_share": 2.0}, "fit_share between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_read(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LOADERS[name](tmp_path, **arguments)


@split_by_file
def test_a_split_without_users_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: [row.__setitem__(-1, "test") for row in rows if row[-1] == "val"])
    with pytest.raises(ValueError, match="has no val users"):
        LOADERS[name](copy)


@pytest.mark.parametrize("name", ["jester", "annotators", "comments"])
def test_a_text_that_was_judged_twice_is_named(name, copy):
    path = copy / FOLDER[name] / "labels.csv.gz"
    edit_csv(path, lambda header, rows: rows.append([*rows[4][:-1], "0"]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: user '\d+' judges text '\d+' a second time"):
        LOADERS[name](copy)


def doubled(header, rows):
    """Every text under a second id as well."""
    rows += [[f"{int(row[0]) + 5000}", f" {row[1]}"] for row in rows]


def supports(population):
    return {user.user_id: set(population.items.take(user.support.inputs.tolist())) for user in population.users}


@pytest.mark.parametrize("fold", range(2))
def test_a_text_under_two_ids_is_one_text_in_the_authors_table_too(fold, tmp_path):
    path = miniatures.popquorn_raw(tmp_path) / "offensiveness" / "raw_data.csv"
    plain = supports(popquorn(tmp_path, fold=fold))
    edit_csv(path, lambda header, rows: [row.__setitem__(0, f"{int(row[0]) + 5000}") for row in rows[::3]])
    assert supports(popquorn(tmp_path, fold=fold)) == plain
    edit_csv(path, lambda header, rows: rows[5].__setitem__(header.index("text"), "quite another text"))
    with pytest.raises(ValueError, match=r"line \d+: instance_id '\d+' has another text above; give each .* or restore"):
        popquorn(tmp_path, fold=fold)


@pytest.mark.parametrize("name", ["jester", "annotators", "comments"])
def test_a_text_under_two_ids_is_one_text(name, copy):
    folder, plain = copy / FOLDER[name], LOADERS[name](copy)
    edit_csv(folder / "items.csv.gz", doubled)

    def elsewhere(header, rows):
        for row in rows[::3]:  # some call it by the other id, some by both, some of these contradict themselves
            row[1] = f"{int(row[1]) + 5000}"
        rows += [[row[0], f"{int(row[1]) - 5000}", *row[2:]] for row in rows[::30]]
        rows += [[row[0], f"{int(row[1]) - 5000}", *row[2:-1], str(1 - int(row[-1]))] for row in rows[3:900:30]]

    edit_csv(folder / "labels.csv.gz", elsewhere)
    population = LOADERS[name](copy)
    edit_csv(folder / "items.csv.gz", lambda header, rows: rows.reverse())
    assert supports(LOADERS[name](copy)) == supports(population), "the order of the file counts nothing"
    assert len(population.items) == len(plain.items) == len(set(population.items.texts))
    for user in population.users:
        roles = [set(getattr(user, role).inputs.tolist()) for role in ROLES]
        assert len(set.union(*roles)) == sum(map(len, roles))
    told = " ".join(population.notes)
    assert f"{len(plain.items)} texts are the same as another one" in told
    assert "the same user, text and label as another one" in told and "judged the same text otherwise too" in told


@pytest.mark.parametrize("name", ["jester", "annotators"])
def test_an_id_of_two_texts_is_named_with_its_line(name, copy):
    path = copy / FOLDER[name] / "items.csv.gz"
    edit_csv(path, lambda header, rows: rows.append([rows[0][0], "quite another text"]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: item_id '\d+' has another text above"):
        LOADERS[name](copy)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("label", lambda v: v[:-3], r"label should be \d+ whole numbers, one for each image, not uint8 \[\d+\]"),
        ("user_id", lambda v: v[:-3], "user_id should be"),
        ("label", lambda v: v + 0.5, "label should be .* not float64"),
        ("user_id", lambda v: v.astype("U5"), "user_id should be .* not <U5"),
        ("images", lambda v: v[:-3], "label should be"),
        ("images", lambda v: v.astype("float32"), r"images should be uint8 \[N, 28, 28\], not float32"),
        ("images", lambda v: v.repeat(2, 1), r"images should be uint8 \[N, 28, 28\], not uint8 \[\d+, 56, 28\]"),
    ],
)
def test_arrays_that_do_not_go_together_are_named(name, change, message, copy):
    path = copy / "unipen_chars" / "unipen_chars.npz"
    edit_npz(path, lambda arrays: arrays.update({name: change(arrays[name])}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: {message}"):
        unipen(copy)


@pytest.mark.parametrize(
    ("fitted", "unable", "expected"),
    [
        ("c", "c", {"a": "train", "b": "train", "c": "fitting"}),  # who can only be fitted on is enough to fit on
        ("bc", "c", {"a": "train", "b": "fitting", "c": "fitting"}),
        ("", "c", {"c": "train"}),
        ("abc", "c", {"c": "fitting"}),
    ],
)
def test_who_is_moved_so_that_nothing_is_empty(fitted, unable, expected, monkeypatch):
    monkeypatch.setattr("users.assignment.is_fitting", lambda user, seed, share: user in fitted)
    able = {user: user not in unable for user in "abcv"}
    part = with_fitting({"a": "train", "b": "train", "c": "train", "v": "val"}, able, 0, 0.5)
    assert part["v"] == "val" and expected.items() <= part.items()
    assert {part["a"], part["b"]} >= ({"train"} if "fitting" in expected.values() else {"train", "fitting"})
    with pytest.raises(ValueError, match="1 users with enough examples are too few: fitting, train"):
        with_fitting({"a": "train", "v": "val"}, able, 0, 0.5)


@split_by_file
@pytest.mark.parametrize("share", [0.02, 0.98])
def test_chance_leaves_nobody_without_a_classifier_and_no_classifier_without_users(name, share, copy):
    population = LOADERS[name](copy, fit_share=share)
    assert len(population.train) and len(population.fitting)


def test_miniatures_are_the_same_for_a_seed_and_others_for_another(root, raw_root, tmp_path):
    again = write_all(tmp_path / "again")
    miniatures.popquorn_raw(again)
    for path in [*root.rglob("*"), *raw_root.rglob("*.csv")]:
        if path.is_file() and path.suffix != ".npz":
            home = root if path.is_relative_to(root) else raw_root
            assert (again / path.relative_to(home)).read_bytes() == path.read_bytes()
    for name, file in ARCHIVES:
        with np.load(file_of(root, name, file)) as first, np.load(file_of(again, name, file)) as second:
            assert all(np.array_equal(first[key], second[key]) for key in first.files)
    other = miniatures.jester(tmp_path / "other", seed=1)
    assert jester(other).fingerprint() != jester(root).fingerprint()

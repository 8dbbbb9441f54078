import csv
import gzip
import io
import random
import sys

import pytest
import torch
from PIL import Image

from users import population_factory
from users.base import ROLES, SPLITS
from users.describe import cost_estimate, describe
from users.rows import class_names
from users.streaming import open_table
from users.table import table


def ratings(users=40, each=8, labels=("bad", "good"), seed=0):
    """Rows of users who share texts."""
    draw = random.Random(seed)
    return [
        {"user_id": f"u{u:02}", "text": f"text {t}", "label": labels[(place + u) % len(labels)]}
        for u in range(users)
        for place, t in enumerate(draw.sample(range(60), each))
    ]


def write(path, rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def with_splits(rows):
    """A third of the users each."""
    return [row | {"split": SPLITS[int(row["user_id"][1:]) % 3]} for row in rows]


def texts_of(population, examples):
    return population.items.take(examples.inputs.tolist())


def triples(population):
    """Every example of the users as it was in the file."""
    return [
        (user.user_id, text, population.class_names[label])
        for user in population.users
        for role in ROLES
        for text, label in zip(texts_of(population, getattr(user, role)), getattr(user, role).labels.tolist(), strict=True)
    ]


def same(first, second):
    return (
        first.fingerprint() == second.fingerprint()
        and first.class_names == second.class_names
        and sorted(texts_of(first, first.fitting)) == sorted(texts_of(second, second.fitting))
    )


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "ratings.csv", ratings())


def test_it_is_registered_and_takes_a_string(path):
    assert population_factory("table") is table
    assert table(str(path)).name == "table-ratings"


def test_every_example_is_a_row_of_its_user_and_every_row_is_used_once(path):
    population, rows = table(path), {(r["user_id"], r["text"], r["label"]) for r in ratings()}
    found = triples(population)
    assert set(found) <= rows and len(set(found)) == len(found)
    assert len(found) + len(population.fitting) == len(rows)
    users = {user.user_id for user in population.users}
    left = {(text, label) for user, text, label in rows if user not in users}
    fitted = set(zip(texts_of(population, population.fitting), population.fitting.labels.tolist(), strict=True))
    assert fitted == {(text, population.class_names.index(label)) for text, label in left}


def test_nobody_in_a_split_fits_the_population_model(tmp_path):
    rows = [row | {"text": f"{row['user_id']}: {row['text']}"} for row in ratings()]
    population = table(write(tmp_path / "t.csv", rows))
    fitted = {text.split(":")[0] for text in texts_of(population, population.fitting)}
    assert fitted and not fitted & {user.user_id for user in population.users}
    assert len(fitted) + len(population.users) == 40


def test_the_order_of_rows_and_columns_and_the_compression_count_nothing(tmp_path, path):
    rows = [dict(reversed(row.items())) for row in ratings()]
    random.Random(1).shuffle(rows)
    first = table(path)
    assert same(first, table(write(tmp_path / "other.csv", rows)))
    assert same(first, table(write(tmp_path / "other.csv.gz", rows)))
    assert [user.user_id for user in first.train] == sorted(user.user_id for user in first.train)


def test_order_counts_nothing_either_where_a_user_contradicts_themselves(tmp_path):
    rows = ratings()
    rows += [row | {"label": "good" if row["label"] == "bad" else "bad"} for row in rows[::9]]
    first = table(write(tmp_path / "a.csv", rows))
    assert same(first, table(write(tmp_path / "b.csv", rows[::-1])))
    (note,) = [note for note in first.notes if "another label too" in note]
    assert note.startswith(f"{2 * len(rows[: len(ratings())][::9])} rows left out")


def test_seeds_deal_train_users_and_rows_anew_but_who_is_asked_in_the_end_stays(path):
    first, second = table(path), table(path, seed=1)
    for split in ("val", "test"):
        assert {u.user_id for u in getattr(first, split)} == {u.user_id for u in getattr(second, split)}
    assert {u.user_id for u in first.train} != {u.user_id for u in second.train}
    assert first.fingerprint() != second.fingerprint()
    assert table(path).fingerprint() == first.fingerprint()


def test_roles_share_nothing_and_have_the_sizes_that_follow(tmp_path):
    rows = ratings(each=9)
    for user in table(write(tmp_path / "t.csv", rows)).users:
        assert [len(getattr(user, role)) for role in ROLES] == [4, 2, 3]
    for user in table(tmp_path / "t.csv", support=7).users:
        assert [len(getattr(user, role)) for role in ROLES] == [7, 1, 1]
    for user in table(write(tmp_path / "long.csv", ratings(users=12, each=50))).users:
        assert [len(getattr(user, role)) for role in ROLES] == [20, 15, 15]


def test_given_splits_are_kept_and_only_train_users_fit(tmp_path):
    rows = [row | {"text": f"{row['user_id']}: {row['text']}"} for row in with_splits(ratings())]
    population = table(write(tmp_path / "t.csv", rows))
    for number, split in enumerate(SPLITS):
        assert {int(user.user_id[1:]) % 3 for user in getattr(population, split)} == {number}
    assert {int(text[1:3]) % 3 for text in texts_of(population, population.fitting)} == {0}
    assert len(population.val) + len(population.test) == 26


@pytest.mark.parametrize("users", [4, 5, 12])
@pytest.mark.parametrize("seed", range(8))
def test_tiny_tables_have_somebody_everywhere(tmp_path, users, seed):
    population = table(write(tmp_path / "t.csv", ratings(users)), seed=seed)
    assert all(len(getattr(population, split)) for split in SPLITS) and len(population.fitting)


def test_three_users_are_too_few(tmp_path):
    with pytest.raises(ValueError, match=r"3 users with enough examples are too few: fitting, train, val, test need one each"):
        table(write(tmp_path / "t.csv", ratings(3)))
    with pytest.raises(ValueError, match="no test user has enough examples"):
        table(write(tmp_path / "s.csv", [row for row in with_splits(ratings()) if row["split"] != "test"]))
    with pytest.raises(ValueError, match="1 users with enough examples are too few: fitting, train"):
        rows = [row for row in with_splits(ratings()) if row["split"] != "train" or row["user_id"] == "u00"]
        table(write(tmp_path / "f.csv", rows))


def test_max_users_takes_some_by_hash_and_somebody_everywhere(tmp_path, path):
    population = table(path, max_users=10)
    assert len(population.users) < 10 and "10 of 40 users were chosen by hash (max_users)" in population.notes
    everybody = table(path)
    for split in SPLITS:
        assert {u.user_id for u in getattr(population, split)} <= {u.user_id for u in getattr(everybody, split)}
    assert set(population.items.texts) == {text for _, text, _ in triples(population)} | set(
        texts_of(population, population.fitting)
    )
    few = table(path, max_users=4)
    assert [len(getattr(few, split)) for split in SPLITS] == [1, 1, 1] and len(few.fitting) == 8
    shuffled = ratings()
    random.Random(2).shuffle(shuffled)
    assert same(population, table(write(tmp_path / "other.csv", shuffled), max_users=10))


@pytest.mark.parametrize("seed", range(4))
def test_max_users_leaves_somebody_in_small_splits_that_are_given(tmp_path, seed):
    rows = [row | {"split": {"u00": "val", "u01": "test"}.get(row["user_id"], "train")} for row in ratings()]
    population = table(write(tmp_path / "t.csv", rows), seed, max_users=4)
    assert [user.user_id for user in population.val + population.test] == ["u00", "u01"] and len(population.train) == 1


def test_users_with_few_rows_are_left_out_and_named(tmp_path):
    rows = ratings() + [row | {"user_id": "shy"} for row in ratings()[:3]]
    population = table(write(tmp_path / "t.csv", rows))
    assert "1 users left out (fewer than 4 different rows): shy" in population.notes
    assert "shy" not in {user.user_id for user in population.users}
    with pytest.raises(ValueError, match="0 users with enough examples"):
        table(tmp_path / "t.csv", support=7)


def test_repetitions_count_once_also_towards_having_enough(tmp_path):
    rows = ratings() + ratings()[:5] + [row | {"user_id": "parrot"} for row in ratings()[:3] * 4]
    population = table(write(tmp_path / "t.csv", rows))
    assert "14 rows left out (the same user, content and label as another row)" in population.notes
    assert "1 users left out (fewer than 4 different rows): parrot" in population.notes
    assert population.fingerprint() == table(write(tmp_path / "u.csv", ratings())).fingerprint()


def test_every_role_is_filled_again_when_repetitions_empty_one(tmp_path):
    rows = ratings(6)
    for name in {row["user_id"] for row in rows}:
        own = [row for row in rows if row["user_id"] == name]
        others = [row for row in rows if row["user_id"] != name]
        population = table(write(tmp_path / f"{name}.csv", others + own[:3] * 3))
        assert name not in {user.user_id for user in population.users}


@pytest.mark.parametrize("most", [4, 6, 10])
def test_however_few_are_chosen_nobody_is_in_two_splits_under_two_seeds(tmp_path, most):
    path = write(tmp_path / "t.csv", ratings(users=60))
    of = {}
    for seed in range(12):
        population = table(path, max_users=most, seed=seed)
        for split in SPLITS:
            for user in getattr(population, split):
                assert of.setdefault(user.user_id, split) == split


def test_numbers_are_classes_in_the_order_of_their_size(tmp_path):
    rows = ratings(labels=("10", "9", "-1", "2.5", "9.0"))
    assert table(write(tmp_path / "t.csv", rows)).class_names == ("-1", "2.5", "9", "10")
    assert table(write(tmp_path / "u.csv", ratings(labels=("10", "9", "b")))).class_names == ("10", "9", "b")


def test_whole_numbers_are_told_apart_however_long_and_others_than_plain_numbers_are_words():
    long = [str(2**53 + n) for n in range(4)]
    assert class_names(long, 30, "here")[0] == tuple(long)
    assert class_names(["1_0", "10", "9"], 30, "here")[0] == ("10", "1_0", "9")
    assert class_names(["4", "4.0", "1e1"], 30, "here")[0] == ("4", "10")
    assert class_names(["9" * 5000, "10"], 30, "here")[0] == ("10", "9" * 5000)


def test_a_mark_of_a_missing_value_is_one_among_numbers_and_a_word_among_words(tmp_path):
    rows = ratings(labels=("0", "1"))
    marked = [row | {"label": "NA"} if n % 40 == 3 else row for n, row in enumerate(rows)]
    population = table(write(tmp_path / "t.csv", marked))
    assert population.class_names == ("0", "1")
    assert "8 rows left out (a label such as NA where the others are numbers)" in population.notes
    for words in (("None", "good"), ("1", "none")):
        assert table(write(tmp_path / "u.csv", ratings(labels=words))).class_names == tuple(sorted(words))
    half = [row | {"label": "NA"} if n % 3 else row for n, row in enumerate(ratings(labels=("0", "1")))]
    with pytest.raises(ValueError, match="column 'label': 213 of 320 labels are 'NA' where the others are numbers; fill them"):
        table(write(tmp_path / "v.csv", half))


def test_of_one_users_thousands_some_are_read_whatever_their_order(tmp_path):
    rows = ratings(each=8)
    heavy = [{"user_id": "u00", "text": f"more {n}", "label": ("bad", "good")[n % 2]} for n in range(300)]
    population = table(write(tmp_path / "t.csv", rows + heavy), max_rows=50, seed=1)
    assert "258 rows left out (beyond the max_rows of their user, by hash)" in population.notes
    assert max(sum(len(getattr(user, role)) for role in ROLES) for user in population.users) <= 50
    assert same(population, table(write(tmp_path / "t.csv", heavy[::-1] + rows), max_rows=50, seed=1))
    with pytest.raises(ValueError, match="max_rows must be at least 12, which a user needs"):
        table(tmp_path / "t.csv", support=10, max_rows=11)


def test_labels_ids_and_texts_are_stripped(tmp_path):
    rows = [
        row | {"user_id": f" {row['user_id']} ", "label": f"{row['label']} ", "text": f" {row['text']}"} for row in ratings()
    ]
    population = table(write(tmp_path / "t.csv", rows))
    assert population.class_names == ("bad", "good") and all(text == text.strip() for text in population.items.texts)
    assert {user.user_id for user in population.users} <= {row["user_id"] for row in ratings()}


@pytest.mark.parametrize(
    "labels", [[f"tag {n}" for n in range(101)], [str(n) for n in range(101)], [str(n / 7) for n in range(400)]]
)
def test_too_many_labels_are_no_classes(tmp_path, labels):
    cure = "merge rare values" if "tag" in labels[0] else "looks like a continuous rating, so bin it first"
    rows = [row | {"label": labels[n % len(labels)]} for n, row in enumerate(ratings())]
    with pytest.raises(ValueError, match=rf"column 'label' has \d+ different values .*{cure}"):
        table(write(tmp_path / "t.csv", rows))


def test_fractions_that_hardly_recur_are_no_classes_but_half_stars_are():
    with pytest.raises(ValueError, match="continuous"):
        class_names(["0.31", "0.52", "0.77"], 5, "here")
    assert class_names(["0.5", "1", "1.5"], 30, "here")[0] == ("0.5", "1", "1.5")


def test_one_label_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="every example has the label 'fine'"):
        table(write(tmp_path / "t.csv", ratings(labels=("fine",))))


def test_a_label_that_only_test_users_have(tmp_path):
    rows = with_splits(ratings())
    test = next(row for row in rows if row["split"] == "test")
    test["label"] = "odd"
    with pytest.raises(ValueError, match=r"no train user has the label 'odd'; .* for 1 user \(u02\)\. Remove or merge"):
        table(write(tmp_path / "t.csv", rows))


def test_a_label_that_nobody_who_fits_has(tmp_path, path):
    train = {user.user_id for user in table(path).train}
    rows = ratings()
    next(row for row in rows if row["user_id"] in train)["label"] = "odd"
    with pytest.raises(ValueError, match=r"no user who fits .* label 'odd'; .*Choose a larger fit_share than 0\.25"):
        table(write(tmp_path / "t.csv", rows))


def test_missing_values_are_left_out_with_their_lines(tmp_path):
    rows = ratings()
    rows[0]["text"], rows[5]["label"], rows[7]["user_id"], rows[9]["label"] = "  ", "", " ", "NaN"
    population = table(write(tmp_path / "t.csv", rows))
    assert "4 rows left out (a value is missing): line 2, 7, 9, 11" in population.notes
    for row in rows[:41]:
        row["label"] = ""
    with pytest.raises(ValueError, match=r"41 of 320 rows lack a value \(line 2, 3, .*, \.\.\.\); fill them in"):
        table(write(tmp_path / "t.csv", rows))


def test_lines_are_those_of_an_editor(tmp_path):
    rows = ratings()
    rows[0]["text"], rows[3]["text"] = "two\nlines", ""
    assert "1 rows left out (a value is missing): line 6" in table(write(tmp_path / "t.csv", rows)).notes


def test_a_column_that_is_missing(tmp_path):
    def renamed(**names):
        return write(tmp_path / "t.csv", [{names.get(k, k): v for k, v in row.items()} for row in ratings()])

    with pytest.raises(ValueError, match=r"t.csv has no column 'user_id'. Did you mean 'userid'\? Known: label, text, userid"):
        table(renamed(user_id="userid"))
    with pytest.raises(ValueError, match=r"no column 'label'. Did you mean 'labels'"):
        table(renamed(label="labels"))
    with pytest.raises(ValueError, match=r"neither a column 'text' nor a column 'image'. Did you mean 'Text'"):
        table(renamed(text="Text"))
    with pytest.raises(ValueError, match=r"neither a column 'text' nor a column 'image'. Did you mean 'images'"):
        table(renamed(text="images"))
    with pytest.raises(ValueError, match="a column 'text' and a column 'image'"):
        table(write(tmp_path / "b.csv", [row | {"image": "a.png"} for row in ratings()]))


def put(folder, content, name="t.csv"):
    (folder / name).write_bytes(content)
    return folder / name


HEADER = b"user_id,text,label\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv is empty"),
        (HEADER, "has a header but no rows"),
        (b"user_id;text;label\n1;a;b\n", "separated by ';'; save it with commas"),
        (b"user_id,text,label,text\n1,a,b,c\n", "2 columns 'text'"),
        (HEADER + b"1,a,b\n1,a\n", r"line 3: 2 fields where the header has 3; mend or remove"),
        (HEADER + b"1,Yes, but,b\n", r"line 2: 4 fields where the header has 3; put texts that contain commas in double"),
        (HEADER + b'1,a,b\n1,"a,b\n1,c,d\n', r"line 3: .*double quote that is not closed"),
        (HEADER + b"1,a,b\n1,caf\xe9,b\n", r"not UTF-8 \(line 3, byte 6: 0xe9\); convert it"),
        (b"\xff\xfeu\x00s\x00", r"not UTF-8 \(line 1, byte 1: 0xff\)"),
    ],
)
def test_broken_csv(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        table(put(tmp_path, content))


def test_a_byte_order_mark_and_windows_lines_and_blank_lines_are_fine(tmp_path, path):
    content = b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n"
    assert b"\r\n" in content
    assert same(table(put(tmp_path, content)), table(path))
    assert same(table(put(tmp_path, gzip.compress(content), "t.csv.gz")), table(path))


def test_a_damaged_gzip_file(tmp_path, path):
    whole = gzip.compress(path.read_bytes())
    for content in (whole[: len(whole) // 2], path.read_bytes()):
        with pytest.raises(ValueError, match=r"t.csv.gz is damaged after line \d+ .*; restore it"):
            table(put(tmp_path, content, "t.csv.gz"))


def test_files_that_are_missing_or_of_another_type(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no table .*none.csv; give a .csv, .csv.gz or .parquet"):
        table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"t.xlsx is of an unknown type; save it as .csv, .csv.gz or .parquet"):
        table(put(tmp_path, b"PK", "t.xlsx"))


def test_splits_that_are_unknown_or_not_by_user(tmp_path):
    rows = with_splits(ratings())
    for wrong, message in (
        ("validate", r"unknown split 'validate'. Did you mean 'val'\? Known: test, train, val"),
        ("", "unknown split ''"),
    ):
        changed = [*rows[:2], rows[2] | {"split": wrong}, *rows[3:]]
        with pytest.raises(ValueError, match=rf"t.csv, line 4: {message}"):
            table(write(tmp_path / "t.csv", changed))
    changed = [*rows[:2], rows[2] | {"split": "test"}, *rows[3:]]
    with pytest.raises(ValueError, match=r"line 4: user 'u00' is in test here and in train above; splits must be by user"):
        table(write(tmp_path / "t.csv", changed))


@pytest.mark.parametrize("wrong", [{"support": 0}, {"fit_share": 0}, {"fit_share": 1}, {"max_users": 3}])
def test_impossible_arguments(path, wrong):
    with pytest.raises(ValueError, match="support must be at least 1, fit_share between 0 and 1 and max_users at least 4"):
        table(path, **wrong)


@pytest.fixture
def photos(tmp_path):
    """A table of images in a folder next to it; image 59 is broken."""
    (tmp_path / "img").mkdir()
    for number in range(60):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "img" / f"{number}.png")
    (tmp_path / "img" / "59.png").write_bytes(b"no image")
    rows = [{"user_id": r["user_id"], "image": f"img/{r['text'].split()[1]}.png", "label": r["label"]} for r in ratings()]
    assert any(row["image"] == "img/59.png" for row in rows)
    return rows


def test_images_are_found_beside_the_table_and_opened_when_needed(tmp_path, photos):
    population = table(write(tmp_path / "t.csv", photos))
    names = [path.name for path in population.items.paths]
    assert len(names) == 60 and population.items.take([names.index("7.png")])[0].getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(ValueError, match=r"59.png cannot be read"):
        population.items.take([names.index("59.png")])


def test_an_image_is_one_however_its_path_is_spelt(tmp_path, photos):
    (tmp_path / "link").symlink_to(tmp_path / "img")
    spellings = (" {} ", "./{}", "img/../{}", "link/../{}", str(tmp_path / "{}"))
    again = [row | {"image": spelling.format(row["image"])} for row in photos for spelling in spellings]
    again += [row | {"image": row["image"].replace("img", "link")} for row in photos]
    population = table(write(tmp_path / "t.csv", photos + again))
    assert len(population.items) == 60 and any("1,920 rows left out" in note for note in population.notes)
    assert population.fingerprint() == table(write(tmp_path / "u.csv", photos)).fingerprint()


def test_an_image_that_is_missing_is_named_with_its_line(tmp_path, photos):
    photos[6]["image"] = photos[9]["image"] = "img/none.png"
    with pytest.raises(FileNotFoundError, match=r"t.csv, line 8: there is no image .*none.png \(1 of 61 images .*relative to"):
        table(write(tmp_path / "t.csv", photos))


def test_images_of_users_who_are_not_used_need_not_exist(tmp_path, photos):
    rows = [*photos, {"user_id": "shy", "image": "img/none.png", "label": "good"}]
    assert len(table(write(tmp_path / "t.csv", rows)).items) == 60


def parquet(path, rows, **kinds):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet takes pyarrow, an optional dependency")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet takes pyarrow, an optional dependency")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    made = pyarrow.table({name: pyarrow.array(values, type=kinds.get(name)) for name, values in columns.items()})
    parquet.write_table(made, path, row_group_size=50)
    return path


def test_texts_are_the_same_whatever_white_space_is_around(tmp_path):
    rows = ratings()
    again = [row | {"text": f" {row['text']}\t"} for row in rows]
    (tmp_path / "spaced").mkdir()
    spaced = table(write(tmp_path / "spaced" / "t.csv", rows + again))
    assert same(table(write(tmp_path / "t.csv", rows)), spaced)
    assert any("320 rows left out" in note for note in spaced.notes)
    for user in spaced.users:
        shown, asked = ({*texts_of(spaced, getattr(user, role))} for role in ("support", "query"))
        assert not shown & asked


def test_parquet_is_as_good_as_csv(tmp_path):
    rows = ratings(labels=(1, 2, 3))
    first = table(write(tmp_path / "t.csv", rows))
    assert first.class_names == ("1", "2", "3")
    assert same(first, table(parquet(tmp_path / "t.parquet", rows)))
    floats = [row | {"label": float(row["label"])} for row in rows]
    assert same(first, table(parquet(tmp_path / "f.parquet", floats)))
    assert open_table(tmp_path / "t.parquet").length == 320


def test_parquet_names_rows_that_lack_a_value(tmp_path):
    rows = ratings()
    rows[3]["label"], rows[60]["text"] = None, None
    assert "2 rows left out (a value is missing): row 4, 61" in table(parquet(tmp_path / "t.parquet", rows)).notes


def test_parquet_whose_missing_numbers_are_not_null_lacks_them_all_the_same(tmp_path):
    rows = [row | {"user_id": float(row["user_id"][1:]), "label": float(row["label"])} for row in ratings(labels=(1, 2))]
    rows[3]["label"], rows[60]["user_id"] = float("nan"), float("nan")
    population = table(parquet(tmp_path / "t.parquet", rows))
    assert "2 rows left out (a value is missing): row 4, 61" in population.notes
    assert "nan" not in {user.user_id for user in population.users}


def test_parquet_that_is_broken_or_holds_something_else(tmp_path):
    whole = parquet(tmp_path / "t.parquet", ratings()).read_bytes()
    with pytest.raises(ValueError, match=r"t.parquet cannot be read as Parquet .*; restore it"):
        table(put(tmp_path, whole[: len(whole) // 2], "t.parquet"))
    with pytest.raises(ValueError, match=r"column 'text' holds list<.*>; it should hold strings or numbers"):
        table(parquet(tmp_path / "l.parquet", [row | {"text": [row["text"]]} for row in ratings()]))
    with pytest.raises(ValueError, match="has no column 'label'"):
        table(parquet(tmp_path / "m.parquet", [{"user_id": 1, "text": "a"}]))


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "of two", "dictionary"])
def test_parquet_whose_ids_are_bytes_is_refused(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet takes pyarrow, an optional dependency")
    kinds = {"of two": pyarrow.binary(2), "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())}
    made = kinds[kind] if kind in kinds else getattr(pyarrow, kind)()
    rows = [row | {"user_id": row["user_id"][1:].encode()} for row in ratings()]
    with pytest.raises(ValueError, match=r"column 'user_id' holds .*binary.*; it should hold strings or numbers"):
        table(parquet(tmp_path / "b.parquet", rows, user_id=made))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[parquet\]', or save the table as \.csv"):
        table(put(tmp_path, b"PAR1", "t.parquet"))


def test_a_description_says_who_is_there_and_what_was_left_out(tmp_path):
    rows = ratings() + [row | {"user_id": "shy"} for row in ratings()[:3]]
    population = table(write(tmp_path / "t.csv", rows))
    said = describe(population).splitlines()
    counts = [len(getattr(population, split)) for split in SPLITS]
    assert said[0] == "population table-t: {} train, {} val, {} test users".format(*counts)
    examples = 8 * sum(counts)
    assert said[1].startswith(f"{examples} examples of these users, {320 - examples} that fit the population model, 60 disti")
    assert said[2] == "2 classes: bad, good"
    assert "1 users left out (fewer than 4 different rows): shy" in said
    assert said[-1] == f"{40 - sum(counts)} further users fit the population model and are in no split"


def test_the_cost_estimate_is_in_units_for_people():
    assert cost_estimate(1000, 384, 50) == "features of 1,000 items: about 1.5 MB on disk and 20 s at 50 items/s"
    assert cost_estimate(10**6, 2048, 500) == "features of 1,000,000 items: about 8.2 GB on disk and 33 min at 500 items/s"
    assert cost_estimate(10**6, 2048, 50).endswith("and 5.6 h at 50 items/s")


def test_examples_have_the_types_that_training_expects(path):
    population = table(path)
    assert population.fitting.inputs.dtype == population.fitting.labels.dtype == torch.int64
    assert {getattr(u, r).inputs.dtype for u in population.users for r in ROLES} == {torch.int64}

"""The pack stage: every kept rollout once, with its targets and columns, and nothing that cannot be learned from."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.rows import write_kept

from dasd_lite.config.stages import PackConfig
from dasd_lite.data.dataset import read_table, shards
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import KEPT, ROLLOUT, ROW
from dasd_lite.data.writer import ShardWriter
from dasd_lite.errors import CheckpointError, DataError
from dasd_lite.stages import pack

pytestmark = pytest.mark.filterwarnings("error")


def selected(folder, sizes, offset=0, weights=None, schema=KEPT):
    """A finished select folder; `sizes` is (tokens, of them context) of each rollout."""
    return write_kept(
        folder,
        [
            {
                "uid": f"{folder.name}{i}",
                "ids": [offset + 100 * i + j for j in range(tokens)],
                "num_context_tokens": context,
                "weight": weight,
            }
            for i, ((tokens, context), weight) in enumerate(zip(sizes, weights or [None] * len(sizes), strict=True))
        ],
        schema,
    )


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 23)
    return selected(tmp_path / "own", [(int(n), int(rng.integers(1, n))) for n in lengths])


def documents(folder):
    """uid → (ids, targets) of each document, in the order of the rows."""
    packed = {}
    for row in read_table(folder, "rows").to_pylist():
        edges = np.cumsum([0, *row["doc_lengths"]])
        assert edges[-1] == len(row["ids"]) == len(row["loss_mask"])
        for uid, a, b in zip(row["uids"], edges[:-1], edges[1:], strict=True):
            assert uid not in packed
            packed[uid] = (row["ids"][a:b], row["loss_mask"][a:b])
    return packed


@pytest.mark.parametrize("method", ["best_fit", "in_order"])
def test_every_rollout_is_packed_once_with_its_targets(source, tmp_path, method):
    manifest = pack.pack(source, PackConfig(seq_len=64, method=method), out=tmp_path / "pack", seed=0).manifest
    kept = read_table(source, "kept").to_pylist()
    packed = documents(tmp_path / "pack")
    assert packed == {
        row["uid"]: (row["ids"], [i >= row["num_context_tokens"] for i in range(len(row["ids"]))]) for row in kept
    }
    rows = read_table(tmp_path / "pack", "rows").to_pylist()
    assert all(len(row["ids"]) <= 64 for row in rows)
    tokens = sum(len(row["ids"]) for row in kept)
    assert manifest["counts"] == {
        "rollouts": 23,
        "replayed": 0,
        "rows": len(rows),
        "tokens": tokens,
        "target_tokens": tokens - sum(row["num_context_tokens"] for row in kept),
        "fill": pytest.approx(tokens / (64 * len(rows))),
    }
    if method == "in_order":
        assert list(packed) == [row["uid"] for row in kept]


def test_the_same_input_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        pack.pack(source, PackConfig(seq_len=64), out=tmp_path / name, seed=0)
    for one, other in zip(shards(tmp_path / "a", "rows"), shards(tmp_path / "b", "rows"), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("replay", "joined"), [(0.0, 0), (0.5, 3), (1.0, 6), (2.6, 12)])
def test_replay_adds_this_many_of_the_phase_before(tmp_path, replay, joined):
    own, before = selected(tmp_path / "own", [(5, 2)] * 6), selected(tmp_path / "before", [(7, 3)] * 12, offset=5000)
    manifest = pack.pack(
        own, PackConfig(seq_len=32, replay=replay), out=tmp_path / "pack", seed=0, earlier=before
    ).manifest
    packed = documents(tmp_path / "pack")
    assert sum(uid.startswith("before") for uid in packed) == joined
    assert (manifest["counts"]["replayed"], manifest["counts"]["rollouts"]) == (joined, 6 + joined)
    theirs = {row["uid"]: row["ids"] for row in read_table(before, "kept").to_pylist()}
    assert all(packed[uid][0] == theirs[uid] for uid in packed if uid in theirs)


def test_the_seed_draws_what_is_replayed(tmp_path):
    own, before = selected(tmp_path / "own", [(5, 2)] * 3), selected(tmp_path / "before", [(7, 3)] * 40)
    drawn = []
    for seed in (0, 0, 1):
        out = tmp_path / f"pack{len(drawn)}"
        pack.pack(own, PackConfig(seq_len=32, replay=4.0), out=out, seed=seed, earlier=before)
        drawn.append({uid for uid in documents(out) if uid.startswith("before")})
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_number_of_replayed_answers_and_replay_alone(tmp_path, capsys):
    own, before = selected(tmp_path / "own", [(5, 2)] * 6), selected(tmp_path / "before", [(7, 3)] * 12)
    both = pack.pack(own, out=tmp_path / "both", earlier=before, seq_len=32, replay_answers=5)
    assert (both.counts["replayed"], both.counts["rollouts"]) == (5, 11)
    alone = pack.pack(None, out=tmp_path / "alone", earlier=before, seq_len=32, replay_answers=5)
    assert (alone.counts["replayed"], alone.counts["rollouts"]) == (5, 5)
    assert {uid for uid in documents(both.folder) if uid.startswith("before")} == set(documents(alone.folder))
    every = pack.pack(None, out=tmp_path / "every", earlier=before, seq_len=32)
    assert (every.counts["replayed"], every.counts["rollouts"]) == (12, 12)
    assert "note" not in capsys.readouterr().err
    more = pack.pack(None, out=tmp_path / "more", earlier=before, seq_len=32, replay_answers=13)
    assert more.counts["rollouts"] == 12
    assert "pack.replay_answers = 13, but" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(DataError, match="there is nothing to pack: pass what select wrote as `kept` or `earlier`"):
        pack.pack(None, out=tmp_path / "nothing")
    with pytest.raises(
        DataError, match=r"pack\.replay_answers = 5 adds rollouts of an earlier phase; pass their folder"
    ):
        pack.pack(own, out=tmp_path / "nothing", replay_answers=5)


def test_replay_for_another_tokenizer_is_refused(tmp_path):
    folders = [selected(tmp_path / name, [(5, 2)] * 3) for name in ("own", "before")]
    for folder, tokenizer in zip(folders, "ab", strict=True):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["inputs"]["tokenizer"] = tokenizer
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"own and .*before: selected for students with different tokenizers"):
        pack.pack(folders[0], out=tmp_path / "pack", earlier=folders[1], seq_len=32, replay=1.0)


# --- weights ------------------------------------------------------------------------------------------


def weights_of(folder):
    """uid → weight of each document."""
    rows = read_table(folder, "rows").to_pylist()
    return {uid: w for row in rows for uid, w in zip(row["uids"], row["weights"], strict=True)}


@pytest.mark.parametrize("method", ["best_fit", "in_order"])
def test_weights_stay_with_their_documents(tmp_path, method):
    rng = np.random.default_rng(1)
    weights = rng.random(23).astype(np.float32).tolist()
    own = selected(tmp_path / "own", [(int(n), 1) for n in rng.integers(2, 40, 23)], weights=weights)
    pack.pack(own, PackConfig(seq_len=64, method=method), out=tmp_path / "pack", seed=0)
    assert weights_of(tmp_path / "pack") == {f"own{i}": weight for i, weight in enumerate(weights)}
    table = read_table(tmp_path / "pack", "rows")
    assert table.schema == ROW
    assert [len(row) for row in table["weights"].to_pylist()] == [len(row) for row in table["doc_lengths"].to_pylist()]


def test_where_nothing_has_a_weight_the_column_is_null(source, tmp_path):
    pack.pack(source, PackConfig(seq_len=64), out=tmp_path / "pack", seed=0)
    table = read_table(tmp_path / "pack", "rows")
    assert table.schema == ROW
    assert table["weights"].null_count == len(table)


@pytest.mark.parametrize(("own_weights", "before_weights"), [([0.5, 1.5], None), (None, [0.25, 1.75])])
def test_those_without_a_weight_count_1_beside_those_with(tmp_path, own_weights, before_weights):
    own = selected(tmp_path / "own", [(5, 2)] * 2, weights=own_weights)
    before = selected(tmp_path / "before", [(7, 3)] * 2, weights=before_weights)
    pack.pack(own, PackConfig(seq_len=32, replay=1.0), out=tmp_path / "pack", seed=0, earlier=before)
    expected = dict(zip(("own0", "own1"), own_weights or [1.0, 1.0], strict=True))
    assert weights_of(tmp_path / "pack") == expected | dict(
        zip(("before0", "before1"), before_weights or [1.0, 1.0], strict=True)
    )


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    older = KEPT.remove(KEPT.get_field_index("weight"))
    source = selected(tmp_path / "own", [(5, 2)], schema=older)
    with pytest.raises(DataError, match=r"own/.*\.parquet: has no column 'weight'; it has uid, "):
        pack.pack(source, PackConfig(seq_len=64), out=tmp_path / "pack", seed=0)


# --- columns that an objective needs --------------------------------------------------------------------


class Objective:
    """Needs columns and minimizes nothing."""

    def __init__(self, *needs, groups=False):
        self.needs, self.groups = needs, groups

    def per_token(self, logits_CV, target_ids_C, tokens):
        raise AssertionError("not trained with")

    def loss(self, per_token_N, targets):
        raise AssertionError("not trained with")


def columns_of(folder):
    """uid → name → value of each document: a number, or what it has for each of its target tokens."""
    packed = {}
    for row in read_table(folder, "rows").to_pylist():
        edges = np.cumsum([0, *row["doc_lengths"]])
        targets = [sum(row["loss_mask"][a:b]) for a, b in itertools.pairwise(edges)]
        edges = np.cumsum([0, *targets])
        for d, uid in enumerate(row["uids"]):
            packed[uid] = {n.removeprefix("doc:"): row[n][d] for n in row if n.startswith("doc:")}
            packed[uid] |= {n[6:]: row[n][edges[d] : edges[d + 1]] for n in row if n.startswith("token:")}
        assert all(len(row[n]) == edges[-1] for n in row if n.startswith("token:"))
    return packed


def side_table(path, kept, seed=0, **types):
    """Columns for all rollouts in another order, and for one that was not kept; returns uid → name → value."""
    rng = np.random.default_rng(seed)
    rows = [{"uid": "unknown", "reward": None, "index": 1, "old": [], "top": [], "ids": None}]
    for row in kept:
        n = len(row["ids"]) - row["num_context_tokens"]
        numbers = rng.random((n, 4)).astype(np.float32)
        rows.append(
            {
                "uid": row["uid"],
                "reward": float(np.float32(rng.normal())),
                "index": int(rng.integers(2**40)),
                "old": numbers[:, 0].tolist(),
                "top": numbers[:, 1:].tolist(),
                "ids": rng.integers(0, 100, (n, 2)).tolist(),
            }
        )
    rng.shuffle(rows)
    types = {
        "uid": pa.string(),
        "reward": pa.float64(),
        "index": pa.int64(),
        "old": pa.list_(pa.float32()),
        "top": pa.large_list(pa.list_(pa.float32(), 3)),
        "ids": pa.list_(pa.list_(pa.int32())),
    } | types
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(types)), path)
    return {row["uid"]: {k: v for k, v in row.items() if k != "uid"} for row in rows if row["uid"] != "unknown"}


@pytest.mark.parametrize("method", ["best_fit", "in_order"])
def test_columns_stay_with_their_documents_and_tokens(source, tmp_path, method):
    kept = read_table(source, "kept").to_pylist()
    wanted = side_table(tmp_path / "columns.parquet", kept)
    needs = Objective("top", "reward", "old", "index", "ids")
    config = PackConfig(seq_len=64, method=method, columns=tmp_path / "columns.parquet")
    rows = pack.pack(source, config, out=tmp_path / "pack", objective=needs)
    assert columns_of(rows.folder) == wanted
    assert rows.to_table().schema == pa.schema(
        [
            *ROW,
            ("token:top", pa.large_list(pa.list_(pa.float32(), 3))),
            ("doc:reward", pa.list_(pa.float32())),
            ("token:old", pa.large_list(pa.float32())),
            ("doc:index", pa.list_(pa.int64())),
            ("token:ids", pa.large_list(pa.list_(pa.int64(), 2))),
        ]
    )
    plain = pack.pack(source, PackConfig(seq_len=64, method=method), out=tmp_path / "plain")
    assert documents(rows.folder) == documents(plain.folder)
    # Another file is another pack; one that is not read is not.
    side_table(tmp_path / "columns.parquet", kept, seed=1)
    with pytest.raises(CheckpointError, match=r"columns\.parquet has changed"):
        pack.pack(source, config, out=tmp_path / "pack", objective=needs)
    assert pack.pack(source, config, out=tmp_path / "plain") == plain


def test_columns_of_replayed_rollouts_and_of_one_that_is_there_twice(tmp_path):
    own, before = selected(tmp_path / "own", [(5, 2)] * 2), selected(tmp_path / "before", [(7, 3)] * 2)
    kept = [row for folder in (own, before) for row in read_table(folder, "kept").to_pylist()]
    wanted = side_table(tmp_path / "columns.parquet", kept)
    config = PackConfig(seq_len=32, replay=1.0, columns=tmp_path / "columns.parquet")
    rows = pack.pack(own, config, out=tmp_path / "pack", earlier=before, objective=Objective("old", "reward"))
    assert columns_of(rows.folder) == {uid: {n: row[n] for n in ("old", "reward")} for uid, row in wanted.items()}
    twice = pack.pack(own, config, out=tmp_path / "twice", earlier=own, objective=Objective("reward"))
    rewards = [x for row in twice.to_table().to_pylist() for x in zip(row["uids"], row["doc:reward"], strict=True)]
    assert sorted(rewards) == sorted(2 * [(f"own{i}", wanted[f"own{i}"]["reward"]) for i in range(2)])


def test_rows_without_columns_are_the_same_bytes(source, tmp_path):
    for name, objective in (("sft", "sft"), ("mine", Objective())):
        pack.pack(source, PackConfig(seq_len=64), out=tmp_path / name, objective=objective)
    (one,), (other,) = (shards(tmp_path / name, "rows") for name in ("sft", "mine"))
    assert one.read_bytes() == other.read_bytes()


def write_rollouts(folder, kept, change=lambda i, row: row):
    """The rollouts that these were selected from, by a teacher with the student's tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for i, row in enumerate(kept):
        answer = row["ids"][row["num_context_tokens"] :]
        logprobs = (-rng.random(len(answer))).astype(np.float32).tolist()
        common = {name: row[name] for name in ROLLOUT.names if name in row}
        rows.append(change(i, common | {"token_ids": answer, "logprobs": logprobs, "token_bytes": [1] * len(answer)}))
    with ShardWriter(folder, identify("sample", 1, {}, {}), {"rollouts": ROLLOUT}) as writer:
        writer.write("rollouts", pa.Table.from_pylist(rows[::-1], schema=ROLLOUT))
        writer.publish({})
    return {row["uid"]: row["logprobs"] for row in rows}


def test_teacher_logprobs_come_from_the_rollouts(tmp_path):
    own, before = selected(tmp_path / "own", [(5, 2), (9, 4)]), selected(tmp_path / "before", [(7, 3)] * 2)
    wanted = {}
    for folder in (own, before):
        wanted |= write_rollouts(tmp_path / f"{folder.name}-sample", read_table(folder, "kept").to_pylist())
    rows = pack.pack(
        own,
        PackConfig(seq_len=32, replay=1.0),
        out=tmp_path / "pack",
        earlier=before,
        rollouts=tmp_path / "own-sample",
        earlier_rollouts=tmp_path / "before-sample",
        objective=Objective("teacher_logprobs"),
    )
    assert {uid: row["teacher_logprobs"] for uid, row in columns_of(rows.folder).items()} == wanted
    with pytest.raises(DataError, match=r"own-sample: no teacher_logprobs for 2 of 4 rollouts; the first is uid befor"):
        pack.pack(
            own,
            PackConfig(seq_len=32, replay=1.0),
            out=tmp_path / "other",
            earlier=before,
            rollouts=tmp_path / "own-sample",
            objective=Objective("teacher_logprobs"),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "needs the teacher's tokens to be the student's, but its tokens are not known; use an"),
        ({"token_ids": [102, 103, 60]}, "but its token 2 is 60, the student's 104; use an objective without it"),
        ({"token_ids": [102, 103]}, "but it has 2, the student 3 with the end token; use an objective without it"),
        ({"logprobs": None}, "column 'teacher_logprobs' has 0 values, but the rollout has 3 target tokens"),
        ({"logprobs": [-1.0, None, -2.0]}, "column 'teacher_logprobs' has a null or a number that is not finite"),
    ],
)
def test_teachers_of_other_tokens_are_refused(tmp_path, change, message):
    own = selected(tmp_path / "own", [(5, 2)] * 2)
    kept = read_table(own, "kept").to_pylist()
    write_rollouts(tmp_path / "sample", kept, lambda i, row: row | change if i == 1 else row)
    with pytest.raises(DataError) as error:
        pack.pack(own, out=tmp_path / "pack", rollouts=tmp_path / "sample", objective=Objective("teacher_logprobs"))
    assert str(error.value).startswith(f"{tmp_path / 'sample'}: uid own1: ")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [r for r in rows if r["uid"] != "own1"], "has no row for 1 of 3 rollouts; the first is uid own1"),
        (lambda rows: [*rows, rows[-1]], " occurs twice; each rollout may have one row"),
        ({"reward": None}, "uid own1: column 'reward' has a null or a number that is not finite"),
        ({"reward": float("inf")}, "uid own1: column 'reward' has a null or a number that is not finite"),
        ({"reward": 1e300}, "uid own1: column 'reward' has a number that float32 cannot hold"),
        ({"old": None}, "uid own1: column 'old' has 0 values, but the rollout has 3 target tokens (its answer and the"),
        ({"old": [0.5, 0.5]}, "uid own1: column 'old' has 2 values, but the rollout has 3 target tokens"),
        ({"old": [0.5, None, 0.5]}, "uid own1: column 'old' has a null or a number that is not finite"),
        ({"old": [0.5, float("nan"), 0.5]}, "uid own1: column 'old' has a null or a number that is not finite"),
        ({"ids": [[1, 2]]}, "uid own1: column 'ids' has 1 values, but the rollout has 3 target tokens"),
        ({"ids": [[1, 2], [1], [1, 2]]}, "uid own1: column 'ids' has lists of 2 and of 1 values; all must be equally"),
        ({"ids": [[1, 2], None, [1, 2]]}, "uid own1: column 'ids' has lists of 2 and of 0 values; all must be equally"),
        ({"ids": [[1, 2], [1, None], [1, 2]]}, "uid own1: column 'ids' has a null or a number that is not finite"),
        (
            lambda rows: [{k: v for k, v in r.items() if k != "old"} for r in rows],
            "has no column 'old'; it has uid, re",
        ),
        (lambda rows: [{k: v for k, v in r.items() if k != "uid"} for r in rows], "has no column 'uid'; it has reward"),
        (
            lambda rows: [r | {"old": "text"} for r in rows],
            "column 'old' is string; it must be a number per rollout, a",
        ),
        (
            lambda rows: [r | {"old": [[[1.0]]]} for r in rows],
            "; it must be a number per rollout, a list with a number",
        ),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, change, message):
    own, path = selected(tmp_path / "own", [(5, 2), (5, 2), (5, 2)]), tmp_path / "columns.parquet"
    side_table(path, read_table(own, "kept").to_pylist())
    rows = [row for row in pq.read_table(path).to_pylist() if row["uid"] != "unknown"]
    rows = change(rows) if callable(change) else [r | change if r["uid"] == "own1" else r for r in rows]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError) as error:
        pack.pack(own, out=tmp_path / "pack", columns=path, objective=Objective("reward", "old", "top", "ids"))
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("needs", "columns", "message"),
    [
        ("weight", None, r"own: train.objective = 'tests.stages.test_pack:Objective' needs weights, but no roll"),
        (
            "teacher_logprobs",
            None,
            "the objective needs teacher_logprobs, which are in the rollouts; pass their folder",
        ),
        ("reward", None, "the objective needs the column 'reward'; set pack.columns to a Parquet file with uid and re"),
        ("reward", "text", "columns.parquet: not a Parquet file"),
        ("reward", "missing", "columns.parquet: no such file"),
    ],
)
def test_columns_that_are_nowhere_are_refused(source, tmp_path, needs, columns, message):
    path = tmp_path / "columns.parquet"
    if columns == "text":
        path.write_text("uid,reward\n")
    with pytest.raises(DataError, match=message) as error:
        pack.pack(source, out=tmp_path / "pack", columns=columns and path, objective=Objective(needs))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pack").exists()


# --- groups ---------------------------------------------------------------------------------------------


def grouped(folder, seed=0, prompts=9, longest=15):
    """Kept rollouts of a few prompts, a prompt's not beside each other."""
    rng = np.random.default_rng(seed)
    rows = [
        {"uid": f"{folder.name}{p}.{i}", "prompt_uid": f"q{p}", "num_context_tokens": 1, "ids": list(range(int(n)))}
        for p in range(prompts)
        for i, n in enumerate(rng.integers(2, longest, rng.integers(1, 5)))
    ]
    rng.shuffle(rows)
    return write_kept(folder, rows)


@pytest.mark.parametrize("method", ["best_fit", "tight", "in_order"])
def test_all_answers_of_a_prompt_are_in_one_row(tmp_path, method):
    own, before = grouped(tmp_path / "own"), grouped(tmp_path / "before", seed=1, prompts=3)
    config = PackConfig(seq_len=110, method=method, replay=0.5)
    rows = pack.pack(own, config, out=tmp_path / "pack", earlier=before, objective=Objective(groups=True))
    prompt_of = {r["uid"]: r["prompt_uid"] for f in (own, before) for r in read_table(f, "kept").to_pylist()}
    row_of, seen = {}, []
    for r, row in enumerate(rows.to_table().to_pylist()):
        assert len(row["ids"]) <= 110
        prompts = [prompt_of[uid] for uid in row["uids"]]
        assert all(row_of.setdefault(prompt, r) == r for prompt in prompts)
        numbers = dict(zip(prompts, row["doc:prompt"], strict=True))
        assert [numbers[prompt] for prompt in prompts] == row["doc:prompt"] and len(set(numbers.values())) == len(
            numbers
        )
        seen += row["uids"]
    counts = rows.counts
    assert sorted(seen) == sorted(uid for uid in documents(rows.folder)) and len(seen) == counts["rollouts"]
    assert counts["fill"] == pytest.approx(counts["tokens"] / (110 * counts["rows"]))
    with pytest.raises(CheckpointError, match="groups: True there, not set now"):
        pack.pack(own, config, out=tmp_path / "pack", earlier=before)


def test_answers_of_a_prompt_that_are_longer_than_a_row_together_are_refused(tmp_path):
    rows = [
        {"uid": f"{p}{i}", "prompt_uid": p, "num_context_tokens": 1, "ids": [0] * 20}
        for p in ("a", "b")
        for i in range(3)
    ]
    own = write_kept(tmp_path / "own", rows[:5])
    with pytest.raises(DataError) as error:
        pack.pack(own, out=tmp_path / "pack", seq_len=59, objective=Objective(groups=True))
    assert str(error.value) == (
        "prompt a: its 3 answers have 60 tokens together, more than pack.seq_len = 59, and the objective needs them in"
        " one row; raise pack.seq_len, or lower select.keep or select.max_tokens"
    )
    assert not (tmp_path / "pack").exists()
    assert pack.pack(own, out=tmp_path / "pack", seq_len=60, objective=Objective(groups=True)).counts["rows"] == 2


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [9, 12])
def test_a_rollout_with_no_supervised_token_is_refused(tmp_path, context):
    source = selected(tmp_path / "own", [(5, 2), (9, context), (4, 4)])
    with pytest.raises(DataError) as error:
        pack.pack(source, PackConfig(seq_len=64), out=tmp_path / "pack", seed=0)
    assert str(error.value) == (
        f"{source}: 2 rollouts have no token to learn, the first is own1: 9 tokens, {context} of them its prompt;"
        " leave it out of the data"
    )
    assert not (tmp_path / "pack").exists()


def test_a_rollout_longer_than_a_row_is_refused_with_its_numbers(tmp_path):
    source = selected(tmp_path / "own", [(5, 2), (65, 3)])
    with pytest.raises(DataError, match=r"65") as error:
        pack.pack(source, PackConfig(seq_len=64), out=tmp_path / "pack", seed=0)
    assert "64" in str(error.value)
    assert not (tmp_path / "pack").exists()
    assert pack.pack(source, PackConfig(seq_len=65), out=tmp_path / "pack", seed=0).manifest["counts"]["rows"] == 2


def test_replay_without_a_phase_before(source, tmp_path):
    with pytest.raises(DataError, match=r"pack\.replay = 1\.0 adds rollouts of an earlier phase"):
        pack.pack(source, PackConfig(replay=1.0), out=tmp_path / "pack", seed=0)


def test_no_temporary_file_is_left(source, tmp_path):
    before = set(tmp_path.iterdir())
    pack.pack(source, PackConfig(seq_len=64), out=tmp_path / "pack", seed=0)
    assert set(tmp_path.iterdir()) == before | {tmp_path / "pack"}

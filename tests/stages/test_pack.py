"""The pack stage: every kept rollout once, its targets marked, and no row that could not be learnt from."""

import numpy as np
import pyarrow as pa
import pytest

from dasd_lite.config.stages import PackConfig
from dasd_lite.data.dataset import read_table, shards
from dasd_lite.data.manifest import Identity
from dasd_lite.data.records import KEPT, ROW
from dasd_lite.data.writer import ShardWriter
from dasd_lite.errors import DataError
from dasd_lite.stages import pack

BLANK = {
    "prompt_uid": "q",
    "messages": [],
    "domain": "all",
    "answer": None,
    "index": 0,
    "completion": "x",
    "finish_reason": "stop",
    "prefix_bytes": 0,
    "score": None,
    "num_sentences": 0,
    "class_counts": None,
}


def selected(folder, sizes, offset=0, weights=None, schema=KEPT):
    """A finished select folder; `sizes` is (tokens, of them context) of each rollout."""
    rows = [
        {**BLANK, "uid": f"{folder.name}{i}", "ids": [offset + 100 * i + j for j in range(n)], "num_context_tokens": c}
        for i, (n, c) in enumerate(sizes)
    ]
    rows = [row | {"weight": weight} for row, weight in zip(rows, weights or [None] * len(rows), strict=True)]
    with ShardWriter(folder, Identity("select", 1, {"sizes": sizes}, {}), {"kept": schema}, shard_rows=3) as writer:
        for i in range(0, len(rows), 2):
            writer.write("kept", pa.RecordBatch.from_pylist(rows[i : i + 2], schema=schema))
        writer.publish({})
    return folder


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 23)
    return selected(tmp_path / "own", [(int(n), int(rng.integers(1, n))) for n in lengths])


def documents(folder):
    """uid → (ids, targets) of each document, in the order of the rows."""
    found = {}
    for row in read_table(folder, "rows").to_pylist():
        edges = np.cumsum([0, *row["doc_lengths"]])
        assert edges[-1] == len(row["ids"]) == len(row["loss_mask"])
        for uid, a, b in zip(row["uids"], edges[:-1], edges[1:], strict=True):
            assert uid not in found
            found[uid] = (row["ids"][a:b], row["loss_mask"][a:b])
    return found


@pytest.mark.parametrize("method", ["best_fit", "in_order"])
def test_every_rollout_is_there_once_with_its_targets(source, tmp_path, method):
    manifest = pack.run(source, PackConfig(seq_len=64, method=method), tmp_path / "pack", seed=0)
    kept = read_table(source, "kept").to_pylist()
    found = documents(tmp_path / "pack")
    assert found == {
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
        assert list(found) == [row["uid"] for row in kept]


def test_the_same_input_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        pack.run(source, PackConfig(seq_len=64), tmp_path / name, seed=0)
    for one, other in zip(shards(tmp_path / "a", "rows"), shards(tmp_path / "b", "rows"), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("replay", "joined"), [(0.0, 0), (0.5, 3), (1.0, 6), (2.6, 12)])
def test_replay_joins_so_many_of_the_phase_before(tmp_path, replay, joined):
    own, before = selected(tmp_path / "own", [(5, 2)] * 6), selected(tmp_path / "before", [(7, 3)] * 12, offset=5000)
    manifest = pack.run(own, PackConfig(seq_len=32, replay=replay), tmp_path / "pack", seed=0, replay=before)
    found = documents(tmp_path / "pack")
    assert sum(uid.startswith("before") for uid in found) == joined
    assert (manifest["counts"]["replayed"], manifest["counts"]["rollouts"]) == (joined, 6 + joined)
    theirs = {row["uid"]: row["ids"] for row in read_table(before, "kept").to_pylist()}
    assert all(found[uid][0] == theirs[uid] for uid in found if uid in theirs)


def test_what_is_replayed_is_drawn_by_the_seed(tmp_path):
    own, before = selected(tmp_path / "own", [(5, 2)] * 3), selected(tmp_path / "before", [(7, 3)] * 40)
    drawn = []
    for seed in (0, 0, 1):
        out = tmp_path / f"pack{len(drawn)}"
        pack.run(own, PackConfig(seq_len=32, replay=4.0), out, seed=seed, replay=before)
        drawn.append({uid for uid in documents(out) if uid.startswith("before")})
    assert drawn[0] == drawn[1] != drawn[2]


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
    pack.run(own, PackConfig(seq_len=64, method=method), tmp_path / "pack", seed=0)
    assert weights_of(tmp_path / "pack") == {f"own{i}": weight for i, weight in enumerate(weights)}
    table = read_table(tmp_path / "pack", "rows")
    assert table.schema == ROW
    assert [len(row) for row in table["weights"].to_pylist()] == [len(row) for row in table["doc_lengths"].to_pylist()]


def test_where_nothing_has_a_weight_the_column_is_null(source, tmp_path):
    pack.run(source, PackConfig(seq_len=64), tmp_path / "pack", seed=0)
    table = read_table(tmp_path / "pack", "rows")
    assert table.schema == ROW
    assert table["weights"].null_count == len(table)


@pytest.mark.parametrize(("own_weights", "before_weights"), [([0.5, 1.5], None), (None, [0.25, 1.75])])
def test_those_without_a_weight_count_1_beside_those_with(tmp_path, own_weights, before_weights):
    own = selected(tmp_path / "own", [(5, 2)] * 2, weights=own_weights)
    before = selected(tmp_path / "before", [(7, 3)] * 2, weights=before_weights)
    pack.run(own, PackConfig(seq_len=32, replay=1.0), tmp_path / "pack", seed=0, replay=before)
    expected = dict(zip(("own0", "own1"), own_weights or [1.0, 1.0], strict=True))
    assert weights_of(tmp_path / "pack") == expected | dict(
        zip(("before0", "before1"), before_weights or [1.0, 1.0], strict=True)
    )


def test_a_folder_of_an_older_version_is_told(tmp_path):
    older = KEPT.remove(KEPT.get_field_index("weight"))
    source = selected(tmp_path / "own", [(5, 2)], schema=older)
    with pytest.raises(DataError, match=r"own: selected by an older version, without the column weight; run select"):
        pack.run(source, PackConfig(seq_len=64), tmp_path / "pack", seed=0)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [9, 12])
def test_a_rollout_with_no_supervised_token_is_refused(tmp_path, context):
    source = selected(tmp_path / "own", [(5, 2), (9, context), (4, 4)])
    with pytest.raises(DataError) as error:
        pack.run(source, PackConfig(seq_len=64), tmp_path / "pack", seed=0)
    assert str(error.value) == (
        f"{source}: 2 rollouts have no token to learn, the first is own1: 9 tokens, {context} of them its prompt;"
        " leave it out of the data"
    )
    assert not (tmp_path / "pack").exists()


def test_a_rollout_longer_than_a_row_is_refused_with_its_numbers(tmp_path):
    source = selected(tmp_path / "own", [(5, 2), (65, 3)])
    with pytest.raises(DataError, match=r"65") as error:
        pack.run(source, PackConfig(seq_len=64), tmp_path / "pack", seed=0)
    assert "64" in str(error.value)
    assert not (tmp_path / "pack").exists()
    assert pack.run(source, PackConfig(seq_len=65), tmp_path / "pack", seed=0)["counts"]["rows"] == 2


def test_replay_without_a_phase_before(source, tmp_path):
    with pytest.raises(DataError, match=r"pack\.replay = 1\.0 needs the folder of a phase before"):
        pack.run(source, PackConfig(replay=1.0), tmp_path / "pack", seed=0)


def test_nothing_of_it_stays_beside_the_folder(source, tmp_path):
    before = set(tmp_path.iterdir())
    pack.run(source, PackConfig(seq_len=64), tmp_path / "pack", seed=0)
    assert set(tmp_path.iterdir()) == before | {tmp_path / "pack"}

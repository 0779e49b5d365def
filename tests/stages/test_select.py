"""Selection on rollouts made by hand: every reason with its value, each rule, budgets, and what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from dasd_lite.chat.chat import Chat
from dasd_lite.config.stages import SelectConfig, Weighting
from dasd_lite.data.dataset import batches, read_table
from dasd_lite.data.manifest import Identity, read_manifest
from dasd_lite.data.records import ROLLOUT, SCORE
from dasd_lite.data.writer import ShardWriter
from dasd_lite.errors import CheckpointError, ConfigError, DataError
from dasd_lite.report.summary import rejections, summary
from dasd_lite.stages import select

GOOD = "<think> Start at 3. Up 1 is 4. </think>\nAnswer: 4"
LINE = "this line is here more than once\n"
SENTENCE = "The dial shows the very same number again. "


def rollout(uid, completion=GOOD, prompt="q", **columns):
    return {
        "uid": uid,
        "prompt_uid": prompt,
        "messages": [{"role": "user", "content": f"Which? {prompt}"}],
        "domain": "math",
        "answer": "4",
        "index": 0,
        "completion": completion,
        "finish_reason": "stop",
        "prefix_bytes": 0,
    } | columns


def write(folder, table, schema, rows, part=4):
    with ShardWriter(
        folder, Identity({"rollouts": "sample", "scores": "score"}[table], 1, {}, {"rows": str(rows)}), {table: schema}
    ) as writer:
        for i in range(0, len(rows), part):
            writer.write(table, pa.RecordBatch.from_pylist(rows[i : i + part], schema=schema))
        writer.publish({"rollouts": len(rows)})
    return folder


@pytest.fixture(scope="module")
def chat(demo):
    return Chat(demo / "student")


@pytest.fixture
def run(tmp_path, demo, chat):
    """`run(rows, **config)` selects; `classes={uid: "TTS="}` gives the rollouts scores."""

    def ran(rows, *, classes=None, max_tokens=10_000, seed=0, mask_prefix=False, out="select", force=False, **config):
        source = tmp_path / "rollouts"
        if not source.exists():
            write(source, "rollouts", ROLLOUT, rows)
        scores = None
        if classes is not None:
            scores = tmp_path / "scores"
            if not scores.exists():
                write(scores, "scores", SCORE, [score(chat, row, classes[row["uid"]]) for row in rows])
        select.select(
            source,
            str(demo / "student"),
            SelectConfig(**({"rule": "all"} | config)),
            out=tmp_path / out,
            seq_len=max_tokens,
            seed=seed,
            scores=scores,
            mask_prefix=mask_prefix,
            force=force,
        )
        return tmp_path / out

    return ran


def score(chat, row, classes):
    """T: p_T − p_S = 0.8; S: the reverse; =: equal; ·: no token begins in it."""
    p = {"T": (0.9, 0.1), "S": (0.1, 0.9), "=": (0.5, 0.5), "·": (np.nan, 0.5), "t": (0.45, 0.30)}
    p_teacher, p_student = zip(*(p[c] for c in classes), strict=True) if classes else ((), ())
    ids, num_context = chat.example(row["messages"], row["completion"])
    return {
        "uid": row["uid"],
        "sentence_ends": list(range(1, len(classes) + 1)),
        "p_teacher": p_teacher,
        "p_student": p_student,
        "teacher_mean_logprob": -1.0,
        "student_mean_logprob": -1.0,
        "num_teacher_tokens": 5,
        "ids": ids,
        "num_context_tokens": num_context,
    }


def kept(folder):
    return [uid for batch in batches(folder, "kept") for uid in batch["uid"].to_pylist()]


def rejected(folder):
    found = {}
    for batch in batches(folder, "rejected"):
        for row in batch.to_pylist():
            found[row["uid"]] = (row["reason"], row["value"])
    return found


# --- filters ----------------------------------------------------------------------------------------


def test_each_filter_gives_its_reason_and_the_number_behind_it(run, chat):
    tokens = len(chat.example(rollout("x")["messages"], GOOD)[0])
    long = GOOD.replace("Up 1", "Up 1 " + " ".join(str(n) for n in range(400)))
    lines = f"<think>\n{LINE * 4}</think>\nAnswer: 4"
    sentences = f"<think> {SENTENCE * 4}</think>\nAnswer: 4"
    grams = "<think> " + "abcdefghijklmnopqrstuvwxyz" * 12 + " </think>\nAnswer: 4"
    rows = [
        rollout("good"),
        rollout("cut off", finish_reason="length"),
        rollout("calls a tool", finish_reason="tool_calls"),
        rollout("bad header", finish_reason="malformed"),
        rollout("refuses", finish_reason="refusal"),
        rollout("filtered", finish_reason="content_filter"),
        rollout("stopped otherwise", finish_reason="abort"),
        rollout("not told", finish_reason="unknown", completion=GOOD + " <function=f>"),
        rollout("no thought", "Answer: 4"),
        rollout("two thoughts", "<think> a </think> b </think> Answer: 4"),
        rollout("no answer", "<think> a </think>\n "),
        rollout("empty thought", "<think> </think> Answer: 4"),
        rollout("opened twice", "<think> a <think> b </think> Answer: 4"),
        rollout("text before", "Well, <think> a </think> Answer: 4"),
        rollout("closed, not opened", "a </think> Answer: 4"),
        rollout("not closed", "<think> a Answer: 4"),
        rollout("empty", ""),
        rollout("call", GOOD + ' <tool_call>{"name": "f"}</tool_call><function=f>'),
        rollout("long", long),
        rollout("lines", lines),
        rollout("sentences", sentences),
        rollout("grams", grams),
    ]
    folder = run(rows, max_tokens=tokens + 700)
    found = rejected(folder)
    reasons = {uid: reason for uid, (reason, _) in found.items()}
    assert kept(folder) == ["good"]
    assert reasons == {
        "cut off": "truncated",
        "calls a tool": "function call",
        "bad header": "malformed channels",
        "refuses": "refused",
        "filtered": "refused",
        "stopped otherwise": "unfinished",
        "not told": "function call",
        **dict.fromkeys(["no thought", "empty thought", "empty"], "no thinking"),
        **dict.fromkeys(["no answer", "not closed"], "no answer"),
        **dict.fromkeys(["two thoughts", "opened twice", "text before", "closed, not opened"], "structure"),
        "call": "function call",
        "long": "too long",
        "lines": "repeated lines",
        "sentences": "repeated sentences",
        "grams": "repeated n-grams",
    }
    assert found["cut off"][1] == tokens
    assert (found["no thought"][1], found["two thoughts"][1]) == (0, 2)
    assert found["call"][1] == 2
    assert found["long"][1] == len(chat.example(rollout("x")["messages"], long)[0]) > tokens + 700
    assert found["lines"][1] == pytest.approx(3 * len(LINE.strip()) / len(lines), abs=0.03)
    assert found["sentences"][1] == pytest.approx(3 * len(SENTENCE) / len(sentences), abs=0.06)
    assert found["grams"][1] > 0.5
    counts = read_manifest(folder)["counts"]
    assert counts["rollouts"] == len(rows)
    assert counts["kept"] == counts["prompts_kept"] == 1
    assert sum(counts["rejected"].values()) == len(rows) - 1
    assert counts["rejected_values"]["function call"] == [1, tokens]
    assert counts["rejected_values"]["repeated n-grams"] == [found["grams"][1]] * 2
    table = rejections(read_manifest(folder))
    assert table is not None and table.row_count == len(counts["rejected"])


def test_the_table_tells_of_filters_only_and_writes_counts_whole():
    counts = {
        "rollouts": 1200,
        "rejected": {"rank": 500, "truncated": 30, "repeated lines": 6},
        "rejected_values": {"rank": [0.0, 2.5], "truncated": [1234.0, 32768.0], "repeated lines": [0.31234, 1.0]},
    }
    screen = Console(width=80)
    with screen.capture() as told:
        screen.print(rejections({"stage": "select", "counts": counts}))
    lines = [line.split() for line in told.get().splitlines()]
    assert lines[1:] == [
        ["truncated", "30", "2.5%", "1,234", "32,768"],
        ["repeated", "lines", "6", "0.5%", "0.312", "1"],
    ]
    assert rejections({"stage": "select", "counts": counts | {"rejected": {"rank": 500, "budget": 9}}}) is None
    assert rejections({"stage": "pack", "counts": {"rollouts": 1200}}) is None


def test_the_first_filter_that_fails_is_the_reason(run):
    row = rollout("all wrong", LINE * 9 + "<tool_call>", finish_reason="length")
    assert rejected(run([row, rollout("good")]))["all wrong"][0] == "truncated"


def test_filters_can_be_opened(run):
    rows = [rollout("no thought", "Answer: 4"), rollout("lines", f"<think> {LINE * 4}</think>\nAnswer: 4")]
    folder = run(
        rows, require_think=False, max_duplicate_lines=1.0, max_duplicate_sentences=1.0, max_repeated_ngrams=1.0
    )
    assert kept(folder) == ["no thought", "lines"]


def test_a_length_of_exactly_the_limit_is_kept(run, chat):
    tokens = len(chat.example(rollout("x")["messages"], GOOD)[0])
    assert kept(run([rollout("a")], max_tokens=tokens)) == ["a"]
    with pytest.raises(DataError, match="too long 1"):
        run([rollout("a")], max_tokens=tokens - 1, out="other")


def test_all_rejected_is_one_line_with_the_counts(run, tmp_path):
    rows = [rollout(str(n), finish_reason="length") for n in range(3)] + [rollout("x", "Answer: 4")]
    with pytest.raises(DataError) as error:
        run(rows)
    told = str(error.value)
    assert told.startswith(f"{tmp_path}/rollouts: all 4 candidates are rejected: truncated 3 (raise max_tokens")
    assert "no thinking 1 (" in told and "select.require_think = false" in told
    assert "\n" not in str(error.value)
    assert not (tmp_path / "select").exists(), "nothing half-written"


# --- what is kept -------------------------------------------------------------------------------------


def test_what_is_kept_is_the_rollout_and_the_ids_that_the_student_reads(run, chat):
    row = rollout("a", domain="code", answer=None, index=3)
    (found,) = read_table(run([row]), "kept").to_pylist()
    ids, num_context = chat.example(row["messages"], GOOD)
    assert found == row | {
        "ids": ids.tolist(),
        "num_context_tokens": num_context,
        "score": None,
        "weight": None,
        "num_sentences": 0,
        "class_counts": None,
    }


def test_scores_bring_sentences_classes_and_what_the_rule_ranked_by(run):
    classes = {"a": "TS=·T", "b": "T"}
    folder = run([rollout("a"), rollout("b")], classes=classes, rule="count")
    (found,) = read_table(folder, "kept").to_pylist()
    assert (found["uid"], found["score"], found["num_sentences"], found["class_counts"]) == ("a", 2.0, 5, [1, 2, 1])
    assert rejected(folder) == {"b": ("rank", 1.0)}


RANKED = {"short": "T=", "long": "TT" + "=" * 8, "middle": "=====", "other": "S"}


def ranked_rows():
    lengths = {"short": 2, "long": 60, "middle": 30}
    rows = [rollout(uid, GOOD.replace("is 4.", "is 4, " + " ".join(map(str, range(n))))) for uid, n in lengths.items()]
    return [*rows, rollout("other", prompt="another question")]


@pytest.mark.parametrize(
    ("rule", "best"),
    [("count", "long"), ("ratio", "short"), ("length_matched", "short")],
)
def test_rules(run, rule, best):
    folder = run(ranked_rows(), classes=RANKED, rule=rule)
    assert kept(folder) == [best, "other"], "the best of each question, in the order of the data"
    values = {uid: value for uid, (reason, value) in rejected(folder).items() if reason == "rank"}
    assert len(values) == 2
    (score, _) = read_table(folder, "kept")["score"].to_pylist()
    assert all(score > value for value in values.values())


def test_the_random_rule_is_a_function_of_the_seed(run):
    rows = [rollout(f"{prompt}{n}", prompt=prompt) for prompt in "abcdefgh" for n in range(4)]
    first, again, other = (
        kept(run(rows, rule="random", seed=seed, out=out)) for seed, out in [(0, "x"), (0, "y"), (1, "z")]
    )
    assert first == again != other
    assert [uid[0] for uid in first] == list("abcdefgh")


def test_keep_takes_more_and_equal_ones_in_order(run):
    rows = [rollout(str(n)) for n in range(5)]
    classes = dict.fromkeys("01234", "T=")
    assert kept(run(rows, classes=classes, rule="count", keep=2)) == ["0", "1"]
    assert kept(run(rows, classes=classes, rule="count", keep=9, out="more")) == ["0", "1", "2", "3", "4"]


def test_rejected_candidates_do_not_take_a_place(run):
    rows = [rollout("best", finish_reason="length"), rollout("second"), rollout("third")]
    assert kept(run(rows, classes={"best": "TTT", "second": "TT", "third": "T"}, rule="count")) == ["second"]


def test_beta_draws_the_line(run):
    rows = [rollout("a"), rollout("b")]  # t: a difference of 0.15
    assert kept(run(rows, classes={"a": "tt=", "b": "T=="}, rule="count", beta=0.1)) == ["a"]
    assert kept(run(rows, classes={"a": "tt=", "b": "T=="}, rule="count", beta=0.2, out="other")) == ["b"]


def test_budgets_are_per_domain_and_reproducible(run):
    rows = [
        rollout(f"{domain}{n}", prompt=f"{domain}{n}", domain=domain) for domain in ("math", "code") for n in range(9)
    ]
    folder = run(rows, budget={"math": 4, "poetry": 1})
    assert sum(uid.startswith("math") for uid in kept(folder)) == 4
    assert sum(uid.startswith("code") for uid in kept(folder)) == 9
    assert set(rejected(folder).values()) == {("budget", 4.0)}
    assert kept(run(rows, budget={"math": 4, "poetry": 1}, out="again")) == kept(folder)
    assert kept(run(rows, budget={"math": 4, "poetry": 1}, seed=1, out="other")) != kept(folder)
    smaller = kept(run(rows, budget={"math": 3}, out="smaller"))
    assert set(smaller) < set(kept(folder)), "a smaller budget keeps some of the same"


def test_a_masked_prefix_is_context(run, chat):
    prefix = "<think> Start at 3."
    row = rollout("a", prefix_bytes=len(prefix))
    (plain,) = read_table(run([row]), "kept").to_pylist()
    (masked,) = read_table(run([row], mask_prefix=True, out="masked"), "kept").to_pylist()
    assert masked["ids"] == plain["ids"]
    begins = masked["num_context_tokens"]
    assert begins > plain["num_context_tokens"]
    assert chat.decode_answer(masked["ids"][begins:], "stop")[0] == GOOD.removeprefix(prefix)


# --- weights ------------------------------------------------------------------------------------------


def told(uid, logprobs, prompt="q", **columns):
    """A rollout whose first token is all of its text; the others, like an end token, are none of it."""
    size = len((columns.get("completion", GOOD)).encode()) - columns.get("prefix_bytes", 0)
    tokens = {"token_ids": list(range(len(logprobs))), "logprobs": logprobs}
    return rollout(uid, prompt=prompt, **columns, **tokens, token_bytes=[size, *[0] * (len(logprobs) - 1)])


def weights_of(folder):
    return {row["uid"]: row["weight"] for row in read_table(folder, "kept").to_pylist()}


def softmax(lam, *means):
    """Weights with mean 1."""
    w = np.exp(lam * np.array(means))
    return (w * len(w) / w.sum()).tolist()


def test_without_weighting_there_is_no_weight_and_nobody_speaks_of_it(run):
    folder = run([told("a", [-1.0]), told("b", [-2.0])])
    assert weights_of(folder) == {"a": None, "b": None}
    manifest = read_manifest(folder)
    assert not {"lam", "effective_sample_size", "weight_range"} & manifest["counts"].keys()
    assert "λ" not in summary(folder)


def test_weights_follow_the_mean_log_probability_of_the_text(run):
    rows = [
        told("a", [-1.0, -77.0]),  # the end token does not count
        told("b", [-1.5]),
        told("alone", [-9.0], prompt="other"),
        told("c", [-2.0], prefix_bytes=7),  # of a mixed one the teacher's part
        told("cut", [-0.1], finish_reason="length"),
        rollout("silent and rejected", finish_reason="length"),
    ]
    rows[1] |= {"logprobs": [-2.0, -1.0], "token_ids": [1, 2], "token_bytes": [0, len(GOOD)]}
    folder = run(rows, weighting=Weighting(lam=0.8))
    found = weights_of(folder)
    assert [found[uid] for uid in "abc"] == pytest.approx(softmax(0.8, -1.0, -1.5, -2.0), rel=1e-6)
    assert found["alone"] == 1.0
    assert read_table(folder, "rejected")["weight"].to_pylist() == [None, None]
    counts = read_manifest(folder)["counts"]
    w = np.array([found[uid] for uid in "abc"])
    assert counts["lam"] == 0.8
    assert counts["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (w @ w) / 3, rel=1e-6)
    assert counts["weight_range"] == [pytest.approx(w.min()), pytest.approx(w.max())]


@pytest.mark.parametrize("favour", ["likely", "unlikely"])
def test_lambda_is_chosen_by_the_effective_sample_size(run, favour):
    rng = np.random.default_rng(0)
    rows = [told(f"{p}{n}", [float(-rng.gamma(2))], prompt=str(p)) for p in range(30) for n in range(4)]
    folder = run(rows, weighting=Weighting(favor=favour))
    manifest = read_manifest(folder)
    lam = manifest["counts"]["lam"]
    assert (lam > 0) == (favour == "likely")
    assert manifest["counts"]["effective_sample_size"] == pytest.approx(0.7, abs=1e-3)
    assert f"λ {lam:.3g}, effective sample size 0.70 of k, " in summary(folder)
    found = weights_of(folder)
    assert np.mean([found[f"7{n}"] for n in range(4)]) == pytest.approx(1, abs=1e-6)


def test_with_scores_the_mean_is_theirs_and_only_those_kept_share_a_prompt(run, tmp_path, chat):
    means = {"a": -1.0, "b": -1.25, "c": -3.0, "d": -0.5}
    classes = {"a": "TT", "b": "TTT", "c": "T", "d": "TTT"}
    rows = [rollout(uid, prompt="other" if uid == "d" else "q") for uid in means]
    scores = [score(chat, row, classes[row["uid"]]) | {"teacher_mean_logprob": means[row["uid"]]} for row in rows]
    write(tmp_path / "scores", "scores", SCORE, scores)
    found = weights_of(run(rows, classes=classes, rule="count", keep=2, weighting=Weighting(lam=2.0)))
    a, b = softmax(2.0, -1.0, -1.25)
    assert found == {"a": pytest.approx(a), "b": pytest.approx(b), "d": 1.0}


def test_lambda_0_asks_nobody_and_one_answer_a_prompt_is_noted(run, capsys):
    folder = run([rollout("a"), rollout("b")], rule="random", weighting=Weighting(lam=0))
    assert list(weights_of(folder).values()) == [1.0]
    manifest = read_manifest(folder)
    assert manifest["counts"]["effective_sample_size"] is None
    assert "λ 0, no prompt with two kept answers, " in summary(folder)
    assert "no prompt has two kept answers, so every weight is 1" in " ".join(capsys.readouterr().err.split())
    folder = run([rollout("a"), rollout("b")], weighting=Weighting(lam=0), out="all")
    assert list(weights_of(folder).values()) == [1.0, 1.0]


def test_a_kept_answer_without_log_probabilities_is_refused_by_name(run, tmp_path):
    rows = [told("a", [-1.0]), rollout("b"), rollout("c", finish_reason="length"), rollout("d")]
    with pytest.raises(DataError) as error:
        run(rows, weighting=Weighting())
    assert str(error.value) == (
        f"{tmp_path}/rollouts: 2 of 3 kept rollouts have no teacher log-probabilities, the first is b; let the teacher"
        " score them (score.by = 'teacher', and a rule that needs scores), or drop select.weighting"
    )
    assert not (tmp_path / "select").exists(), "nothing half-written"


def test_scores_without_the_teacher_are_refused_too(run, tmp_path, chat):
    rows = [rollout("a"), rollout("b")]
    scores = [score(chat, row, "T") | {"teacher_mean_logprob": None} for row in rows]
    write(tmp_path / "scores", "scores", SCORE, scores)
    with pytest.raises(DataError, match="2 of 2 kept rollouts have no teacher log-probabilities, the first is a"):
        run(rows, classes={}, weighting=Weighting(lam=1.0))


def test_weights_need_more_than_one_answer_a_prompt(run):
    rows = [told("a", [-1.0]), told("b", [-2.0], prompt="other")]
    for weighting in (Weighting(), Weighting(lam=0.5)):
        with pytest.raises(DataError, match=r"select\.weighting .* but select\.keep = 1 keeps one; raise it"):
            run(rows, rule="random", weighting=weighting)
    with pytest.raises(DataError, match=r"rollouts: select\.weighting: every prompt has a single answer"):
        run(rows, rule="random", keep=2, weighting=Weighting())


def test_tokens_without_all_of_their_columns_are_refused(run):
    rows = [told("a", [-1.0]), told("b", [-1.0, -2.0]) | {"token_bytes": [len(GOOD)]}]
    with pytest.raises(DataError, match="rollout b has 2 logprobs and 1 token_bytes; right is one of each"):
        run(rows, weighting=Weighting())


# --- what is refused ----------------------------------------------------------------------------------


def test_rules_that_need_scores_say_so(run):
    with pytest.raises(
        DataError, match=r"select\.rule = 'count' needs scores; run score first, or use 'random' or 'all'"
    ):
        run([rollout("a")], rule="count")


def test_scores_of_other_rollouts_are_refused(run, tmp_path, chat):
    write(tmp_path / "scores", "scores", SCORE, [score(chat, rollout("b"), "T")])
    with pytest.raises(DataError, match=r"scores: its rows do not match .*rollouts; score them again"):
        run([rollout("a")], classes={}, rule="count")


def test_another_option_is_refused_by_name_and_forced(run):
    run([rollout("a")])
    with pytest.raises(CheckpointError, match=r"require_think: True there, False now"):
        run([rollout("a")], require_think=False)
    run([rollout("a")], require_think=False, force=True)
    with pytest.raises(CheckpointError, match=r"require_think: False there, True now"):
        run([rollout("a")])


def test_a_student_that_is_none(tmp_path):
    write(tmp_path / "rollouts", "rollouts", ROLLOUT, [])
    with pytest.raises(ConfigError, match=r"model = '.*gone': no such folder"):
        select.select(
            tmp_path / "rollouts", str(tmp_path / "gone"), SelectConfig(), out=tmp_path / "out", seq_len=9, seed=0
        )

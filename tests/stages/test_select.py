"""Selection on handmade rollouts: every reason with its value, each rule, budgets, weights, and what is refused."""

import json

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
from dasd_lite.grading.grade import Grade
from dasd_lite.report.summary import rejections, rule_warning, summary
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

    def select_rows(
        rows, *, classes=None, max_tokens=10_000, seed=0, mask_prefix=False, out="select", force=False, **config
    ):
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

    return select_rows


def score(chat, row, classes):
    """A score row with a sentence per letter: T: p_T − p_S = 0.8, S: -0.8, =: 0, t: 0.15, ·: no token in it."""
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
    """The reason and value of each rejected rollout, by uid."""
    rows = [row for batch in batches(folder, "rejected") for row in batch.to_pylist()]
    return {row["uid"]: (row["reason"], row["value"]) for row in rows}


# --- filters ----------------------------------------------------------------------------------------


def test_each_filter_reports_its_reason_and_value(run, chat):
    tokens = len(chat.example(rollout("x")["messages"], GOOD)[0])
    long = GOOD.replace("Up 1", "Up 1 " + " ".join(str(n) for n in range(400)))
    lines = f"<think>\n{LINE * 4}</think>\nAnswer: 4"
    sentences = f"<think> {SENTENCE * 4}</think>\nAnswer: 4"
    grams = "<think> " + "abcdefghijklmnopqrstuvwxyz" * 12 + " </think>\nAnswer: 4"
    loop = "<think> " + " ".join(map(str, range(150))) + "".join(" abc def" for _ in range(12)) + " </think> Answer: 4"
    rows = [
        rollout("good"),
        rollout("cut off", finish_reason="length"),
        rollout("calls a tool", finish_reason="tool_calls"),
        rollout("bad header", finish_reason="malformed"),
        rollout("refuses", finish_reason="refusal"),
        rollout("filtered", finish_reason="content_filter"),
        rollout("aborted", finish_reason="abort"),
        rollout("reason unknown", finish_reason="unknown", completion=GOOD + " <function=f>"),
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
        rollout("loop", loop),
    ]
    folder = run(rows, max_tokens=tokens + 700, max_repeated_span=60)
    why = rejected(folder)
    reasons = {uid: reason for uid, (reason, _) in why.items()}
    values = {uid: value for uid, (_, value) in why.items()}
    assert kept(folder) == ["good"]
    assert reasons == {
        "cut off": "truncated",
        "calls a tool": "function call",
        "bad header": "malformed channels",
        "refuses": "refused",
        "filtered": "refused",
        "aborted": "unfinished",
        "reason unknown": "function call",
        **dict.fromkeys(["no thought", "empty thought", "empty"], "no thinking"),
        **dict.fromkeys(["no answer", "not closed"], "no answer"),
        **dict.fromkeys(["two thoughts", "opened twice", "text before", "closed, not opened"], "structure"),
        "call": "function call",
        "long": "too long",
        "lines": "repeated lines",
        "sentences": "repeated sentences",
        "grams": "repeated n-grams",
        "loop": "repeated span",
    }
    assert values["cut off"] == tokens
    assert (values["no thought"], values["two thoughts"]) == (0, 2)
    assert values["call"] == 2
    assert values["long"] == len(chat.example(rollout("x")["messages"], long)[0]) > tokens + 700
    assert values["lines"] == pytest.approx(3 * len(LINE.strip()) / len(lines), abs=0.03)
    assert values["sentences"] == pytest.approx(3 * len(SENTENCE) / len(sentences), abs=0.06)
    assert values["grams"] > 0.5
    assert values["loop"] == len(chat.encode(" abc def")) * 12
    counts = read_manifest(folder)["counts"]
    assert counts["rollouts"] == len(rows)
    assert counts["kept"] == counts["prompts_kept"] == 1
    assert sum(counts["rejected"].values()) == len(rows) - 1
    assert counts["rejected_values"]["function call"] == [1, tokens]
    assert counts["rejected_values"]["repeated n-grams"] == [values["grams"]] * 2
    table = rejections(read_manifest(folder))
    assert table is not None and table.row_count == len(counts["rejected"])


def test_the_table_of_rejections_shows_filters_only_and_counts_as_integers():
    counts = {
        "rollouts": 1200,
        "rejected": {"rank": 500, "truncated": 30, "repeated lines": 6},
        "rejected_values": {"rank": [0.0, 2.5], "truncated": [1234.0, 32768.0], "repeated lines": [0.31234, 1.0]},
    }
    screen = Console(width=80)
    with screen.capture() as capture:
        screen.print(rejections({"stage": "select", "counts": counts}))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[1:] == [
        ["truncated", "30", "2.5%", "1,234", "32,768"],
        ["repeated", "lines", "6", "0.5%", "0.312", "1"],
    ]
    assert rejections({"stage": "select", "counts": counts | {"rejected": {"rank": 500, "budget": 9}}}) is None
    assert rejections({"stage": "pack", "counts": {"rollouts": 1200}}) is None


def test_the_first_filter_that_fails_is_the_reason(run):
    row = rollout("all wrong", LINE * 9 + "<tool_call>", finish_reason="length")
    assert rejected(run([row, rollout("good")]))["all wrong"][0] == "truncated"


def test_filters_can_be_turned_off(run):
    rows = [rollout("no thought", "Answer: 4"), rollout("lines", f"<think> {LINE * 4}</think>\nAnswer: 4")]
    folder = run(
        rows, require_think=False, max_duplicate_lines=1.0, max_duplicate_sentences=1.0, max_repeated_ngrams=1.0
    )
    assert kept(folder) == ["no thought", "lines"]


def test_a_loop_is_measured_by_its_length_and_a_text_given_twice_is_none(run, chat):
    steps = "".join(f"Then {n} and {n * n % 97} is {n * n}. " for n in range(9, 29))
    rows = [
        rollout("loop", f"<think> {steps}{' Wait.' * 30}</think>\nAnswer: 4"),
        rollout("short loop", f"<think> {steps}{' Wait.' * 5}</think>\nAnswer: 4"),
        rollout("twice", f"<think> {steps}So: {steps[:200]}</think>\nAnswer: 4"),
    ]
    loose = {"max_duplicate_sentences": 1.0}
    folder = run(rows, max_repeated_span=60, **loose)
    assert kept(folder) == ["short loop", "twice"]
    assert rejected(folder) == {"loop": ("repeated span", 30 * len(chat.encode(" Wait.")))}
    assert kept(run(rows, max_repeated_span=500, **loose, out="all")) == ["loop", "short loop", "twice"]


def test_a_length_of_exactly_the_limit_is_kept(run, chat):
    tokens = len(chat.example(rollout("x")["messages"], GOOD)[0])
    assert kept(run([rollout("a")], max_tokens=tokens)) == ["a"]
    with pytest.raises(DataError, match="too long 1"):
        run([rollout("a")], max_tokens=tokens - 1, out="other")


def test_all_rejected_is_one_line_with_the_counts(run, tmp_path):
    rows = [rollout(str(n), finish_reason="length") for n in range(3)] + [rollout("x", "Answer: 4")]
    with pytest.raises(DataError) as error:
        run(rows)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/rollouts: all 4 candidates are rejected: truncated 3 (raise max_tokens")
    assert "no thinking 1 (" in message and "select.require_think = false" in message
    assert "\n" not in message
    assert not (tmp_path / "select").exists(), "nothing half-written"


# --- what is kept -------------------------------------------------------------------------------------


def test_a_kept_row_is_the_rollout_and_the_ids_for_the_student(run, chat):
    row = rollout("a", domain="code", answer=None, index=3)
    (kept_row,) = read_table(run([row]), "kept").to_pylist()
    ids, num_context = chat.example(row["messages"], GOOD)
    assert kept_row == row | {
        "ids": ids.tolist(),
        "num_context_tokens": num_context,
        "score": None,
        "weight": None,
        "num_sentences": 0,
        "class_counts": None,
        "grade": None,
    }


def test_scores_add_sentence_counts_class_counts_and_the_score_of_the_rule(run):
    classes = {"a": "TS=·T", "b": "T"}
    folder = run([rollout("a"), rollout("b")], classes=classes, rule="count")
    (row,) = read_table(folder, "kept").to_pylist()
    assert (row["uid"], row["score"], row["num_sentences"], row["class_counts"]) == ("a", 2.0, 5, [1, 2, 1])
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
def test_each_rule_keeps_its_best_candidate(run, rule, best):
    folder = run(ranked_rows(), classes=RANKED, rule=rule)
    assert kept(folder) == [best, "other"], "the best answer to each question, in the order of the data"
    values = {uid: value for uid, (reason, value) in rejected(folder).items() if reason == "rank"}
    assert len(values) == 2
    (score, _) = read_table(folder, "kept")["score"].to_pylist()
    assert all(score > value for value in values.values())


def test_the_random_rule_depends_only_on_the_seed(run):
    rows = [rollout(f"{prompt}{n}", prompt=prompt) for prompt in "abcdefgh" for n in range(4)]
    first, again, other = (
        kept(run(rows, rule="random", seed=seed, out=out)) for seed, out in [(0, "x"), (0, "y"), (1, "z")]
    )
    assert first == again != other
    assert [uid[0] for uid in first] == list("abcdefgh")


def test_the_random_rule_knows_the_phase(run, tmp_path, demo):
    rows = [rollout(f"{prompt}{n}", prompt=prompt) for prompt in "abcdefgh" for n in range(4)]
    run(rows)
    low, again, high = (
        select.select(tmp_path / "rollouts", str(demo / "student"), out=tmp_path / out, rule="random", phase=phase)
        for out, phase in [("low", "low"), ("again", "low"), ("high", "high")]
    )
    assert kept(low.folder) == kept(again.folder) != kept(high.folder)


def test_keep_may_be_above_1_and_ties_are_kept_in_order(run):
    rows = [rollout(str(n)) for n in range(5)]
    classes = dict.fromkeys("01234", "T=")
    assert kept(run(rows, classes=classes, rule="count", keep=2)) == ["0", "1"]
    assert kept(run(rows, classes=classes, rule="count", keep=9, out="more")) == ["0", "1", "2", "3", "4"]


def test_rejected_candidates_do_not_count_toward_keep(run):
    rows = [rollout("best", finish_reason="length"), rollout("second"), rollout("third")]
    assert kept(run(rows, classes={"best": "TTT", "second": "TT", "third": "T"}, rule="count")) == ["second"]


def test_beta_is_the_threshold_between_classes(run):
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
    assert set(smaller) < set(kept(folder)), "a smaller budget keeps a subset"


def test_a_masked_prefix_is_context(run, chat):
    prefix = "<think> Start at 3."
    row = rollout("a", prefix_bytes=len(prefix))
    (plain,) = read_table(run([row]), "kept").to_pylist()
    (masked,) = read_table(run([row], mask_prefix=True, out="masked"), "kept").to_pylist()
    assert masked["ids"] == plain["ids"]
    begins = masked["num_context_tokens"]
    assert begins > plain["num_context_tokens"]
    assert chat.decode_answer(masked["ids"][begins:], "stop")[0] == GOOD.removeprefix(prefix)


def test_repetition_is_that_of_the_teachers_part(run):
    drifting = "<think> " + SENTENCE * 4 + "\n"
    calm = "So it is 4, not 5, 6 or 7. </think>\nAnswer: 4"
    rows = [
        rollout("drifting", drifting + calm, prefix_bytes=len(drifting)),
        rollout("mended", f"<think> 1, 2. {SENTENCE * 4}</think>\nAnswer: 4", prefix_bytes=len("<think> 1, 2.")),
        rollout("loop", f"<think>{' Wait.' * 30} {calm}", prefix_bytes=len(f"<think>{' Wait.' * 30}")),
        rollout("two thoughts", f"<think> a </think> b {calm}", prefix_bytes=len("<think> a </think> b")),
        rollout("other language", f"<think> 漢字 é🙂. {calm}", prefix_bytes=len("<think> 漢字 é".encode())),
    ]
    folder = run(rows, max_repeated_span=60, max_repeated_ngrams=0.2)
    assert kept(folder) == ["drifting", "loop", "other language"]
    why = {uid: reason for uid, (reason, _) in rejected(folder).items()}
    assert why == {"mended": "repeated sentences", "two thoughts": "structure"}
    folder = run(rows, max_repeated_span=60, max_repeated_ngrams=0.2, filter_prefix=True, out="both")
    assert kept(folder) == ["other language"]
    assert {rejected(folder)[uid][0] for uid in ("drifting", "loop")} == {"repeated sentences", "repeated n-grams"}
    masked = run(rows, max_repeated_span=60, max_repeated_ngrams=0.2, mask_prefix=True, out="masked")
    assert kept(masked) == ["drifting", "loop", "other language"]


# --- what is said about the rule ----------------------------------------------------------------------


def spaced(uid, words, prompt="q"):
    return rollout(uid, GOOD.replace("is 4.", "is 4, " + " ".join(map(str, range(words)))), prompt=prompt)


def test_questions_that_lost_all_their_candidates_are_counted(run):
    rows = [rollout("a"), rollout("b", finish_reason="length"), rollout("c", prompt="r", finish_reason="length")]
    folder = run(rows)
    counts = read_manifest(folder)["counts"]
    assert (counts["prompts"], counts["prompts_kept"], counts["prompts_lost"]) == (2, 1, 1)
    assert "1 of 2 questions lost all their candidates" in summary(folder)


def test_a_count_that_is_the_length_is_said(run):
    rows = [spaced(f"{prompt}{n}", 9 * n, prompt) for prompt in "pqr" for n in range(3)]
    folder = run(rows, classes={row["uid"]: "T" * (5 + int(row["uid"][1])) + "=" for row in rows}, rule="count")
    measured = read_manifest(folder)["counts"]["choice"]
    assert measured == {
        "questions": 3,
        "length_correlation": pytest.approx(1),
        "tied": 0.0,
        "teacher_share": pytest.approx(18 / 21),
        "could_flip": None,
    }
    assert rule_warning(read_manifest(folder)) == (
        "  rule 'count': it prefers long answers (rank correlation with length +1.00)"
    )
    fewest = run(rows, classes={}, rule="fewest", out="fewest")
    assert "it prefers short answers (rank correlation with length −1.00)" in rule_warning(read_manifest(fewest))
    for rule in ("longest", "shortest"):
        assert rule_warning(read_manifest(run(rows, rule=rule, out=rule))) is None, "they say so themselves"
    assert "choice" not in read_manifest(run(rows, out="all"))["counts"]


def test_classes_that_tell_nothing_apart_and_ties_are_said(run):
    rows = [rollout(f"{prompt}{n}", prompt=prompt) for prompt in "pqr" for n in range(2)]
    folder = run(rows, classes={row["uid"]: "T" * 19 + "=" for row in rows}, rule="count")
    assert rule_warning(read_manifest(folder)) == (
        "  rule 'count': 95% of all sentences are teacher sentences, so they hardly tell answers apart;"
        " the best scores are equal in 100% of the questions"
    )


@pytest.mark.parametrize(("noise", "share"), [(0.04, 0.0), (0.06, 0.5), (0.9, 1.0)])
def test_a_margin_within_the_noise_of_the_engines_is_said(run, tmp_path, chat, noise, share):
    rows = [spaced(uid, 0, uid[0]) for uid in ("p0", "p1", "q0", "q1")]
    classes = {"p0": "Tt==", "p1": "T===", "q0": "TTT=", "q1": "T==="}  # t: 0.05 above beta
    write(tmp_path / "scores", "scores", SCORE, [score(chat, row, classes[row["uid"]]) for row in rows])
    (tmp_path / "scores" / "timing.json").write_text(json.dumps({"engine_noise_sentence": noise}))
    folder = run(rows, classes=classes, rule="count")
    assert read_manifest(folder)["counts"]["choice"]["could_flip"] == share
    warned = f"engine noise could change the choice in {share:.0%} of the questions"
    assert (warned in (rule_warning(read_manifest(folder)) or "")) == (share > 0)


# --- weights ------------------------------------------------------------------------------------------


def with_logprobs(uid, logprobs, prompt="q", **columns):
    """A rollout whose first token spells all of its text; the others spell nothing, as an end token does."""
    size = len((columns.get("completion", GOOD)).encode()) - columns.get("prefix_bytes", 0)
    tokens = {"token_ids": list(range(len(logprobs))), "logprobs": logprobs}
    return rollout(uid, prompt=prompt, **columns, **tokens, token_bytes=[size, *[0] * (len(logprobs) - 1)])


def weights_of(folder):
    return {row["uid"]: row["weight"] for row in read_table(folder, "kept").to_pylist()}


def softmax(lam, *means):
    """Weights with mean 1."""
    w = np.exp(lam * np.array(means))
    return (w * len(w) / w.sum()).tolist()


def test_without_weighting_there_are_no_weights_and_they_are_not_mentioned(run):
    folder = run([with_logprobs("a", [-1.0]), with_logprobs("b", [-2.0])])
    assert weights_of(folder) == {"a": None, "b": None}
    manifest = read_manifest(folder)
    assert not {"lam", "effective_sample_size", "weight_range"} & manifest["counts"].keys()
    assert "λ" not in summary(folder)


def test_weights_follow_the_mean_log_probability_of_the_text(run):
    rows = [
        with_logprobs("a", [-1.0, -77.0]),  # the end token does not count
        with_logprobs("b", [-1.5]),
        with_logprobs("alone", [-9.0], prompt="other"),
        with_logprobs("c", [-2.0], prefix_bytes=7),  # only the teacher's part of a mixed rollout counts
        with_logprobs("cut", [-0.1], finish_reason="length"),
        rollout("rejected without log-probabilities", finish_reason="length"),
    ]
    rows[1] |= {"logprobs": [-2.0, -1.0], "token_ids": [1, 2], "token_bytes": [0, len(GOOD)]}
    folder = run(rows, weighting=Weighting(lam=0.8))
    weights = weights_of(folder)
    assert [weights[uid] for uid in "abc"] == pytest.approx(softmax(0.8, -1.0, -1.5, -2.0), rel=1e-6)
    assert weights["alone"] == 1.0
    assert read_table(folder, "rejected")["weight"].to_pylist() == [None, None]
    counts = read_manifest(folder)["counts"]
    w = np.array([weights[uid] for uid in "abc"])
    assert counts["lam"] == 0.8
    assert counts["effective_sample_size"] == pytest.approx(w.sum() ** 2 / (w @ w) / 3, rel=1e-6)
    assert counts["weight_range"] == [pytest.approx(w.min()), pytest.approx(w.max())]


@pytest.mark.parametrize("favor", ["likely", "unlikely"])
def test_lambda_is_chosen_by_the_effective_sample_size(run, favor):
    rng = np.random.default_rng(0)
    rows = [with_logprobs(f"{p}{n}", [float(-rng.gamma(2))], prompt=str(p)) for p in range(30) for n in range(4)]
    folder = run(rows, weighting=Weighting(favor=favor))
    manifest = read_manifest(folder)
    lam = manifest["counts"]["lam"]
    assert (lam > 0) == (favor == "likely")
    assert manifest["counts"]["effective_sample_size"] == pytest.approx(0.7, abs=1e-3)
    assert f"λ {lam:.3g}, effective sample size 0.70 of k, " in summary(folder)
    weights = weights_of(folder)
    assert np.mean([weights[f"7{n}"] for n in range(4)]) == pytest.approx(1, abs=1e-6)


def test_with_scores_the_means_are_from_the_scores_and_only_kept_answers_count(run, tmp_path, chat):
    means = {"a": -1.0, "b": -1.25, "c": -3.0, "d": -0.5}
    classes = {"a": "TT", "b": "TTT", "c": "T", "d": "TTT"}
    rows = [rollout(uid, prompt="other" if uid == "d" else "q") for uid in means]
    scores = [score(chat, row, classes[row["uid"]]) | {"teacher_mean_logprob": means[row["uid"]]} for row in rows]
    write(tmp_path / "scores", "scores", SCORE, scores)
    weights = weights_of(run(rows, classes=classes, rule="count", keep=2, weighting=Weighting(lam=2.0)))
    a, b = softmax(2.0, -1.0, -1.25)
    assert weights == {"a": pytest.approx(a), "b": pytest.approx(b), "d": 1.0}


def test_lambda_0_needs_no_log_probabilities_and_single_answers_are_noted(run, capsys):
    folder = run([rollout("a"), rollout("b")], rule="random", weighting=Weighting(lam=0))
    assert list(weights_of(folder).values()) == [1.0]
    manifest = read_manifest(folder)
    assert manifest["counts"]["effective_sample_size"] is None
    assert "λ 0, no prompt with two kept answers, " in summary(folder)
    assert "no prompt has two kept answers, so every weight is 1" in " ".join(capsys.readouterr().err.split())
    folder = run([rollout("a"), rollout("b")], weighting=Weighting(lam=0), out="all")
    assert list(weights_of(folder).values()) == [1.0, 1.0]


def test_a_kept_answer_without_log_probabilities_is_refused_by_name(run, tmp_path):
    rows = [with_logprobs("a", [-1.0]), rollout("b"), rollout("c", finish_reason="length"), rollout("d")]
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


def test_weights_need_more_than_one_answer_per_prompt(run):
    rows = [with_logprobs("a", [-1.0]), with_logprobs("b", [-2.0], prompt="other")]
    for weighting in (Weighting(), Weighting(lam=0.5)):
        with pytest.raises(DataError, match=r"select\.weighting .* but select\.keep = 1 keeps one; raise it"):
            run(rows, rule="random", weighting=weighting)
    with pytest.raises(DataError, match=r"rollouts: select\.weighting: every prompt has a single answer"):
        run(rows, rule="random", keep=2, weighting=Weighting())


def test_token_columns_of_different_lengths_are_refused(run):
    rows = [with_logprobs("a", [-1.0]), with_logprobs("b", [-1.0, -2.0]) | {"token_bytes": [len(GOOD)]}]
    with pytest.raises(DataError, match="rollout b has 2 logprobs and 1 token_bytes; every token needs one of each"):
        run(rows, weighting=Weighting())


# --- what is refused ----------------------------------------------------------------------------------


def test_rules_that_need_scores_say_so(run):
    with pytest.raises(
        DataError, match=r"select\.rule = 'count' needs scores; run score first, or use 'longest', .*'random' or 'all'"
    ):
        run([rollout("a")], rule="count")


def test_scores_of_other_rollouts_are_refused(run, tmp_path, chat):
    write(tmp_path / "scores", "scores", SCORE, [score(chat, rollout("b"), "T")])
    with pytest.raises(DataError, match=r"scores: its rows do not match .*rollouts; score them again"):
        run([rollout("a")], classes={}, rule="count")


def test_a_changed_option_is_refused_by_name_and_replaced_with_force(run):
    run([rollout("a")])
    with pytest.raises(CheckpointError, match=r"require_think: True there, False now"):
        run([rollout("a")], require_think=False)
    run([rollout("a")], require_think=False, force=True)
    with pytest.raises(CheckpointError, match=r"require_think: False there, True now"):
        run([rollout("a")])


def test_a_student_that_does_not_exist(tmp_path):
    write(tmp_path / "rollouts", "rollouts", ROLLOUT, [])
    with pytest.raises(ConfigError, match=r"model = '.*gone': no such folder"):
        select.select(
            tmp_path / "rollouts", str(tmp_path / "gone"), SelectConfig(), out=tmp_path / "out", seq_len=9, seed=0
        )


# --- right answers ------------------------------------------------------------------------------------

WRONG = GOOD.replace("Answer: 4", "Answer: 5")
SILENT = GOOD.replace("Answer: 4", "Well.")


def graded_rows():
    return [
        rollout("right", GOOD, prompt="a"),
        rollout("wrong", WRONG, prompt="a"),
        rollout("silent", SILENT, prompt="b"),
        rollout("cut", GOOD, prompt="b", finish_reason="length"),
        rollout("without", WRONG, prompt="c", answer=None),
    ]


def grades(folder):
    tables = (read_table(folder, table).to_pylist() for table in ("kept", "rejected"))
    return {row["uid"]: row["grade"] for table in tables for row in table}


def test_answers_are_graded_where_a_reference_is_known(run):
    folder = run(graded_rows())
    assert grades(folder) == {
        "right": "right",
        "wrong": "wrong",
        "silent": "no_answer",
        "cut": "no_answer",
        "without": None,
    }
    counts = read_manifest(folder)["counts"]["grades"]
    assert counts == {"graded": 4, "no_answer": 2, "right": 1, "wrong": 1, "questions": 2, "questions_right": 1}
    assert rejected(folder) == {"cut": ("truncated", pytest.approx(58, abs=30))}, "none for being wrong"


def test_only_right_answers_where_that_is_known(run):
    folder = run(graded_rows(), require_right="where_known")
    assert {row["uid"] for row in read_table(folder, "kept").to_pylist()} == {"right", "without"}
    assert {uid: reason for uid, (reason, _) in rejected(folder).items()} == {
        "wrong": "wrong answer",
        "silent": "wrong answer",
        "cut": "truncated",
    }


def test_only_answers_that_are_known_to_be_right(run):
    folder = run(graded_rows(), require_right="yes")
    assert [row["uid"] for row in read_table(folder, "kept").to_pylist()] == ["right"]
    assert rejected(folder)["without"][0] == "no reference answer"


@pytest.mark.parametrize("verdict", ["unparseable", "unknown"])
def test_what_cannot_be_compared_is_never_a_wrong_answer(tmp_path, demo, verdict):
    def cannot(completion, answer):
        return Grade(verdict, "x")

    cannot.fingerprint = verdict
    source = write(tmp_path / "rollouts", "rollouts", ROLLOUT, graded_rows())
    options = {"grader": cannot, "rule": "all", "seq_len": 10_000}
    for required, kept in (("where_known", {"right", "wrong", "silent", "without"}), ("yes", None)):
        out = tmp_path / required
        if kept is None:
            with pytest.raises(DataError, match=r"cannot be compared 3 \(select.require_right = 'where_known'"):
                select.select(source, str(demo / "student"), out=out, require_right=required, **options)
        else:
            folder = select.select(source, str(demo / "student"), out=out, require_right=required, **options).folder
            assert {row["uid"] for row in read_table(folder, "kept").to_pylist()} == kept


def test_repetition_is_counted_whatever_else_is_wrong(run):
    rows = [rollout("ok"), rollout("cut", GOOD + "\n" + LINE * 30, finish_reason="length")]
    counts = read_manifest(run(rows))["counts"]
    assert (counts["repeating"], counts["rejected"]) == (1, {"truncated": 1})

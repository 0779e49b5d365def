"""A folder of sample whose questions and limit have changed: its shards have rows that its table has no longer."""

from pathlib import Path

from dasd_lite.data.journal import Journal
from dasd_lite.data.manifest import Identity
from dasd_lite.data.records import ROLLOUT

GROWS = frozenset(("config.keys", "config.limit"))


def grown(folder: Path) -> Path:
    """Write the answers a and b under a limit of 2 tokens, which cuts off b; then b and c under a limit of 9."""
    for limit, keys, answer in ((2, "ab", "old"), (9, "bc", "new")):
        identity = Identity("sample", 1, {"keys": keys, "limit": limit}, {}, grows=GROWS)
        options = {"keys": list(keys), "limit": limit, "columns": lambda _, answer=answer: {"answer": answer}}
        with Journal(folder, identity, ROLLOUT, 2, **options) as journal:
            for position in sorted({0, 1} - journal.done()):
                key = keys[position]
                is_cut_off = (limit, key) == (2, "b")
                row = dict.fromkeys(ROLLOUT.names) | {
                    "uid": key,
                    "prompt_uid": f"question {key}",
                    "messages": [{"role": "user", "content": key}],
                    "domain": "all",
                    "answer": answer,
                    "index": 0,
                    "completion": f"<think>{key}" + ("" if is_cut_off else "</think> all of it"),
                    "finish_reason": "length" if is_cut_off else "stop",
                    "prefix_bytes": 0,
                    "num_tokens": 2,
                    "max_tokens": limit,
                }
                journal.commit({position: row})
            journal.publish({"rollouts": 2})
    return folder

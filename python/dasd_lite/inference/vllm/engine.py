"""The program of a child process that owns one vLLM engine: `python -m dasd_lite.inference.vllm.engine FD`.

Input, over the socket FD from the process that started it (see vllm_pool.py): the engine's options, then jobs: prompt
token ids and sampling options. Output, over the same socket: the answers, and once a second a heartbeat. Invariants:
nothing but these messages is on the socket, whatever vLLM prints; the process ends, with all of its workers, as soon
as the one that started it is gone. This is the only module that imports vLLM.

    from the parent                         to the parent
    the engine's options: {name: value}     ("ready", (context, rows of the embedding)) or ("refused", reason)
    ("add", [Job, …])                       ("done", [Answer, …])
    ("abort", [key, …])                     ("beat", steps of the engine, jobs at work)
    ("close",)
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

_BEAT_S = 1.0


class EngineJob(NamedTuple):
    """One prompt for the engine."""

    key: int
    prompt: npt.NDArray[np.int32]
    options: dict[str, Any]
    """Keywords of vLLM's SamplingParams."""


class EngineReply(NamedTuple):
    """What the engine made of a job; log-probabilities are of the raw model at temperature 1."""

    key: int
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: str
    prompt_logprobs: npt.NDArray[np.float32] | None
    """[T] of a job with `prompt_logprobs`: each prompt token's, NaN for the first."""
    refusal: str = ""
    """Why vLLM does not take the job; then there is nothing else."""


class _Link:
    """The socket to the parent: a thread that listens, and one that tells every second that this process lives."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)  # vLLM's workers must not keep it open
        self._connection = Connection(fd)
        self._sending = threading.Lock()
        self._parent = os.getppid()
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.steps = 0
        self.running = 0
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Tell the parent; when it is gone this process ends."""
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)  # half the time of Connection's own pickler
        try:
            with self._sending:
                self._connection.send_bytes(content)
        except OSError:
            end(1)

    def _listen(self) -> None:
        try:
            while True:
                self.inbox.put(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            end(1)

    def _beat(self) -> None:
        over = threading.Event()
        while not over.wait(_BEAT_S):
            if os.getppid() != self._parent:  # the socket can outlive the parent in what it has forked
                end(1)
            self.send("beat", self.steps, self.running)


def end(code: int) -> NoReturn:
    """End this process at once, and vLLM's workers with it, whatever they are waiting for."""
    if os.getpgrp() == os.getpid():  # this process was given a group of its own
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


def main() -> None:
    """Load the engine and serve jobs until told to close."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is stepped here, in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    link = _Link(int(sys.argv[1]))
    try:
        engine = _load(link)
        if engine is not None:
            _serve(engine, link)
            engine.engine_core.shutdown()
    except BaseException:
        traceback.print_exc()  # the parent quotes the last line
        sys.stderr.flush()
        os._exit(1)  # at once: threads and workers of vLLM could keep a dying interpreter up
    sys.stderr.flush()
    os._exit(0)


def _load(link: _Link) -> Any:
    """Load the engine that the parent asks for, or tell why vLLM refuses and return none."""
    options = link.inbox.get()
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    if current_platform.is_cpu() and "max_num_batched_tokens" not in options:
        # A prompt read in pieces makes vLLM wind the generator of its seed back, which those of a CPU cannot.
        options["enable_chunked_prefill"] = False
    try:
        # The context is that of vllm.LLM, whose batches are larger than those of a bare engine.
        engine = LLMEngine.from_engine_args(EngineArgs(**options), usage_context=UsageContext.LLM_CLASS)
    except ValueError as error:  # an option or a machine that does not suit the model: too little memory, mostly
        link.send("refused", " ".join(str(error).split()))
        return None
    link.send("ready", (int(engine.model_config.max_model_len), int(engine.model_config.get_vocab_size())))
    return engine


def _serve(engine: Any, link: _Link) -> None:
    """Step the engine while it has jobs, wait while it has none."""
    running: dict[str, EngineJob] = {}
    while True:
        while not running or not link.inbox.empty():
            kind, *content = link.inbox.get()
            if kind == "close":
                return
            if kind == "abort":
                left = [str(key) for key in content[0] if str(key) in running]
                engine.abort_request(left)
                for name in left:
                    del running[name]
            else:
                _add(engine, link, content[0], running)
            link.running = len(running)
        done = [_answer(running.pop(out.request_id), out) for out in engine.step() if out.finished]
        link.steps += 1
        link.running = len(running)
        if done:
            link.send("done", done)


def _add(engine: Any, link: _Link, jobs: list[EngineJob], running: dict[str, EngineJob]) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for job in jobs:
        params = SamplingParams(
            **job.options,
            flat_logprobs=True,
            ignore_eos=True,  # vLLM's own notion of it; `stop_token_ids` is the whole list
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            engine.add_request(str(job.key), {"prompt_token_ids": job.prompt.tolist()}, params)
        except ValueError as error:  # an id that the model does not have, say
            nothing = np.empty(0, dtype=np.float32)
            reason = " ".join(str(error).split())
            link.send("done", [EngineReply(job.key, nothing.astype(np.int32), nothing, "", None, reason)])
            continue
        running[str(job.key)] = job


def _answer(job: EngineJob, output: Any) -> EngineReply:
    sampled = output.outputs[0]
    ids = list(sampled.token_ids)
    prompt_logprobs = None
    if job.options.get("prompt_logprobs") is not None:
        after_first = _logprobs_of(job.prompt[1:].tolist(), output.prompt_logprobs)  # the first has none
        prompt_logprobs = np.append(np.float32(np.nan), after_first)
    return EngineReply(
        job.key,
        np.array(ids, dtype=np.int32),
        _logprobs_of(ids, sampled.logprobs),
        str(sampled.finish_reason),
        prompt_logprobs,
    )


def _logprobs_of(ids: list[int], found: Any) -> npt.NDArray[np.float32]:
    """Return the log-probability of each of `ids` from vLLM's flat lists, which have these tokens alone."""
    if found is None or found.token_ids != ids:
        raise RuntimeError(f"vLLM gave log-probabilities of other tokens than the {len(ids)} asked for")
    return np.array(found.logprobs, dtype=np.float32)


if __name__ == "__main__":
    # The module under its own name, or its classes would be other ones to the parent than to this program.
    from dasd_lite.inference.vllm import engine as vllm_engine

    vllm_engine.main()

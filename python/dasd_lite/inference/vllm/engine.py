"""The program of a child process that runs one vLLM engine: `python -m dasd_lite.inference.vllm.engine FD`.

Input, over the socket FD from the parent process (pool.py): the engine's options, then jobs, each with prompt token ids
and sampling options. Output, over the same socket: the replies, and a heartbeat once a second. Invariants: the socket
carries only these messages, whatever vLLM prints; the process and all of its workers end as soon as the parent is gone.
This is the only module that imports vLLM.

    from the parent                         to the parent
    the engine's options: {name: value}     ("ready", (context, rows of the embedding)) or ("rejected", reason)
    ("add", [EngineJob, …])                 ("done", [EngineReply, …])
    ("abort", [key, …])                     ("beat", steps of the engine, running jobs)
    ("close",)
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

_BEAT_S = 1.0
_OF_FREE_MEMORY = 0.9  # the rest is for CUDA graphs and what else vLLM does not count
_OF_FREE_HOST_MEMORY = 0.5  # which other programs need more of at any time


class EngineJob(NamedTuple):
    """One prompt for the engine."""

    key: int
    prompt: npt.NDArray[np.int32]
    options: dict[str, Any]
    """Keywords of vLLM's SamplingParams."""


class EngineReply(NamedTuple):
    """The result of a job; log-probabilities are the raw model's at temperature 1."""

    key: int
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    finish_reason: str
    prompt_logprobs: npt.NDArray[np.float32] | None
    """[T] for a job with `prompt_logprobs`: those of the prompt's tokens, NaN for the first."""
    error: str = ""
    """Why vLLM rejects the job; the other fields are empty then."""


class _Link:
    """The socket to the parent, with a thread that receives messages and one that sends the heartbeat."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)  # vLLM's workers must not hold it open
        self._connection = Connection(fd)
        self._sending = threading.Lock()
        self._parent = os.getppid()
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.steps = 0
        self.running = 0
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def send(self, *message: Any) -> None:
        """Send a message to the parent; end this process if the parent is gone."""
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)  # takes half the time of Connection's own pickler
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
        while True:
            time.sleep(_BEAT_S)
            if os.getppid() != self._parent:  # processes that the parent forked can keep the socket open
                end(1)
            self.send("beat", self.steps, self.running)


def end(code: int) -> NoReturn:
    """Kill this process and vLLM's workers at once, whatever they are waiting for."""
    if os.getpgrp() == os.getpid():  # this process leads its own group
        os.killpg(0, signal.SIGKILL)
    os._exit(code)


def main() -> None:
    """Load the engine and serve jobs until the parent closes it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # this process itself steps the engine
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
        os._exit(1)  # at once: vLLM's threads and workers could keep the interpreter alive
    sys.stderr.flush()
    os._exit(0)


def _load(link: _Link) -> Any:
    """Load the engine with the parent's options; if vLLM rejects them, report why and return None."""
    options = link.inbox.get()
    if options["gpu_memory_utilization"] is None:
        options["gpu_memory_utilization"] = share_of_memory()
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    if current_platform.is_cpu() and "max_num_batched_tokens" not in options:
        # After a chunked prefill vLLM rewinds the request's random generator, which CPU generators cannot do.
        options["enable_chunked_prefill"] = False
    try:
        # The usage context of vllm.LLM: its default batches are larger than a bare engine's.
        engine = LLMEngine.from_engine_args(EngineArgs(**options), usage_context=UsageContext.LLM_CLASS)
    except ValueError as error:  # an option or a machine that does not fit the model; mostly too little memory
        link.send("rejected", " ".join(str(error).split()))
        return None
    link.send("ready", (int(engine.model_config.max_model_len), int(engine.model_config.get_vocab_size())))
    return engine


def share_of_memory() -> float:
    """Return the share of each visible GPU's whole memory that is 0.9 of what is free now, on the fullest of them.

    vLLM refuses to start if the share that it may use is not free: a display or another process holds some. Without a
    GPU it is the share of the machine's memory that is half of what is available.
    """
    import torch

    if not torch.cuda.is_available():
        import psutil  # which vLLM itself needs

        memory = psutil.virtual_memory()
        return max(0.01, _OF_FREE_HOST_MEMORY * float(memory.available / memory.total))
    cards = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
    return max(0.01, _OF_FREE_MEMORY * min(free / total for free, total in cards))


def _serve(engine: Any, link: _Link) -> None:
    """Step the engine while it has jobs, and wait for messages while it has none."""
    running: dict[str, EngineJob] = {}
    while True:
        while not running or not link.inbox.empty():
            kind, *content = link.inbox.get()
            if kind == "close":
                return
            if kind == "abort":
                aborted = [str(key) for key in content[0] if str(key) in running]
                engine.abort_request(aborted)
                for name in aborted:
                    del running[name]
            else:
                _add(engine, link, content[0], running)
            link.running = len(running)
        done = [_reply(running.pop(out.request_id), out) for out in engine.step() if out.finished]
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
            ignore_eos=True,  # what vLLM takes for it; `stop_token_ids` is complete
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            engine.add_request(str(job.key), {"prompt_token_ids": job.prompt.tolist()}, params)
        except ValueError as error:  # such as a token id that the model does not have
            empty = np.empty(0, dtype=np.float32)
            reason = " ".join(str(error).split())
            link.send("done", [EngineReply(job.key, empty.astype(np.int32), empty, "", None, reason)])
            continue
        running[str(job.key)] = job


def _reply(job: EngineJob, output: Any) -> EngineReply:
    sampled = output.outputs[0]
    ids = list(sampled.token_ids)
    prompt_logprobs = None
    if job.options.get("prompt_logprobs") is not None:
        after_first = _logprobs_of(job.prompt[1:].tolist(), output.prompt_logprobs)  # the first token has none
        prompt_logprobs = np.append(np.float32(np.nan), after_first)
    return EngineReply(
        job.key,
        np.array(ids, dtype=np.int32),
        _logprobs_of(ids, sampled.logprobs),
        str(sampled.finish_reason),
        prompt_logprobs,
    )


def _logprobs_of(ids: list[int], flat: Any) -> npt.NDArray[np.float32]:
    """Return the log-probability of each of `ids` from vLLM's flat lists, which contain exactly these tokens."""
    if flat is None or flat.token_ids != ids:
        raise RuntimeError(f"vLLM returned log-probabilities of tokens other than the {len(ids)} requested")
    return np.array(flat.logprobs, dtype=np.float32)


if __name__ == "__main__":
    # Import the module by its own name: the parent could not unpickle classes of __main__.
    from dasd_lite.inference.vllm import engine

    engine.main()

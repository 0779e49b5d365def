"""How much memory training will take, before it takes it.

Input: a model's shape, the options of `train`, the length of a row. Output: bytes by what they are for, on the card
and in host memory. Nothing here needs torch. Invariant: every term follows from what the layers of a decoder of the
Llama kind (Qwen3) keep for the backward pass and from how train.py works; tests count what autograd keeps and what is
alive at the peak, and hold the terms against it. What only a GPU can show is assumed: `_CONTEXT`, `_COMMUNICATION`,
`_FRAGMENTATION`, and what Liger's kernels and FSDP keep, which is derived from their code.

Letters: T tokens of one forward pass, E hidden size, I width of the MLP, Q and K width of all queries and of all keys,
V vocabulary, C positions whose logits exist at once, a bytes of an element in the format of the computation.
What makes it fit is in fit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.costs.hardware import Hardware
from dasd_lite.costs.shape import ModelShape
from dasd_lite.model import LOGIT_BYTES

AUTO_CHECKPOINTING = 4096
"""Tokens of a forward pass over which gradient_checkpointing = "auto" means on …"""
_AUTO_KEPT = 4e9  # … or bytes that would be kept without it: fewer than any card has to spare
_MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}  # bytes a trained weight; blocks of 256 + scale
_NF4 = 0.516  # bytes a weight: half a byte, 8 bits of scale for each 64, a float32 for each 256 of these
_CONTEXT = 600e6  # CUDA's context and its libraries' workspaces
_COMMUNICATION = 500e6  # NCCL's buffers, with several processes
_FRAGMENTATION = 0.05  # of what comes and goes


@dataclass(frozen=True)
class Prediction:
    """Bytes on one card at the worst moment of a step, by what they are for, and in host memory."""

    weights: float
    gradients: float
    optimizer: float
    kept: float
    """What the forward pass keeps for the backward pass: each layer's input, or all that autograd wants."""
    layer: float
    """What the layer under way needs beside that, with the weights in 16 bits that are made on the way."""
    loss: float
    """Logits of one chunk with their gradients, and the gradient of the output head."""
    overhead: float
    moment: str
    """The worst moment: forward, loss, layer or embedding."""
    host: float
    """Bytes in host memory, of all processes of this machine together."""

    @property
    def activations(self) -> float:
        """All that comes and goes but the loss."""
        return self.kept + self.layer

    @property
    def total(self) -> float:
        """Bytes on the card."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.overhead


def predict(
    shape: ModelShape, config: TrainConfig, *, seq_len: int, num_processes: int = 1, machine: Hardware | None = None
) -> Prediction:
    """Predict the memory of training on rows of `seq_len` tokens, the worst case: full, and all tokens targets."""
    machine = machine or Hardware()
    step = TrainingStep(shape, config, seq_len * config.micro_batch_size, num_processes, machine)
    moment, parts = max(step.moments().items(), key=lambda item: sum(item[1]))
    kept, layer, loss = parts
    fixed = _CONTEXT + (_COMMUNICATION if num_processes > 1 else 0) if machine.on_gpu else 0
    paged = config.optimizer == "paged_adamw_8bit"  # moves to the host what a full card has no room for
    return Prediction(
        weights=step.weights,
        gradients=step.gradients,
        optimizer=0.0 if paged else step.optimizer,
        kept=kept,
        layer=layer,
        loss=loss,
        overhead=fixed + (_FRAGMENTATION * sum(parts) if machine.on_gpu else 0),
        moment=moment,
        host=num_processes * (step.host + (step.optimizer if paged else 0)),
    )


@dataclass(frozen=True)
class TrainingStep:
    """One forward and backward pass over T tokens: the terms that `predict` adds up, in bytes."""

    shape: ModelShape
    config: TrainConfig
    tokens: int
    num_processes: int
    machine: Hardware

    # --- what does not depend on the row ------------------------------------------------------------

    @property
    def lora(self) -> Lora | None:
        """The adapter, when one is trained."""
        return self.config.method if isinstance(self.config.method, Lora) else None

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP spreads the weights; an adapter's base is whole on each card."""
        return self.num_processes > 1 and self.lora is None

    @property
    def trained(self) -> int:
        """Weights that are trained, of one process."""
        if self.lora is not None:
            return self.shape.adapter_parameters(self.lora)
        return self.shape.num_parameters // (self.num_processes if self.is_sharded else 1)

    @property
    def weights(self) -> float:
        """What is trained in float32; under an adapter the base in the format of the computation or in 4 bits.

        FSDP brings two layers together at a time, and keeps embedding and head together throughout, in a bytes.
        """
        shape, a = self.shape, self.a
        if self.lora is None:
            layers = 2 * shape.linear_parameters / shape.num_layers + self._tables
            return 4.0 * self.trained + (a * layers if self.is_sharded else 0)
        if self.lora.kind == "lora":
            return 4.0 * self.trained + a * shape.num_parameters
        rest = shape.num_parameters - shape.linear_parameters
        return 4.0 * self.trained + _NF4 * shape.linear_parameters + a * rest

    @property
    def _tables(self) -> int:
        """Weights of embedding and head."""
        return self.shape.head_parameters * (1 if self.shape.tied else 2)

    @property
    def gradients(self) -> float:
        """Float32, as what is trained."""
        return 4.0 * self.trained

    @property
    def optimizer(self) -> float:
        """AdamW's two moments."""
        return _MOMENTS[self.config.optimizer] * self.trained

    # --- number formats -----------------------------------------------------------------------------

    @property
    def a(self) -> int:
        """Bytes of an element in the format of the computation."""
        return {"auto": self.machine.element_bytes, "float32": 4}.get(self.config.dtype, 2)

    @property
    def liger(self) -> bool:
        """Whether Liger's kernels stand in for norms and MLPs; not for the norms of queries and keys."""
        return self.config.liger == "on" or (self.config.liger == "auto" and self.machine.liger)

    @property
    def _widened(self) -> bool:
        """Whether a norm's weight in float32, as one process trains it, makes its output float32; not with Liger."""
        return self.a == 2 and not self.liger and self.lora is None and not self.is_sharded

    @property
    def _own_inputs(self) -> bool:
        """Whether each linear layer keeps a copy of its input.

        Autocast makes one per layer of what is float32, and PEFT by way of float32 of what is not.
        """
        return self._widened or (self.a == 2 and self.lora is not None)

    # --- what a layer keeps, per token --------------------------------------------------------------

    def _keeps_input(self, name: str) -> bool:
        """Tell whether the gradient of a weight needs the layer's input; frozen ones need none."""
        return self.lora is None or name in self.shape.adapted(self.lora)

    @cached_property
    def _norms(self) -> float:
        """Two norms: their input in float32, which Liger needs not, the normalised for the gradient of the weight."""
        inside = self.a if self.liger else 4 + (self.a if self.lora is None else 0)
        return 2.0 * inside * self.shape.hidden_size

    @cached_property
    def _inputs(self) -> float:
        """Inputs of the five layers behind the norms: one each, or one behind each norm."""
        groups = [[self._keeps_input(f"{n}_proj") for n in names] for names in (("q", "k", "v"), ("gate", "up"))]
        if self.shape.num_moe_layers:
            groups[1] = [self.lora is None] * self.shape.experts_per_token  # each expert gathers its tokens
        copies = [sum(group) if self._own_inputs or len(group) > 3 else any(group) for group in groups]
        return float(self.a * self.shape.hidden_size * sum(copies))

    @cached_property
    def _attention(self) -> float:
        """Norms of queries and keys in float32; queries, keys, values, output, log-sums; the input of o_proj."""
        q, k, a = self.shape.q_size, self.shape.kv_size, self.a
        found = (4 + (a if self.lora is None else 0)) * (q + k) if self.shape.qk_norm else 0
        found += a * (2 * q + 2 * k) + 4 * self.shape.num_heads
        if self._keeps_input("o_proj") and self.lora is not None and self._own_inputs:
            found += a * q
        if not self.machine.varlen:
            # Documents laid side by side are put in order again, which o_proj keeps; on a GPU keys and values are
            # repeated for each head.
            found += a * q * (self._keeps_input("o_proj") and not (self.lora is not None and self._own_inputs))
            found += 2 * a * (q - k) if self.machine.on_gpu else 0
        return float(found)

    @cached_property
    def _mlp(self) -> float:
        """Both inputs of silu(gate) × up, and silu(gate), which Liger computes again."""
        return float((2 if self.liger else 3) * self.a * self.shape.mlp_width)

    @cached_property
    def _down(self) -> float:
        """Input of down_proj."""
        return float(self.a * self.shape.mlp_width) if self._keeps_input("down_proj") else 0.0

    @cached_property
    def _low_rank(self) -> float:
        """What an adapter's first matrix gives, of rank r."""
        return float(self.a * self.lora.rank * len(self.shape.adapted(self.lora))) if self.lora is not None else 0.0

    @cached_property
    def layer_kept(self) -> float:
        """Bytes a token that one layer keeps for its backward pass."""
        return self._norms + self._inputs + self._attention + self._mlp + self._down + self._low_rank

    @cached_property
    def _layer_peak(self) -> float:
        """Bytes a token when a layer is computed again and gone back through, beside its input.

        The worst is the MLP: on the way back its three tensors have their gradients beside them and the product is
        gone; Liger writes two of these in place. On the way forth an adapter's input exists four times: as it came,
        in float32, and in a bytes for either matrix.
        """
        width, hidden = self.shape.mlp_width, self.shape.hidden_size
        rest = self.layer_kept - self._mlp - self._down + self.a * hidden  # the gradient that passes by the layer
        if self.liger or self.a == 4:
            rest -= self.a * hidden  # the norm keeps the layer's input itself
        back = self._mlp + (self.a * width * 2 if self.liger else self._mlp)
        forth = 0.0
        if self._down and self.lora is not None and self.a == 2:
            forth = self._mlp + (self.a + 4 + self.a) * width + 3 * self.a * hidden
        return rest + max(back, forth)

    @cached_property
    def _layer_forward(self) -> float:
        """Bytes a token while a layer runs that keeps nothing: silu(gate), up, their product; see _layer_peak."""
        width, hidden = self.shape.mlp_width, self.shape.hidden_size
        wide = 4 if self.lora is not None and self.a == 2 else 3
        return float(wide * self.a * width + 8 * hidden)

    # --- what the whole pass keeps ------------------------------------------------------------------

    @cached_property
    def checkpointed(self) -> bool:
        """Whether layers are computed again."""
        if self.config.gradient_checkpointing != "auto":
            return self.config.gradient_checkpointing == "on"
        kept = float(self.tokens * self.shape.num_layers * self.layer_kept)
        return self.tokens > AUTO_CHECKPOINTING or kept > _AUTO_KEPT

    @property
    def _copied(self) -> float:
        """Trained matrices in 16 bits: autocast keeps them to the end of the forward pass, autograd beyond."""
        if self.a == 4 or self.is_sharded:
            return 0.0
        if self.lora is not None:
            return 2.0 * self.trained
        return 2.0 * (self.shape.matrix_parameters - self._tables)

    @cached_property
    def _final(self) -> float:
        """Last norm."""
        inside = self.a if self.liger else 4 + (self.a if self.lora is None else 0)
        return float(self.tokens * self.shape.hidden_size * inside)

    @cached_property
    def _hidden(self) -> float:
        """Hidden states that the logits are made from."""
        return float(self.tokens * self.shape.hidden_size * (4 if self._widened else self.a))

    @cached_property
    def kept(self) -> float:
        """Bytes that autograd keeps, wherever they lie."""
        layers, rope = self.shape.num_layers, 2 * self.a * self.shape.head_dim
        each = self.a * self.shape.hidden_size if self.checkpointed else self.layer_kept
        copied = 0.0 if self.checkpointed else self._copied
        return self.tokens * (layers * each + rope) + self._final + self._hidden + copied

    @property
    def host(self) -> float:
        """What lies in host memory of this process.

        A tensor that two operations keep is there twice: the norms' inputs, without checkpointing a quarter of all.
        torch gives out pinned memory in powers of two.
        """
        if not self.config.offload_activations:
            return 0.0
        if not self.checkpointed:
            return 1.25 * (self.kept - self._hidden)
        piece = self.tokens * self.shape.hidden_size * self.a
        pinned = 1 << (piece - 1).bit_length() if self.machine.on_gpu else piece
        return self.shape.num_layers * pinned + (1.0 if self.liger else 1.7) * self._final

    @property
    def _final_on_card(self) -> float:
        return 0.0 if self.config.offload_activations else self._final

    @cached_property
    def _on_card(self) -> float:
        """What of `kept` is on the card: when offloaded the hidden states, and one layer on its way."""
        if not self.config.offload_activations:
            return self.kept
        one = self.a * self.shape.hidden_size if self.checkpointed else self.layer_kept
        return self._hidden + self.tokens * one

    def moments(self) -> dict[str, tuple[float, float, float]]:
        """Return what comes and goes at the moments that can be the worst: kept, of the layer, of the loss."""
        table = float(self.shape.head_parameters)
        before_loss = self._on_card - self._final_on_card - self._hidden
        forward, back = self._layer_forward, self._layer_peak
        if not self.checkpointed:  # most of it is kept anyway
            forward, back = max(0.0, forward - self._mlp), max(0.0, back - self.layer_kept)
        # A tied head's gradient waits for the embedding's, at the very end: in float32, with FSDP in a bytes.
        waiting = table * (self.a if self.is_sharded else 4 * self.shape.tied) if self.lora is None else 0.0
        copied = self._copied if self.checkpointed else 0.0
        return {
            "forward": (before_loss, copied + self.tokens * forward, 0.0),
            "loss": (self._on_card, 0.0, self._loss(copied)),
            "layer": (before_loss, self._made + self.tokens * back + waiting, 0.0),
            "embedding": (0.0, self._end, 0.0),
        }

    @property
    def _made(self) -> float:
        """Weights and gradients of the layer that is gone back through, in other formats than they are kept in."""
        shape, layer = self.shape, self.shape.linear_parameters / self.shape.num_layers
        if self.lora is not None:  # one 4-bit matrix at a time is unfolded
            return 2.0 * shape.hidden_size * shape.mlp_width if self.lora.kind == "qlora" else 0.0
        if self.is_sharded:
            return (self.a + 4) * layer
        return 2.0 * layer if self.checkpointed and self.a == 2 else 0.0

    def _loss(self, copied: float) -> float:
        """Bytes of a chunk at the worst of four moments.

        Forth: logits in a bytes and in float32, log-probabilities. Back: log-probabilities and two gradients of them
        beside the head's gradient of earlier chunks and its weight in 16 bits once more. Then the gradient of the
        logits beside the head's of this chunk too. At last the head's of this chunk, of those before, and their sum.
        """
        table, a = float(self.shape.head_parameters), self.a
        cells = float(min(self.tokens, max(1, LOGIT_BYTES // (4 * self.shape.vocab_size))) * self.shape.vocab_size)
        if self.lora is not None:
            return 12 * cells + self._hidden
        copy = 2 * table if a == 2 and not self.is_sharded else 0.0
        forth = (10 if a == 2 else 8) * cells + copy + copied
        back = max(12 * cells + a * table + copy, a * cells + 2 * a * table + copy, 3 * a * table)
        return max(forth, back + self._hidden)

    @property
    def _end(self) -> float:
        """Gradient of the embedding: the head's that has waited, its own, their sum; with FSDP one to be added up."""
        table = float(self.shape.head_parameters)
        if self.lora is not None:
            return 0.0
        if self.is_sharded:
            return (3 * self.a if self.shape.tied else 2 * self.a + 8) * table
        return (12 if self.shape.tied else 4) * table

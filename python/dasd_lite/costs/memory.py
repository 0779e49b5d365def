"""Predict how much memory training will take.

Input: a model's shape, the options of `train`, and the length of a row. Output: bytes by what they are for, on the GPU
and in host memory. Nothing here needs torch. Invariant: every term follows from what the layers of a Llama-like decoder
(Qwen3) keep for the backward pass, and from how training/loop.py works; tests count what autograd keeps and what is
alive at the peak, and compare. What only a GPU can show is assumed: `_CONTEXT`, `_COMMUNICATION`, `_FRAGMENTATION`, and
what Liger's kernels and FSDP keep, which is derived from their code.

T: tokens of one forward pass. What makes a training run fit is in fit.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from dasd_lite.config.train import OBJECTIVES, Lora, TrainConfig
from dasd_lite.costs.hardware import GPU_SIZES, Hardware
from dasd_lite.costs.shape import ModelShape
from dasd_lite.model import LOGIT_BYTES, logit_bytes

# gradient_checkpointing = "auto" means on if a forward pass has more tokens than this, or if more bytes than this would
# be kept without it; every GPU has that much to spare.
AUTO_CHECKPOINTING, _AUTO_KEPT = 4096, 4e9
_MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}  # bytes per trained weight; 256 share a scale
_NF4 = 0.516  # bytes per weight: half a byte, an 8-bit scale for each 64, a float32 for each 256 of these
_READ_BACK = 2 << 30  # of a GPU, beside the exported model's weights, to read it back there
_CONTEXT = 600e6  # CUDA's context and the workspaces of its libraries
_COMMUNICATION = 500e6  # NCCL's buffers, with several processes
_FRAGMENTATION = 0.05  # of what is allocated and freed in every step


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU at the peak of a step, by what they are for, and bytes in host memory."""

    weights: float
    gradients: float
    optimizer: float
    kept: float
    """What the forward pass keeps for the backward pass: the input of each layer, or all that autograd saves."""
    layer: float
    """What the current layer needs on top of that, including the 16-bit copies of weights that are made for it."""
    loss: float
    """Logits of one chunk with their gradients, and the gradient of the output head."""
    overhead: float
    peak: str
    """Where in the step the peak is: forward, loss, last norm, last layer, layer, or embedding."""
    host: float
    """Bytes in host memory, of all processes on this machine together."""

    @property
    def activations(self) -> float:
        """All that is allocated and freed in a step, except the loss."""
        return self.kept + self.layer

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.overhead


def most_layers_kept(step: TrainingStep, gpu_bytes: float) -> int:
    """Return how many layers can keep their activations within `gpu_bytes`."""
    layers = step.shape.num_layers
    fits = (k for k in range(layers, 0, -1) if predict_step(replace(step, layers_kept=k)).total <= gpu_bytes)
    return next(fits, 0)


def predict(
    shape: ModelShape, config: TrainConfig, *, seq_len: int, num_processes: int = 1, hardware: Hardware | None = None
) -> Prediction:
    """Predict the memory of training in the worst case: rows of `seq_len` tokens, all of them targets."""
    tokens = seq_len * config.micro_batch_size
    return predict_step(TrainingStep(shape, config, tokens, num_processes, hardware or Hardware()))


def predict_step(step: TrainingStep) -> Prediction:
    """Predict the memory of a step."""
    config, num_processes, hardware = step.config, step.num_processes, step.hardware
    peak, parts = max(step.candidates().items(), key=lambda item: sum(item[1]))
    kept, layer, loss = parts
    fixed = _CONTEXT + (_COMMUNICATION if num_processes > 1 else 0) if hardware.on_gpu else 0
    paged = config.optimizer == "paged_adamw_8bit"  # moves what does not fit on the GPU to host memory
    prediction = Prediction(
        weights=step.weights,
        gradients=step.gradients,
        optimizer=0.0 if paged else step.optimizer,
        kept=kept,
        layer=layer,
        loss=loss,
        overhead=fixed + (_FRAGMENTATION * sum(parts) if hardware.on_gpu else 0),
        peak=peak,
        host=num_processes * (step.host + (step.optimizer if paged else 0)),
    )
    return replace(prediction, host=_host_bytes(step, prediction)) if hardware.on_gpu else prediction


def _host_bytes(step: TrainingStep, prediction: Prediction) -> float:
    """Return the bytes in host memory at the worst time: while the model is loaded, or when it has been exported.

    Each process that shards a model reads it whole in its turn, and makes a part float32 before that moves to the GPU.
    The exported model is read back into host memory if the GPU has no room for it beside the trained one; of a GPU that
    is not known, the smallest is assumed that can train. One process alone loads weight by weight onto the GPU.
    """
    stored, free = 2.0 * step.shape.num_parameters, step.hardware.free
    loading = stored + 4.0 * step.shape.head_parameters if step.is_sharded else 0.0
    if free is None:
        free = next((size * 1e9 for size in GPU_SIZES if prediction.total <= size * 1e9), 0.0)
    held = prediction.weights + prediction.gradients + prediction.optimizer
    reading = 0.0 if free - held > stored + _READ_BACK else stored
    return max(loading, prediction.host + reading)


@dataclass(frozen=True)
class TrainingStep:
    """One forward and backward pass over T tokens: the terms that `predict` adds up, in bytes."""

    shape: ModelShape
    config: TrainConfig
    tokens: int
    num_processes: int
    hardware: Hardware
    layers_kept: int = 0
    """Layers that keep their activations although others compute theirs again."""
    keeps_attention: bool = False
    """Whether the others keep the output of attention."""

    # --- weights, gradients, optimizer --------------------------------------------------------------

    @property
    def lora(self) -> Lora | None:
        """The adapter, if one is trained."""
        return self.config.method if isinstance(self.config.method, Lora) else None

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP shards the weights; the base of an adapter is whole on each GPU."""
        return self.num_processes > 1 and self.lora is None

    @property
    def trained_parameters(self) -> int:
        """Number of trained weights in one process."""
        if self.lora is not None:
            return self.shape.adapter_parameters(self.lora)
        return self.shape.num_parameters // (self.num_processes if self.is_sharded else 1)

    @property
    def weights(self) -> float:
        """Trained weights in float32; the base of an adapter in the compute format or in 4 bits.

        FSDP gathers two layers at a time, and keeps the embedding and the head gathered throughout, all in the compute
        format.
        """
        shape, trained = self.shape, 4.0 * self.trained_parameters
        if self.lora is None:
            gathered = 2 * shape.linear_parameters / shape.num_layers + self._table_parameters
            return trained + (self.element_bytes * gathered if self.is_sharded else 0)
        if self.lora.kind == "lora":
            return trained + self.element_bytes * shape.num_parameters
        rest = shape.num_parameters - shape.linear_parameters
        return trained + _NF4 * shape.linear_parameters + self.element_bytes * rest

    @property
    def _table_parameters(self) -> int:
        """Number of weights of the embedding and the head."""
        return self.shape.head_parameters * (1 if self.shape.tied else 2)

    @property
    def gradients(self) -> float:
        """Float32, like the trained weights."""
        return 4.0 * self.trained_parameters

    @property
    def optimizer(self) -> float:
        """AdamW's two moments."""
        return _MOMENTS[self.config.optimizer] * self.trained_parameters

    # --- number formats -----------------------------------------------------------------------------

    @property
    def element_bytes(self) -> int:
        """Bytes of an element in the compute format."""
        return {"auto": self.hardware.element_bytes, "float32": 4}.get(self.config.dtype, 2)

    @property
    def stream_bytes(self) -> int:
        """Bytes of an element of the residual stream: where float16 is computed in, it is float32."""
        is_float16 = self.config.dtype == "float16" or (self.config.dtype == "auto" and self.hardware.is_float16)
        return 4 if is_float16 else self.element_bytes

    @property
    def uses_liger(self) -> bool:
        """Whether Liger's kernels replace norms, rotary embeddings and MLPs."""
        return self.config.liger == "on" or (self.config.liger == "auto" and self.hardware.liger)

    @property
    def _norms_return_float32(self) -> bool:
        """Whether the output of a norm is float32: its input is, or its trained weight, without Liger and FSDP."""
        own = self.element_bytes == 2 and not self.uses_liger and self.lora is None and not self.is_sharded
        return own or self.stream_bytes > self.element_bytes

    # --- what a layer keeps, per token --------------------------------------------------------------

    def _keeps_input(self, name: str) -> bool:
        """Return whether a linear layer's input is kept for the gradient of its weight; frozen weights need none."""
        return self.lora is None or name in self.shape.adapted(self.lora)

    @cached_property
    def _norm_kept(self) -> float:
        """One norm: its float32 input (not with Liger), and the normalized output for the gradient of its weight."""
        inside = self.stream_bytes if self.uses_liger else 4 + (self.stream_bytes if self.lora is None else 0)
        return float(inside * self.shape.hidden_size)

    @cached_property
    def _inputs_kept(self) -> float:
        """Inputs of the five linear layers after the norms: one copy per layer, or one per norm."""
        groups = [[self._keeps_input(f"{n}_proj") for n in names] for names in (("q", "k", "v"), ("gate", "up"))]
        if self.shape.num_moe_layers:
            groups[1] = [self.lora is None] * self.shape.experts_per_token  # each expert gathers its tokens
        # Autocast copies a float32 input for each layer that reads it.
        copies = [sum(group) if self._norms_return_float32 or len(group) > 3 else any(group) for group in groups]
        return float(self.element_bytes * self.shape.hidden_size * sum(copies))

    @cached_property
    def _attention_kept(self) -> float:
        """Queries, keys, values, output, log-sums; what the norms of queries and keys keep.

        These are kept in float32 and, if their weights are trained, once more; Liger keeps them as they are.
        """
        q, k, element = self.shape.q_size, self.shape.kv_size, self.element_bytes
        norms = element if self.uses_liger else 4 + (element if self.lora is None else 0)
        kept = norms * (q + k) if self.shape.qk_norm else 0
        kept += element * (2 * q + 2 * k) + 4 * self.shape.num_heads
        if not self.hardware.varlen:
            # Documents that were laid side by side are put in order again, and o_proj keeps that; on a GPU, keys and
            # values are repeated for each head.
            kept += element * q * self._keeps_input("o_proj")
            kept += 2 * element * (q - k) if self.hardware.on_gpu else 0
        return float(kept)

    @cached_property
    def _mlp_kept(self) -> float:
        """Both factors of silu(gate) × up, and the gate; Liger computes silu(gate) again."""
        return float((2 if self.uses_liger else 3) * self.element_bytes * self.shape.mlp_width)

    @cached_property
    def _down_input_kept(self) -> float:
        """Input of down_proj."""
        return float(self.element_bytes * self.shape.mlp_width) if self._keeps_input("down_proj") else 0.0

    @cached_property
    def _adapters_kept(self) -> float:
        """Output of the first matrix of each adapter, `rank` elements."""
        if self.lora is None:
            return 0.0
        return float(self.element_bytes * self.lora.rank * len(self.shape.adapted(self.lora)))

    @cached_property
    def layer_kept(self) -> float:
        """Bytes per token that one layer keeps for its backward pass."""
        before_mlp = 2 * self._norm_kept + self._inputs_kept + self._attention_kept
        return before_mlp + self._mlp_kept + self._down_input_kept + self._adapters_kept

    @cached_property
    def _layer_backward(self) -> float:
        """Bytes per token while a layer is computed again and goes through its backward pass, beside its input.

        Either of two moments is the worst. At down_proj: its input, and the gradient of that; with an adapter, one more
        by way of the adapter. Inside of the MLP: its three tensors have
        their gradients beside them, and the product is gone; Liger writes two of these in place.
        """
        width, hidden, element = self.shape.mlp_width, self.shape.hidden_size, self.element_bytes
        stream = self.stream_bytes
        passing = stream * hidden  # the gradient that bypasses the layer
        rest = self.layer_kept - self._mlp_kept - self._down_input_kept + passing
        if self.uses_liger or stream == 4:
            rest -= stream * hidden  # the norm keeps the layer's input itself
        has_adapter = self.lora is not None and self._keeps_input("down_proj")
        down = self._mlp_kept + self._down_input_kept + (2 if has_adapter else 1) * element * width
        inside = self._mlp_kept + (element * width if self.uses_liger else self._mlp_kept)
        return rest + max(down, inside)

    @cached_property
    def _attention_backward(self) -> float:
        """Bytes per token while attention goes through its backward pass, which comes after the MLP's.

        Its gradients, and what flash-attention allocates for itself: the queries' gradient in float32 and, where heads
        share keys, the gradients of keys and values for every head (csrc/flash_attn/flash_api.cpp, mha_varlen_bwd).
        Then, without Liger, the norm of the queries, whose backward pass takes five of their size in float32.
        """
        q, k, element = self.shape.q_size, self.shape.kv_size, self.element_bytes
        before = self._norm_kept + self._inputs_kept + self._attention_kept + self._adapters_kept
        gradients = element * (2 * q + 2 * k)  # of the output, of queries, keys and values
        workspace = 4 * q + (2 * element * q if q != k else 0) if self.hardware.varlen and element == 2 else 0
        norm = 5 * 4 * q - gradients if self.shape.qk_norm and not self.uses_liger else 0
        return float(before + max(gradients + workspace, norm) + self.stream_bytes * self.shape.hidden_size)

    @cached_property
    def _layer_forward(self) -> float:
        """Bytes per token while a layer runs that keeps nothing: silu(gate), up, their product."""
        return float(3 * self.element_bytes * self.shape.mlp_width + 8 * self.shape.hidden_size)

    # --- what the whole pass keeps ------------------------------------------------------------------

    @cached_property
    def checkpointing(self) -> bool:
        """Whether layers compute their activations again in the backward pass."""
        if self.config.gradient_checkpointing != "auto":
            return self.config.gradient_checkpointing == "on"
        kept = float(self.tokens * self.shape.num_layers * self.layer_kept)
        return self.tokens > AUTO_CHECKPOINTING or kept > _AUTO_KEPT

    @property
    def _autocast_copies(self) -> float:
        """Trained matrices in 16 bits: autocast keeps them until the forward pass ends, autograd even longer."""
        if self.element_bytes == 4 or self.is_sharded:
            return 0.0
        if self.lora is not None:
            return 2.0 * self.trained_parameters
        return 2.0 * (self.shape.matrix_parameters - self._table_parameters)

    @property
    def _last_norm_kept(self) -> float:
        return self.tokens * self._norm_kept

    @property
    def _last_norm_backward(self) -> float:
        """What the last norm kept, and five of its size in float32 in its backward pass; Liger needs one."""
        inside = self.stream_bytes if self.uses_liger else 5 * 4
        return self._last_norm_kept + self.tokens * inside * self.shape.hidden_size

    @cached_property
    def _hidden_states(self) -> float:
        """Hidden states that the logits are computed from."""
        return float(self.tokens * self.shape.hidden_size * (4 if self._norms_return_float32 else self.element_bytes))

    @property
    def _kept_per_layer(self) -> float:
        """Bytes per token that a layer leaves behind: its input, or all that it keeps."""
        return self.stream_bytes * self.shape.hidden_size if self.checkpointing else self.layer_kept

    @cached_property
    def kept(self) -> float:
        """Bytes that autograd keeps, on the GPU or in host memory."""
        rope = 2 * self.element_bytes * self.shape.head_dim
        copies = 0.0 if self.checkpointing else self._autocast_copies
        layers = self.tokens * (self.shape.num_layers * self._kept_per_layer + rope)
        chosen = self._whole_layers_kept + self._attention_outputs_kept
        experts = 0.0 if self.checkpointing else self.shape.num_moe_layers * self._adapted_experts
        return layers + chosen + self._last_norm_kept + self._hidden_states + copies + experts

    @property
    def _whole_layers(self) -> int:
        """Layers that keep their activations although others compute theirs again."""
        return min(self.layers_kept, self.shape.num_layers) if self.checkpointing else 0

    @cached_property
    def _whole_layers_kept(self) -> float:
        """What these layers keep beside their inputs: their activations and, of trained matrices, autocast's copies."""
        activations = self.tokens * (self.layer_kept - self._kept_per_layer) + self._adapted_experts
        return self._whole_layers * (activations + self._autocast_copies / self.shape.num_layers)

    @property
    def _adapted_experts(self) -> float:
        """A layer's experts with their adapter added, which PEFT makes for all of them and autograd keeps."""
        is_adapted = self.lora is not None and self.lora.experts == "adapted"
        return float(self.element_bytes * self.shape.layer_expert_parameters) if is_adapted else 0.0

    @cached_property
    def _attention_outputs_kept(self) -> float:
        """What the other layers keep, beside their inputs, of attention: its output and log-sums."""
        if not (self.checkpointing and self.keeps_attention):
            return 0.0
        of_layer = self.element_bytes * self.shape.q_size + 4 * self.shape.num_heads
        return float(self.tokens * (self.shape.num_layers - self._whole_layers) * of_layer)

    @property
    def host(self) -> float:
        """Bytes in host memory, of this process.

        A tensor that two operations keep is there twice: the inputs of the norms, a quarter of everything without
        checkpointing. torch rounds pinned memory up to powers of two.
        """
        if not self.config.offload_activations:
            return 0.0
        if not self.checkpointing:
            return 1.25 * (self.kept - self._hidden_states)
        layer_input = self.tokens * self.shape.hidden_size * self.stream_bytes
        pinned = 1 << (layer_input - 1).bit_length() if self.hardware.on_gpu else layer_input
        return self.shape.num_layers * pinned + (1.0 if self.uses_liger else 1.7) * self._last_norm_kept

    @cached_property
    def _kept_on_gpu(self) -> float:
        """The part of `kept` on the GPU: with offloading, the hidden states and one layer on its way."""
        if not self.config.offload_activations:
            return self.kept
        return self._hidden_states + self.tokens * self._kept_per_layer

    # --- the peak -----------------------------------------------------------------------------------

    def candidates(self) -> dict[str, tuple[float, float, float]]:
        """Return what the step needs where its peak can be: bytes kept, of the current layer, and of the loss."""
        table = float(self.shape.head_parameters)
        last_norm = 0.0 if self.config.offload_activations else self._last_norm_kept
        without_loss = self._kept_on_gpu - last_norm - self._hidden_states
        forward, backward = self._layer_forward, max(self._layer_backward, self._attention_backward)
        experts = self._adapted_experts
        if not self.checkpointing or self._whole_layers:  # the last layer keeps most of it anyway
            forward = max(0.0, forward - self._mlp_kept - self._down_input_kept)
            experts = 0.0
        if not self.checkpointing:
            backward = max(0.0, backward - self.layer_kept)
        # The gradient of a tied head waits in float32 for the embedding's, at the very end; FSDP has the head's wait in
        # the compute format.
        waiting = table * (self.element_bytes if self.is_sharded else 4 * self.shape.tied) if self.lora is None else 0.0
        # Copies live until the forward pass ends; those of layers that keep their activations are counted there.
        share = 1 - self._whole_layers / self.shape.num_layers
        copies = self._autocast_copies * share if self.checkpointing else 0.0
        moments = {
            "forward": (without_loss, copies + self.tokens * forward + experts, 0.0),
            "loss": (self._kept_on_gpu, 0.0, self._loss(copies)),
            "last norm": (without_loss, self._last_norm_backward + waiting, 0.0),
            # The last layers are the first to go back, so all others find their activations gone.
            "layer": (
                without_loss - self._whole_layers_kept,
                self._converted_layer + self.tokens * backward + waiting,
                0.0,
            ),
            "embedding": (0.0, self._embedding_gradients, 0.0),
        }
        if self._whole_layers:
            kept_layer = self.tokens * max(0.0, backward - self.layer_kept)
            moments["last layer"] = (without_loss, kept_layer + waiting, 0.0)
        return moments

    @property
    def _converted_layer(self) -> float:
        """Weights and gradients of the layer in its backward pass, in other formats than they are kept in."""
        shape, layer = self.shape, self.shape.linear_parameters / self.shape.num_layers
        if self.lora is not None:  # one 4-bit matrix at a time is dequantized, one of the experts has its gradient
            matrix = 2.0 * shape.hidden_size * shape.mlp_width if self.lora.kind == "qlora" else 0.0
            return matrix + self._adapted_experts * (4 / 3 if self.checkpointing else 1 / 3)
        if self.is_sharded:
            return (self.element_bytes + 4) * layer
        return 2.0 * layer if self.checkpointing and self.element_bytes == 2 else 0.0

    @cached_property
    def logit_bytes(self) -> int:
        """Bytes of float32 logits that exist at the same time."""
        if self.hardware.memory is None or self.hardware.free is None:
            return LOGIT_BYTES
        optimizer = 0.0 if self.config.optimizer == "paged_adamw_8bit" else self.optimizer
        copies = 0.0 if not self.checkpointing else self._autocast_copies
        held = self.weights + self.gradients + optimizer + self._kept_on_gpu + copies
        return logit_bytes(self.hardware.free - held, self.hardware.memory)

    @property
    def _chunk_cells(self) -> float:
        """Logits of one chunk of positions."""
        return float(min(self.tokens, max(1, self.logit_bytes // (4 * self.shape.vocab_size))) * self.shape.vocab_size)

    def _loss(self, autocast_copies: float) -> float:
        """Bytes of a chunk of logits, of the gradients of head and hidden states, and of a copy of the head's weight.

        In one pass: logits in the compute format and in float32; the gradient of the hidden states and, in float32, the
        head's.
        """
        if not (self.config.one_pass_loss and self.config.objective in OBJECTIVES):
            return self._loss_in_two_passes(autocast_copies)
        table, element = float(self.shape.head_parameters), self.element_bytes
        chunk = (element + 4 if element == 2 else 4) * self._chunk_cells
        hidden = self.tokens * self.shape.hidden_size * element * (2 if self._norms_return_float32 else 1)
        if self.lora is not None:
            return chunk + hidden + autocast_copies
        copy = 2 * table if element == 2 and not self.is_sharded else 0.0
        return chunk + hidden + 4 * table + copy + autocast_copies

    def _loss_in_two_passes(self, autocast_copies: float) -> float:
        """Bytes at the worst of four points.

        Forward: logits in the compute format and in float32, and log-probabilities. Backward, first: log-probabilities
        and two gradients of them, beside the head's gradient from earlier chunks and a 16-bit copy of its weight. Then
        the gradient of the logits, and the head's of this chunk too. Last, the head's gradients of this chunk and of
        those before, and their sum.
        """
        table, element, cells = float(self.shape.head_parameters), self.element_bytes, self._chunk_cells
        if self.lora is not None:
            return 12 * cells + self._hidden_states
        copy = 2 * table if element == 2 and not self.is_sharded else 0.0
        forward = (10 if element == 2 else 8) * cells + copy + autocast_copies
        backward = max(
            12 * cells + element * table + copy, element * cells + 2 * element * table + copy, 3 * element * table
        )
        return max(forward, backward + self._hidden_states)

    @property
    def _embedding_gradients(self) -> float:
        """The head's gradient that has waited, the embedding's own, and their sum; with FSDP another to reduce."""
        table = float(self.shape.head_parameters)
        if self.lora is not None:
            return 0.0
        if self.is_sharded:
            return (3 * self.element_bytes if self.shape.tied else 2 * self.element_bytes + 8) * table
        return (12 if self.shape.tied else 4) * table

"""From a model table to what runs it: transformers here, vLLM, servers, or a sampler of the user's own."""

from __future__ import annotations

from pathlib import Path

from dasd_lite.config.models import CustomTeacher, Endpoint, Teacher, Transformers, Vllm
from dasd_lite.data.manifest import Identity, read_manifest
from dasd_lite.data.seeds import digest
from dasd_lite.data.usage import Usage
from dasd_lite.errors import DataError
from dasd_lite.inference import Sampler


def model_identity(model: Teacher | Sampler) -> Path | str:
    """Return what identifies a model in fingerprints.

    This is its folder; behind an endpoint a hash of its name and, if known, its tokenizer and template; of a custom
    sampler a hash of its code and options. Every stage that uses the teacher calls this function, so two different
    teachers within one run are noticed.
    """
    from dasd_lite.chat.chat import Chat
    from dasd_lite.data.hub import model_folder

    if isinstance(model, Endpoint):
        return digest(model.model, Chat(model_folder(model.tokenizer)).fingerprint if model.tokenizer else "")
    if isinstance(model, Transformers | Vllm):
        return model_folder(model.model, weights=True)
    from dasd_lite.inference.custom import custom_source

    return custom_source(model)


def model_name(model: Teacher | Sampler) -> str:
    """Return what people call a model."""
    if isinstance(model, Endpoint | Transformers | Vllm):
        return model.model
    return model.kind if isinstance(model, CustomTeacher) else type(model).__name__


def check_same_teacher(rollouts: Path, teacher: Teacher | Sampler, identity: Identity) -> None:
    """Refuse to combine the rollouts of one teacher with answers or scores of another.

    Args:
        rollouts: Folder of the rollouts.
        teacher: The teacher that is used now.
        identity: The stage that uses it, with `teacher` among its inputs.

    Raises:
        DataError: They are not the same. What was ingested has no teacher, so any may follow.
    """
    sampled_from = read_manifest(rollouts)["inputs"].get("teacher")
    if sampled_from not in (None, "", identity.inputs["teacher"]):
        name = model_name(teacher)
        raise DataError(f"{rollouts}: sampled from another teacher than {name}; {identity.stage} must use the same one")


def open_sampler(
    model: Teacher | Sampler,
    folder: Path | None = None,
    used: Usage | None = None,
    *,
    four_bit: bool = False,
) -> Sampler:
    """Open the sampler for `model`.

    Args:
        model: The teacher or student table of a recipe, or a sampler, which is used as it is.
        folder: Weights to load in place of the model's own, such as a student after training.
        used: Tokens used so far, which count against an endpoint's budget.
        four_bit: Load the weights in 4 bits; transformers only.

    Raises:
        ConfigError: The options do not fit the machine, or a custom class cannot be used as a sampler.
    """
    if isinstance(model, Endpoint):
        from dasd_lite.inference.endpoint.sampler import EndpointSampler

        return EndpointSampler(model, used)
    if isinstance(model, Vllm):
        from dasd_lite.inference.vllm.sampler import VllmSampler

        return VllmSampler(model, folder)
    if isinstance(model, Transformers):
        from dasd_lite.inference.local import TransformersSampler

        return TransformersSampler(model, folder, four_bit=four_bit)
    from dasd_lite.inference.custom import open_custom

    return open_custom(model)

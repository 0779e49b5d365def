"""Every architecture: documents of one row have the log-probabilities that each has alone, or it is refused."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.zoo import APART, LONGROPE, PACKED, REFUSED, build, save

from dasd_lite.errors import ConfigError
from dasd_lite.model.architecture import read_architecture
from dasd_lite.model.load import load_model
from dasd_lite.model.logprobs import target_logprobs

# Longer than the windows and chunks of the zoo, and of one, two and several documents side by side.
LENGTHS = [40, 33, 7, 2, 55, 36]


def alone(folder, ids, lengths):
    """Each document by itself, through the model's own eager attention and its own logits."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    parts = []
    for document in np.split(ids, np.cumsum(lengths)[:-1]):
        tokens = torch.from_numpy(document)
        with torch.no_grad():
            logprobs = plain(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
        parts.append(np.append(np.nan, logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()))
    return np.concatenate(parts)


def random_ids(lengths):
    return np.random.default_rng(0).integers(3, 440, sum(lengths))


@pytest.mark.parametrize("name", [name for name in [*PACKED, *APART] if name != "phi3_longrope"])
def test_a_row_has_the_logprobs_of_each_document_alone(name, tmp_path):
    folder, ids = save(build(name), tmp_path / name), random_ids(LENGTHS)
    assert read_architecture(folder).packs == (name in PACKED)
    found = target_logprobs(load_model(folder, device="cpu"), ids, LENGTHS)
    np.testing.assert_allclose(found, alone(folder, ids, LENGTHS), atol=5e-6)


@pytest.mark.parametrize(("context", "factors"), [(600, "short_factor"), (None, "long_factor"), (2048, "long_factor")])
def test_longrope_has_the_factors_of_the_served_context_whatever_the_documents(context, factors, tmp_path):
    folder, lengths = save(build("phi3_longrope"), tmp_path / "longrope"), [700, 90, 30]
    ids = random_ids(lengths)
    found = target_logprobs(load_model(folder, device="cpu", context=context), ids, lengths)
    # The same model with these factors for every length.
    rope = {**LONGROPE, "short_factor": LONGROPE[factors], "long_factor": LONGROPE[factors]}
    fixed = save(build("phi3_longrope", rope_parameters=rope), tmp_path / "fixed")
    np.testing.assert_allclose(found, alone(fixed, ids, lengths), atol=2e-5)  # rounding over 700 tokens


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(name, tmp_path):
    folder = save(build(name), tmp_path / name)
    with pytest.raises(ConfigError, match=REFUSED[name][2]):
        load_model(folder, device="cpu")

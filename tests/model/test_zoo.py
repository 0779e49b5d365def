"""Every architecture: documents of one row have the log-probabilities that each has alone, or it is refused."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.zoo import APART, LONGROPE, PACKED, REFUSED, ZOO, build, save

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


def test_sixteen_bits_are_scored_where_layers_add_up_in_float32(tmp_path):
    folder, ids = save(build("mamba"), tmp_path / "mamba"), random_ids(LENGTHS)
    exact, rounded = (
        target_logprobs(load_model(folder, device="cpu", dtype=dtype), ids, LENGTHS)
        for dtype in ("float32", "bfloat16")
    )
    assert np.nanmean(np.abs(rounded - exact)) < 0.05


def test_weights_that_are_multiplied_directly_are_not_read_in_four_bits(tmp_path):
    with pytest.raises(ConfigError, match="mamba multiplies by its weights directly, so they cannot be in 4 bits"):
        load_model(save(build("mamba"), tmp_path / "mamba"), device="cpu", four_bit=True)


def test_the_documented_table_is_the_zoo():
    """What a row lists as untested may be missing in the zoo; nothing else, and nothing of the zoo in the table."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    starts = {"| exact, packed": PACKED, "| exact, one document": APART, "| refused:": REFUSED}
    for start, names in starts.items():
        rows = [line.split("|")[2] for line in text.splitlines() if line.startswith(start)]
        kinds = [kind.strip() for row in rows for kind in row.split("; untested:")[0].split(",")]
        tried = {kind_of(name) for name in names if name != "llama_dynamic"}
        assert set(kinds) - {"any"} == tried, start


def kind_of(name):
    config_class, numbers = ZOO[name]
    return getattr(transformers, config_class)(**numbers).model_type

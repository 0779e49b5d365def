"""The smallest change of options with which a training run fits a GPU."""

from tests.costs.models import SHAPE_4B

from dasd_lite.config.train import Lora, TrainConfig
from dasd_lite.costs.fit import sizes_that_fit, smallest_change
from dasd_lite.costs.memory import predict


def change(gpu_bytes, config=None, seq_len=65536, **options):
    return smallest_change(SHAPE_4B, config or TrainConfig(), seq_len=seq_len, gpu_bytes=gpu_bytes, **options)


def test_nothing_is_changed_where_it_fits():
    assert change(141e9).settings == {}


def test_no_more_is_changed_than_needed():
    assert change(80e9).settings == {"train.optimizer": '"adamw_8bit"'}
    assert change(60e9).settings == {"train.optimizer": '"adamw_8bit"', "train.offload_activations": "true"}
    assert change(40e9).settings == {"train.method": '{ kind = "lora", rank = 32 }'}
    two = TrainConfig(micro_batch_size=2, grad_accum_steps=4)
    assert change(100e9, two).settings == {"train.micro_batch_size": "1", "train.grad_accum_steps": "8"}
    kept = TrainConfig(method=Lora(kind="lora", rank=8, alpha=16), gradient_checkpointing="off")
    assert change(12e9, kept, 4096).settings == {"train.gradient_checkpointing": '"on"'}
    much = change(8e9)
    assert much.settings["pack.seq_len"] == str(much.seq_len)
    assert 'kind = "qlora"' in str(much)


def test_every_change_fits_and_a_smaller_gpu_never_needs_less():
    lengths = []
    for gpu_bytes in range(4 * 10**9, 100 * 10**9, 4 * 10**9):
        smallest = change(gpu_bytes)
        assert smallest is None or smallest.prediction.total <= gpu_bytes
        lengths.append(0 if smallest is None else smallest.seq_len)
    assert lengths == sorted(lengths)
    assert change(2e9) is None


def test_moments_in_8_bits_are_not_proposed_to_several_processes():
    assert change(30e9, num_processes=8).settings == {"train.offload_activations": "true"}


def test_the_change_keeps_the_options_of_an_adapter():
    smallest = change(7e9, TrainConfig(method=Lora(kind="lora", rank=8, alpha=16)), 4096)
    assert smallest.settings["train.method"] == '{ kind = "qlora", rank = 8, alpha = 16.0 }'


def test_sizes_that_fit_are_those_of_common_gpus():
    assert sizes_that_fit(predict(SHAPE_4B, TrainConfig(), seq_len=65536)) == [141]

"""Two processes keep the same B, whoever loaded what, whatever was joined; what is sharded is refused."""

import pytest
import replica_worker
import torch
from torch import nn

import feedbackpath as fp
from feedbackpath.rules.replicas import begin_alike


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("replicas")
    torch.multiprocessing.spawn(replica_worker.run_all, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def difference(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max()) for one, other in pairs for a, b in zip(one, other, strict=True))


ALIKE = [
    "load on the first",
    "load on both",
    "kp, own seeds",
    "mirror-kp, own seeds",
    "wm, own seeds",
    "inside another",
    "accumulating",
    "join, kp",
    "join, fa",
    "join, mirror-kp",
    "join, kp, no batch",
    "join, kp, no batch in turns",
    "join, fa, no batch",
    "join, mirror-kp, no batch",
    "join, kp, no batch, inside another",
    "branches",
    "zero",
]


@pytest.mark.parametrize("job", ALIKE)
def test_processes_have_the_same_weights_and_feedback_weights(job, found):
    assert not isinstance(found[0][job], str), found[0][job]
    assert difference(found[0][job], found[1][job]) == 0.0


def test_a_checkpoint_that_the_first_process_loads_counts_for_all_from_the_first_step(found):
    assert difference(found[0]["load on the first"], found[0]["load on both"]) == 0.0


def test_a_redundancy_optimizer_ends_where_a_plain_one_does(found):
    assert difference(found[0]["zero"], found[0]["no zero"]) < 1e-12


def test_a_process_without_a_batch_ends_with_what_the_other_has_come_to_alone(found):
    for outcomes in found:
        assert difference(outcomes["join, kp, no batch"], outcomes["join, kp, no batch, alone"]) < 1e-12


@pytest.mark.parametrize("job", ["join, wm", "join, wm, no batch"])
def test_a_rule_that_mirrors_at_each_step_refuses_to_join(job, found):
    for outcomes in found:
        assert outcomes[job].startswith("RuleError: DistributedDataParallel.join lets processes take")
        assert "drop_last=True" in outcomes[job]


def test_clipping_that_counts_feedback_weights_is_named_on_every_process(found):
    for outcomes in found:
        (message,) = outcomes["clipped"]
        assert "the norm counts feedback weights too" in message


@pytest.mark.parametrize("job", ["fsdp, wm", "fsdp, mirror-kp", "fsdp, fa", "untied, then parallel"])
def test_weights_that_are_sharded_after_untie_are_refused_by_every_use(job, found):
    for outcomes in found:
        for words in outcomes[job]:
            assert words.startswith("UntieError: the weight")
            assert "sharded over processes" in words
            assert "use DistributedDataParallel" in words


def test_weights_that_are_sharded_before_are_refused_by_untie(found):
    for outcomes in found:
        (words,) = outcomes["parallel, then untied"]
        assert words.startswith("UntieError: '0' (Linear) is sharded (FSDP, tensor parallelism)")


def test_processes_that_train_a_model_each_are_let_be(found):
    first, second = (outcomes["apart"] for outcomes in found)
    assert not isinstance(first, str)
    assert difference(first, second) > 0.1


def test_a_single_process_has_no_hook_and_retie_takes_it_off(tmp_path):
    def hooks(model):
        return [hook for hook in model._forward_pre_hooks.values() if hook is begin_alike]

    model = nn.Sequential(nn.Linear(6, 3))
    path = fp.untie(model, "kp")
    path.matrix_angles()
    assert hooks(model) == []
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        path.matrix_angles()  # untied before the job was one
        path.matrix_angles()
        assert len(hooks(model)) == 1
        path.retie()
        assert hooks(model) == []
    finally:
        torch.distributed.destroy_process_group()

"""Two processes under DistributedDataParallel end where one does; or learn from noise of both."""

import contextlib
import math
import unittest.mock

import ddp_worker
import pytest
import torch

NOISY = ("pal", "dtp")  # each process has noise of its own; one process can take the shares of two in turn


def test_two_processes_equal_one_under_every_rule(tmp_path):
    torch.multiprocessing.spawn(ddp_worker.run_all_rules, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert list(first) == list(ddp_worker.RULES)
    for rule, by_one in first.items():
        alone = ddp_worker.train(ddp_worker.RULES[rule], parts=2 if rule in NOISY else 1)
        for name, pair in by_one.items():
            for ours, other, single in zip(pair, second[rule][name], alone[name], strict=True):
                assert torch.equal(ours, other), f"{rule}: ranks differ in {name!r}"
                torch.testing.assert_close(ours, single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", NOISY)
def test_processes_that_had_the_same_noise_would_end_elsewhere(rule):
    with unittest.mock.patch.object(ddp_worker, "as_process", return_value=contextlib.nullcontext()):
        alike = ddp_worker.train(rule, parts=2)
    for name, (_, b) in ddp_worker.train(rule, parts=2).items():
        assert (b - alike[name][1]).norm() > 1e-3 * b.norm()


def test_steps_of_two_processes_can_be_audited(tmp_path):
    torch.multiprocessing.spawn(ddp_worker.run_audits, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        verdicts = torch.load(tmp_path / f"{rank}.pt")
        assert verdicts.pop("bp") is False
        assert verdicts == dict.fromkeys(("kp", "wm", "averaged"), True)


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """What each of two processes finds in mirror mode."""
    folder = tmp_path_factory.mktemp("mirrored")
    torch.multiprocessing.spawn(ddp_worker.run_mirrors, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    return {name: ddp_worker.mirror_at_rest(name, how) for name, how in ddp_worker.MIRRORS.items()}


@pytest.mark.parametrize("name", ddp_worker.MIRRORS)
def test_feedback_is_the_same_on_all_ranks_bit_for_bit_and_after_resuming(name, mirrored):
    first, second = (found[name] for found in mirrored)
    assert equal(first["feedback"], second["feedback"])
    assert first["passes"] == second["passes"]
    if name != "until":
        assert equal(first["feedback"], first["resumed"])


@pytest.mark.parametrize(("name", "share"), [("averaged", 1.0), ("signs", 1.0), ("target", 0.5)])
def test_the_angle_of_averaged_noise_is_that_of_all_ranks_samples(name, share, mirrored, alone):
    """tan(angle) falls with the root of the samples: each rank's own, or its share of what a target needs."""
    found = mirrored[0][name]
    for layer, angle in found["angles"].items():
        assert found["samples"][layer] == pytest.approx(share * alone[name]["samples"][layer], abs=1)
        assert angle == pytest.approx(found["planned_deg"][layer], rel=0.15), layer
        tangent = math.tan(math.radians(alone[name]["angles"][layer])) / math.sqrt(2 * share)
        assert math.tan(math.radians(angle)) == pytest.approx(tangent, rel=0.15), layer


@pytest.mark.parametrize(("name", "times"), [("same", 1), ("averaged", 2), ("target", 1)])
def test_work_is_counted_on_all_devices(name, times, mirrored, alone):
    for layer, flops in mirrored[0][name]["flops"].items():
        assert flops == pytest.approx(times * alone[name]["flops"][layer], rel=0.05)


def test_mirroring_until_an_angle_takes_half_the_passes_of_one_device(mirrored, alone):
    found = mirrored[0]["until"]
    assert max(found["angles"].values()) < 4.8
    assert found["passes"]["3"] == pytest.approx(alone["until"]["passes"]["3"] / 2, rel=0.15)


def test_one_rank_of_averaged_noise_is_what_the_same_noise_gives(tmp_path, alone):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = ddp_worker.mirror_at_rest("averaged", ddp_worker.MIRRORS["averaged"])
    finally:
        torch.distributed.destroy_process_group()
    assert equal(found["feedback"], alone["same"]["feedback"])


def test_ranks_that_average_noise_keep_one_schedule(mirrored):
    first, second = (found["schedule"] for found in mirrored)
    assert equal(first["feedback"], second["feedback"])
    states = [dict(found["state"]) for found in (first, second)]
    assert states[0].pop("rule_names") == states[1].pop("rule_names")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    passes = first["state"]["parts"]["MirrorMode"]["passes"].values()
    assert len(passes) == 3
    assert max(passes) < 20  # there was something to choose

"""Two processes under DistributedDataParallel end where one does, by every rule."""

import ddp_worker
import torch

import feedbackpath as fp


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(ddp_worker.run_all_rules, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert list(first) == list(fp.RULES)
    for rule, by_one in first.items():
        alone = ddp_worker.train(rule)
        for name, pair in by_one.items():
            for ours, other, single in zip(pair, second[rule][name], alone[name], strict=True):
                assert torch.equal(ours, other), f"{rule}: ranks differ in {name!r}"
                torch.testing.assert_close(ours, single, rtol=1e-9, atol=1e-9)


def test_steps_of_two_processes_can_be_audited(tmp_path):
    torch.multiprocessing.spawn(ddp_worker.run_audits, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        verdicts = torch.load(tmp_path / f"{rank}.pt")
        assert verdicts == {"kp": "transport-free", "wm": "transport-free", "bp": "transports weights"}

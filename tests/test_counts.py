"""What the arrays of a chip do in a training step, against sums by hand; energy and area."""

import copy
import dataclasses

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import feedbackpath as fp
from feedbackpath.hardware import ArrayCounts, Costs, Work
from feedbackpath.report.counts import counts_table, energy_table

STEP = 0.25
COARSE = fp.devices.LinearStep(step=STEP, bound=1e6)


def make_mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def make_convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def train(rule, make=make_mlp, *, steps=2, batch=10, device=COARSE, counts=True, lr=0.1, **settings):
    """Train with counts; return the counter (None: without), the path, and the model's weights."""
    model = make()
    chip = fp.Chip(device, **settings)
    path = fp.untie(model, rule, chip=chip)
    data = torch.Generator().manual_seed(0)
    shape = (8,) if make is make_mlp else (2, 6, 6)
    model(torch.zeros(2, *shape).requires_grad_(False))  # B of broadcast rules is made then
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    chip.attach(optimizer)
    counter = chip.counting() if counts else None
    for _ in range(steps):
        x = torch.randn(batch, *shape, generator=data)
        optimizer.zero_grad()
        (model(x) - 1.0).square().sum().backward()
        optimizer.step()
        path.step()
    return counter, path, [p.detach().clone() for p in model.parameters()]


def read_of(counts, array, phase):
    work = counts[array].work[phase]
    return work.reads, work.products, work.dac, work.adc, work.moved


def test_an_mlp_against_sums_by_hand():
    counts = train("kp")[0].counts()
    v1, v2, n = 48, 24, 10
    assert read_of(counts, "W", "forward") == (2 * n, n * (v1 + v2), n * (8 + 6), n * (6 + 4), n * (8 + 6))
    assert read_of(counts, "B", "backward") == (n, n * v2, n * 4, n * 6, n * 4)  # no error leaves layer 1
    assert read_of(counts, "one", "backward") == read_of(counts, "B", "backward")
    assert counts["W"].work["update"].moved == counts["B"].work["update"].moved == v1 + v2
    assert (counts["W"].cells, counts["W"].dacs, counts["W"].adcs) == (v1 + v2, 14, 10)
    assert (counts["B"].cells, counts["B"].dacs, counts["B"].adcs) == (v1 + v2, 4, 6)
    assert (counts["one"].cells, counts["one"].dacs, counts["one"].adcs) == (v1 + v2, 18, 16)
    assert set(counts["W"].work) == {"forward", "update"}


def test_a_convolution_is_read_position_by_position():
    layers = train("fa", make_convolutional)[0].by_layer()
    n, u1, u2 = 10, 36, 4  # maps of 6 x 6 and of 2 x 2
    first, second = layers["0"], layers["2"]
    assert read_of(first, "W", "forward") == (
        n * u1, n * u1 * 54, n * u1 * 18, n * u1 * 3, n * 2 * 36
    )  # fmt: skip
    assert read_of(second, "W", "forward") == (
        n * u2, n * u2 * 108, n * u2 * 27, n * u2 * 4, n * 3 * 36
    )  # fmt: skip
    assert read_of(second, "B", "backward") == (
        n * u2, n * u2 * 108, n * u2 * 4, n * u2 * 27, n * u2 * 4
    )  # fmt: skip
    assert first["B"].work == {}
    assert "update" not in second["B"].work  # B of fa is never written


@pytest.mark.parametrize("make", [make_mlp, make_convolutional])
def test_pulses_are_those_that_the_asked_changes_take(make):
    """Changes are whole steps: a learning rate of one step, and errors of 0 and +-1 of whole inputs."""

    def run(device):
        model = make().double()
        chip = fp.Chip(device)
        path = fp.untie(model, "kp", chip=chip)
        optimizer = torch.optim.SGD(model.parameters(), lr=STEP)
        chip.attach(optimizer)
        with chip.counting() as counter:
            shape = (8,) if make is make_mlp else (2, 6, 6)
            x = torch.randint(-2, 3, (10, *shape), generator=torch.Generator().manual_seed(0)).double()
            for p in model.parameters():
                p.data.copy_(p.data.sign())
            before = [(w.detach().clone(), b.detach().clone()) for _, w, b in path.pairs()]
            model(x).sum().backward()
            optimizer.step()
            path.step()
        return counter.counts(), before, list(path.pairs())

    counts, before, after = run(COARSE)
    for side, array in enumerate(("W", "B")):
        asked = [
            (pair[side] - old[side]).detach() / STEP for (_, *pair), old in zip(after, before, strict=True)
        ]
        work = counts[array].work["update"]
        assert work.pulses == pytest.approx(sum(float(a.abs().sum()) for a in asked))
        assert work.pulses > 0
        assert work.writes == sum(int((a.abs() > 0.5).sum()) for a in asked)


class Products(TorchDispatchMode):
    """Multiplications by a weight's values in whatever runs: a slow count that knows no phases."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.found = {w.untyped_storage().data_ptr(): w for w in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "convolution"):
            used = [a for a in args if isinstance(a, torch.Tensor) and self._is_one(a)]
            if used:
                self.found += output.numel() * (used[0].numel() // self._outputs(name, used[0], args))
        elif name == "convolution_backward" and args[-1][0] and self._is_one(args[2]):
            self.found += args[0].numel() * args[2][0].numel()
        return output

    def _is_one(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.weights

    def _outputs(self, name, used, args):
        return used.shape[0] if name == "convolution" else used.shape[1]


@pytest.mark.parametrize("rule", ["bp", "fa", "kp", "dfa", "wm"])
@pytest.mark.parametrize("make", [make_mlp, make_convolutional])
def test_products_are_those_that_the_simulation_computes(rule, make):
    """W and B of every operation that torch runs in a step, found by their memory."""
    model = make()
    chip = fp.Chip(fp.devices.Ideal())
    path = fp.untie(model, rule, chip=chip)
    shape = (8,) if make is make_mlp else (2, 6, 6)
    x = torch.randn(10, *shape)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    chip.attach(optimizer)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        path.step()

    step()
    weights = [(w.weight, w.feedback if w.has_feedback else w.weight) for w in path.weights]
    with chip.counting() as counter, Products([p for pair in weights for p in pair]) as seen:
        step()
    counts = counter.counts()
    total = sum(counts[array].total.products for array in counts if array != "one")
    assert total == seen.found


def test_mirror_mode_pays_its_dues():
    counter, _, _ = train("wm", steps=1)
    for of, inputs, outputs in zip(counter.by_layer().values(), (8, 6), (6, 4), strict=True):
        reads = 2048  # nothing had been seen yet
        assert read_of(of, "W", "mirror")[:4] == (
            reads, reads * inputs * outputs, reads * inputs, reads * outputs
        )  # fmt: skip
        assert of["W"].work["mirror"].moved == reads * inputs
        assert of["B"].work["mirror"].moved == reads * (inputs + outputs)
        assert of["B"].work["mirror"].pulses > 0
        assert "update" not in of["B"].work


def test_signs_are_read_cell_by_cell_and_brought_to_b():
    counts = train("ss")[0].counts()
    assert (counts["W"].work["update"].adc, counts["W"].work["update"].products) == (72, 72)
    assert counts["B"].work["update"].moved == 72
    assert counts["one"].work["update"].adc == 0


def test_a_broadcast_error_goes_in_by_the_outputs():
    counts = train("dfa")[0].by_layer()["2"]
    assert read_of(counts, "B", "backward") == (10, 240, 40, 60, 40)
    assert counts["B"].cells == 4 * 6


def test_samples_bring_signals_and_corrections_are_reads():
    samples = train("kp", update="samples", batch=7)[0].by_layer()
    first = samples["0"]
    assert first["B"].work["update"].moved == 7 * (8 + 6)  # no error has come to B of the first layer
    assert samples["2"]["B"].work["update"].moved == 7 * 6
    assert samples["2"]["W"].work["update"].moved == 7 * 4
    assert samples["2"]["one"].work["update"].moved == 0
    assert first["W"].work["update"].dac == 7 * (8 + 6)
    verified = train("kp", verify=3)[0].counts()["W"].work["update"]
    assert (verified.adc, verified.products) == (3 * 72, 3 * 72)


def test_ideal_cells_are_set_without_pulses():
    counts = train("kp", device=fp.devices.Ideal())[0].counts()
    for array in ("W", "B"):
        assert (counts[array].work["update"].writes, counts[array].work["update"].pulses) == (72, 0)
    frozen = train("fa", device=fp.devices.Ideal())[0].counts()
    assert "update" not in frozen["B"].work


def test_pairs_and_reference_columns_have_two_cells():
    for device in (fp.devices.PCM(), fp.devices.HfO2()):
        assert train("fa", device=device)[0].counts()["B"].cells == 2 * 72


@pytest.mark.parametrize("rule", ["bp", "kp", "wm"])
def test_counting_changes_no_bit(rule):
    soft = fp.devices.SoftBounds(step=1e-3, noise=0.3)
    reads = fp.Read(bits=8, noise=0.02)
    runs = [
        train(rule, make_convolutional, device=soft, read=reads, counts=counts, lr=0.01)[2]
        for counts in (False, True)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_a_run_that_is_resumed_has_the_counts_of_one_that_was_not_broken():
    counter, path, _ = train("kp")
    state = copy.deepcopy(path.state_dict())
    assert copy.deepcopy(path).chip.counter is None
    again, other, _ = train("kp", steps=1)
    other.load_state_dict(state)
    assert again.counts() == counter.counts()
    assert again.steps == 2


# Energy and area


def test_energy_and_area_scale_with_the_users_numbers():
    work, arrays = Work(1, 2, 3, 4, 5, 6, 7), ArrayCounts(10, 20, 30)
    free = Costs(**{field.name: 0.0 for field in dataclasses.fields(Costs)})
    assert free.energy_pj(work) == free.area_um2(arrays) == 0
    for name, operations in (("product", 2), ("dac", 3), ("adc", 4), ("pulse", 6), ("moved", 7)):
        assert dataclasses.replace(free, **{f"{name}_pj": 2.5}).energy_pj(work) == 2.5 * operations
    for name, parts in (("cell", 10), ("dac", 20), ("adc", 30)):
        assert dataclasses.replace(free, **{f"{name}_um2": 2.5}).area_um2(arrays) == 2.5 * parts
    doubled = Costs(**{name: 2 * value for name, value in dataclasses.asdict(Costs()).items()})
    assert doubled.energy_pj(work) == pytest.approx(2 * Costs().energy_pj(work))


def test_what_cannot_be_counted_is_refused():
    for value in (-1.0, float("inf"), "much", True):
        with pytest.raises(fp.ChipError, match="Costs: pulse_pj"):
            Costs(pulse_pj=value)
    chip = fp.Chip()
    with pytest.raises(fp.ChipError, match="call untie.* first"):
        chip.counting()
    fp.untie(make_mlp(), "kp", chip=chip)
    counter = chip.counting()
    with pytest.raises(fp.ChipError, match="is counting already"):
        chip.counting()
    with pytest.raises(fp.ChipError, match="no training step"):
        counter.counts()
    for rule, model in (("dtp", make_mlp()), ("pfa", make_mlp()), ("rdd", make_mlp()), ("kp", nn.LSTM(3, 2))):
        chip = fp.Chip()
        fp.untie(model, rule, chip=chip)
        assert not chip.can_count
        with pytest.raises(fp.ChipError, match="weight_ih_l0" if rule == "kp" else rule):
            chip.counting()


def test_energy_is_told_beside_one_array():
    arrays = train("kp")[0].counts()
    costs = Costs(pulse_pj=1000.0)
    text = Console(width=120)
    with text.capture() as captured:
        text.print(counts_table({"kp": arrays}), energy_table({"kp": arrays}, costs))
    cells = next(line.split() for line in captured.get().splitlines() if "–" in line.split())
    both = costs.energy_pj(arrays["W"].total) + costs.energy_pj(arrays["B"].total)
    assert float(cells[-3]) == pytest.approx(both / costs.energy_pj(arrays["one"].total), abs=0.006)
    assert float(cells[-3]) > 1.5
    area = costs.area_um2(arrays["W"]) + costs.area_um2(arrays["B"])
    assert float(cells[-1]) == pytest.approx(area / costs.area_um2(arrays["one"]), abs=0.006)
    assert sum(line.split()[:1] == ["kp"] for line in captured.get().splitlines()) == 5

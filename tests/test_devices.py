"""What devices do to a weight, against pulses one by one and against closed forms."""

import math
from dataclasses import replace

import pytest
import torch

import feedbackpath as fp
from feedbackpath.hardware.devices import PRESETS, device_named

SHAPES = {
    "constant": fp.devices.LinearStep(step=0.01),
    "linear": fp.devices.LinearStep(step=0.01, slope_up=0.4, slope_down=0.2),
    "soft": fp.devices.SoftBounds(step=0.01, bound=0.8, low=-0.6),
    "exponential": fp.devices.Exponential(step=0.002, a_up=-1.2, a_down=-0.1, a=-0.5, b=-0.5),
    "power": fp.devices.Power(step=0.005, gamma_up=1.7, gamma_down=0.6),
    "power-1": fp.devices.Power(step=0.005),
    "reference": fp.devices.Reference(step=0.01, asymmetry=0.3),
}
over_shapes = pytest.mark.parametrize("device", SHAPES.values(), ids=SHAPES)
EVEN = {"noise": 0.0, "spread": 0.0, "asymmetry_spread": 0.0, "bound_spread": 0.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cells_of(device, w):
    return device.draw(w, seeded())


@over_shapes
@pytest.mark.parametrize("is_up", [True, False])
def test_many_pulses_at_once_are_pulses_one_by_one(device, is_up):
    w = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
    cells, way = cells_of(device, w), torch.full((9,), is_up)
    state = w + cells.shift
    for _ in range(40):
        size = device.step * device.response(state, way, cells)
        state = state + (size if is_up else -size)
    at_once = device.apply(w, torch.full((9,), 40.0, dtype=torch.float64), way, cells, None)
    moved = (state - cells.shift - w).abs().max()
    assert moved > 0.01
    is_exact = isinstance(device, fp.devices.LinearStep)
    assert (at_once - state + cells.shift).abs().max() < (1e-12 if is_exact else 0.02 * moved)


@over_shapes
def test_mean_and_variance_of_a_write(device):
    for one in (device, replace(device, noise=0.5)):
        w = torch.full((40_000,), 0.1, dtype=torch.float64)
        cells = cells_of(one, w)
        for asked in (2.3 * one.step, -0.4 * one.step):
            new = one.write(w, torch.full_like(w, asked), cells, seeded(1))
            mean = one.mean(w[:1], torch.tensor([asked], dtype=torch.float64), _first(cells))
            variance = one.variance(w[:1], torch.tensor([asked], dtype=torch.float64), _first(cells))
            error = math.sqrt(float(variance) / len(w))
            assert abs(float(new.mean() - mean)) < 4 * error + 0.02 * one.step
            assert float(new.var()) == pytest.approx(float(variance), rel=0.06)


def _first(cells):
    return cells._replace(
        **{
            name: value[:1]
            for name, value in cells._asdict().items()
            if torch.is_tensor(value) and value.dim()
        }
    )


def test_a_device_without_noise_stays_within_a_step_of_what_was_asked():
    device, w = fp.devices.LinearStep(step=0.01), torch.zeros(1000)
    asked = torch.empty(1000).uniform_(-0.5, 0.5, generator=seeded())
    assert (device.write(w, asked, cells_of(device, w), seeded()) - asked).abs().max() <= 0.01 + 1e-6


@pytest.mark.parametrize("asked", [5.0, -5.0])
def test_bounds_hold_and_a_cell_beyond_them_waits_for_its_write(asked):
    device = fp.devices.SoftBounds(step=0.1, bound=0.5, bound_spread=0.3)
    w = torch.linspace(-2.0, 2.0, 50)
    cells = cells_of(device, w)
    new = device.write(w, torch.full_like(w, asked), cells, seeded())
    assert (new <= cells.high + 1e-6).all()
    assert (new >= cells.low - 1e-6).all()
    assert torch.equal(device.write(w, torch.zeros_like(w), cells, seeded()), w)


def test_cells_scatter_as_their_settings_say():
    device = fp.devices.SoftBounds(
        spread=0.2, asymmetry=0.3, asymmetry_spread=0.1, bound_spread=0.05, stuck=0.25
    )
    cells = cells_of(device, torch.zeros(200, 200))
    assert float(cells.up.mean()) == pytest.approx(1.3, abs=0.01)
    assert float(cells.down.mean()) == pytest.approx(1.0, abs=0.01)
    common = torch.cov(torch.stack([cells.up.flatten(), cells.down.flatten()]))[0, 1]
    assert float(common) == pytest.approx(0.2**2 * 1.3, rel=0.05)
    assert float(cells.high.std()) == pytest.approx(0.05, rel=0.05)
    assert float(cells.is_stuck.float().mean()) == pytest.approx(0.25, abs=0.02)


def test_stuck_cells_stay():
    device, w = fp.devices.LinearStep(step=0.01, stuck=0.5), torch.zeros(100)
    cells = cells_of(device, w)
    moved = device.write(w, torch.full_like(w, 0.1), cells, seeded()) != 0
    assert torch.equal(moved, ~cells.is_stuck)


def test_ups_and_downs_lead_to_the_symmetry_point_and_a_reference_makes_it_0():
    for kind, expected in ((fp.devices.SoftBounds, None), (fp.devices.Reference, 0.0)):
        device = kind(step=0.01, asymmetry_spread=0.3)
        w = torch.full((500,), 0.3)
        cells = cells_of(device, w)
        for _ in range(600):
            for asked in (0.01, -0.01):
                w = device.write(w, torch.full_like(w, asked), cells, seeded())
        point = device.symmetry_point(cells) if expected is None else torch.zeros(500)
        assert (w - point).abs().max() < 0.02


def test_a_pair_counts_up_on_both_sides_and_refreshes():
    device = fp.devices.Pair(cell=fp.devices.SoftBounds(step=0.05, low=0.0))
    w = torch.zeros(3)
    cells = cells_of(device, w)
    seen = []
    for number in range(200):
        w = device.write(w, torch.full((3,), 0.05 if number % 2 else -0.05), cells, seeded(number))
        seen.append(float(cells.minus[0]))
    assert w.abs().max() < 0.1
    assert any(later < earlier for earlier, later in zip(seen, seen[1:], strict=False))


def test_a_measured_response_is_followed(tmp_path):
    soft = fp.devices.SoftBounds(step=0.05)
    w, lines = torch.tensor([-1.0], dtype=torch.float64), ["pulse,conductance"]
    cells = cells_of(soft, w)
    for number in range(200):
        lines.append(f"{number},{1e-6 * (float(w) + 1.0):.12g}")
        w = soft.after(w, torch.ones(1).double(), torch.tensor([number < 100]), cells)
    file = tmp_path / "response.csv"
    file.write_text("\n".join(lines))
    device = fp.devices.Measured.from_csv(file, step=0.05)
    at, asked = torch.linspace(-0.8, 0.8, 9).double(), torch.full((9,), 0.25).double()
    for sign in (1.0, -1.0):
        found, expected = (d.mean(at, sign * asked, cells_of(d, at)) for d in (device, soft))
        assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pulse,conductance\n0,1\n1,2\n", "at least four"),
        ("0,1\n1,x\n", "line 2"),
        ("0,1\n1,2\n2,3\n3,4\n4,5\n", "then fall"),
    ],
)
def test_a_response_that_cannot_be_is_named(tmp_path, text, message):
    file = tmp_path / "response.csv"
    file.write_text(text)
    with pytest.raises(fp.ChipError, match=message):
        fp.devices.Measured.from_csv(file)


@pytest.mark.parametrize(
    "settings", [{"step": 0.0}, {"noise": -1.0}, {"stuck": 2.0}, {"low": 1.0}, {"spread": math.nan}]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(fp.ChipError, match=next(iter(settings))):
        fp.devices.SoftBounds(**settings)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_writes_finite_weights(name):
    device, w = device_named(name), torch.linspace(-0.5, 0.5, 400)
    cells = cells_of(device, w)
    for number in range(5):
        w = device.write(w, torch.full_like(w, 0.02), cells, seeded(number))
    assert w.isfinite().all()
    assert float(w.mean()) > 0.0


@pytest.mark.parametrize("is_up", [True, False])
@pytest.mark.parametrize(
    "device",
    [
        fp.devices.PCM(**EVEN).cell,
        fp.devices.Exponential(step=0.05, a_up=-3.0, a_down=-2.0, a=-0.5, b=-0.2),
        fp.devices.Power(step=0.2, gamma_up=2.0, gamma_down=1.5),
    ],
    ids=["pcm", "exponential", "power"],
)
def test_large_pulses_come_to_what_they_come_to_one_by_one(device, is_up):
    counts = torch.arange(0.0, 100.0).double()
    w = torch.full_like(counts, 0.1)
    cells, way = cells_of(device, w), torch.full((100,), is_up)
    one_by_one, state = [], w[:1]
    for _ in counts:
        one_by_one.append(float(state))
        step = device.step * device.response(state, way[:1], cells) * (1.0 if is_up else -1.0)
        state = (state + step).clamp(cells.low, cells.high)
    found = device.apply(w, counts, way, cells, None)
    assert (found - torch.tensor(one_by_one).double()).abs().max() < 0.02 * (device.bound - device.lowest)
    torch.testing.assert_close(found[:17], torch.tensor(one_by_one[:17]).double())


def step_responses_of_aihwkit(kind, sign, pulses):
    """Return weights after 1, 2, ... pulses of a device of the package aihwkit, without its noise."""
    presets = pytest.importorskip("aihwkit.simulator.presets.devices", reason="aihwkit is not installed")
    from aihwkit.simulator.configs import SingleRPUConfig, UpdateParameters
    from aihwkit.simulator.tiles.analog import AnalogTile

    device = getattr(presets, kind)()
    for name in vars(device):
        if name.endswith(("_dtod", "_std", "_std_add", "_std_slope")) or name == "lifetime":
            setattr(device, name, 0.0)
    update = UpdateParameters(desired_bl=1, update_bl_management=False, update_management=False)
    tile = AnalogTile(1, 1, SingleRPUConfig(device=device, update=update))
    tile.set_learning_rate(10 * device.dw_min)  # each update is a pulse: its chance is 1
    found = []
    try:
        tile.set_weights(torch.zeros(1, 1))
        for _ in range(pulses):
            tile.update(torch.ones(1, 1), torch.full((1, 1), -sign))
            found.append(float(tile.get_weights()[0]))
    except RuntimeError as error:  # built for another torch
        pytest.skip(f"aihwkit does not run with this torch: {error}")
    return torch.tensor(found).double()


@pytest.mark.parametrize(
    ("kind", "device", "sign"),
    [
        ("EcRamPresetDevice", fp.devices.EcRam(**EVEN), 1.0),
        ("EcRamPresetDevice", fp.devices.EcRam(**EVEN), -1.0),
        ("CapacitorPresetDevice", fp.devices.Capacitor(**EVEN), 1.0),
        ("CapacitorPresetDevice", fp.devices.Capacitor(**EVEN), -1.0),
        ("ReRamESPresetDevice", fp.devices.ReRam(**EVEN), 1.0),
        ("ReRamESPresetDevice", fp.devices.ReRam(**EVEN), -1.0),
        ("PCMPresetDevice", fp.devices.PCM(**EVEN).cell, 1.0),  # it can only be raised
        ("ReRamArrayHfO2PresetDevice", fp.devices.HfO2(**EVEN, error=0.0), 1.0),
        ("ReRamArrayHfO2PresetDevice", fp.devices.HfO2(**EVEN, error=0.0), -1.0),
    ],
)
def test_presets_respond_as_those_of_aihwkit(kind, device, sign):
    theirs = step_responses_of_aihwkit(kind, sign, 200)
    counts = torch.arange(1.0, 201.0).double()
    w = torch.zeros_like(counts)
    ours = device.apply(w, counts, torch.full((200,), sign > 0), cells_of(device, w), None)
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()

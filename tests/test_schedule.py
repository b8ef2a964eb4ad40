"""Tables of every solver against the released samplers' own, and what must hold for any of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miga_engine.errors import ConfigError
from miga_engine.schedule import COLUMNS, NUM_COEFFICIENTS, add_noise, make_schedule

GOLDENS = Path(__file__).parent / "goldens" / "samplers"
NO_LEVELS = (
    (), "", "1,a", (0.5, 0.9), (0.5, 0.5), (1.5, 1), (1, float("nan")), (1, -0.5), (0,), 1, "nan", (1, 0.5, 0, 0),
    (True, 0.5), {1: 2}, b"1", [1, [0.5]], [10**400], [1 - i / 1e6 for i in range(1001)], "inf 1", (1, None),
)  # fmt: skip
FLOW_SOLVERS = ("unipc", "dpmpp_2m", "euler", "lcm")


def column(schedule, name):
    return schedule.coefficients.rows64[:, 0, COLUMNS.index(name)]


@pytest.mark.parametrize("case", sorted(json.loads((GOLDENS / "wan_meta.json").read_text())["tables"]))
@pytest.mark.parametrize("solver", ["unipc", "dpmpp"])
def test_flow_tables_match_golden(solver, case):
    golden = load_file(GOLDENS / "wan_tables.safetensors")
    num_steps, shift = case.removeprefix("T").split("_shift")
    sigmas, timesteps, _ = make_schedule(solver, int(num_steps), float(shift))
    assert (sigmas - golden[f"{solver}_sigmas_{case}"]).abs().max() <= 1e-7
    assert torch.equal(timesteps, golden[f"{solver}_timesteps_{case}"])


@pytest.mark.parametrize("num_steps", [10, 50, 64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_tables_match_golden(num_steps, eta):
    tables = load_file(GOLDENS / "vc2_tables.safetensors")

    def golden(name):
        return tables[f"ddim_{name}_S{num_steps}_eta{eta:.0f}"].flip(0)

    plain = make_schedule("ddim", num_steps, eta=eta)
    scaled = make_schedule("ddim", num_steps, eta=eta, use_scale_array=True)
    assert torch.equal(plain.timesteps, golden("timesteps"))
    for received, name in (
        (plain.alphas[:-1] ** 2, "alphas"),
        (plain.sigmas[:-1], "sqrt_one_minus_alphas"),
        (column(plain, "p_m") ** 2, "alphas_prev"),
        (column(plain, "p_n"), "sigmas"),
        (column(plain, "m_x") / column(scaled, "m_x"), "scale_arr"),
        (column(scaled, "p_m") / column(plain, "p_m"), "scale_arr_prev"),
    ):
        assert (received - golden(name)).abs().max() <= 1e-6, name
    assert plain.uses_noise == (eta > 0)


@pytest.mark.parametrize("solver", [*FLOW_SOLVERS, "ddim"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 54, 200])
def test_rows_are_finite_and_keep_a_point_mass(solver, num_steps):
    num_steps += solver == "ddim"  # which starts at two steps
    _check_rows(make_schedule(solver, num_steps, eta=0.0), solver)


@pytest.mark.parametrize("solver", [*FLOW_SOLVERS, "dmd"])
@pytest.mark.parametrize(
    "levels",
    [{"denoising_steps": (1000, 750, 500, 250)}, {"sigmas": (1, 0.5)}, {"sigmas": (1,)}, {"sigmas": "0.9 0.4 0.3, 0"},
     {"denoising_steps": (999, 934, 862, 756, 603, 410, 250, 140, 74), "shift": 1.0},
     {"sigmas": [1 - 1e-6, 0.5, 1e-6]}],
)  # fmt: skip
def test_rows_of_explicit_levels_are_finite_and_keep_a_point_mass_from_pure_noise_on(solver, levels):
    _check_rows(make_schedule(solver, **levels), solver)


def _check_rows(schedule, solver):
    rows, num_steps = schedule.coefficients.rows64, schedule.num_steps
    assert rows.shape == (num_steps, 3, NUM_COEFFICIENTS)
    assert torch.isfinite(schedule.coefficients.rows).all()
    assert schedule.sigmas.shape == (num_steps + 1,)
    assert schedule.sigmas[-1] == 0
    assert (schedule.sigmas[:-1] > schedule.sigmas[1:]).all()
    # Data that is one constant sample: x_s = α_s·a + σ_s·e and exact predictions make every solver exact.
    sample, noise = 0.7, -1.3
    alphas, sigmas = schedule.alphas.double(), schedule.sigmas.double()
    levels = alphas * sample + sigmas * noise
    last = None if solver != "ddim" else levels[-2]  # ddim's last step is an identity
    for s in range(num_steps):
        for h in range(min(s, 2) + 1):
            row = dict(zip(COLUMNS, rows[s, h].tolist(), strict=True))
            x, v = levels[s].item(), noise if solver == "ddim" else noise - sample
            y = levels[s - 1].item() if s else 0.0
            m = row["m_x"] * x + row["m_v"] * v
            corrected = row["c_x"] * x + row["c_y"] * y + (row["c_m"] + row["c_m1"] + row["c_m2"]) * sample
            expected = levels[s + 1] if s + 1 < num_steps or last is None else last
            assert m == pytest.approx(sample, abs=2e-6)
            assert corrected == pytest.approx(x, abs=1e-6)
            received = row["p_x"] * corrected + row["p_v"] * v + row["p_m"] * m + row["p_m1"] * sample
            received += row["p_n"] * noise
            assert received == pytest.approx(expected.item(), abs=2e-6)


def test_explicit_levels_are_those_that_are_given_and_the_network_is_told_them_whole():
    warped = make_schedule("euler", 54, 5.0, denoising_steps=(1000, 750, 500, 250))
    assert warped.sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-7)
    assert warped.timesteps.dtype == torch.float32
    assert warped.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625], abs=1e-4)
    evenly = make_schedule("euler", 4, 5.0)
    assert torch.equal(evenly.coefficients.rows64, warped.coefficients.rows64)
    assert evenly.timesteps.dtype == torch.int64
    for same in ("1000,757,522", " 1000, 757 522 0 ", [1000, 757.0, 522, 0], ["1000", "757", "522"]):
        plain = make_schedule("lcm", shift=1.0, denoising_steps=same)
        assert plain.sigmas.tolist() == pytest.approx([1, 0.757, 0.522, 0], abs=1e-7)
        assert torch.equal(plain.sigmas, make_schedule("dmd", shift=9.0, sigmas=(1, 0.757, 0.522)).sigmas)


def test_v_prediction_equals_epsilon_prediction():
    epsilon, velocity = (make_schedule("ddim", 16, prediction_type=kind) for kind in ("epsilon", "v"))
    x, noise = 0.4, -1.1
    for s in range(16):
        alpha, sigma = epsilon.alphas[s].item(), epsilon.sigmas[s].item()
        v = (noise - sigma * x) / alpha  # from noise = alpha·v + sigma·x
        outputs = []
        for schedule, output in ((epsilon, noise), (velocity, v)):
            row = dict(zip(COLUMNS, schedule.coefficients.rows64[s, 0].tolist(), strict=True))
            m = row["m_x"] * x + row["m_v"] * output
            outputs.append((m, row["p_x"] * x + row["p_v"] * output + row["p_m"] * m))
        assert outputs[0] == pytest.approx(outputs[1], rel=1e-5)


def test_add_noise_matches_golden_and_takes_mixed_levels():
    golden = load_file(GOLDENS / "wan_trajectories.safetensors")
    schedule = make_schedule("unipc", 10, 5.0)
    x0, noise = (golden[f"addnoise_{name}"].transpose(0, 1) for name in ("x0", "noise"))
    for step_index in (0, 3, 6, 9):
        expected = golden[f"addnoise_step{step_index}"].transpose(0, 1)
        assert (add_noise(schedule, x0, noise, step_index) - expected).abs().max() <= 1e-6
    mixed = add_noise(schedule, x0, noise, torch.tensor([9, 0, 3]))
    for frame, step_index in enumerate((9, 0, 3)):
        assert torch.equal(mixed[frame], add_noise(schedule, x0, noise, step_index)[frame])
    assert torch.equal(add_noise(schedule, x0, noise, 10), x0)
    assert add_noise(schedule, x0.bfloat16(), noise.bfloat16(), 3).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, r"solver 'heun' is unknown: choose one of unipc"),
        ({"num_steps": 0}, r"num_steps is 0: give a whole number"),
        ({"num_steps": 2.5}, r"num_steps is 2.5"),
        ({"shift": 0.0}, r"shift is 0.0: give a positive"),
        ({"shift": float("nan")}, r"shift is nan"),
        ({"shift": 1e12}, r"neighbouring sigmas of these 54 steps are equal in float32: bring .* lower num_steps"),
        ({"sigmas": (0.5, 0.5 - 1e-12)}, r"neighbouring sigmas of these 2 steps are equal .*, or move the levels"),
        ({"sigmas": (0.5, 1e-60)}, r"neighbouring sigmas of these 2 steps are equal"),
        ({"sigmas": (1, 0.5), "denoising_steps": (1000,)}, r"sigmas and denoising_steps are given for solver 'unipc'"),
        ({"solver": "ddim", "sigmas": (1, 0.5)}, r"sigmas are given for solver 'ddim': they belong to flow models"),
        *(({"sigmas": value}, r"sigmas must be up to 1000 numbers that descend, from") for value in NO_LEVELS),
        ({"denoising_steps": (1001, 500)}, r"denoising_steps must be up to 1000 numbers .* at most 1000 to above 0"),
        ({"use_scale_array": True}, r"use_scale_array is set for solver 'unipc'"),
        ({"prediction_type": "epsilon"}, r"prediction_type 'epsilon' does not fit solver 'unipc'"),
        ({"solver": "ddim", "num_steps": 1001}, r"num_steps is 1001: ddim needs"),
        ({"solver": "ddim", "num_steps": 1}, r"num_steps is 1: ddim needs"),
        ({"solver": "ddim", "eta": 1.5}, r"eta is 1.5"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(**options)


def test_add_noise_refuses_a_level_outside_the_table():
    schedule, frames = make_schedule("unipc", 10), torch.zeros(2, 4, 3, 3)
    with pytest.raises(ConfigError, match=r"step_index is 11: give one between 0 and 10"):
        add_noise(schedule, frames, frames, 11)
    with pytest.raises(ConfigError, match=r"noise has shape \(1, 4, 3, 3\)"):
        add_noise(schedule, frames, frames[:1], 3)

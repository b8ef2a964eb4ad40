"""sampler_update against the released samplers' runs and float64, and its contract."""

import json

import pytest
import torch
from places import GOLDENS
from safetensors.torch import load_file

from miga_engine import ops
from miga_engine.schedule import make_schedule

WAN_META = json.loads((GOLDENS / "samplers" / "wan_meta.json").read_text())

VC2_META = json.loads((GOLDENS / "samplers" / "vc2_meta.json").read_text())


@pytest.fixture(scope="module")
def wan():
    return load_file(GOLDENS / "samplers" / "wan_trajectories.safetensors")


@pytest.fixture(scope="module")
def vc2():
    return load_file(GOLDENS / "samplers" / "vc2_trajectories.safetensors")


def to_frames(latents):
    """[1,C,n,H,W] → [n,C,H,W]."""
    return latents[0].transpose(0, 1).contiguous()


class Queue:
    """Frames with their solver history, as the runtime keeps them; NaN stands for uninitialised memory."""

    def __init__(self, frames, schedule, step_index):
        self.schedule = schedule
        self.sample = frames.clone()
        self.last_sample, self.x0, self.x0_previous = (torch.full_like(frames, torch.nan) for _ in range(3))
        self.step_index = torch.tensor(step_index)
        self.history_length = torch.zeros_like(self.step_index)

    @property
    def state(self):
        return self.sample, self.last_sample, self.x0, self.x0_previous

    def step(self, slots, velocity, velocity_uncond=None, guidance_scale=1.0, noise=None):
        ops.sampler_update(
            *self.state,
            velocity,
            velocity_uncond,
            slots=slots,
            coefficients=self.schedule.coefficients.rows,
            step_index=self.step_index[slots],
            history_length=self.history_length[slots],
            guidance_scale=guidance_scale,
            noise=noise,
        )
        self.step_index[slots] += 1
        self.history_length[slots] = (self.history_length[slots] + 1).clamp(max=2)


def assert_close(received, expected, tolerance):
    assert torch.isfinite(received).all()
    error = (received - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("key", [entry["key"] for entry in WAN_META["traj"]])
def test_flow_trajectories_match_golden(wan, key):
    solver, num_steps, shift = key.split("_")
    schedule = make_schedule(solver, int(num_steps[1:]), float(shift.removeprefix("shift")))
    frames = to_frames(wan[f"{key}_init"])
    queue, slots = Queue(frames, schedule, [0] * len(frames)), torch.arange(len(frames))
    for s in range(schedule.num_steps):
        queue.step(slots, torch.tanh(0.8 * queue.sample + 0.5 * schedule.sigmas[s]))
        assert_close(queue.sample, to_frames(wan[f"{key}_x"][s]), 1e-5)
        assert_close(queue.x0, to_frames(wan[f"{key}_x0pred"][s]), 1e-5)
        if solver == "unipc":
            assert_close(queue.last_sample, to_frames(wan[f"{key}_corrected_sample"][s]), 1e-5)


def run_mixed_levels(wan, order, one_by_one):
    """The golden per-frame run: eight frames at eight levels; yields (iteration, frames visited, queue)."""
    meta = WAN_META["perframe"]
    schedule = make_schedule("unipc", meta["T"], meta["shift"])
    queue = Queue(to_frames(wan["perframe_init"]), schedule, meta["starts"])
    for iteration in range(meta["iters"]):
        visited = [frame for frame in order if queue.step_index[frame] < schedule.num_steps]
        for group in [[frame] for frame in visited] if one_by_one else [visited]:
            slots = torch.tensor(group)
            sigmas = schedule.sigmas[queue.step_index[slots]].view(-1, 1, 1, 1)
            queue.step(slots, torch.tanh(0.8 * queue.sample[slots] + 0.5 * sigmas))
        yield iteration, visited, queue


def test_mixed_levels_match_golden(wan):
    seen = []
    for iteration, visited, queue in run_mixed_levels(wan, WAN_META["perframe"]["visit_order"], one_by_one=False):
        for frame in visited:
            prefix = f"perframe_it{iteration}_f{frame}"
            for state, name in (
                (queue.sample, "prev_sample"),
                (queue.last_sample, "last_sample"),
                (queue.x0, "x0pred"),
            ):
                assert_close(state[frame], to_frames(wan[f"{prefix}_{name}"])[0], 1e-5)
            seen.append((iteration, frame, queue.step_index[frame].item() - 1, queue.history_length[frame].item()))
    assert seen == [(r["iter"], r["frame"], r["step"], r["history_len"]) for r in WAN_META["perframe"]["records"]]


def test_order_and_grouping_of_frames_do_not_matter(wan):
    runs = [
        list(run_mixed_levels(wan, order, one_by_one))[-1][2].state
        for order, one_by_one in (
            (range(8), False),
            (WAN_META["perframe"]["visit_order"], False),
            (range(7, -1, -1), True),
        )
    ]
    for other in runs[1:]:
        for first_state, other_state in zip(runs[0], other, strict=True):
            assert torch.equal(first_state, other_state)


def pseudo_epsilon(frames, timesteps, context):
    return torch.tanh(0.7 * frames + 0.3 * frames.mean(0) + 0.6 * timesteps.view(-1, 1, 1, 1) / 1000 + context)


def ddim_step(queue, slots, guidance_scale, noise):
    timesteps = queue.schedule.timesteps[queue.step_index[slots]].float()
    branches = (pseudo_epsilon(queue.sample[slots], timesteps, context) for context in (0.1, -0.2))
    queue.step(slots, *branches, guidance_scale, noise)


@pytest.mark.parametrize("case", VC2_META["base"], ids=lambda case: case["key"])
def test_ddim_trajectories_match_golden(vc2, case):
    # The base sampler of the release applies the scale array.
    schedule = make_schedule("ddim", case["S"], eta=case["eta"], use_scale_array=True)
    frames = to_frames(vc2[f"{case['key']}xT"])
    queue, slots = Queue(frames, schedule, [0] * len(frames)), torch.arange(len(frames))
    for s in range(schedule.num_steps):
        ddim_step(queue, slots, case["cfg"], to_frames(vc2[f"{case['key']}noises"][s]))
        assert_close(queue.sample, to_frames(vc2[f"{case['key']}x"][s]), 1e-5)
        assert_close(queue.x0, to_frames(vc2[f"{case['key']}pred_x0"][s]), 1e-5)


@pytest.mark.parametrize("case", VC2_META["fifo_onestep"], ids=lambda case: case["key"])
def test_ddim_mixed_levels_match_golden(vc2, case):
    # The release's per-frame step forgets the scale array and counts indices from the clean end.
    schedule = make_schedule("ddim", case["S"], eta=case["eta"])
    assert schedule.timesteps.flip(0)[case["indices"]].tolist() == case["timesteps"]
    queue = Queue(to_frames(vc2[f"{case['key']}x"]), schedule, [case["S"] - 1 - index for index in case["indices"]])
    slots = torch.arange(len(case["indices"]))
    ddim_step(queue, slots, case["cfg"], to_frames(vc2[f"{case['key']}noise"]))
    assert_close(queue.sample, to_frames(vc2[f"{case['key']}y"]), 1e-5)
    assert_close(queue.x0, to_frames(vc2[f"{case['key']}pred_x0"]), 1e-5)


def random_update(dtype=torch.float32, solver="unipc", num_steps=12, num_rows=5, **options):
    """Arguments of one update of three frames in a queue of num_rows, distinct levels and history lengths."""
    generator = torch.Generator().manual_seed(1)
    schedule = make_schedule(solver, num_steps, **options)
    coefficients = schedule.coefficients.rows64 if dtype == torch.float64 else schedule.coefficients.rows
    shape = (3, 4, 5, 7)
    state = [torch.randn(num_rows, *shape[1:], generator=generator).to(dtype) for _ in range(4)]
    velocities = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    arguments = {
        "slots": torch.tensor([4, 1, 2]),
        "coefficients": coefficients,
        "step_index": torch.tensor([num_steps - 1, 1, 5]),
        "history_length": torch.tensor([2, 0, 1]),
        "guidance_scale": 5.0,
        "noise": torch.randn(shape, generator=generator).to(dtype),
    }
    return state, velocities, arguments


@pytest.mark.parametrize("solver", ["unipc", "dpmpp_2m", "euler", "ddim"])
def test_float32_stays_within_rounding_of_float64(solver):
    state, velocities, arguments = random_update(torch.float32, solver)
    state64, velocities64, arguments64 = random_update(torch.float64, solver)
    ops.sampler_update(*state, *velocities, **arguments)
    ops.sampler_update(*state64, *velocities64, **arguments64)
    # The same sums over magnitudes bound what rounding can do: at most 24 roundings lie on any path.
    bounds, (cond, uncond), absolute = random_update(torch.float64, solver)
    bounds = [bound.abs() for bound in bounds]
    absolute |= {"coefficients": absolute["coefficients"].abs(), "noise": absolute["noise"].abs()}
    ops.sampler_update(*bounds, cond.abs() + 2 * uncond.abs(), uncond.abs(), **absolute)
    for received, exact, bound in zip(state, state64, bounds, strict=True):
        assert ((received - exact).abs() <= 24 * torch.finfo(torch.float32).eps / 2 * bound).all()


def test_history_that_does_not_exist_is_not_read():
    state, velocities, arguments = random_update()
    arguments["history_length"] = torch.zeros(3, dtype=torch.int64)
    expected = [row.clone() for row in state]
    ops.sampler_update(*expected, *velocities, **arguments)
    for history in state[1:]:
        history[arguments["slots"]] = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(3, 1, 1, 1)
    ops.sampler_update(*state, *velocities, **arguments)
    for received, wanted in zip(state, expected, strict=True):
        assert torch.equal(received[arguments["slots"]], wanted[arguments["slots"]])
        assert torch.isfinite(received).all()


@pytest.mark.parametrize("slots", [[-1, 1, 2], [0, -1, 2], [-1, -1, 0], [-1, -1, -1]])
def test_frames_without_a_slot_leave_the_state_untouched(slots):
    state, velocities, arguments = random_update()
    arguments["slots"] = torch.tensor(slots)
    has_slot = arguments["slots"] >= 0
    expected = [row.clone() for row in state]
    if has_slot.any():
        only = {k: v[has_slot] for k, v in arguments.items() if k not in ("coefficients", "guidance_scale")}
        ops.sampler_update(*expected, *(v[has_slot] for v in velocities), **arguments | only)
    for velocity in velocities:
        velocity[~has_slot] = torch.nan
    arguments["step_index"][~has_slot] = 999
    ops.sampler_update(*state, *velocities, **arguments)
    for received, wanted in zip(state, expected, strict=True):
        assert torch.equal(received, wanted)


def test_half_precision_velocities_are_read_at_their_values():
    state, velocities, arguments = random_update()
    narrow = [velocity.bfloat16() for velocity in velocities]
    expected = [row.clone() for row in state]
    ops.sampler_update(*state, *narrow, **arguments)
    ops.sampler_update(*expected, *(velocity.float() for velocity in narrow), **arguments)
    assert all(torch.equal(received, wanted) for received, wanted in zip(state, expected, strict=True))


@pytest.mark.slow
def test_opcheck():
    state, velocities, arguments = random_update()
    torch.library.opcheck(torch.ops.miga.sampler_update.default, (*state, *velocities), arguments)
    torch.library.opcheck(
        torch.ops.miga.sampler_update.default, (*state, velocities[0], None), arguments | {"noise": None}
    )


def test_compiles_without_graph_breaks():
    def update_and_score(state, velocities, arguments):
        ops.sampler_update(*state, *velocities, **arguments)
        return ops.consistency_score(state[0], state[0][None])

    state, velocities, arguments = random_update()
    eager = [row.clone() for row in state]
    expected = update_and_score(eager, velocities, arguments)
    compiled = torch.compile(update_and_score, fullgraph=True)
    assert torch.equal(compiled(state, velocities, arguments), expected)
    assert all(torch.equal(received, wanted) for received, wanted in zip(state, eager, strict=True))


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (None, {"slots": torch.tensor([0, 1])}, r"velocity_cond has shape \(3, 4, 5, 7\), expected \(2, 4, 5, 7\)"),
        (None, {"step_index": torch.tensor([0])}, r"step_index has shape \(1,\), expected \(3,\) as slots"),
        (None, {"history_length": torch.zeros(3)}, r"history_length has dtype torch.float32, expected int64"),
        (
            None,
            {"coefficients": torch.zeros(12, 3, 9)},
            r"coefficients has shape \(12, 3, 9\), expected \(num_steps, 3, 12\)",
        ),
        (None, {"noise": torch.zeros(3, 4, 5, 6)}, r"noise has shape \(3, 4, 5, 6\), expected \(3, 4, 5, 7\)"),
        (1, torch.zeros(4, 4, 5, 7), r"last_sample has shape \(4, 4, 5, 7\), expected \(5, 4, 5, 7\) as sample"),
        (2, torch.zeros(5, 4, 5, 7).half(), r"x0 has dtype torch.float16, expected torch.float32 as sample"),
        (4, torch.zeros(3, 4, 5, 7).long(), r"velocity_cond has dtype torch.int64, expected a floating point type"),
    ],
)
def test_sampler_update_refuses_what_does_not_fit(position, change, message):
    state, velocities, arguments = random_update()
    tensors = [*state, *velocities]
    if position is None:
        arguments |= change
    else:
        tensors[position] = change
    with pytest.raises(ValueError, match=message):
        ops.sampler_update(*tensors, **arguments)

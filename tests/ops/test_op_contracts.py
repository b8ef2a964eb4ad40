"""Every op under torch.compile, opcheck, and its refusals; with whichever implementation this device has."""

import inspect
import subprocess
import sys

import places
import pytest
import torch
from op_inputs import DEVICE, NUM_HEADS, NUM_TOKENS, D, Kernel, small_arguments

from miga_engine import ops
from miga_engine.models.wan.dit import WanDiT, WanDiTConfig
from miga_engine.noise import Purpose, frame_noise
from miga_engine.schedule import make_schedule


def _sampler_arguments(t):
    schedule = make_schedule("ddim", 5, 1.0, eta=0.5)
    state = [t["frames"].clone() for _ in range(4)]
    slots, steps = (torch.tensor(v, device=DEVICE) for v in ([2, -1, 0], [1, 0, 3]))
    noise = frame_noise(7, Purpose.SOLVER, [4, 5, 6], device=DEVICE)
    indices = {"slots": slots, "step_index": steps, "history_length": steps.clamp(max=2)}
    indices["coefficients"] = schedule.coefficients.rows.to(DEVICE)
    velocities = t["frames"][:3] * 0.3, t["frames"][1:] * 0.2
    return (*state, *velocities), indices, noise


def _calls(dtype):
    """Each op as (overload, arguments, keyword arguments)."""
    t, miga = small_arguments(dtype), torch.ops.miga
    args, indices, noise = _sampler_arguments(t)
    tables = (t["weight"], t["bias"], t["rows"], 1e-6, dtype)
    heads = [t[name].unflatten(2, (NUM_HEADS, -1)) for name in "qk"]
    return {
        "sampler_update": (
            miga.sampler_update.default,
            args,
            {
                **indices,
                "guidance_scale": 3.0,
                "guidance_weights": t["norm"][:9].view(3, 3),
                "noise_counters": noise.counters,
                "noise_seed": noise.seed,
            },
        ),
        "guidance_dots": (
            miga.guidance_dots.default,
            (args[0], *args[4:]),
            {"slots": indices["slots"], "direction": t["norm"][:9].view(3, 3)},
        ),
        "consistency_score": (miga.consistency_score.default, (t["frames"], t["frames"][None, :2], "all"), {}),
        "norm_modulate": (miga.norm_modulate.default, (t["x"], *tables), {}),
        "residual_norm_modulate": (miga.residual_norm_modulate.default, (t["x"], t["y"], t["gate"], *tables), {}),
        "qk_norm_rope": (
            miga.qk_norm_rope.default,
            (t["q"], t["k"], t["norm"], t["norm"], t["temporal"], t["spatial"], t["positions"], NUM_HEADS, 1e-6),
            {},
        ),
        "frame_attention": (miga.frame_attention.default, (*heads, heads[1], None, None, None, "sdpa"), {}),
        "gelu_": (miga.gelu_.default, (t["x"],), {}),
    }


OPS = list(_calls(torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, args, kwargs = _calls(dtype)[name]
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_compiles_as_one_graph(name: str) -> None:
    op, args, kwargs = _calls(torch.float32)[name]

    def run(*args, **kwargs):
        out = op(*args, **kwargs)
        return [out, *(a * 1 for a in args if isinstance(a, torch.Tensor))]  # what it mutates is part of the result

    expected = run(*_clone(args), **kwargs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*_clone(args), **kwargs)
    for ours, theirs in zip(compiled, expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def _clone(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.slow
def test_the_transformer_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    model = WanDiT(WanDiTConfig(24, 48, 8, 2, 2, 6, 4, 3, 3)).to(DEVICE)
    latents, context = torch.randn(2, 3, 2, 4, 4, device=DEVICE), torch.randn(1, 3, 6, device=DEVICE)
    cache, timesteps = model.encode_context(context), torch.tensor([[900.0, 10.0], [3.0, 500.0]], device=DEVICE)
    expected = model(latents, timesteps, cache)
    compiled = torch.compile(model, fullgraph=True)(latents, timesteps, cache)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "launch", "op"),
    [
        ("norm_modulate", "launch", "norm_modulate"),
        ("norm_modulate", "launch_residual", "residual_norm_modulate"),
        ("qk_norm_rope", "launch", "qk_norm_rope"),
        ("sampler_update", "launch", "sampler_update"),
        ("guidance_dots", "launch", "guidance_dots"),
        ("consistency_score", "launch", "consistency_score"),
    ],
)
def test_launch_takes_the_arguments_of_its_op(kernel: str, launch: str, op: str) -> None:
    schema = getattr(torch.ops.miga, op).default._schema.arguments
    parameters = list(inspect.signature(getattr(Kernel(kernel), launch)).parameters.values())
    for argument, parameter in zip(schema, parameters, strict=False):
        assert (parameter.name, parameter.kind is parameter.KEYWORD_ONLY) == (argument.name, argument.kwarg_only)
        if argument.has_default_value():
            assert parameter.default == argument.default_value
    assert all(parameter.default is not parameter.empty for parameter in parameters[len(schema) :])


INDEX_ARGUMENTS = {
    "norm_modulate": ("rows", [-1, 4, 2**40]),
    "residual_norm_modulate": ("rows", [-1, 4, 2**40]),
    "qk_norm_rope": ("positions", [-1, 9, 2**40]),
    "frame_attention": ("key_rows", [-1, 2, 2**40]),
    "sampler_update slots": ("slots", [-2, 4, 2**40, 0]),  # the last names a row twice
    "sampler_update steps": ("step_index", [-1, 5, 2**40]),
    "sampler_update lengths": ("history_length", [-1, -(2**40)]),
    "sampler_update counters": ("noise.counters", [-1, 2**32]),
    "guidance_dots": ("slots", [-2, 4, 2**40]),
}


def _call_with(name: str, wrong: int, *, registered: bool) -> None:
    """A call of the op with one wrong index, of a frame that has a slot where there are such."""
    t = small_arguments()
    argument = INDEX_ARGUMENTS[name][0]
    args, indices, noise = _sampler_arguments(t)
    key_rows = torch.tensor([[0, 1, 1], [1, 0, 0]], device=DEVICE)
    index = {**t, **indices, "key_rows": key_rows, "noise.counters": noise.counters}
    index[argument].view(-1)[0] = wrong
    q, k = (t[name].unflatten(2, (NUM_HEADS, -1)) for name in "qk")
    tables = {name: t[name] for name in ("temporal", "spatial", "positions")}
    miga = torch.ops.miga
    rows = (t["weight"], t["bias"], t["rows"])
    if name == "norm_modulate" and registered:
        miga.norm_modulate(t["x"], *rows, 1e-6, torch.float32)
    elif name == "norm_modulate":
        ops.norm_modulate(t["x"], *rows, eps=1e-6, dtype=torch.float32)
    elif name == "residual_norm_modulate" and registered:
        miga.residual_norm_modulate(t["x"], t["y"], t["gate"], *rows, 1e-6, torch.float32)
    elif name == "residual_norm_modulate":
        ops.residual_norm_modulate(t["x"], t["y"], t["gate"], *rows, eps=1e-6, dtype=torch.float32)
    elif name == "qk_norm_rope" and registered:
        miga.qk_norm_rope(t["q"], t["k"], t["norm"], t["norm"], *tables.values(), NUM_HEADS, 1e-6)
    elif name == "qk_norm_rope":
        ops.qk_norm_rope(t["q"], t["k"], t["norm"], t["norm"], **tables, num_heads=NUM_HEADS, eps=1e-6)
    elif name == "frame_attention" and registered:
        miga.frame_attention(q, k, k, None, index["key_rows"], None, "auto")
    elif name == "frame_attention":
        ops.frame_attention(q, k, k, key_rows=index["key_rows"])
    elif name == "guidance_dots":
        call = miga.guidance_dots if registered else ops.guidance_dots
        call(args[0], *args[4:], slots=indices["slots"], direction=t["norm"][:9].view(3, 3))
    elif registered:
        miga.sampler_update(*args, **indices, guidance_scale=3.0, noise_counters=noise.counters, noise_seed=7)
    else:
        ops.sampler_update(*args, **indices, guidance_scale=3.0, noise=noise)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name, (_, all_) in INDEX_ARGUMENTS.items() for wrong in all_]
)
def test_an_index_out_of_bounds_is_refused_or_bounded(name: str, wrong: int, registered: bool) -> None:
    """By the public function and by the kernel it calls; a counter, which names no memory, by the former alone.

    On a GPU, where the host would have to wait for it, none is, and none reaches memory that is not the op's: a kernel
    of ours takes the nearest, which test_frame_attention_kernel.py has of attention.
    """
    argument = INDEX_ARGUMENTS[name][0]
    if DEVICE == "cuda" and name == "frame_attention":
        pytest.skip("where SDPA is chosen, torch gathers its keys, whose assertion ends the process")
    if DEVICE == "cuda" or (registered and argument == "noise.counters"):
        _call_with(name, wrong, registered=registered)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return
    with pytest.raises((ValueError, RuntimeError), match=argument):
        _call_with(name, wrong, registered=registered)


@pytest.mark.slow
def test_wrong_calls_end_in_sentences_and_never_in_a_signal() -> None:
    """In a process of its own, which a signal would end: a hundred spoilt calls of each op."""
    script = places.TESTS / "fuzz_ops.py"
    command = [sys.executable, "-X", "faulthandler", script, "--count", "100", "--verbose"]  # names what ended it
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "20 ops, 100 calls each: 0 faults" in done.stdout


def test_states_that_share_memory_are_refused() -> None:
    t = small_arguments()
    args, indices, _ = _sampler_arguments(t)
    overlapping = args[0][:1].expand(args[0].shape)
    with pytest.raises(ValueError, match=r"x0 has strides .* memory of its own for each element"):
        ops.sampler_update(*args[:2], overlapping, *args[3:], **indices, guidance_scale=3.0)
    with pytest.raises(ValueError, match="last_sample has memory that is sample's too"):
        ops.sampler_update(args[0], args[0], *args[2:], **indices, guidance_scale=3.0)
    with pytest.raises(ValueError, match="q has strides"):
        ops.rms_norm_(t["q"][:1].expand(2, NUM_TOKENS, D), t["norm"], eps=1e-6)

"""Who computes attention: choice, refusal, self-test, and the adapters of packages that may not be installed."""

import sys
import types

import pytest
import torch

from miga_engine import ops
from miga_engine.config import ATTENTION_BACKENDS
from miga_engine.errors import ConfigError, DeviceError
from miga_engine.ops.frame_attention import _choose, backends, probe
from miga_engine.ops.frame_attention.backends import BACKENDS, Backend, Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSED_ON_CPU = {
    "triton": "its kernels need a GPU",
    "cudnn": "needs an NVIDIA GPU with cuDNN",
    "xformers": "the xformers package is not installed|needs a GPU",
    "flash": "the flash_attn package is not installed|needs a GPU",
    "sage": "the sageattention package is not installed|needs a GPU",
}


def make_inputs(queries=13, keys=11, heads=3, dim=64, batch=2, prompts=None, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(batch, queries, heads, dim, generator=generator)
    k, v = torch.randn(2, prompts or batch, keys, heads, dim, generator=generator)
    return [tensor.to(device, dtype) for tensor in (q, k, v)]


@pytest.fixture
def fresh(monkeypatch):
    """No backend tested or timed yet."""
    monkeypatch.setattr(probe, "_tested", set())
    monkeypatch.setattr(probe, "_fastest", {})


def exact(q, k, v, bias=None, key_rows=None, scale=None):
    return ops.frame_attention_reference(q.double(), k.double(), v.double(), bias, key_rows, scale)


def assert_in_budget(out, q, *args):
    expected = exact(q, *args)
    eager = ops.frame_attention_reference(q, *args, *[None] * (5 - len(args)))
    eps = torch.finfo(q.dtype).eps
    budget = 2 * ((eager - expected).abs().max() + eps * expected.abs().max())
    assert (out - expected).abs().max() <= budget


def test_every_name_has_a_backend() -> None:
    assert ("auto", *BACKENDS) == ATTENTION_BACKENDS
    assert set(ops.SELF_ATTENTION_ONLY) < set(ATTENTION_BACKENDS)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "onednn", "reference"])
@pytest.mark.parametrize("rows", [None, [2, 0], [[0, 1, 2], [2, 2, 1]]])
@pytest.mark.parametrize("has_bias", [False, True])
def test_agrees_with_float64(backend: str, rows: list | None, has_bias: bool) -> None:
    keys = 70 if backend == "onednn" else 11
    q, k, v = make_inputs(queries=12, keys=keys, prompts=None if rows is None else 3)
    bias = None
    if has_bias:
        bias = torch.randn(k.shape[0], 1, 1, k.shape[1], generator=torch.Generator().manual_seed(5))
        bias[0, ..., -4:] = -torch.inf
    rows = None if rows is None else torch.tensor(rows)
    out = ops.frame_attention(q, k, v, bias, key_rows=rows, backend=backend)
    assert out.is_contiguous()
    assert_in_budget(out, q, k, v, bias, rows)


def test_one_prompt_for_all_windows_and_a_range_of_queries() -> None:
    q, k, v = make_inputs(queries=40, keys=40, prompts=1)
    out = ops.frame_attention(q[:, 7:19], k, v, scale=0.3)
    assert_in_budget(out, q[:, 7:19], k, v, None, None, 0.3)


def test_one_key_with_the_logarithm_of_its_count_is_that_many_keys() -> None:
    q, k, v = make_inputs(keys=5)
    padded = [torch.cat([t, t[:, -1:].expand(-1, 7, -1, -1)], dim=1) for t in (k, v)]
    bias = torch.tensor([0.0, 0, 0, 0, 8]).log().nan_to_num(neginf=0)[None, None, None]  # the last key stands for 8
    torch.testing.assert_close(ops.frame_attention(q, k, v, bias), ops.frame_attention(q, *padded))


@pytest.mark.skipif(DEVICE == "cuda", reason="the reasons are those of a CPU")
@pytest.mark.parametrize("backend", REFUSED_ON_CPU)
def test_a_name_is_obeyed_or_refused(backend: str, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make_inputs()
    with pytest.raises(
        DeviceError, match=f"attention='{backend}' cannot be used here, for .*({REFUSED_ON_CPU[backend]})"
    ):
        ops.frame_attention(q, k, v, backend=backend)
    with pytest.raises(DeviceError, match=rf"'{backend}' cannot .*: choose auto, sdpa, onednn, reference"):
        ops.require_attention(backend, "cpu", torch.float32, 64)


def test_unknown_names_list_the_known_ones() -> None:
    q, k, v = make_inputs()
    with pytest.raises(ConfigError, match="attention is 'fast': choose auto, triton, sdpa"):
        ops.frame_attention(q, k, v, backend="fast")
    with pytest.raises(ConfigError, match="attention is 'fast': choose auto, triton, sdpa"):
        ops.require_attention("fast", "cpu", torch.float32, 64)


@pytest.mark.parametrize(
    ("shapes", "rows", "message"),
    [
        (((2, 6, 2, 8), (2, 4, 2, 4), (2, 4, 2, 8)), None, r"k has shape \(2, 4, 2, 4\), expected \[P,M,2,8\], as q"),
        (((2, 6, 2, 8), (2, 4, 2, 8), (2, 5, 2, 8)), None, r"v has shape \(2, 5, 2, 8\), expected \[P,M,2,8\]"),
        (((2, 6, 2, 8), (3, 4, 2, 8), (3, 4, 2, 8)), None, "k has batch 3, expected 1 or 2, or key_rows"),
        (
            ((2, 6, 2, 8), (3, 4, 2, 8), (3, 4, 2, 8)),
            [0],
            r"key_rows has shape \(1,\), expected int64 \[2\] or \[2,F\]",
        ),
        (((2, 6, 2, 8), (3, 4, 2, 8), (3, 4, 2, 8)), [[0] * 4] * 2, "q has length 6, expected a multiple of 4 frames"),
    ],
)
def test_refuses_what_does_not_fit(shapes, rows, message) -> None:
    rows = None if rows is None else torch.tensor(rows)
    with pytest.raises(ValueError, match=message):
        ops.frame_attention(*map(torch.zeros, shapes), key_rows=rows)


@pytest.mark.parametrize(
    ("out", "fault"),
    [(torch.zeros_like, "error .* against the oracle"), (lambda q: q * torch.nan, "values that are not finite")],
)
def test_a_wrong_backend_is_caught_at_its_first_call(fresh, monkeypatch, out, fault) -> None:
    monkeypatch.setitem(BACKENDS, "sdpa", Backend(backends._always, lambda call: out(call.q)))
    with pytest.raises(DeviceError, match=f"attention='sdpa' gives wrong results on cpu .{fault}"):
        ops.frame_attention(*make_inputs(), backend="sdpa")


def test_gradients_are_sdpas_and_others_refuse() -> None:
    q, k, v = (t.requires_grad_() for t in make_inputs())
    ops.frame_attention(q, k, v).square().sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v)]
    heads = [t.transpose(1, 2) for t in doubles]
    torch.nn.functional.scaled_dot_product_attention(*heads).square().sum().backward()
    for ours, theirs in zip((q, k, v), doubles, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="attention='reference' has no gradient: train with auto or sdpa"):
        ops.frame_attention(q, k, v, backend="reference")


def test_input_that_is_not_finite_is_not_the_backends_fault(fresh) -> None:
    q, k, v = make_inputs()
    k[0, 0] = torch.nan
    assert ops.frame_attention(q, k, v, backend="sdpa").isnan().any()


def test_a_backend_that_fails_or_is_wrong_is_never_the_fastest(fresh, monkeypatch) -> None:
    calls = []

    def backend(name, result, cost):
        def run(call):
            calls.append(name)
            return result(call)

        times[name] = cost
        return Backend(backends._always, run)

    def fail(call):
        raise RuntimeError("no kernel image")

    times: dict[str, float] = {}
    right = backends._run_reference
    monkeypatch.setitem(BACKENDS, "triton", backend("triton", lambda call: call.q * 0, 1.0))
    monkeypatch.setitem(BACKENDS, "sdpa", backend("sdpa", right, 3.0))
    monkeypatch.setitem(BACKENDS, "cudnn", backend("cudnn", fail, 1.5))
    monkeypatch.setitem(BACKENDS, "flash", backend("flash", right, 2.0))

    class Clock:
        """Stands for a GPU's events: what ran between two records took what its backend costs."""

        def __init__(self, enable_timing):
            pass

        def record(self):
            self.position = len(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, stop):
            return sum(times[name] for name in calls[self.position : stop.position])

    monkeypatch.setattr(torch.cuda, "Event", Clock)
    call = Call(*make_inputs(), None, None, None)
    ranking = {name: probe._milliseconds(name, call) for name in ("triton", "sdpa", "cudnn", "flash")}
    assert ranking == {"triton": float("inf"), "sdpa": 3.0, "cudnn": float("inf"), "flash": 2.0}


def test_auto_times_each_shape_once_and_takes_the_fastest(fresh, monkeypatch) -> None:
    timed = []

    def milliseconds(name, call):
        timed.append(name)
        return {"triton": 2.0, "sdpa": 3.0, "cudnn": 1.0}[name]

    def on_gpu(queries):
        q = types.SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.bfloat16, shape=(1, queries, 2, 64))
        return Call(q, q, q, None, None, None)

    for name in backends.TIMED:
        refusal = None if name in ("triton", "sdpa", "cudnn") else "it is not installed"
        backend = Backend(lambda call, refusal=refusal: refusal, backends._run_reference)
        monkeypatch.setitem(BACKENDS, name, backend)
    monkeypatch.setattr(probe, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [_choose(on_gpu(n)) for n in (64, 64, 128)] == ["cudnn"] * 3
    assert timed == ["triton", "sdpa", "cudnn"] * 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [_choose(on_gpu(n)) for n in (64, 32)] == ["cudnn", "sdpa"]
    assert len(timed) == 6  # nothing is timed while a graph is captured


def _xformers(monkeypatch, run):
    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, module.memory_efficient_attention = module, run
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)


def test_xformers_adapter_gives_layout_and_aligned_bias(monkeypatch) -> None:
    def stand_in(q, k, v, attn_bias=None, scale=None):
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.stride(2) % 8 == 0
        return ops.frame_attention_reference(q, k, v, attn_bias, None, scale)

    _xformers(monkeypatch, stand_in)
    q, k, v = make_inputs(prompts=1)
    bias = torch.randn(1, 1, 1, k.shape[1])
    out = backends._run_xformers(Call(q, k, v, bias, None, 0.5))
    assert_in_budget(out, q, k, v, bias, None, 0.5)


def test_flash_and_sage_adapters_give_layout_and_scale(monkeypatch) -> None:
    def flash(q, k, v, softmax_scale=None):
        return ops.frame_attention_reference(q, k, v, None, None, softmax_scale), "logsumexp"

    def sage(q, k, v, tensor_layout, is_causal, sm_scale):
        assert (tensor_layout, is_causal) == ("NHD", False)
        return ops.frame_attention_reference(q, k, v, None, None, sm_scale)

    for package, name, run in (("flash_attn", "flash_attn_func", flash), ("sageattention", "sageattn", sage)):
        module = types.ModuleType(package)
        setattr(module, name, run)
        monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    q, k, v = make_inputs(prompts=1)
    call = Call(q, k, v, None, None, 0.5)
    for run in (backends._run_flash, backends._run_sage):
        assert_in_budget(run(call), q, k, v, None, None, 0.5)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
@pytest.mark.parametrize("backend", [name for name in ATTENTION_BACKENDS if name != "reference"])
def test_what_is_installed_on_this_gpu_is_right(fresh, backend: str) -> None:
    q, k, v = make_inputs(queries=1560, keys=1560, dim=128, dtype=torch.bfloat16, device=DEVICE)
    if backend != "auto" and (reason := ops.attention_backends(DEVICE, torch.bfloat16)[backend]):
        pytest.skip(reason)
    out = ops.frame_attention(q, k, v, backend=backend)  # compared with the oracle inside
    assert out.isfinite().all()

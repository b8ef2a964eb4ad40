"""Engine: what a caller gets, reproducibility, timelines, chunking, cancelling."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden_model
import pytest
import small_models
import torch

import miga_engine
from miga_engine import ConfigError, Engine
from miga_engine.config import MigaConfig, fifo_config
from miga_engine.presets import PRESETS
from miga_engine.prompts import PromptTimeline
from miga_engine.resolve import layout_of
from miga_engine.runtime.network import PromptedTransformer
from miga_engine.runtime.stream import Chunk


class Model:
    """A family's model in small, and its short run."""

    def __init__(self, family: golden_model.Family, folder: Path) -> None:
        self.folder = family.build(folder)
        self.engine = Engine.from_pretrained(self.folder)
        self.options, self.num_frames = family.options, family.num_frames
        self.miga: MigaConfig = self.options["miga"]

    def generate(self, num_frames: int | None = None, prompt="a red balloon", **options) -> torch.Tensor:
        return self.engine.generate(prompt, num_frames or self.num_frames, **(self.options | options)).frames

    def stream(self, num_frames: int | None, **options) -> Iterator[Chunk]:
        return self.engine.stream("a red balloon", num_frames, **(self.options | options))

    @functools.cached_property
    def video(self) -> torch.Tensor:
        return self.generate()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    return {name: Model(family, tmp_path_factory.mktemp(name)) for name, family in small_models.MODELS.items()}


@pytest.fixture(params=small_models.MODELS)
def model(models, request) -> Model:
    return models[request.param]


@pytest.fixture(scope="module")
def folder(models) -> Path:
    return models["wan"].folder


@pytest.fixture(scope="module")
def engine(models) -> Engine:
    return models["wan"].engine


RULES = [{"guidance": "cfg-zero"}, {"guidance": "apg"}, {"guidance_scale_end": 2.0}]


def _generate(engine: Engine, num_frames: int = 30, prompt="a red balloon", **options) -> torch.Tensor:
    return engine.generate(prompt, num_frames, **(golden_model.OPTIONS | {"miga": golden_model.MIGA} | options)).frames


def _digest(frames: torch.Tensor) -> str:
    return hashlib.sha256(frames.numpy().tobytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "num_frames"),
    [
        *(("wan", n) for n in (1, 2, 17, 30, 61)),
        *(("videocrafter2", n) for n in (1, 2, 9)),
        *((name, n) for name in ("ti2v", "skyreels", "experts") for n in (10, 30)),
    ],
)
def test_exactly_as_many_frames_as_asked(models, family, num_frames):
    model = models[family]
    frames = model.generate(num_frames)
    assert frames.shape == (num_frames, model.options["height"], model.options["width"], 3)
    assert frames.dtype == torch.uint8


@pytest.mark.slow
def test_same_seed_same_frames_however_they_are_cut(model):
    assert torch.equal(model.video, model.generate())
    for chunk_frames, overlap in ((1, False), (4, True)):
        chunks = list(model.stream(model.num_frames, chunk_frames=chunk_frames, overlap_decode=overlap))
        assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), model.video)
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert [chunk.first_frame for chunk in chunks] == list(range(0, model.num_frames, chunk_frames))
    assert not torch.equal(model.video, model.generate(seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_frames", [None, 7])
def test_overlapped_decoding_changes_nothing(engine, chunk_frames):
    options = golden_model.OPTIONS | {"miga": golden_model.MIGA, "chunk_frames": chunk_frames}
    plain, overlapped = (list(engine.stream("a red balloon", 61, overlap_decode=o, **options)) for o in (False, True))
    assert len(plain) > 3
    assert [(c.index, c.first_frame) for c in plain] == [(c.index, c.first_frame) for c in overlapped]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(plain, overlapped, strict=True))
    assert torch.equal(_generate(engine, 61, overlap_decode=True), torch.cat([chunk.frames for chunk in plain]))


@pytest.mark.slow
def test_overlapped_runs_in_two_threads_do_not_disturb_one_another(engine):
    alone = [_generate(engine, seed=seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda seed: _generate(engine, seed=seed, overlap_decode=True), (0, 1)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["close", "drop", "cancel"])
def test_overlapped_stream_ends_with_its_thread(engine, ends):
    options = golden_model.OPTIONS | {"miga": golden_model.MIGA, "overlap_decode": True}
    is_cancelled = []
    chunks = engine.stream("a red balloon", is_cancelled=lambda: bool(is_cancelled), **options)
    first = [next(chunks) for _ in range(3)]
    assert any(thread.name == "miga-decode" for thread in threading.enumerate())
    if ends == "close":
        chunks.close()
    elif ends == "drop":
        del chunks
    else:
        is_cancelled.append(True)
        first += list(chunks)
        plain = engine.stream("a red balloon", **options | {"overlap_decode": False})
        assert len(first) > 3  # what was already made comes out
        assert all(torch.equal(chunk.frames, next(plain).frames) for chunk in first)
    assert not any(thread.name == "miga-decode" for thread in threading.enumerate())


@pytest.mark.slow
def test_vae_dtype_is_obeyed_and_close(folder, engine):
    half = Engine.from_pretrained(folder, vae_dtype="bfloat16")
    assert half.bundle.vae.dtype == torch.bfloat16
    assert half.bundle.transformer.dtype == torch.float32
    frames = _generate(half)
    difference = (frames.float() - _generate(engine).float()).square().mean().sqrt()
    assert 0 < difference < 2  # levels of 255
    with pytest.raises(ConfigError, match="vae_dtype must be one of float32, tf32, bfloat16, float16, got 'int8'"):
        Engine.from_pretrained(folder, vae_dtype="int8")


@pytest.mark.slow
def test_same_frames_in_another_process(engine, folder):
    program = (
        "import hashlib, golden_model; from miga_engine import Engine; "
        f"engine = Engine.from_pretrained({str(folder)!r}); "
        "video = engine.generate('a red balloon', 30, miga=golden_model.MIGA, **golden_model.OPTIONS); "
        "print(hashlib.sha256(video.frames.numpy().tobytes()).hexdigest())"
    )
    environment_path = f"{Path(__file__).parent}:{Path(miga_engine.__file__).parent.parent}"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": environment_path, "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert result.stdout.strip() == _digest(_generate(engine))


@pytest.mark.slow
@pytest.mark.parametrize("window_batch", [2, 5])
def test_window_batch_changes_rounding_only(model, window_batch):
    batched = model.generate(miga=dataclasses.replace(model.miga, window_batch=window_batch))
    assert (batched.int() - model.video.int()).abs().max() <= 2


@pytest.mark.slow
def test_a_run_is_cancelled_between_passes(model):
    chunks: list[Chunk] = []
    for chunk in model.stream(model.num_frames, is_cancelled=lambda: bool(chunks)):
        chunks.append(chunk)
    frames = torch.cat([chunk.frames for chunk in chunks])
    assert 0 < len(frames) < model.num_frames
    assert torch.equal(frames, model.video[: len(frames)])


def test_cancelled_before_the_first_frame(model):
    assert list(model.stream(model.num_frames, is_cancelled=lambda: True)) == []


@pytest.mark.slow
def test_fifo_diffusion_runs_and_streams(model):
    fifo = fifo_config(model.miga, model.engine.bundle.window_frames)
    if model.engine.bundle.transformer.boundary_timestep is not None:
        with pytest.raises(ConfigError, match="commit 'trailing' needs a model of one network"):
            model.generate(miga=fifo)
        return
    video = model.generate(miga=fifo)
    assert video.shape == model.video.shape
    assert not torch.equal(video, model.video)
    chunks = model.stream(model.num_frames, miga=fifo, chunk_frames=4)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), video)


RANK = """
import sys
import torch, torch.distributed as dist
import small_models
from miga_engine import Engine
from miga_engine.runtime.ranks import Ranks
rank, folder, models = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
ranks = Ranks()
results = {}
for (name, family), model in zip(small_models.MODELS.items(), models, strict=True):
    engine = Engine.from_pretrained(model, ranks=ranks)
    calls = []
    engine.bundle.transformer.register_forward_hook(lambda *_: calls.append(1))
    chunks = [chunk.frames for chunk in engine.stream("a red balloon", family.num_frames, **family.options)]
    results[name] = torch.cat(chunks) if chunks else None, len(calls)
torch.save(results, f"{folder}/{rank}.pt")
ranks.close()
"""


@pytest.mark.slow
def test_two_ranks_share_the_windows_and_make_the_same_video(models, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(miga_engine.__file__).parent.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    folders = [str(model.folder) for model in models.values()]
    processes = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path), *folders], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, model in models.items():
        calls = []
        hook = model.engine.bundle.transformer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.generate()
        hook.remove()
        assert torch.equal(first[name][0], model.video)
        assert second[name][0] is None  # the first rank gives the frames
        assert first[name][1] + second[name][1] == len(calls)
        assert second[name][1] > len(calls) / 4


@pytest.mark.slow
def test_endless_stream_starts_at_once_and_can_be_dropped(engine):
    chunks = engine.stream("a red balloon", **golden_model.OPTIONS, miga=golden_model.MIGA)
    first = [next(chunks) for _ in range(6)]
    assert first[0].first_frame == 0
    assert first[0].frames.__dlpack_device__()[0] == 1  # kDLCPU
    assert torch.equal(torch.from_dlpack(first[0].frames), first[0].frames)


@pytest.mark.slow
def test_callback_ends_the_run_with_what_is_there(engine):
    seen = []

    def stop_after_three(progress):
        seen.append(progress.num_frames_out)
        return len(seen) < 3

    options = golden_model.OPTIONS | {"miga": golden_model.MIGA}
    video = engine.generate("a red balloon", 200, callback=stop_after_three, **options)
    assert len(seen) == 3
    assert len(video.frames) == seen[-1] < 200


def test_callback_is_refused_nothing_when_it_returns_nothing(engine):
    options = golden_model.OPTIONS | {"miga": golden_model.MIGA}
    assert len(engine.generate("a red balloon", 20, callback=lambda progress: None, **options).frames) == 20


@pytest.mark.slow
def test_events_tell_the_run(engine):
    events = []
    _generate(engine, on_event=events.append, miga=dataclasses.replace(golden_model.MIGA, score_drop=0.0))
    kinds = [event.kind for event in events]
    assert [event.data["stage"] for event in events if event.kind == "stage"][:3] == ["seed_clip", "warmup", "stage1"]
    assert {"score", "search_started", "search_finished", "chunk"} <= set(kinds)
    assert sum(event.data["num_frames"] for event in events if event.kind == "chunk") == 30


@pytest.mark.slow
def test_a_run_leaves_nothing_behind_for_the_next(engine):
    before = _generate(engine)
    _generate(engine, 20, prompt="another prompt", seed=9)
    assert torch.equal(before, _generate(engine))


@pytest.mark.slow
def test_save_and_read_back(engine, tmp_path):
    from miga_engine.video.reading import read_metadata, read_video

    options = golden_model.OPTIONS | {"miga": golden_model.MIGA}
    video = engine.generate("a red balloon", 20, **options)
    video.save(tmp_path / "video.mkv")
    assert torch.equal(torch.from_numpy(read_video(tmp_path / "video.mkv")), video.frames)
    metadata = read_metadata(tmp_path / "video.mkv")
    assert metadata["prompt"] == "a red balloon"
    assert metadata["miga"]["zigzag_width"] == 2


@pytest.mark.slow
def test_what_a_run_holds_does_not_grow_with_its_length(engine):
    """Bytes of all tensors that are alive, beside those of the frames given out."""

    def alive() -> int:
        gc.collect()
        held_by = (torch.Tensor, torch.nn.Parameter)  # and not what other tests have left of tensors without data
        storages = [entry.untyped_storage() for entry in gc.get_objects() if type(entry) in held_by]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    held = []
    prompt = {20 * i: f"a kite number {i}" for i in range(14)}
    with engine.stream(prompt, **(golden_model.OPTIONS | {"miga": golden_model.MIGA})) as stream:
        for chunk in stream:
            if chunk.first_frame >= (81, 241)[len(held)]:
                held.append(alive())
            if len(held) == 2:
                break
    assert held[1] <= 1.001 * held[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "videocrafter2"])
def test_of_many_prompts_only_those_at_hand_are_held(models, family, monkeypatch):
    """100 prompts take the memory of those that the queue shows, and give the frames of a table that holds all."""
    engine, options = models[family].engine, models[family].options
    step = 4 if family == "wan" else 1
    prompt = {step * i: f"a kite number {i}" for i in range(100)}
    options = {**options, "miga": dataclasses.replace(options["miga"], prompt_blend_frames=2 * step)}
    num_frames = (28 if family == "wan" else 14) * step
    tables = []
    make = PromptedTransformer.__init__

    def held(self, *arguments):
        make(self, *arguments)
        tables.append(self)

    monkeypatch.setattr(PromptedTransformer, "__init__", held)
    few = engine.generate(prompt, num_frames, **options).frames
    monkeypatch.setattr(PromptTimeline, "most_prompt_rows", lambda self, num_latents: len(self))
    assert torch.equal(engine.generate(prompt, num_frames, **options).frames, few)
    small, large = (table._context.layers[0][0].shape[0] for table in tables)
    layout = layout_of(engine.resolve(prompt, num_frames=num_frames, **options), engine.bundle)
    assert small <= layout.capacity + 2 < large


@pytest.mark.slow
def test_a_later_prompt_changes_only_what_it_can_reach(engine):
    single = _generate(engine, 61)
    double = _generate(engine, 61, prompt={0: "a red balloon", 57: "snow at night"})
    same = (single == double).flatten(1).all(dim=1)
    assert not same.all()
    assert same[0]


@pytest.mark.slow
def test_a_prompt_after_the_end_changes_nothing(engine):
    assert torch.equal(_generate(engine), _generate(engine, prompt={0: "a red balloon", 5000: "night"}))


def test_facts_come_with_the_model(models):
    model = models["videocrafter2"]
    engine, bundle = model.engine, model.engine.bundle
    assert engine.preset is PRESETS["videocrafter2"]
    assert (bundle.prediction_type, bundle.frame_ratio, bundle.latent_channels) == ("epsilon", 1, 4)
    assert (bundle.window_frames, bundle.facts.window_frames, bundle.default_negative_prompt) == (5, 16, "")
    with pytest.raises(ConfigError, match="solver 'unipc' does not fit a model that predicts epsilon"):
        engine.resolve("a b", num_frames=4, solver="unipc", use_scale_array=False, **model.options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"prompt": "snow at night"}, {"use_scale_array": False}, {"eta": 0.0}, *RULES])
def test_options_of_a_stochastic_solver_are_heard(models, options):
    model = models["videocrafter2"]
    assert not torch.equal(model.video, model.generate(**options))

"""Laws of SAM's place in PEFT's comparison on image generation; the last are held against the harness itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    Dinov2Config,
    Dinov2Model,
)

from benchmarks.peft_comparison.images import Batches, selecting
from peft_sam import SamConfig
from peft_sam.layers.found import sam_layers
from tests.benchmarks.flux import transforms, write_flux
from tests.benchmarks.harness import experiments, modules_of, needs_harness
from tests.shared.reference import largest, mean_loss_gradients

EXPERIMENTS = experiments("flux")
CHANNELS = 4


class Transformer(nn.Module):
    """Tells a velocity of each place from what it sees there, from the prompt and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(CHANNELS, CHANNELS), nn.Linear(3, CHANNELS)
        self.config = SimpleNamespace(guidance_embeds=False, to_dict=dict)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        return (self.to_q(hidden_states) + self.to_k(encoder_hidden_states).mean(1, True) * timestep[:, None, None],)


def pipeline_of(transformer: nn.Module) -> Any:
    """A stand-in for what the harness's pipeline offers."""
    timesteps = torch.linspace(1000, 1, 1000)
    return SimpleNamespace(
        transformer=transformer,
        vae=None,
        scheduler=SimpleNamespace(
            config=SimpleNamespace(num_train_timesteps=1000), timesteps=timesteps, sigmas=timesteps / 1000
        ),
        _pack_latents=lambda latents: latents.flatten(2).transpose(1, 2),
        _prepare_latent_ids=lambda latents: torch.zeros(len(latents), latents[0, 0].numel(), 4),
        _unpack_latents_with_ids=lambda told, ids: told.transpose(1, 2).unflatten(2, (2, 2)),
    )


def run_of(latents: Tensor, prompts: Tensor) -> Any:
    """Stand-ins for what the harness's module `run` offers."""
    pictures = {"pixel_values": None, "prompts": None, "repeats": 3}
    return SimpleNamespace(
        get_train_valid_test_datasets=lambda **_: (pictures, None, None),
        precompute_prompt_caches=lambda *_, **__: (prompts, torch.zeros(len(prompts), 2, 4), {}),
        precompute_latent_cache=lambda **_: latents,
        compute_density_for_timestep_sampling=lambda batch_size, generator, **_: torch.rand(
            batch_size, generator=generator
        ),
        get_sigmas=lambda _, schedule, step_indices, **__: schedule.sigmas[step_indices].view(-1, 1, 1, 1),
        compute_loss_weighting_for_sd3=lambda _, sigmas: 1 / sigmas,
    )


def settings() -> Any:
    of_times = {"weighting_scheme": "sigma", "logit_mean": 0, "logit_std": 1, "mode_scale": 1}
    return SimpleNamespace(seed=0, batch_size=2, max_steps=4, guidance_scale=1.0, **of_times)


def standing_in() -> tuple[Any, Tensor]:
    """A stand-in for the module `run`, and the pictures' latents."""
    latents = torch.randn(5, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(1))
    return run_of(latents, torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(2))), latents


def test_each_batch_is_pictures_on_the_way_to_their_noise_and_comes_again_as_it_was() -> None:
    run, latents = standing_in()
    batches = Batches(run, pipeline_of(Transformer()), settings(), "cpu")
    seen = []
    for first, again in zip(batches, batches, strict=True):
        assert all(map(torch.equal, first["seen"].values(), again["seen"].values()))
        sigmas = first["seen"]["timestep"].view(-1, 1, 1, 1)
        noisy = first["seen"]["hidden_states"].transpose(1, 2).unflatten(2, (2, 2))
        # (1 − σ)·x + σ·ε = x + σ·(ε − x)
        pictures = noisy - sigmas * first["velocity"]
        seen += [int((latents - picture).abs().amax((1, 2, 3)).argmin()) for picture in pictures]
        torch.testing.assert_close(pictures, latents[seen[-2:]])
    assert sorted(seen[:5]) == list(range(5))
    assert len(seen) == 4 * 2


def test_the_selection_is_that_of_the_mean_weighted_flow_matching_loss() -> None:
    run, _ = standing_in()
    base = Transformer()

    def get_pipeline(peft_config: Any, device_type: str) -> Any:
        model = Transformer()
        model.load_state_dict(base.state_dict())
        return pipeline_of(get_peft_model(model, peft_config))  # type: ignore[arg-type]

    config = SamConfig(density=0.2, target_modules=["to_q", "to_k"])
    pipeline = selecting(get_pipeline, run, settings(), 3)(peft_config=config, device_type="cpu")
    found = {name: delta.indices.tolist() for name, delta in pipeline.transformer.base_model.sparse_deltas().items()}
    batches = list(Batches(run, pipeline_of(base), settings(), "cpu"))[:3]

    def total(model: Any, batch: Any) -> Tensor:
        told = model(**batch["seen"])[0].transpose(1, 2).unflatten(2, (2, 2))
        weight = 1 / batch["seen"]["timestep"]
        return (weight * ((told - batch["velocity"]) ** 2).mean((1, 2, 3))).sum()

    gradients = mean_loss_gradients(base, list(found), batches, total, 6)
    expected = largest({name: of.double() ** 2 for name, of in gradients.items()}, sum(map(len, found.values())))
    assert found == {name: positions for name, positions in expected.items() if positions}


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["to_q"]), SamConfig(score="random", density=0.1), None])
def test_what_needs_no_data_runs_as_without(config: Any) -> None:
    made = pipeline_of(Transformer())
    select = selecting(lambda **_: made, None, settings(), 2)
    assert select(peft_config=config, device_type="cpu") is made


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_is_a_pending_or_data_free_config_of_peft_s_layout(folder: Path) -> None:
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, SamConfig)
    assert config.selection is None
    assert {"lr", "weight_decay"} == set(json.loads((folder / "training_params.json").read_text())["optimizer_kwargs"])


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The harness's modules `utils`, `data` and `run`, with an accelerator's counters that stand still."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms())
    for name in ("memory_allocated", "memory_reserved", "max_memory_reserved", "empty_cache"):
        monkeypatch.setattr(torch.cpu, name, lambda: 0, raising=False)
    monkeypatch.setattr(torch.cpu, "reset_peak_memory_stats", lambda: None, raising=False)
    with modules_of("image-gen", ("utils", "data", "run"), monkeypatch) as found:
        yield found


@pytest.fixture(params=[False, True], ids=["plain", "guided"])
def small(request: pytest.FixtureRequest, harness: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> Any:
    """The benchmark's settings, for a small pipeline and few pictures; its encoder for scores is small, too."""
    write_flux(tmp_path / "flux", request.param)
    settings = harness["utils"].get_train_config("")
    settings.model_id, settings.dtype, settings.resolution = str(tmp_path / "flux"), "float32", 16
    settings.max_sequence_length, settings.text_encoder_out_layers = 4, [0, 1, 2]
    settings.max_steps, settings.eval_steps, settings.num_inference_steps = 6, 6, 1
    settings.drift_image_prompts = settings.sample_image_prompts = ["dog"]
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), dtype=np.uint8)
    pictures = Dataset.from_dict({"image": list(map(Image.fromarray, pixels))})
    monkeypatch.setattr(harness["data"], "load_dataset", lambda *_, **__: pictures)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    encoder = Dinov2Model(Dinov2Config(**shape)).eval()

    def process(images: list[Image.Image], **_: Any) -> Any:
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
        return BatchFeature({"pixel_values": pixels})

    monkeypatch.setattr(harness["run"], "get_dino_encoder", lambda *_: (process, encoder))
    return settings


def make(harness: dict[str, Any], settings: Any, config: Any) -> Any:
    """The harness's pipeline with an adapter, by its own function, followed by the selection."""
    return selecting(harness["utils"].get_pipeline, harness["run"], settings, 4)(
        model_id=settings.model_id,
        dtype=settings.dtype,
        compile=settings.compile,
        peft_config=config,
        autocast_adapter_dtype=settings.autocast_adapter_dtype,
        use_gc=settings.use_gc,
        device_type="cpu",
    )


def train(harness: dict[str, Any], settings: Any, pipeline: Any) -> Any:
    """The harness's training and its result."""
    result, _ = harness["run"].train(
        pipeline=pipeline,
        train_config=settings,
        accelerator_memory_init=0,
        is_adalora=False,
        print_verbose=print,
        device_type="cpu",
    )
    assert result.status == harness["utils"].TrainStatus.SUCCESS, result.error_msg
    return result


@pytest.mark.extra
@needs_harness
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # the harness's own
@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "logit_normal", "mode"])
def test_the_losses_are_those_of_the_harness_s_own_training(
    weighting: str, harness: dict[str, Any], small: Any
) -> None:
    small.weighting_scheme, small.optimizer_kwargs = weighting, {"lr": 0.0}
    pipeline = make(harness, small, SamConfig(score="random", density=0.1, target_modules=["to_q"]))
    batches = Batches(harness["run"], pipeline, small, "cpu")
    with torch.no_grad():
        losses = [batches.loss(pipeline.transformer, batch).item() for batch in batches]
    torch.manual_seed(small.seed)  # the times
    result = train(harness, small, pipeline)
    assert losses == pytest.approx(result.losses, rel=1e-5)


@pytest.mark.extra
@needs_harness
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # the harness's own
@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_the_harness_s_own_functions_make_select_train_evaluate_and_save(
    folder: Path, harness: dict[str, Any], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = harness["utils"]
    monkeypatch.chdir(folder.parents[2])
    assert utils.validate_experiment_path(str(folder.relative_to(folder.parents[2]))) == f"sam_sparse/{folder.name}"
    small.optimizer_kwargs = utils.get_train_config(str(folder / utils.FILE_NAME_TRAIN_PARAMS)).optimizer_kwargs
    config = PeftConfig.from_pretrained(folder)
    pipeline = make(harness, small, config)
    deltas = pipeline.transformer.base_model.sparse_deltas()
    layers = sam_layers(pipeline.transformer)
    assert {target for target in config.target_modules if not any(name.endswith(target) for name in layers)} == set()
    result = train(harness, small, pipeline)
    assert result.num_trainable_params == sum(len(delta.values) for delta in deltas.values())
    assert any(bool(delta.values.any()) for delta in deltas.values())
    assert {"test dino_similarity", "drift"} <= set(result.metrics[-1])
    size = utils.get_file_size(pipeline.transformer, peft_config=config, clean=True, print_fn=print)
    assert result.num_trainable_params * 5 < size < 99999999

"""A SAM adapter in PEFT's comparison on image generation: a selection after the pipeline is made.

The loss is inside the benchmark's `train()`: flow matching. Of a picture's latents x and noise ε, at a time that is
drawn, the transformer sees (1 − σ)·x + σ·ε and is to tell the velocity ε − x; the loss is the mean of
w(σ)·(v − (ε − x))² over all numbers of a batch. What `train()` has from functions comes from the same ones; what it
writes out is here. Where the settings ask for autocast, the selection is without: in the precision of the weights.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_sam import SamConfig, select_parameters

# as in `train()`: the transformer is told times from 0 to 1
TIMES = 1000


class Batches:
    """The batches that `train()` makes of the benchmark's own pictures, as often as they are asked for.

    Order and noise come from a generator with the benchmark's seed, as there: a batch has the noise that it is trained
    with. The times come from a generator of their own.
    """

    def __init__(self, run: Any, pipeline: Any, settings: Any, device: str) -> None:
        """Encode the training pictures and their prompts.

        Args:
            run: the benchmark's module of this name.
            pipeline: of its `get_pipeline`.
            settings: its settings of the run.
            device: where it trains.
        """
        self.run, self.pipeline, self.settings, self.device = run, pipeline, settings, device
        self.schedule = copy.deepcopy(pipeline.scheduler)
        pictures, _, _ = run.get_train_valid_test_datasets(train_config=settings, print_fn=print)
        self.repeats = pictures["repeats"]
        encode = {"train_config": settings, "device_type": device}
        self.prompts, self.text_ids, _ = run.precompute_prompt_caches(
            pipeline, train_prompts=pictures["prompts"], eval_prompts=[], **encode
        )
        self.latents = run.precompute_latent_cache(
            pipeline=pipeline, vae=pipeline.vae, pixel_values=pictures["pixel_values"], **encode
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings = self.settings
        noises = torch.Generator(self.device).manual_seed(settings.seed)
        times = torch.Generator().manual_seed(settings.seed)
        orders = [torch.randperm(len(self.latents), generator=noises, device=self.device) for _ in range(self.repeats)]
        for places in torch.cat(orders)[: settings.max_steps * settings.batch_size].split(settings.batch_size):
            yield self.noised(places, noises, times)

    def noised(self, places: Tensor, noises: torch.Generator, times: torch.Generator) -> dict[str, Any]:
        """What the transformer sees of the pictures at these places, what it is to tell, and how much that weighs."""
        run, settings, latents = self.run, self.settings, self.latents[places]
        noise = torch.randn(latents.shape, generator=noises, device=latents.device, dtype=latents.dtype)
        quantiles = run.compute_density_for_timestep_sampling(
            weighting_scheme=settings.weighting_scheme,
            batch_size=len(places),
            logit_mean=settings.logit_mean,
            logit_std=settings.logit_std,
            mode_scale=settings.mode_scale,
            generator=times,
        )
        steps = (quantiles * self.schedule.config.num_train_timesteps).long()
        timesteps = self.schedule.timesteps[steps].to(latents.device)
        sigmas = run.get_sigmas(
            timesteps, self.schedule, step_indices=steps, n_dim=latents.ndim, dtype=latents.dtype
        ).to(latents.device)
        seen = {
            "hidden_states": self.pipeline._pack_latents((1 - sigmas) * latents + sigmas * noise),
            "timestep": timesteps / TIMES,
            "encoder_hidden_states": self.prompts[places],
            "txt_ids": self.text_ids[places],
            "img_ids": self.pipeline._prepare_latent_ids(latents).to(latents.device),
        }
        weight = run.compute_loss_weighting_for_sd3(settings.weighting_scheme, sigmas=sigmas)
        return {"velocity": noise - latents, "weight": weight, "seen": seen}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """mean w(σ)·(v − (ε − x))² over a batch of pictures."""
        seen, velocity = batch["seen"], batch["velocity"]
        guidance = None
        if model.config.guidance_embeds:
            guidance = torch.full((len(velocity),), self.settings.guidance_scale, device=velocity.device)
        told = model(**seen, guidance=guidance, return_dict=False)[0][:, : seen["hidden_states"].shape[1]]
        told = self.pipeline._unpack_latents_with_ids(told, seen["img_ids"])
        return (batch["weight"].float() * (told.float() - velocity.float()) ** 2).mean()


def selecting(get_pipeline: Callable[..., Any], run: Any, settings: Any, max_batches: int) -> Callable[..., Any]:
    """The benchmark's `get_pipeline`, followed by the selection.

    Args:
        run: the benchmark's module of this name.
        settings: its settings of the run.
    """

    def get_pipeline_and_select(*, peft_config: Any, device_type: str, **options: Any) -> Any:
        pipeline = get_pipeline(peft_config=peft_config, device_type=device_type, **options)
        if not isinstance(peft_config, SamConfig) or not peft_config.needs_data:
            return pipeline
        adapted = getattr(pipeline.transformer, "_orig_mod", pipeline.transformer)  # compiled
        batches = Batches(run, pipeline, settings, device_type)  # encoded while the transformer is out of the way
        adapted.to(device_type)
        print(select_parameters(adapted, batches, loss_fn=batches.loss, max_batches=max_batches))
        adapted.to("cpu")  # as get_pipeline leaves it
        return pipeline

    return get_pipeline_and_select


def install(settings: Any, max_batches: int) -> None:
    """Let the benchmark's `run.py` select."""
    utils, run = importlib.import_module("utils"), importlib.import_module("run")
    utils.get_pipeline = selecting(utils.get_pipeline, run, settings, max_batches)

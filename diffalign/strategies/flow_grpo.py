"""Flow-GRPO: group-relative policy gradient through the stochastic sampler of a flow model.

Paper: Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", NeurIPS 2025, arXiv 2505.05470.
Official code: https://github.com/yifan123/flow_grpo.

The deterministic sampler becomes a stochastic one with the same marginals (``diffusion.sde``), so that each step has a
density. ``images_per_prompt`` images of a caption are a group; with A an image's reward minus the mean of its group,
over the deviation of the whole rollout, and r the ratio of a step's new density to the recorded one::

    loss = mean over images and steps of  max(-A r, -A clamp(r, 1 - c, 1 + c)) + kl_beta KL
    KL   = mean over elements of (mu - mu_ref)^2 / (2 g^2)              "released": code, published values of beta
         = mean over elements of (mu - mu_ref)^2 / (2 g^2 (-dt))        "gaussian": paper, but for the mean

The last step is not trained, and no gradient passes the unconditional branch of guidance: both are in the code only.
Images without an advantage count in the means here; the code takes them out of the batch, the penalty included.
DanceGRPO (arXiv 2505.07818) is ``noise_schedule constant``, ``noise_level 0.3``, ``advantage_std group``,
``advantage_unbiased true``, ``trained_share 0.6``, ``same_start true`` and ``kl_beta 0``, except that its rewards see
the last step's guess of the clean image. The formulas hold for discrete processes too, with DDIM's steps.

Small groups (6 to 12) are reported to collapse where 24 are stable. Judge progress by images of the deterministic
sampler: the last stochastic step leaves noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from diffalign.strategies.advantages import StdScope
from diffalign.strategies.registry import register
from diffalign.strategies.standardised import StandardisedConfig, StandardisedRewards


@dataclass(frozen=True)
class FlowGRPOConfig(StandardisedConfig):
    """Constants of Flow-GRPO.

    Args:
        images_per_prompt: images of a caption in a rollout, its group. 24: official configs.
        rollout_steps: sampling steps. 10: paper; images are judged with 40.
        rollout_guidance_scale: guidance in sampling and in training. 4.5: official configs for SD 3.5.
        train_last_step: train the step that ends at the image, too. False: official code.
        advantage: "group": paper.
        advantage_std: whose deviation divides. "batch": official configs; issue 52 of their repository reports higher
            PickScores with "group".
        kl_beta: weight of the divergence from the reference. 0.04: official configs for GenEval and OCR; 0.01 for
            PickScore.
        detach_unconditional: no gradient through the unconditional branch of guidance. True: official code.
    """

    images_per_prompt: int = 24
    rollout_steps: int = 10
    rollout_guidance_scale: float = 4.5
    train_last_step: bool = False
    advantage: Literal["caption", "group", "batch"] = "group"
    advantage_std: StdScope = "batch"
    kl_beta: float = 0.04
    detach_unconditional: bool = True


@register(
    "flow_grpo",
    summary="group-relative policy gradient for flow models, sampled stochastically, near a reference",
    paper="Flow-GRPO: Training Flow Matching Models via Online RL (arXiv 2505.05470)",
    repository="https://github.com/yifan123/flow_grpo",
    family="on-policy",
)
class FlowGRPO(StandardisedRewards):
    """Learns from how images of a caption compare."""

    spec = replace(StandardisedRewards.spec, bundled_model="tiny-sd3")
    Config = FlowGRPOConfig

"""What the numbers mean that methods report; each is a mean over the examples of a step.

Those that one method alone reports are explained in its class, ``Strategy.glossary``.
"""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "loss": "objective of the example; 0 for those that were dropped and still count",
    "logit": "scaled margin z; positive where the preference is satisfied; 0 while policy and reference are equal",
    "implicit_accuracy": "share of satisfied preferences; a tie counts one half, in text methods none",
    "effective_weight": (
        "how strongly the example still pulls, 0 once satisfied: sigmoid(-logit) of a pair, 1/2 at the start; in lists "
        "the same, summed by the weights of pairs; sigmoid(logit) sigmoid(-logit) of a judgement, 1/4 at the start"
    ),
    "winner_margin": "reference's error minus the policy's on the chosen image; should rise",
    "loser_margin": "policy's error minus the reference's on the rejected image; alone it can rise while samples decay",
    "policy_error_chosen": "policy's error on the chosen image",
    "policy_error_rejected": "policy's error on the rejected image",
    "reference_error_chosen": "reference's error on the chosen image",
    "reference_error_rejected": "reference's error on the rejected image",
    "policy_error": "policy's error on the image, whatever its label",
    "reference_error": "reference's error on the image, whatever its label",
    "labelled_share": "share of videos with a labelled segment",
    "gain": "reference's error minus the policy's",
    "gain_for_label": "gain, with its sign reversed on disliked examples",
    "liked_share": "share of liked examples",
    "reference_point": "gain from which utility is measured",
    "reward": "mean reward of the images of the rollout, a weighted sum where there are several",
    "reward_std": "deviation of the reward over the images of the rollout",
    "flat_groups": "share of captions whose images all have the same reward: they teach nothing",
    "failed_images": "images of the rollout on which a reward failed",
    "unread_answers": "share of the answers of judges so far that could not be read",
    "seconds": "time of training so far, without validation and checkpoints; goes on over a resume",
    "images": "images sampled for training so far, by all processes",
    "active_images": "share of the rollout's images that are replayed; the others have no advantage",
    "ratio": "density of a replayed step over the recorded one; 1 before the first update of a rollout",
    "approximate_kl": "half the squared log-ratio of a step, in the units of densities (means over elements)",
    "clipped_share": "share of steps whose ratio has left the trust region",
    "reference_distance": "squared distance of the policy's prediction from the reference's, mean over elements",
    "reference_kl": "divergence of a step from the reference's, mean over elements",
    "rewards/chosen": "implied reward of the chosen text",
    "rewards/rejected": "implied reward of the rejected text",
    "rewards/margins": "difference of the implied rewards",
    "rewards/accuracies": "share of pairs whose chosen text has the greater implied reward",
    "logps/chosen": "policy's log-probability of the chosen text",
    "logps/rejected": "policy's log-probability of the rejected text",
    "length/chosen": "tokens of the chosen text",
    "length/rejected": "tokens of the rejected text",
}

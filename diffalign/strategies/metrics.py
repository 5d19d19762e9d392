"""What the numbers mean that methods report; each is a mean over the examples of a step."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "loss": "objective of the example",
    "logit": "scaled margin z; positive where the preference is satisfied; 0 while policy and reference are equal",
    "implicit_accuracy": "share of satisfied preferences; a tie counts one half, in text methods none",
    "effective_weight": "how strongly the example still pulls, sigmoid(-logit); 1/2 at the start, 0 once satisfied",
    "winner_margin": "reference's error minus the policy's on the chosen image; should rise",
    "loser_margin": "policy's error minus the reference's on the rejected image; alone it can rise while samples decay",
    "policy_error_chosen": "policy's error on the chosen image",
    "policy_error_rejected": "policy's error on the rejected image",
    "reference_error_chosen": "reference's error on the chosen image",
    "reference_error_rejected": "reference's error on the rejected image",
    "policy_error": "policy's error on the image, whatever its label",
    "reference_error": "reference's error on the image, whatever its label",
    "prompt_margin": "policy's error under the wrong caption minus that under the right one",
    "label_weight": "factor on the margin that the smoothed label gives",
    "labelled_share": "share of videos with a labelled segment",
    "gain": "reference's error minus the policy's",
    "gain_for_label": "gain, with its sign reversed on disliked examples",
    "liked_share": "share of liked examples",
    "reference_point": "gain from which utility is measured",
    "warm_start": "1 while another objective warms the policy up, else 0",
    "rewards/chosen": "implied reward of the chosen text",
    "rewards/rejected": "implied reward of the rejected text",
    "rewards/margins": "difference of the implied rewards",
    "rewards/accuracies": "share of pairs whose chosen text has the greater implied reward",
    "logps/chosen": "policy's log-probability of the chosen text",
    "logps/rejected": "policy's log-probability of the rejected text",
    "length/chosen": "tokens of the chosen text",
    "length/rejected": "tokens of the rejected text",
}

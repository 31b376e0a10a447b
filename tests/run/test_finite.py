"""A loss, gradient, weight or score that is not finite ends the run before it is trained on or saved."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import config, pairs_judged, random_pairs, tiny_model, tiny_trainer
from transformers import TrainerCallback

from reward_recipes.run import FiniteSteps, UserError, checkpoints
from reward_recipes.run.checkpoints import find_damage

TWO_IN_ORDER = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}


class SpoilStep2(TrainerCallback):
    """Makes a weight infinite in the update of step 2."""

    def on_step_end(self, args: object, state: Any, control: object, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step == 2:
            model.score.weight.data.fill_(math.inf)


def one_bad_margin(value: float) -> list[dict[str, Any]]:
    """32 pairs, of which pair 21 has a margin that makes its loss `inf` or `nan`."""
    pairs = random_pairs(32, margins=True)
    pairs[21]["margin"] = value
    return pairs


@pytest.mark.parametrize(("value", "packed"), [(math.inf, {}), (math.nan, {"max_tokens_per_row": 48})])
def test_a_bad_loss_names_its_step_rows_and_checkpoint(value: float, packed: dict[str, int], tmp_path: Path) -> None:
    """An infinite margin leaves the gradient finite: the loss itself is looked at. Pair 21 comes in step 3."""
    args = config(tmp_path, max_steps=4, save_steps=1, gradient_accumulation_steps=4, **TWO_IN_ORDER)
    trainer = tiny_trainer(tiny_model("gpt2"), args, one_bad_margin(value), **packed)
    with pytest.raises(UserError) as stopped:
        trainer.train()
    expected = f"step 3: expected finite numbers, found the loss {value}, from rows 20, 21 of the training data; the "
    assert str(stopped.value).startswith(f"{expected}newest good checkpoint is {tmp_path / 'checkpoint-2'}; ")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_bad_gradient_names_all_rows_of_its_step(clip: float, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    before = model.score.weight.detach().clone()
    model.score.weight.register_hook(lambda gradient: gradient * math.inf)
    args = config(tmp_path, max_steps=2, max_grad_norm=clip, gradient_accumulation_steps=2, **TWO_IN_ORDER)
    with pytest.raises(UserError, match=r"step 1: .* the gradient norm (inf|nan), from rows 0, 1, 2, 3 .* no checkpoi"):
        tiny_trainer(model, args, random_pairs(8)).train()
    assert torch.equal(model.score.weight, before)


def test_bad_weights_are_not_saved(tmp_path: Path) -> None:
    """They went bad in the update, so no loss has shown it yet."""
    args = config(tmp_path, max_steps=4, save_steps=1, per_device_train_batch_size=4)
    with pytest.raises(UserError, match=r"step 2: expected finite weights, .* newest good checkpoint is .*point-1; "):
        tiny_trainer(tiny_model("gpt2"), args, random_pairs(16), callbacks=[SpoilStep2()]).train()
    assert [(path.name, find_damage(path)) for path in checkpoints(tmp_path)] == [("checkpoint-1", None)]


def test_bad_scores_of_an_evaluation_name_their_rows(tmp_path: Path) -> None:
    """One token's embedding is not a number, and one pair holds that token."""
    model = tiny_model("gpt2")
    pairs = pairs_judged(model, [True] * 5)
    texts = [{*pair["chosen_ids"], *pair["rejected_ids"]} for pair in pairs]
    held = [token for text in texts for token in text]
    row, spared = next((row, token) for row in range(5) for token in texts[row] if held.count(token) == 1)
    model.transformer.wte.weight.data[spared] = math.nan
    with pytest.raises(UserError, match=rf"expected finite scores, found inf or nan, on rows {row} of the evaluated"):
        tiny_trainer(model, config(tmp_path), random_pairs(4), pairs).evaluate()


def test_float16_may_have_infinite_gradients_but_no_infinite_loss(tmp_path: Path) -> None:
    """Its scaler skips such a step and halves the scale."""
    steps = FiniteSteps(tmp_path)
    steps.add(torch.tensor(0.5), torch.tensor([3]))
    steps.check(1, None)
    steps.add(torch.tensor(math.inf), torch.tensor([4]))
    with pytest.raises(UserError, match=r"step 2: .* the loss inf, from rows 4 of .* there is no checkpoint yet"):
        steps.check(2, None)

"""Every figure that the trainer reports is that of all pairs, and training is stock TRL's."""

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import (
    NINE,
    SEVEN,
    TurnRound,
    config,
    corner_pairs,
    dataset,
    pairs_judged,
    random_pairs,
    text_score,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
)
from trl import ModelConfig, RewardTrainer

from reward_recipes.run import LoggingWindow
from reward_recipes.score import peft_config

ONE_ROW = {"max_tokens_per_row": math.inf}  # a batch, as on any CPU
KINDS = [{}, ONE_ROW, ONE_ROW | {"layout": "unshared"}, {"max_tokens_per_row": 48}]
PACKED_OR_NOT = pytest.mark.parametrize("packed", KINDS[:2], ids=["plain", "packed"])
LAYOUTS = pytest.mark.parametrize("packed", KINDS, ids=["plain", "packed", "unshared", "rows"])


def loss_by_hand(model: torch.nn.Module, pairs: list[dict[str, Any]]) -> float:
    margins = [text_score(model, pair["chosen_ids"]) - text_score(model, pair["rejected_ids"]) for pair in pairs]
    return sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins)


@PACKED_OR_NOT
def test_seven_pairs_at_batch_four_are_exact_and_each_eval_set_has_its_own_figures(
    packed: dict[str, int], tmp_path: Path
) -> None:
    """4/7 and 2/3; the probe of training pairs has 4/5, so the gap is 4/5 - 4/7 = 8/35."""
    model = tiny_model("gpt2")
    pairs = [pair | {"subset": index % 2} for index, pair in enumerate(pairs_judged(model, SEVEN))]
    others = pairs_judged(model, [True, True, False], seed=1)
    probe = pairs_judged(model, [True] * 4 + [False], seed=2)
    side = {"test": dataset(others), "train_probe": dataset(probe)}
    args = config(tmp_path, per_device_eval_batch_size=4)
    sets = {"side_datasets": side, "subsets": ["even", "odd"]}
    trainer = tiny_trainer(model, args, corner_pairs(), pairs, **sets, **packed)
    figures, logged = trainer.evaluate(), trainer.state.log_history[-1]
    expected = {
        "eval_accuracy": 4 / 7,
        "eval_loss": pytest.approx(loss_by_hand(model, pairs), rel=1e-6),
        "eval_accuracy_even": 3 / 4,  # pairs 0, 2, 4 and 6
        "eval_accuracy_odd": 1 / 3,
        "eval_test_accuracy": 2 / 3,
        "eval_train_probe_accuracy": 4 / 5,
        "eval_overfitting_gap": pytest.approx(8 / 35),
        **{"eval_pairs": 7, "eval_test_pairs": 3, "eval_train_probe_pairs": 5},
    }
    for reported in (figures, logged):
        assert {name: reported[name] for name in expected} == expected
    test = trainer.predict(dataset(pairs[:3]), metric_key_prefix="test").metrics
    assert test["test_accuracy"] == 1 / 3 and "eval_overfitting_gap" not in test


@PACKED_OR_NOT
def test_predictions_stand_in_the_order_of_the_data(packed: dict[str, int], tmp_path: Path) -> None:
    """Whatever the batches, which are made by length: each pair's scores are those of its texts alone."""
    model, pairs = tiny_model("gpt2"), random_pairs(20) + corner_pairs()
    expected = [[text_score(model, pair[side]) for side in ("chosen_ids", "rejected_ids")] for pair in pairs]
    for most in (1, 3, 64):
        trainer = tiny_trainer(model, config(tmp_path, per_device_eval_batch_size=most), corner_pairs(), **packed)
        assert trainer.predict(dataset(pairs)).predictions == pytest.approx(np.array(expected), rel=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_best_model_is_chosen_by_exact_accuracy(adapter: bool, tmp_path: Path) -> None:
    """5/9 at step 1, 4/9 at step 2; TRL's mean of batch means is 5/12 and then 7/12, and would keep step 2."""
    model = tiny_model("gpt2")
    pairs = pairs_judged(model, NINE)
    args = config(tmp_path, eval_strategy="steps", max_steps=2, learning_rate=0.0, per_device_eval_batch_size=4)
    lora = peft_config(ModelConfig("any", use_peft=adapter))
    given = {"callbacks": [TurnRound()], "max_tokens_per_row": 64, "peft_config": lora}
    trainer = tiny_trainer(model, args, random_pairs(8), pairs, **given)
    trainer.train()
    logged = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert logged == pytest.approx([5 / 9, 4 / 9], abs=1e-12)
    assert trainer.state.best_metric == logged[0]
    assert trainer.state.best_global_step == 1
    trainer.end_with_best(tmp_path / "best")
    if adapter:
        trainer.model.load_adapter(str(tmp_path / "best"), "default")
    assert trainer.evaluate()["eval_accuracy"] == logged[0]
    assert sorted(path.name for path in tmp_path.glob("*-*")) == ["best-1", "checkpoint-2"]
    names = {path.name for path in tmp_path.rglob("*")}
    assert "tokenizer.json" in names and "trainer_state.json" in names
    assert not names & {"training_args.bin", "README.md"} - ({"README.md"} if adapter else set())  # peft writes one


def test_workers_that_stay_do_not_mix_up_eval_sets(tmp_path: Path) -> None:
    """Trainer keeps one loader for `eval` when workers persist; side sets must not get it."""
    model = tiny_model("gpt2")
    args = config(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    side = {"test": dataset(pairs_judged(model, [True, True, False], seed=1))}
    trainer = tiny_trainer(model, args, corner_pairs(), pairs_judged(model, SEVEN), side_datasets=side)
    for _ in range(2):
        figures = trainer.evaluate()
        assert (figures["eval_pairs"], figures["eval_test_pairs"]) == (7, 3)
    loaders = [trainer.get_eval_dataloader(), *trainer._side_loaders.values()]
    assert len(multiprocessing.active_children()) == len(loaders)  # no new ones for the second evaluation
    for loader in loaders:
        loader._iterator._shutdown_workers()  # left to the garbage collector it takes seconds


def test_without_a_probe_the_gap_is_that_of_the_logging_window(tmp_path: Path) -> None:
    """Right about all training pairs, and the pairs that were evaluated between two steps are none of them: 1 - 4/7."""
    model = tiny_model("gpt2")
    args = config(tmp_path, eval_strategy="steps", max_steps=2, learning_rate=0.0, per_device_train_batch_size=4)
    trainer = tiny_trainer(model, args, pairs_judged(model, [True] * 8, seed=1), pairs_judged(model, SEVEN))
    trainer.train()
    windows = [(entry["accuracy"], entry["pairs"]) for entry in trainer.state.log_history if "loss" in entry]
    gaps = [entry["eval_overfitting_gap"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert windows == [(1.0, 4), (1.0, 8)]
    assert gaps == pytest.approx([3 / 7, 3 / 7])


def test_the_probe_is_scored_in_evaluation_mode_and_leaves_the_window_alone(tmp_path: Path) -> None:
    """The training pairs, the probe and the eval set are the same, the weights stay, half of all units drop out."""
    model, pairs = tiny_model("gpt2"), random_pairs(8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    fields = {"disable_dropout": False, "eval_strategy": "steps", "max_steps": 2, "learning_rate": 0.0}
    args = config(tmp_path, per_device_train_batch_size=4, **fields)
    trainer = tiny_trainer(model, args, pairs, pairs, side_datasets={"train_probe": dataset(pairs)})
    trainer.train()
    expected = pytest.approx(loss_by_hand(model, pairs), rel=1e-5)
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_train_probe_loss"] for entry in evaluated] == [expected] * 2
    assert [entry["eval_overfitting_gap"] for entry in evaluated] == [0, 0]
    assert [entry["pairs"] for entry in trained] == [4, 8]
    assert np.mean([entry["loss"] for entry in trained]) != expected  # dropout there was


def window_of(batches: list[np.ndarray]) -> LoggingWindow:
    window = LoggingWindow()
    for number, scores in enumerate(batches):
        window.add(torch.tensor(0.5 + number), torch.from_numpy(scores).float(), torch.tensor([10 + number, 5, 20]))
    return window


def test_the_training_log_is_over_pairs_not_batches(tmp_path: Path) -> None:
    """4 of 5 pairs are right, in batches of 4 and 1, whose means would give 7/8 or 1/2."""
    model = tiny_model("gpt2")
    args = config(tmp_path, num_train_epochs=1, logging_steps=2, learning_rate=0.0, per_device_train_batch_size=4)
    trainer = tiny_trainer(model, args, pairs_judged(model, [True] * 4 + [False]))
    trainer.train()
    assert [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry] == [4 / 5]


def test_the_window_is_exact_over_uneven_batches() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.integers(-2, 3, (size, 2)) / 2 for size in (4, 4, 1)]
    scores = np.concatenate(batches)
    margins = scores[:, 0] - scores[:, 1]
    assert (margins == 0).any()
    window = window_of(batches)
    expected = {
        "loss": (0.5 + 1.5 + 2.5) / 2,  # two optimizer steps
        "accuracy": ((margins > 0).sum() + (margins == 0).sum() / 2) / 9,
        **{"margin": margins.mean(), "mean_reward": scores.mean()},
        "min_reward": np.mean([batch.min() for batch in batches]),
        "max_reward": np.mean([batch.max() for batch in batches]),
        **{"pairs": 9, "num_tokens": 33, "num_unique_tokens": 15, "num_padded_tokens": 60},
    }
    assert window.drain(2, lambda table: table) == pytest.approx(expected)
    assert window.drain(3, lambda table: table) == {}


def test_the_window_covers_all_processes() -> None:
    """A second process with other scores: extremes are those of the two batches taken together, as in TRL."""
    mine, other = [np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])], [np.array([[5.0, -3.0]]), np.array([[1.0, 1.0]])]
    tables = []
    window_of(other).drain(1, lambda table: tables.append(table) or table)
    figures = window_of(mine).drain(1, lambda table: torch.cat([table, *tables]))
    assert figures["loss"] == 0.5 + 1.5  # of the step, on each process
    assert figures["accuracy"] == (1 + 0 + 1 + 0.5) / 4
    assert figures["margin"] == (1 - 2 + 8 + 0) / 4
    assert (figures["min_reward"], figures["max_reward"]) == ((-3 + 0) / 2, (5 + 2) / 2)
    assert (figures["pairs"], figures["num_tokens"]) == (4, 42)


@LAYOUTS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_are_those_of_stock_trl(packed: dict[str, int], accumulation: int, tmp_path: Path) -> None:
    """Loss with margins and centring, accuracy and rewards at every step, on the same seed, data and pad token."""
    fields = {"center_rewards_coefficient": 0.1, "gradient_accumulation_steps": accumulation}
    # Not Adam: the loss ignores a shift of all scores, and Adam would turn that direction's rounding into steps.
    args = config(tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, optim="sgd", **fields)
    pairs = random_pairs(64, margins=True)
    ours = tiny_trainer(tiny_model("gpt2"), args, pairs, **packed)
    given = {"train_dataset": dataset(pairs), "processing_class": tiny_tokenizer()}
    stock = RewardTrainer(model=tiny_model("gpt2"), args=args, **given)
    names, logs = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "learning_rate"), []
    for trainer in (ours, stock):
        trainer.train()
        logs.append([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])
    np.testing.assert_allclose(*logs, rtol=1e-4, atol=1e-5)
    assert len(logs[0]) == 3


@PACKED_OR_NOT
def test_smoothed_labels_are_labels_of_which_a_share_is_wrong(packed: dict[str, int], tmp_path: Path) -> None:
    """The first logged loss is the mean of both ways round of each pair, with its margin, weighted 0.8 and 0.2."""
    pairs = random_pairs(8, margins=True)
    model = tiny_model("gpt2")
    scores = [[text_score(model, pair[f"{side}_ids"]) for side in ("chosen", "rejected")] for pair in pairs]
    margins = [chosen - rejected - pair["margin"] for (chosen, rejected), pair in zip(scores, pairs, strict=True)]
    expected = np.mean([0.8 * math.log1p(math.exp(-z)) + 0.2 * math.log1p(math.exp(z)) for z in margins])
    args = config(tmp_path, max_steps=1, per_device_train_batch_size=8, label_smoothing_factor=0.2)
    trainer = tiny_trainer(model, args, pairs, pairs, **packed)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated == pytest.approx(loss_by_hand(tiny_model("gpt2"), pairs), rel=1e-5)


@LAYOUTS
def test_accumulated_pairs_weigh_as_in_one_batch(packed: dict[str, int], tmp_path: Path) -> None:
    """13 pairs as six micro-batches of two and one of one, or at once: the same log, and weights that all moved."""
    options = {"num_train_epochs": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1}
    options |= {"center_rewards_coefficient": 0.1, "label_smoothing_factor": 0.1}
    weights, logs = [], []
    for batch, accumulation in ((2, 7), (13, 1)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        args = config(tmp_path, **options, **sizes)
        trainer = tiny_trainer(tiny_model("gpt2"), args, random_pairs(13, margins=True), **packed)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
        logs.append([[entry[name] for name in ("loss", "grad_norm")] for entry in trainer.state.log_history[:3]])
    np.testing.assert_allclose(*logs, rtol=1e-4)
    start = dict(tiny_model("gpt2").named_parameters())
    moved = {name: (weights[0][name] - start[name]).norm().item() for name in start}
    apart = {name: (weights[0][name] - weights[1][name]).norm().item() for name in start}
    assert math.hypot(*apart.values()) < 1e-4 * math.hypot(*moved.values())
    assert all(moved[name] > 1e-4 for name, tensor in start.items() if tensor.dim() == 2)


def test_bf16_does_not_tie_scores(tmp_path: Path) -> None:
    """Scores of about 2 under bf16 autocast: a head inside it ties pairs, ours does not."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(0.02)
        model.transformer.ln_f.bias.fill_(1.0)
        model.score.weight.copy_(2 / 32 + model.score.weight)
    args = config(tmp_path, bf16=True)
    pairs = random_pairs(40)
    ours = tiny_trainer(model, args, corner_pairs(), pairs).predict(dataset(pairs))
    assert ours.predictions.dtype == np.float32
    assert 1 < np.abs(ours.predictions).mean() < 3
    assert ours.metrics["test_ties"] == 0
    model.score.__class__ = torch.nn.Linear
    assert tiny_trainer(model, args, corner_pairs(), pairs).predict(dataset(pairs)).metrics["test_ties"] > 0.1

"""How good scores are and how far to trust them: metrics, intervals, the report, and the pictures of both.

The room alone knows what counts as right, how an interval heeds shared prompts, and how figures look on a page.
`evaluation`, which loads a model and scores with it, is not imported here, so that importing the room stays light.
"""

from reward_recipes.evaluate.markdown import (
    LONGER,
    UNKNOWN,
    decimals,
    page,
    percent,
    points,
    power,
    span,
    table,
    with_interval,
)
from reward_recipes.evaluate.metrics import compute_preference_metrics
from reward_recipes.evaluate.picture import AS_PERCENT, LEVEL, STYLE
from reward_recipes.evaluate.test_split import describe_test, score_table, write_test
from reward_recipes.evaluate.training_log import read_log, summarise
from reward_recipes.evaluate.training_picture import draw_training, plot_training
from reward_recipes.evaluate.uncertainty import bootstrap_interval, credit, pairwise_accuracy

"""How good scores are and how far to trust them: metrics, intervals, the report, and the pictures of both.

The room alone knows what counts as right, how an interval heeds shared prompts, and how figures look on a page.
`evaluation`, which scores with a model, and the modules that draw are not imported here: the room stays light.
"""

from reward_recipes.evaluate.markdown import (
    LONGER,
    UNKNOWN,
    decimals,
    page,
    percent,
    points,
    span,
    table,
    with_interval,
)
from reward_recipes.evaluate.test_split import describe_test, score_table, write_test
from reward_recipes.evaluate.training_log import draw_training, read_log, summarise
from reward_recipes.evaluate.uncertainty import (
    bootstrap_interval,
    compute_preference_metrics,
    credit,
    pairwise_accuracy,
)

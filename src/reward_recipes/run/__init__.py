"""What a run leaves behind and how it survives: its files, checkpoints, signals, options and errors.

The room alone knows what an output folder holds, which checkpoints count, and how a mistake is told in one line.
Of this package it imports `shipped` and `early` alone.
"""

from reward_recipes.run import output
from reward_recipes.run.arguments import option, parse_arguments, save_recipe
from reward_recipes.run.checkpoints import (
    WRITE_ERRORS,
    CheckpointKeeper,
    checkpoint_at,
    checkpoints,
    latest_valid,
    saved,
    step_of,
)
from reward_recipes.run.checks import (
    check_accelerator,
    check_hub_fields,
    check_model_init,
    check_processes,
    check_repo_id,
    check_source,
    fit_engine,
    fit_to_device,
    join_processes,
    keep_freed_memory,
    refuse_without_effect,
    repeated_pairs,
)
from reward_recipes.run.console import ROWS, Rows, quiet_libraries, quiet_trainer, use_console
from reward_recipes.run.errors import TOKEN, UserError, expect, first_line, run_cli, settings_that_fit, source_hint
from reward_recipes.run.files import CSVFile, read_mapping, replacing, save_json
from reward_recipes.run.finite import FiniteSteps, NotFinite, require_finite_scores, require_sound_weights
from reward_recipes.run.lineage import Lineage, made_from, numbers_of
from reward_recipes.run.output import report_write_errors
from reward_recipes.run.provenance import cost, made_with
from reward_recipes.run.stopping import Patience, StopOnSignal, keep_training_if_trackers_fail
from reward_recipes.run.window import LoggingWindow

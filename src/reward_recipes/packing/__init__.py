"""How pairs share rows, so that each prompt is computed once and nothing is padded.

The room alone knows the layout of a packed row, its attention mask, and for which models packing is exact.
"""

from reward_recipes.packing.attention import row_limit
from reward_recipes.packing.collators import EvalBatches, PackedCollator, PaddedCollator, training_collator
from reward_recipes.packing.layout import Group, by_length, pack_texts, pad_texts
from reward_recipes.packing.support import choose_packing, has_dropout, packing_difference, unsupported
from reward_recipes.packing.tap import ScoreTap

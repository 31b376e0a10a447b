"""What a preference pair becomes: read from its source, joined with its prompt, turned into token ids, counted.

The room alone knows which sources can be read, how prompt and reply are joined, where a text ends in EOS, which pairs
answer one prompt, and why a pair is dropped.
"""

from reward_recipes.pairs.audit import audit, format_audit
from reward_recipes.pairs.dialogue import (
    HH_REPLY,
    TEMPLATE_VALUES,
    Dialogue,
    Text,
    as_messages,
    join,
    last_reply,
    with_template_values,
)
from reward_recipes.pairs.encode import (
    Status,
    common_prefix_length,
    encode_splits,
    status_counts,
    subset_names,
    usable_pairs,
)
from reward_recipes.pairs.files import parse_json, without_nulls
from reward_recipes.pairs.prompts import KnownBy, hold_out
from reward_recipes.pairs.source import Pairs, SeveralAnswers, load_pairs, load_rows, read_columns, split_of
from reward_recipes.pairs.tokens import (
    as_turns,
    encode_prompt,
    encode_texts,
    load_recipe_tokenizer,
    load_tokenizer,
    save_tokenizer,
)

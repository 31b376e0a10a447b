"""What a preference pair becomes: read from its source, joined with its prompt, turned into token ids, counted.

The room alone knows which sources can be read, where a text ends in EOS, and why a pair is dropped.
"""

from reward_recipes.pairs.audit import audit, format_audit
from reward_recipes.pairs.encode import (
    HH_REPLY,
    Status,
    common_prefix_length,
    encode_pairs,
    join,
    split_by_prompt,
    status_counts,
    subset_names,
    usable_pairs,
)
from reward_recipes.pairs.json_rows import parse_json
from reward_recipes.pairs.source import BUILDERS, checked_pairs, column_kind, load_pairs, split_of
from reward_recipes.pairs.tokens import (
    NEW_PAD_TOKEN,
    Messages,
    encode_dialogues,
    encode_rendered,
    encode_texts,
    load_recipe_tokenizer,
    load_tokenizer,
    render,
)
